// Asks again and again while the tab is seen: at a steady pace, more slowly while nothing answers.

import { Locked, Unreachable, events } from "./client.js";

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
    if (document.hidden) return; // `seen` goes on
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
      lost(error.message, wait_s);
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

function lost(why, wait_s) {
  // The seconds are not announced: only that it is so.
  connection.textContent = `The gateway does not answer (${why}); trying again. What you see is from before.`;
  connection.title = `next try in ${Math.round(wait_s)} s`;
  connection.hidden = false;
}

function reconnected() {
  connection.hidden = true;
}
