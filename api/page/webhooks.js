// Webhooks that tell of batches' ends, and what became of each.

import { h } from "./dom.js";
import { openListing } from "./listing.js";
import { badge, empty, table } from "./parts.js";
import { clock, count, shortId } from "./words.js";

const EVERY_S = 3;
const KINDS = { pending: "live", delivered: "good", failed: "bad" };

/** Open the view in an element; returns how to close it. */
export function open(root) {
  return openListing(root, {
    title: "Webhooks",
    path: "v1/stoker/deliveries",
    every_s: EVERY_S,
    refusal: "Webhooks cannot be shown",
    content: ({ data }) => content(data),
  });
}

function content(deliveries) {
  if (!deliveries.length) {
    return empty("No webhook yet", "A batch that names an address tells it of its end, signed and with retries. Put this beside endpoint and completion_window when you make the batch:",
      '"stoker": {"webhook": {"url": "https://example.org/stoker"}}');
  }
  return deliveryTable(deliveries);
}

/** A table of deliveries. Addresses are strangers' texts, so they are no links. */
export function deliveryTable(deliveries) {
  return table("deliveries", "Webhooks", [
    { name: "state", label: "State", cell: (one) => badge(one.state, KINDS[one.state] ?? "quiet") },
    { name: "url", label: "To", cell: (one) => [h("span", { class: "mono clamp", title: one.url }, one.url), one.error && h("span", { key: "error", class: "why" }, one.error)] },
    { name: "event", label: "Event", cell: (one) => [h("span", { class: "mono" }, one.event), h("a", { class: "under mono", href: `#/batches/${encodeURIComponent(one.batch)}` }, shortId(one.batch))] },
    { name: "tries", label: "Tries", number: true, cell: (one) => count(one.tries) },
    { name: "status", label: "Answer", number: true, cell: (one) => one.status_code ?? "–" },
    { name: "when", label: "When", number: true, cell: (one) => [h("span", null, clock(one.ended_at ?? one.created_at)), !one.ended_at && one.next_at && h("span", { key: "next", class: "under" }, `next ${clock(one.next_at)}`)] },
  ], deliveries, (one) => one.id);
}
