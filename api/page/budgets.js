// Budgets of tokens and of money: what is spent, what is reserved for jobs that run, and the cap.

import { h } from "./dom.js";
import { openListing } from "./listing.js";
import { empty, meter, table } from "./parts.js";
import { brief, clock, count, money, percent, shortId } from "./words.js";

const EVERY_S = 3;

/** Open the view in an element; returns how to close it. */
export function open(root) {
  return openListing(root, {
    title: "Budgets",
    path: "v1/stoker/budgets",
    every_s: EVERY_S,
    refusal: "Budgets cannot be shown",
    content: ({ data }) => content(data),
  });
}

function content(budgets) {
  if (!budgets.length) {
    return empty("No budget holds now", "No living key has one, and no batch that runs. A key can have a budget for a day or a month, a batch one of its own; what is beyond ends as budget_exceeded.",
      "stoker keys create --name nightly --tokens-per-day 20000000");
  }
  return [
    h("p", { key: "lead", class: "lead" }, "Spent is what results took, and of money what endpoints billed; reserved is the most that running jobs may still take. Together they never exceed the cap. Days and months are UTC's."),
    budgetTable(budgets),
  ];
}

/** A table of budgets. */
export function budgetTable(budgets) {
  return table("budgets", "Budgets", [
    { name: "owner", label: "Of", cell: owner },
    { name: "period", label: "Period", cell: (one) => [`${one.period === "batch" ? "the whole batch" : `this ${one.period}`}`, h("span", { class: "under" }, `since ${clock(one.began_at)}`)] },
    { name: "use", label: "Use", cell: (one) => meter(`budget of ${one.key_name ?? one.batch}`, one.spent / one.cap, words(one), { more: one.reserved / one.cap, kind: (one.spent + one.reserved) / one.cap > 0.9 ? "hot" : "" }) },
    { name: "spent", label: "Spent", number: true, cell: (one) => amount(one.spent, one.unit) },
    { name: "reserved", label: "Reserved", number: true, cell: (one) => amount(one.reserved, one.unit) },
    { name: "cap", label: "Cap", number: true, cell: (one) => amount(one.cap, one.unit) },
  ], budgets, (one) => `${one.key} ${one.batch} ${one.period} ${one.began_at} ${one.unit}`);
}

const amount = (value, unit) =>
  unit === "tokens" ? h("span", { title: `${count(value)} tokens` }, brief(value)) : h("span", { title: `${value} ${unit}` }, money(value, unit));
const words = (one) => `${percent(one.spent / one.cap, 0)} spent${one.reserved ? `, ${percent(one.reserved / one.cap, 0)} reserved` : ""}`;

function owner(one) {
  if (one.batch) return h("a", { class: "mono", href: `#/batches/${encodeURIComponent(one.batch)}`, title: one.batch }, shortId(one.batch));
  return [h("b", { class: "name", title: one.key_name }, one.key_name), h("span", { class: "under mono" }, one.key)];
}
