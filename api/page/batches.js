// All batches of the tenant, the newest first, as they go.

import { buttons } from "./actions.js";
import { Refused, address, ask, now } from "./client.js";
import { h, render } from "./dom.js";
import { murmur, tell } from "./news.js";
import { empty, figure, meter, progress, shareOf, sorry, state, table } from "./parts.js";
import { poll } from "./poll.js";
import { ENDED, endedAt, observe, rateNow, rateOnAverage, secondsLeft } from "./rates.js";
import { ago, brief, clock, count, counted, duration, percent, rate, shortId } from "./words.js";

const PAGE = 20;
const EVERY_S = 1.5;
const WORKERS_EVERY_S = 5; // workers announce themselves no oftener
const known = new Map(); // kept while other views are open: coming back shows them at once
const cursors = []; // the last batch of each older page that was opened
let more = false;
let loaded = false;

/** Open the view in an element; returns how to close it. */
export function open(root, _parts, session) {
  let refused = null;
  let engines = null;

  const view = { root, session, changed, older, draw };
  const batches = poll(async (signal) => {
    try {
      await look(signal);
      refused = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error.message;
    }
    draw();
  }, { every_s: EVERY_S });
  const workers = session.may("admin") && poll(async (signal) => {
    try {
      engines = (await ask("v1/stoker/workers", { signal })).data;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
    }
    draw();
  }, { every_s: WORKERS_EVERY_S });

  function changed(batch, name) {
    if (batch) keep([batch]);
    if (batch && name === "retry") location.hash = `#/batches/${encodeURIComponent(batch.id)}`;
    draw();
    batches.now();
  }

  function older() {
    const shown = inOrder();
    cursors.push(shown.at(-1).id);
    batches.now();
  }

  function draw() {
    const shown = inOrder();
    render(root, h("h1", { key: "title", tabindex: -1 }, "Batches"),
      refused ? sorry("These batches cannot be shown", refused) : loaded && content(view, shown, engines));
  }

  if (loaded) draw();
  return { close: () => { batches.stop(); if (workers) workers.stop(); } };
}

/** Read the newest page, and of the older ones those where something may have changed. */
async function look(signal) {
  const page = await ask(`v1/batches?limit=${PAGE}`, { signal });
  const fresh = page.data;
  const before = inOrder();
  if (before.length && fresh.length && page.has_more && !fresh.some((one) => known.has(one.id))) {
    known.clear(); // more than a page is new: what lies between is not known
    cursors.length = 0;
  }
  const last = fresh.at(-1);
  for (const one of before) {
    const isCovered = !last || !page.has_more || newestFirst(one, last) <= 0;
    if (isCovered && !fresh.some((other) => other.id === one.id)) known.delete(one.id); // past its retention
  }
  keep(fresh);
  if (!cursors.length) more = page.has_more;
  for (const cursor of [...cursors]) await lookBehind(cursor, signal);
  loaded = true;
}

async function lookBehind(cursor, signal) {
  const place = inOrder().findIndex((one) => one.id === cursor);
  const behind = place < 0 ? [] : inOrder().slice(place + 1, place + 1 + PAGE);
  if (behind.length && behind.every((one) => ENDED.has(one.status))) return;
  try {
    const page = await ask(`v1/batches?limit=${PAGE}&after=${encodeURIComponent(cursor)}`, { signal });
    keep(page.data);
    if (cursor === cursors.at(-1)) more = page.has_more;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    cursors.splice(cursors.indexOf(cursor), 1); // it has gone meanwhile
  }
}

function keep(batches) {
  for (const one of batches) {
    const before = known.get(one.id);
    if (before && !ENDED.has(before.status) && ENDED.has(one.status)) {
      const { failed } = one.stoker.jobs;
      tell(`${one.stoker.name} is ${one.status}${failed ? `, ${counted(failed, "job")} failed` : ""}.`, failed ? "bad" : "");
    } else if (before && before.stoker.paused_reason === null && one.stoker.paused_reason) {
      tell(`${one.stoker.name} is paused: ${one.stoker.paused_reason}`, "bad");
    } else if (!before && loaded && !ENDED.has(one.status)) {
      murmur(`${one.stoker.name} is new.`);
    }
    known.set(one.id, one);
    observe(one);
  }
}

const newestFirst = (a, b) => b.created_at - a.created_at || (a.id < b.id ? 1 : a.id > b.id ? -1 : 0);
const inOrder = () => [...known.values()].sort(newestFirst);

function content(view, shown, engines) {
  if (!shown.length) {
    return empty("No batch yet", "Upload a file with one request a line, then make a batch of it; or let the command line do both on this machine.",
      `curl ${address("v1/files")} -H "Authorization: Bearer $STOKER_KEY" -F purpose=batch -F file=@prompts.jsonl`,
      `curl ${address("v1/batches")} -H "Authorization: Bearer $STOKER_KEY" -H "Content-Type: application/json" -d '{"input_file_id": "file-…", "endpoint": "/v1/chat/completions", "completion_window": "24h"}'`,
      "stoker submit prompts.jsonl");
  }
  return [
    h("div", { key: "figures", class: "figures" }, overview(shown, engines)),
    table("batches", "Batches", columns(view), shown, (one) => one.id),
    more && h("button", { key: "older", type: "button", class: "older", onclick: view.older }, "Show older batches"),
  ];
}

