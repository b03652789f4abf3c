// What the semantic cache may serve, and how wrong it is at most.

import { h } from "./dom.js";
import { openListing } from "./listing.js";
import { badge, empty, facts, meter } from "./parts.js";
import { brief, count, counted, duration, percent } from "./words.js";

const EVERY_S = 5;
const STATES = {
  pilot: ["pilot", "quiet", "It learns: the engine answers everything, nothing is served yet."],
  shadow: ["shadow", "quiet", "It decides what it would serve, and the engine answers all the same."],
  serving: ["serving", "good", "Both bounds hold: answers are served, and a share of them audited by the engine."],
  suspended: ["suspended", "bad", "A bound no longer holds: nothing is served until it does again."],
};

/** Open the view in an element; returns how to close it. */
export function open(root) {
  return openListing(root, {
    title: "Cache",
    path: "v1/stoker/namespaces",
    every_s: EVERY_S,
    refusal: "The cache cannot be shown",
    content: ({ data, note }) => content(data, note),
  });
}

function content(spaces, note) {
  if (!spaces.length) {
    return empty("No namespace yet", "The exact cache works by itself. Answers to requests that only mean the same are served once a batch asks for it, and only while their certificate holds.",
      "stoker submit prompts.jsonl --cache semantic");
  }
  return [
    h("p", { key: "lead", class: "lead" }, "A namespace holds the answers to one template by one checkpoint. Each has a certificate: the most of its lookups that were answered otherwise than the engine would have, with 95% confidence at all moments at once."),
    note && h("p", { key: "note", class: "notice" }, note),
    h("div", { key: "spaces", class: "spaces" }, spaces.map((one) => card(one))),
  ];
}

function card(one) {
  const [word, kind, meaning] = STATES[one.state] ?? ["not known", "quiet", "Its certificate could not be read."];
  return h("article", { key: one.namespace, class: "space", "aria-label": `namespace ${one.namespace}` },
    h("div", { class: "heading" }, h("h2", null, `Namespace ${one.namespace}`), badge(word, kind)),
    h("p", { class: "template mono", title: one.template }, one.template || "without a template"),
    h("p", { class: "more" }, meaning),
    bound(one),
    facts([
      ["Model", one.model],
      ["Served", `${count(one.hits)} of ${counted(one.lookups, "lookup")}, ${percent(one.share)}`],
      ["Saved", `${brief(one.tokens_saved)} tokens`],
      ["Audited", `${counted(one.audits, "answer")}, at ${brief(one.audit_tokens)} tokens`],
      ["Answers kept", `${count(one.entries)}${one.ttl_s ? `, each for ${duration(one.ttl_s)}` : ""}`],
    ]),
    (one.sentence || one.why?.length > 0) && h("details", { key: "sentence" }, h("summary", null, "What the certificate says"),
      one.sentence && h("p", { key: "said" }, one.sentence), (one.why ?? []).map((reason, place) => h("p", { key: `why ${place}` }, reason))));
}

function bound(one) {
  if (!one.hits) return h("p", { key: "bound" }, one.lookups ? `None of ${counted(one.lookups, "lookup")} was served from the cache, so none was wrong.` : "Nothing was looked up yet.");
  const limit = one.error_limit;
  if (one.error_bound === null || !limit) return null;
  const most = Math.ceil(one.error_bound * 10_000) / 100; // a bound is rounded up
  return h("div", { key: "bound", class: "bound" },
    h("p", null, "At most ", h("b", null, `${most.toFixed(2)}%`), ` of its lookups were answered wrongly; the limit is ${percent(limit, 0)}.`),
    meter("the bound, of its limit", one.error_bound / limit, `${Math.ceil((one.error_bound / limit) * 100)}% of the limit`, { kind: one.error_bound > limit ? "hot" : "" }));
}
