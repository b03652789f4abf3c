// Files to take home: through the page while they are small, else by a command that needs no browser's memory.

import { Locked, address, ask, send } from "./client.js";
import { h } from "./dom.js";
import { tell } from "./news.js";
import { command } from "./parts.js";
import { bytes } from "./words.js";

const MOST_BYTES = 200 * 1000 * 1000;
const LATER_MS = 60_000;

/** A list of files; each of `files` is {id, label, name}. `tooLarge` is a Set that remembers which were, `draw` draws again. */
export function downloads(files, tooLarge, draw) {
  return h("ul", { class: "downloads" }, files.map((one) => h("li", { key: one.id },
    h("button", { type: "button", title: one.id, onclick: (event) => fetched(one, event.currentTarget, tooLarge, draw) }, one.label),
    tooLarge.has(one.id) && h("div", { key: "by-hand" },
      h("p", null, `More than ${bytes(MOST_BYTES)}: too much for a browser's memory. This takes it in a stream:`), command(byHand(one))))));
}

// The name was chosen by whoever uploaded the file, and the line goes into a shell.
const safe = (name) => name.replace(/^.*[/\\]/, "").replace(/[^A-Za-z0-9._-]/g, "_").replace(/^[-.]+/, "_") || "file.jsonl";

const path = (file) => `v1/files/${encodeURIComponent(file.id)}/content`;
const byHand = (file) => `curl -f ${address(path(file))} -H "Authorization: Bearer $STOKER_KEY" -o ${safe(file.name)}`;

async function fetched(file, button, tooLarge, draw) {
  button.disabled = true;
  try {
    const { bytes: size } = await ask(`v1/files/${encodeURIComponent(file.id)}`);
    const content = size > MOST_BYTES ? null : await read(await send(path(file), { timeout_ms: 0 }));
    if (content === null) {
      tooLarge.add(file.id);
      draw();
    } else save(content, safe(file.name));
  } catch (error) {
    if (!(error instanceof Locked)) tell(`${file.label}: ${error.message}`, "bad");
  } finally {
    button.disabled = false;
  }
}

/** The content, or null once it proves too large: a file that still grows does not say its size. */
async function read(response) {
  const chunks = [];
  let size = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(chunks, { type: "application/octet-stream" });
    size += value.length;
    if (size > MOST_BYTES) {
      await reader.cancel();
      return null;
    }
    chunks.push(value);
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), LATER_MS);
}
