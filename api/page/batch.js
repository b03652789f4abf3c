// One batch: its figures, how it went over time, what went wrong, its files and its jobs.

import { buttons } from "./actions.js";
import { Refused, ask, now } from "./client.js";
import { budgetTable } from "./budgets.js";
import { h, render } from "./dom.js";
import { downloads } from "./download.js";
import { jobsOf } from "./jobs.js";
import { chart, facts, figure, legend, progress, shareOf, sorry, state, table } from "./parts.js";
import { poll } from "./poll.js";
import { ENDED, endedAt, observe, rateNow, rateOnAverage, secondsLeft } from "./rates.js";
import { deliveryTable } from "./webhooks.js";
import { brief, clock, count, counted, duration, percent, rate } from "./words.js";

const EVERY_S = 2;
const ENDED_EVERY_S = 15; // its webhooks may still be on their way
const WORDS = { created: "created", in_progress: "in progress", cancelling: "cancelling", finalizing: "finalizing", ended: "ended" };

/** Open the view of batch `id`; returns how to close it. */
export function open(root, [id], session) {
  let seen = null;
  let refused = null;
  let beat = 0;
  const tooLarge = new Set();
  const path = encodeURIComponent(id);

  const figures = poll(async (signal) => {
    beat += 1;
    if (seen && ENDED.has(seen.batch.status) && beat % Math.round(ENDED_EVERY_S / EVERY_S)) return;
    try {
      seen = await ask(`v1/stoker/batches/${path}`, { signal });
      refused = null;
      observe(seen.batch);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error.message;
    }
    draw();
  }, { every_s: EVERY_S });
  const jobs = jobsOf(id, () => seen?.batch, () => draw());

  function changed(batch, name) {
    if (batch && name === "retry") location.hash = `#/batches/${encodeURIComponent(batch.id)}`;
    else if (batch && seen) seen = { ...seen, batch };
    beat = -1;
    draw();
    figures.now();
  }

  function draw() {
    const crumbs = h("p", { key: "crumbs", class: "crumbs" }, h("a", { href: "#/batches" }, "Batches"), " / ", h("span", { class: "mono" }, id));
    if (refused) render(root, crumbs, sorry("This batch cannot be shown", refused));
    else if (!seen) render(root, crumbs);
    else {
      render(root, crumbs, heading(seen.batch, session, changed), h("div", { key: "figures", class: "figures" }, numbers(seen.batch)),
        seen.batch.stoker.jobs.total > 0 && h("section", { key: "progress" }, progress(seen.batch), legend(seen.batch)),
        problems(seen), course(seen), errors(seen, jobs),
        h("div", { key: "rest", class: "columns" }, files(seen.batch, tooLarge, draw), settings(seen)),
        aside(seen), h("section", { key: "jobs" }, jobs.draw(seen.batch)));
    }
  }

  return { close: () => { figures.stop(); jobs.stop(); } };
}

const heading = (batch, session, changed) => h("div", { key: "heading", class: "heading" },
  h("h1", { tabindex: -1 }, batch.stoker.name), state(batch), buttons(batch, session, changed));

function numbers(batch) {
  const { jobs, tokens, budget_tokens: budget } = batch.stoker;
  const pace = rateNow(batch);
  const ended = endedAt(batch);
  const left = secondsLeft(batch);
  const used = tokens.prompt + tokens.completion;
  return [
    figure("Jobs", count(jobs.done), jobs.total ? `of ${count(jobs.total)}, ${shareOf(jobs.done, jobs.total)}` : ""),
    figure("Failed", count(jobs.failed), jobs.done ? `${percent(jobs.failed / jobs.done)} of those done` : ""),
    ended
      ? figure("Took", duration(ended - batch.created_at), `ended ${clock(ended)}`)
      : figure("Time left", left === null ? "–" : duration(left), left === null ? "not known yet" : `about ${clock(now() + left)}`),
    figure(ended ? "Rate" : "Rate now", rate(ended ? rateOnAverage(batch) : pace?.jobs), ended ? "jobs, on average" : `on average ${rate(rateOnAverage(batch))}`),
    figure("From the cache", jobs.done ? shareOf(jobs.served, jobs.done) : "–", `${brief(tokens.saved)} tokens saved`),
    figure("Tokens in", brief(tokens.prompt), tokens.cached ? `${shareOf(tokens.cached, tokens.prompt)} in the engine's prefix cache` : ""),
    figure("Tokens out", brief(tokens.completion), pace && !ended ? `${rate(pace.tokens)} now` : tokens.reasoning ? `${brief(tokens.reasoning)} of them reasoning` : ""),
    budget && figure("Budget", shareOf(used, budget), `${brief(used)} of ${counted(budget, "token")}`),
  ];
}

