// What can be done to a batch: cancel, retry, resume. Each asks before, and tells what became of it.

import { Locked, ask } from "./client.js";
import { confirmed } from "./dialog.js";
import { h } from "./dom.js";
import { tell } from "./news.js";
import { ENDED } from "./rates.js";
import { count, counted } from "./words.js";

const CANCELLABLE = new Set(["validating", "in_progress"]);
const busy = new Set();

/** The buttons that make sense for this batch and key; `changed` gets the batch that an action answered with. */
export function buttons(batch, session, changed) {
  const jobs = batch.stoker.jobs;
  const may = session.may("submit");
  const button = (name, label, act, kind = "") => h("button", {
    key: name, type: "button", class: kind, disabled: !may || busy.has(batch.id),
    title: may ? null : "this key may not: it lacks the scope submit", onclick: act,
    "aria-label": `${label} ${batch.stoker.name}`,
  }, label);
  return h("div", { class: "actions" },
    batch.status === "in_progress" && batch.stoker.paused_reason && button("resume", "Resume", () => resume(batch, changed), "do"),
    CANCELLABLE.has(batch.status) && button("cancel", "Cancel", () => cancel(batch, changed)),
    ENDED.has(batch.status) && jobs.failed > 0 && button("retry", "Retry failed", () => retry(batch, changed)));
}

async function cancel(batch, changed) {
  const { done, total } = batch.stoker.jobs;
  const sure = await confirmed({
    title: `Cancel ${batch.stoker.name}?`,
    text: total === 0 ? "Its file is still being read; none of its jobs will run." : `${counted(total - done, "job")} will not run and end as batch_cancelled. What is in flight ends, and the ${count(done)} results that are there stay.`,
    action: "Cancel the batch", keep: "Let it run", kind: "danger",
  });
  if (sure) await act(batch, "cancel", changed, "is being cancelled");
}

async function retry(batch, changed) {
  const sure = await confirmed({
    title: `Retry what failed of ${batch.stoker.name}?`,
    text: `A new batch is made of its ${counted(batch.stoker.jobs.failed, "failed job")}, with the same settings. This one stays as it is.`,
    action: "Make the batch", kind: "do",
  });
  if (sure) await act(batch, "retry", changed, "has a new batch for what failed");
}

async function resume(batch, changed) {
  const sure = await confirmed({
    title: `Resume ${batch.stoker.name}?`,
    text: `It was paused: ${batch.stoker.paused_reason}. If the reason is still there its jobs may fail.`,
    action: "Resume the batch", kind: "do",
  });
  if (sure) await act(batch, "resume", changed, "goes on");
}

async function act(batch, name, changed, words) {
  busy.add(batch.id);
  try {
    changed(await ask(`v1/batches/${encodeURIComponent(batch.id)}/${name}`, { method: "POST" }), name);
    tell(`${batch.stoker.name} ${words}.`);
  } catch (error) {
    if (!(error instanceof Locked)) tell(`${batch.stoker.name}: ${error.message}`, "bad");
  } finally {
    busy.delete(batch.id);
    changed(null, name);
  }
}
