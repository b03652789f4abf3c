// The jobs of one batch, a page at a time, all or of one outcome.

import { Locked, Refused, Unreachable, ask } from "./client.js";
import { h } from "./dom.js";
import { badge, table } from "./parts.js";
import { poll } from "./poll.js";
import { ENDED, endedAt } from "./rates.js";
import { clock, count, duration } from "./words.js";

const PAGE = 25;
const EVERY_S = 3;
const FILTERS = ["all", "succeeded", "failed", "truncated", "empty", "waiting"];
const OUTCOMES = { succeeded: "good", truncated: "held", empty: "quiet", failed: "bad" };
const SOURCES = { engine: "engine", reused: "reused", exact: "exact cache", duplicate: "duplicate", semantic: "semantic cache", none: "–" };
const places = new Map(); // where each batch's list was left

/** The word for a job's outcome. */
export const outcomeOf = (job) => badge(job.outcome ?? "waiting", OUTCOMES[job.outcome] ?? "quiet");

/** The word for where a job's answer came from. */
export const sourceOf = (job) => SOURCES[job.source] ?? job.source;

/** The list: `draw(batch)` describes it, `filter(outcome)` chooses, `stop` ends it. */
export function jobsOf(id, batchNow, redraw) {
  const place = places.get(id) ?? { outcome: "all", trail: [] };
  places.set(id, place);
  let page = null;
  let problem = null;
  let wasRead = false; // since the batch ended: then it changes no more

  const reading = poll(async (signal) => {
    const batch = batchNow();
    if (page && wasRead) return;
    const isLast = Boolean(batch && ENDED.has(batch.status));
    await read(signal);
    wasRead = isLast;
  }, { every_s: EVERY_S });

  async function read(signal) {
    const { outcome, trail } = place;
    const query = new URLSearchParams({ limit: String(PAGE) });
    if (trail.length) query.set("after", String(trail.at(-1)));
    if (outcome !== "all") query.set("outcome", outcome);
    try {
      const found = await ask(`v1/stoker/batches/${encodeURIComponent(id)}/jobs?${query}`, { signal });
      if (outcome !== place.outcome || trail !== place.trail) return; // another page was chosen meanwhile
      page = found;
      problem = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      problem = error.message;
    }
    redraw();
  }

  async function turn(change) {
    Object.assign(place, change);
    wasRead = false;
    redraw();
    try {
      await read();
    } catch (error) {
      if (!(error instanceof Unreachable || error instanceof Locked)) throw error; // the next poll says so
    }
  }

  const filter = (outcome) => turn({ outcome, trail: [] });
  const next = () => turn({ trail: [...place.trail, page.next_after] });
  const back = () => turn({ trail: place.trail.slice(0, -1) });

  function draw(batch) {
    const counts = countsOf(batch);
    return [
      h("div", { class: "heading" }, h("h2", null, "Jobs"),
        h("div", { class: "filters", role: "group", "aria-label": "Jobs by outcome" }, FILTERS.map((one) => h("button", {
          key: one, type: "button", "aria-pressed": String(place.outcome === one), onclick: () => filter(one),
        }, one, " ", h("span", { class: "count" }, count(counts[one])))))),
      problem && h("p", { key: "problem", class: "notice", role: "alert" }, problem),
      page?.data.length > 0 && table("jobs", "Jobs", columns(id, batch), page.data, (one) => one.line),
      page && !page.data.length && h("p", { key: "none", class: "more" }, page.has_more ? "None in the lines looked at so far; go on to the next page." : nothing(batch, place)),
      h("div", { key: "pages", class: "pages" },
        h("button", { type: "button", disabled: !place.trail.length, onclick: back }, "Previous"),
        h("button", { type: "button", disabled: !page?.has_more, onclick: next }, "Next"),
        h("label", null, "After line ", h("input", {
          type: "number", min: 0, max: batch.stoker.jobs.total, inputmode: "numeric",
          onchange: (event) => turn({ trail: event.target.value ? [Number(event.target.value)] : [] }),
        }))),
    ];
  }

  return { draw, filter, stop: reading.stop };
}

function nothing(batch, place) {
  if (place.trail.length) return "No further jobs.";
  if (place.outcome !== "all") return `No job ${place.outcome === "waiting" ? "waits" : place.outcome === "empty" ? "has an empty answer" : `has ${place.outcome === "truncated" ? "been truncated" : place.outcome}`}.`;
  return batch.status === "validating" ? "Its file is being read; the jobs come then." : "It has no jobs.";
}

const codeOf = (job) => job.error_code ?? (job.status_code >= 400 ? `http_${job.status_code}` : null);

function countsOf({ stoker: { jobs } }) {
  return { ...jobs, all: jobs.total, waiting: jobs.total - jobs.done };
}

function columns(id, batch) {
  const ended = endedAt(batch) ?? undefined;
  return [
    { name: "line", label: "Line", number: true, cell: (one) => count(one.line) },
    { name: "custom", label: "custom_id", cell: (one) => h("a", { class: "mono", title: one.custom_id, href: `#/batches/${encodeURIComponent(id)}/jobs/${one.line}` }, one.custom_id) },
    { name: "outcome", label: "Outcome", cell: (one) => [outcomeOf(one), codeOf(one) && h("span", { key: "code", class: "under mono" }, codeOf(one))] },
    { name: "source", label: "From", cell: (one) => (one.outcome ? sourceOf(one) : "") },
    { name: "in", label: "Tokens in", number: true, cell: (one) => (one.outcome ? count(one.prompt_tokens) : "") },
    { name: "out", label: "Tokens out", number: true, cell: (one) => (one.outcome ? count(one.completion_tokens) : "") },
    { name: "took", label: "Took", number: true, cell: (one) => (one.duration_ms ? duration(one.duration_ms / 1000) : "") },
    { name: "ended", label: "Ended", number: true, cell: (one) => (one.ended_at ? clock(one.ended_at, ended) : "") },
  ];
}