/** Why it stands still, or never began. */
function problems({ batch, waiting }) {
  const told = [];
  if (batch.stoker.paused_reason) told.push(h("p", { key: "paused" }, h("b", null, "Paused. "), batch.stoker.paused_reason));
  if (waiting?.jobs) {
    told.push(h("p", { key: "waiting" }, h("b", null, `${counted(waiting.jobs, "job")} ${waiting.jobs === 1 ? "waits" : "wait"} for another try`),
      `, after up to ${counted(waiting.tries, "try").replace(/trys$/, "tries")}; the next ${waiting.next_in_s > 0 ? `in ${duration(waiting.next_in_s)}` : "now"}. Last error: `, h("span", { class: "mono" }, waiting.last_error)));
  }
  const refusals = batch.errors?.data ?? [];
  if (refusals.length) {
    told.push(h("div", { key: "refusals" }, h("p", null, h("b", null, "Its file was refused.")),
      table("refusals", "What is wrong with the file", [
        { name: "line", label: "Line", number: true, cell: (one) => (one.line === null ? "–" : count(one.line)) },
        { name: "code", label: "Code", cell: (one) => h("span", { class: "mono" }, one.code) },
        { name: "message", label: "What is wrong", cell: (one) => `${one.message}${one.param ? ` (${one.param})` : ""}` },
      ], refusals, (one) => `${one.line} ${one.code} ${one.param}`)));
  }
  return told.length > 0 && h("section", { key: "problems", class: `notice ${refusals.length ? "bad" : ""}` }, told);
}

function course({ batch, marks, finished }) {
  return h("section", { key: "course", class: "course" },
    h("h2", null, "Timeline"),
    h("ol", { class: "timeline" }, marks.map((mark, place) => h("li", { key: mark.name, class: mark.name === "ended" ? batch.status : mark.name },
      h("b", null, mark.name === "ended" ? batch.status : (WORDS[mark.name] ?? mark.name)),
      h("span", null, clock(mark.at)),
      h("span", { class: "more" }, place ? `after ${duration(Math.max(0, mark.at - marks[place - 1].at))}` : "")))),
    finished.length > 0 ? chart(finished) : batch.stoker.jobs.total > 200_000 && h("p", { class: "more" }, "No chart of results over time: the batch has more than 200,000 jobs."));
}

function errors({ errors: kinds, errors_complete: areAll }, jobs) {
  return kinds.length > 0 && h("section", { key: "errors" }, h("h2", null, "Errors by kind"),
    table("errors", "Errors by kind", [
      { name: "count", label: "Jobs", number: true, cell: (one) => h("button", { type: "button", class: "link", onclick: () => jobs.filter("failed"), title: "show the failed jobs" }, count(one.count)) },
      { name: "code", label: "Kind", cell: (one) => h("span", { class: "mono" }, one.code) },
      { name: "message", label: "One of them", cell: (one) => h("span", { class: "clamp", title: one.message }, one.message ?? "") },
    ], kinds, (one) => one.code),
    !areAll && h("p", { key: "some", class: "more" }, "The batch is large: only some of its failed jobs are counted here."));
}

function files(batch, tooLarge, draw) {
  const { done, failed } = batch.stoker.jobs;
  const base = batch.stoker.name.replace(/\.jsonl$/, "");
  const part = ENDED.has(batch.status) ? "" : ", as far as they are";
  const listed = [
    done > failed && { id: batch.stoker.output_file_id, label: `Results${part}`, name: `${base}.out.jsonl` },
    failed > 0 && { id: batch.stoker.error_file_id, label: `Failed jobs${part}`, name: `${base}.errors.jsonl` },
    { id: batch.input_file_id, label: "The input file", name: `${base}.jsonl` },
  ];
  return h("section", { key: "files" }, h("h2", null, "Files"), downloads(listed.filter(Boolean), tooLarge, draw));
}

function settings({ batch, engines }) {
  const { stoker } = batch;
  const link = (id) => h("a", { class: "mono", href: `#/batches/${encodeURIComponent(id)}` }, id);
  return h("section", { key: "settings" }, h("h2", null, "Settings"), facts([
    ["Endpoint", batch.endpoint],
    ["Model", batch.model],
    ["Window", `${windowWords(batch.completion_window)}${batch.expires_at ? `, until ${clock(batch.expires_at)}` : ""}`],
    ["Priority", `${stoker.priority}, weight ${stoker.weight}`],
    ["Cache", stoker.cache],
    ["Order of jobs", stoker.order],
    ["Bad lines left out", stoker.skipped ? count(stoker.skipped) : null],
    ["Retries", stoker.retry_of && link(stoker.retry_of)],
    ["Labels", words(stoker.labels)],
    ["Metadata", words(batch.metadata)],
    ["Webhook", stoker.webhook],
    ...engines.map((one, place) => [engines.length > 1 ? `Engine ${place + 1}` : "Engine", engineWords(one)]),
  ]));
}

const windowWords = (text) => (/^\d+s$/.test(text) ? duration(Number.parseInt(text, 10)) : text);

const words = (pairs) => Object.entries(pairs ?? {}).map(([name, value]) => `${name}: ${value}`).join(", ") || null;

const engineWords = (one) => [one.alias, one.version ?? one.kind, one.quantization, one.checkpoint, one.flags]
  .filter((part) => typeof part === "string" && part).map((part) => h("span", { class: "part" }, part));

function aside({ budgets, deliveries }) {
  return [
    budgets.length > 0 && h("section", { key: "budgets" }, h("h2", null, "Budgets"), budgetTable(budgets)),
    deliveries.length > 0 && h("section", { key: "deliveries" }, h("h2", null, "Webhooks"), deliveryTable(deliveries)),
  ];
}
