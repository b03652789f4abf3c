// Asks again and again while the tab is seen: at a steady pace, more slowly while nothing answers.

import { Locked, Unreachable, events, isLocked } from "./client.js";

const SLOWEST_S = 30;
const connection = document.getElementById("connection");

/** Run an async `step(signal)` now and every `every_s` until `stop`; `now` runs it at once. */
export function poll(step, { every_s }) {
  const stopped = new AbortController();
  let failures = 0;
  let timer;
  let running = false;
  let again = false;

  async function run() {
    clearTimeout(timer);
    if (stopped.signal.aborted) return;
    if (running) {
      again = true;
      return;
    }
    if (document.hidden || isLocked()) return; // `seen`, or `unlocked`, goes on
    running = true;
    let wait_s = every_s;
    try {
      await step(stopped.signal);
      if (failures) reconnected();
      failures = 0;
    } catch (error) {
      if (stopped.signal.aborted || error instanceof Locked) return; // `unlocked` goes on
      if (!(error instanceof Unreachable)) throw error;
      failures += 1;
      wait_s = error.retryAfter_s ?? Math.min(SLOWEST_S, every_s * 2 ** failures) * (0.75 + Math.random() / 2);
      lost(error, wait_s);
    } finally {
      running = false;
    }
    if (stopped.signal.aborted) return;
    timer = setTimeout(run, again ? 0 : wait_s * 1000);
    again = false;
  }

  const seen = () => !document.hidden && run();
  document.addEventListener("visibilitychange", seen, { signal: stopped.signal });
  events.addEventListener("unlocked", run, { signal: stopped.signal });
  run();
  return {
    now: run,
    stop() {
      stopped.abort();
      clearTimeout(timer);
      if (failures) reconnected();
    },
  };
}

function lost({ message, status }, wait_s) {
  const what = status === 429 ? "The gateway asks to wait" : "The gateway does not answer";
  const text = `${what}, trying again (${message}). What you see is from before.`;
  // A text that stays the same is not announced again.
  if (connection.textContent !== text) connection.textContent = text;
  connection.title = `next try in ${Math.round(wait_s)} s`;
  connection.hidden = false;
}

function reconnected() {
  connection.hidden = true;
}