function overview(shown, engines) {
  const live = shown.filter((one) => !ENDED.has(one.status));
  const left = live.reduce((sum, one) => sum + one.stoker.jobs.total - one.stoker.jobs.done, 0);
  const rates = live.map((one) => rateNow(one)).filter(Boolean);
  const paused = live.filter((one) => one.stoker.paused_reason).length;
  const healthy = engines?.filter((one) => one.healthy).length;
  const tokens = engines?.reduce((sum, one) => sum + (one.tokens_per_s ?? 0), 0);
  return [
    figure("Live batches", count(live.length), paused ? `${count(paused)} paused` : "of those shown"),
    figure("Jobs to go", brief(left), "of these"),
    figure("Jobs now", rates.length ? rate(rates.reduce((sum, one) => sum + one.jobs, 0)) : "–", "in the last 20 s"),
    engines && figure("Output tokens", rate(tokens), engines.length ? `${healthy} of ${counted(engines.length, "worker")} healthy` : "no worker lives: stoker worker"),
  ];
}

function columns(view) {
  return [
    { name: "state", label: "State", cell: (one) => state(one) },
    { name: "batch", label: "Batch", cell: batchCell },
    { name: "progress", label: "Progress", cell: progressCell },
    { name: "rate", label: "Rate", number: true, cell: rateCell },
    { name: "left", label: "Time", number: true, cell: timeCell },
    { name: "cache", label: "Cache", number: true, cell: ({ stoker: { jobs } }) => h("span", { title: `${count(jobs.served)} answers from the cache` }, jobs.done ? shareOf(jobs.served, jobs.done) : "–") },
    { name: "tokens", label: "Tokens", number: true, cell: tokensCell },
    { name: "actions", label: "", cell: (one) => buttons(one, view.session, view.changed) },
  ];
}

function batchCell(one) {
  const labels = Object.entries(one.stoker.labels ?? {});
  return [
    h("a", { class: "name", href: `#/batches/${encodeURIComponent(one.id)}`, title: one.stoker.name }, one.stoker.name),
    h("span", { class: "under mono", title: one.id }, shortId(one.id)),
    labels.map(([name, value]) => h("span", { key: `label-${name}`, class: "label", title: `${name}: ${value}` }, `${name}: ${value}`)),
  ];
}

function progressCell(one) {
  const { done, total, failed, truncated, running_shards } = one.stoker.jobs;
  const notes = [
    failed > 0 && h("b", { key: "failed", class: "bad" }, `${brief(failed)} failed`),
    truncated > 0 && h("b", { key: "truncated", class: "held" }, `${brief(truncated)} truncated`),
    one.status === "in_progress" && !one.stoker.paused_reason && !running_shards && done < total && h("span", { key: "waits" }, "waits for a worker"),
    one.status === "failed" && one.errors?.data?.length > 0 && h("b", { key: "refused", class: "bad" }, one.errors.data[0].code),
  ];
  return [progress(one), h("span", { class: "under" },
    h("span", null, total || ENDED.has(one.status) ? `${count(done)} of ${count(total)}` : "reading its file"),
    total > 0 && h("span", { key: "share" }, percent(done / total)), notes),
  one.stoker.paused_reason && h("span", { key: "why", class: "why clamp", title: one.stoker.paused_reason }, one.stoker.paused_reason)];
}

function rateCell(one) {
  if (!one.in_progress_at) return "–";
  if (ENDED.has(one.status) && !one.stoker.jobs.done) return "–";
  if (ENDED.has(one.status)) return [h("span", null, rate(rateOnAverage(one))), h("span", { class: "under" }, "on average")];
  return [h("span", null, rate(rateNow(one)?.jobs)), h("span", { class: "under" }, `avg ${rate(rateOnAverage(one))}`)];
}

function timeCell(one) {
  const ended = endedAt(one);
  if (ended) return [h("span", { title: clock(ended) }, ago(ended, now())), h("span", { class: "under" }, `took ${duration(ended - one.created_at)}`)];
  const left = secondsLeft(one);
  return [h("span", { title: left ? `about ${clock(now() + left)}` : null }, left === null ? "–" : duration(left)),
    h("span", { class: "under", title: `since ${clock(one.created_at)}` }, left === null ? `since ${clock(one.created_at)}` : "left")];
}

function tokensCell(one) {
  const { prompt, completion } = one.stoker.tokens;
  const budget = one.stoker.budget_tokens;
  const words = `${count(prompt)} in, ${count(completion)} out`;
  if (!budget) return [h("span", { title: words }, brief(prompt + completion)), h("span", { class: "under" }, `${brief(completion)} out`)];
  const share = (prompt + completion) / budget;
  return meter("budget", share, `${brief(prompt + completion)} of ${brief(budget)}`, { kind: share > 0.9 ? "hot" : "" });
}
