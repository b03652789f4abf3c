// What several views are made of: tables, states, bars, meters, charts, commands to copy.

import { h } from "./dom.js";
import { clock, count, counted, duration, percent } from "./words.js";

const STATES = {
  validating: ["validating", "live"],
  in_progress: ["in progress", "live"],
  cancelling: ["cancelling", "ending"],
  finalizing: ["finalizing", "live"],
  completed: ["completed", "good"],
  failed: ["failed", "bad"],
  expired: ["expired", "bad"],
  cancelled: ["cancelled", "quiet"],
};
const SEGMENTS = [
  ["served", "from the cache"],
  ["answered", "answered by an engine"],
  ["truncated", "truncated"],
  ["empty", "empty"],
  ["failed", "failed"],
];

/** A table that becomes a list of cards on a phone. Columns: {name, label, number, cell(item)}; `key` tells rows apart. */
export function table(name, label, columns, items, key) {
  return h("table", { class: `grid ${name}`, role: "table", "aria-label": label },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" },
      columns.map((one) => h("th", { key: one.name, role: "columnheader", scope: "col", class: cellClass(one) }, one.label)))),
    h("tbody", { role: "rowgroup" }, items.map((item) =>
      h("tr", { key: key(item), role: "row" }, columns.map((one) =>
        h("td", { key: one.name, role: "cell", class: cellClass(one), "data-label": one.label }, one.cell(item)))))));
}

const cellClass = (column) => `c-${column.name}${column.number ? " number" : ""}`;

/** A batch's state as a word with a mark. */
export function state(batch) {
  const paused = batch.status === "in_progress" && batch.stoker.paused_reason;
  const [word, kind] = paused ? ["paused", "held"] : (STATES[batch.status] ?? [batch.status, "quiet"]);
  return badge(word, kind);
}

export const badge = (word, kind) => h("span", { class: `state ${kind}` }, word);

/** How many jobs ended in each way; those from the cache are taken out of the succeeded. */
export function shares(jobs) {
  const served = Math.min(jobs.served, jobs.succeeded);
  return { ...jobs, served, answered: jobs.succeeded - served };
}

/** A batch's progress, in one segment for each way to end. */
export function progress(batch) {
  const { total } = batch.stoker.jobs;
  const parts = shares(batch.stoker.jobs);
  const said = SEGMENTS.filter(([name]) => parts[name]).map(([name, word]) => `${count(parts[name])} ${word}`);
  const words = `${count(parts.done)} of ${counted(total, "job")} done${said.length ? `: ${said.join(", ")}` : ""}`;
  return h("div", {
    class: "bar", role: "progressbar", title: words, "aria-label": "progress", "aria-valuetext": words,
    "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": total ? Math.floor((parts.done / total) * 100) : 0,
  }, SEGMENTS.map(([name]) => h("i", {
    // One job in a million is still to be seen.
    key: name, class: name, hidden: !parts[name], style: { "flex-grow": String((parts[name] ?? 0) / (total || 1)) },
  })), h("i", { key: "rest", class: "rest", style: { "flex-grow": String(Math.max(0, 1 - parts.done / (total || 1))) } }));
}

/** What the colours of the bar stand for, with their counts. */
export function legend(batch) {
  const parts = shares(batch.stoker.jobs);
  return h("ul", { class: "legend" }, SEGMENTS.map(([name, word]) =>
    h("li", { key: name, class: parts[name] ? "" : "none" }, h("i", { class: name }), h("b", null, count(parts[name] ?? 0)), ` ${word}`)));
}

/** A share of 0 to 1 as a bar with its words. `parts`: further shares behind it. */
export function meter(label, share, words, { kind = "", more = 0 } = {}) {
  const within = Math.max(0, Math.min(1, share));
  return h("div", { class: "measure" },
    h("div", {
      class: `meter ${kind}`, role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
      "aria-valuenow": Math.round(within * 100), "aria-valuetext": words,
    }, h("i", { style: { width: `${within * 100}%` } }),
    h("i", { class: "more", hidden: !more, style: { width: `${Math.max(0, Math.min(1 - within, more)) * 100}%` } })),
    h("span", { class: "words" }, words));
}

/** A line of the last values; its words say the last one. */
export function sparkline(values, words) {
  const most = Math.max(...values, 1e-9);
  const step = 100 / Math.max(1, values.length - 1);
  const points = values.map((value, place) => `${(place * step).toFixed(1)},${(23 - (value / most) * 21).toFixed(1)}`);
  return h("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": words },
    values.length > 1 && h("polygon", { class: "under", points: `0,24 ${points.join(" ")} 100,24` }),
    values.length > 1 && h("polyline", { class: "line", points: points.join(" ") }));
}

/** Results over time, failures on top of the rest. Buckets: {at, jobs, failed}, `at` being where each ends. */
export function chart(buckets) {
  const most = Math.max(...buckets.map((one) => one.jobs), 1);
  const all = buckets.reduce((sum, one) => sum + one.jobs, 0);
  const failed = buckets.reduce((sum, one) => sum + one.failed, 0);
  const width = buckets.length > 1 ? (buckets.at(-1).at - buckets[0].at) / (buckets.length - 1) : 0;
  const [first, last] = [buckets[0].at - width, buckets.at(-1).at];
  const each = 600 / buckets.length;
  return h("figure", { class: "chart" },
    h("figcaption", null, `Results over time${width >= 0.1 ? `, each bar ${duration(width)}` : ""}; at most ${count(most)} in one`),
    h("svg", {
      viewBox: "0 0 600 90", preserveAspectRatio: "none", role: "img",
      "aria-label": `${counted(all, "result")} from ${clock(first)} to ${clock(last)}, ${count(failed)} of them failed`,
    }, buckets.map((one, place) => {
      const [tall, low] = [(one.jobs / most) * 88, (one.failed / most) * 88];
      const [x, wide] = [(place * each + each * 0.1).toFixed(2), Math.min(24, each * 0.8).toFixed(2)];
      return h("g", { key: place },
        h("title", null, `to ${clock(one.at)}: ${counted(one.jobs, "result")}, ${count(one.failed)} failed`),
        h("rect", { class: "good", x, width: wide, y: 90 - tall + low, height: tall - low }),
        h("rect", { class: "bad", x, width: wide, y: 90 - tall, height: low }));
    })),
    h("div", { class: "axis" }, h("span", null, clock(first)), h("span", null, clock(last))));
}

/** A command line with a button that copies it. */
export function command(text) {
  const copy = async (event) => {
    const button = event.currentTarget;
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch {
      getSelection().selectAllChildren(code); // no clipboard without TLS: Ctrl-C does it
    }
  };
  return h("div", { class: "command" }, h("code", { tabindex: 0 }, text), h("button", { type: "button", onclick: copy }, "Copy"));
}

/** What to say, and to do, where there is nothing yet. */
export function empty(title, why, ...commands) {
  return h("section", { class: "empty" }, h("h2", null, title), h("p", null, why), commands.map((one) => command(one)));
}

/** The view cannot be shown, and why. */
export const sorry = (title, why) => h("section", { class: "empty", role: "alert" }, h("h2", null, title), h("p", null, why));

/** A list of names and values. */
export const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
  .map(([name, value]) => h("div", { key: name }, h("dt", null, name), h("dd", null, value))));

/** A figure with its name. */
export const figure = (name, value, more) => h("div", { key: name, class: "figure" },
  h("span", { class: "name" }, name), h("span", { class: "value" }, value), h("span", { class: "more" }, more ?? ""));

export const shareOf = (part, whole) => (whole ? percent(part / whole) : percent(null));
