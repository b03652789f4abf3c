// A question before something that cannot be taken back.

import { h, render } from "./dom.js";

/** Ask; true if the user wants it. Escape and "Keep" are no. */
export function confirmed({ title, text, action, keep = "Go back", kind = "" }) {
  const dialog = document.createElement("dialog");
  const before = document.activeElement;
  return new Promise((resolve) => {
    render(dialog,
      h("h2", { id: "question" }, title),
      h("p", null, text),
      h("div", { class: "actions" },
        h("button", { type: "button", class: "keep", onclick: () => dialog.close("no") }, keep),
        h("button", { type: "button", class: `do ${kind}`, onclick: () => dialog.close("yes") }, action)));
    dialog.setAttribute("aria-labelledby", "question");
    dialog.addEventListener("close", () => {
      dialog.remove();
      before?.focus?.();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
