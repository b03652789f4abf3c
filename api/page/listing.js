// A view of one list that is read again and again: its title, what is there, or why it cannot be shown.

import { Refused, ask } from "./client.js";
import { h, render } from "./dom.js";
import { sorry } from "./parts.js";
import { poll } from "./poll.js";

/** Open it in an element; `content` is given the answer of `path`, asked for every `every_s` seconds. Returns how to close it. */
export function openListing(root, { title, path, every_s, refusal, content }) {
  let answer = null;
  let refused = null;
  const reading = poll(async (signal) => {
    try {
      answer = await ask(path, { signal });
      refused = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error.message;
    }
    render(root, h("h1", { key: "title", tabindex: -1 }, title), refused ? sorry(refusal, refused) : answer && content(answer));
  }, { every_s });
  return { close: reading.stop };
}
