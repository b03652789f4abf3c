// How fast batches go: now, from what was seen of them in the last seconds, and on average.

import { now } from "./client.js";

const WINDOW_S = 20; // results come some times a second at best, some times a minute on a small machine
const LEAST_S = 1.5;
const seen = new Map();
export const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);

/** Remember what a batch has done by now. */
export function observe(batch) {
  if (ENDED.has(batch.status)) {
    seen.delete(batch.id);
    return;
  }
  const at = performance.now() / 1000;
  const samples = seen.get(batch.id) ?? [];
  if (samples.length && at - samples.at(-1).at < 0.5) return;
  samples.push({ at, done: batch.stoker.jobs.done, tokens: batch.stoker.tokens.completion });
  while (samples.length > 2 && samples[1].at < at - WINDOW_S) samples.shift();
  seen.set(batch.id, samples);
}

/** Jobs and output tokens a second in the last seconds; null until two looks are far enough apart. */
export function rateNow(batch) {
  const samples = seen.get(batch.id) ?? [];
  const span_s = samples.length > 1 ? samples.at(-1).at - samples[0].at : 0;
  if (span_s < LEAST_S) return null;
  return {
    jobs: Math.max(0, samples.at(-1).done - samples[0].done) / span_s,
    tokens: Math.max(0, samples.at(-1).tokens - samples[0].tokens) / span_s,
  };
}

/** Jobs a second from its first shard to its end, or to now. */
export function rateOnAverage(batch) {
  if (!batch.in_progress_at) return null;
  const span_s = (endedAt(batch) ?? now()) - batch.in_progress_at;
  return span_s > 0 ? batch.stoker.jobs.done / Math.max(1, span_s) : null;
}

/** Seconds to its end at today's pace; null when nobody can say. */
export function secondsLeft(batch) {
  const left = batch.stoker.jobs.total - batch.stoker.jobs.done;
  if (batch.status !== "in_progress" || batch.stoker.paused_reason || left <= 0) return null;
  const pace = rateNow(batch)?.jobs ?? rateOnAverage(batch);
  return pace ? left / pace : null;
}

export const endedAt = (batch) => batch.completed_at ?? batch.failed_at ?? batch.expired_at ?? batch.cancelled_at ?? null;
