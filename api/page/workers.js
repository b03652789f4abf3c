// The live workers and their engines.

import { Refused, ask } from "./client.js";
import { h, render } from "./dom.js";
import { murmur } from "./news.js";
import { badge, empty, figure, meter, sorry, sparkline, table } from "./parts.js";
import { poll } from "./poll.js";
import { count, counted, percent, rate } from "./words.js";

const EVERY_S = 2.5; // announcements come every 5 s
const KEPT = 60;
const history = new Map(); // tokens/s of each worker as far as they were seen
let workers = null;

/** Open the view in an element; returns how to close it. */
export function open(root, _parts, session) {
  let refused = session.may("admin") ? null : "Engines are everybody's, so only a key with the scope admin sees them; yours has not. Ask for one: stoker keys create --scope admin.";
  const reading = !refused && poll(async (signal) => {
    try {
      workers = (await ask("v1/stoker/workers", { signal })).data;
      remember();
      refused = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error.message;
    }
    draw();
  }, { every_s: EVERY_S });

  function draw() {
    render(root, h("h1", { key: "title", tabindex: -1 }, "Workers"),
      refused ? sorry("Workers cannot be shown", refused) : workers && content());
  }

  draw();
  return { close: () => { if (reading) reading.stop(); } };
}

function remember() {
  const alive = new Set(workers.map((one) => one.name));
  for (const [name] of history) {
    if (!alive.has(name)) {
      history.delete(name);
      murmur(`Worker ${name} has gone.`);
    }
  }
  for (const one of workers) {
    const seen = history.get(one.name) ?? [];
    seen.push(one.tokens_per_s ?? 0);
    history.set(one.name, seen.slice(-KEPT));
  }
}

function content() {
  if (!workers.length) {
    return empty("No worker lives", "Batches wait until one does. Start one on each GPU machine, with the same settings; it starts its own engine.", "stoker worker");
  }
  const sum = (name) => workers.reduce((all, one) => all + (one[name] ?? 0), 0);
  const ill = workers.filter((one) => !one.healthy).length;
  return [
    h("div", { key: "figures", class: "figures" },
      figure("Workers", count(workers.length), ill ? `${count(ill)} unhealthy` : "all healthy"),
      figure("Output tokens", rate(sum("tokens_per_s")), "of all engines"),
      figure("Running", count(sum("running")), "requests in engines"),
      figure("Waiting", count(sum("waiting")), "in engines' queues")),
    table("workers", "Workers", COLUMNS, workers, (one) => one.name),
  ];
}

const COLUMNS = [
  { name: "health", label: "State", cell: (one) => (one.healthy ? badge("healthy", "good") : badge("unhealthy", "bad")) },
  { name: "worker", label: "Worker", cell: (one) => [h("b", { class: "name", title: one.name }, one.name), h("span", { class: "under" }, `${one.node}, ${one.children === 1 ? "1 child" : `${count(one.children)} children`}`)] },
  { name: "engine", label: "Engine", cell: (one) => [h("span", { title: one.engine }, one.engine), h("span", { class: "under", title: one.models.join(", ") }, one.models.join(", "))] },
  { name: "tokens", label: "Output tokens", number: true, cell: tokensCell },
  { name: "running", label: "Running", number: true, cell: (one) => count(one.running) },
  { name: "waiting", label: "Waiting", number: true, cell: (one) => count(one.waiting) },
  { name: "kv", label: "KV cache", cell: (one) => share("KV cache in use", one.kv_use, "not stated") },
  { name: "gpu", label: "GPU", cell: (one) => share("GPU utilisation", one.gpu_use, "no GPU", 1) },
];

function tokensCell(one) {
  if (one.tokens_per_s === null || one.tokens_per_s === undefined) return "–";
  const values = history.get(one.name) ?? [];
  return [h("span", null, rate(one.tokens_per_s)), sparkline(values, `${rate(one.tokens_per_s)}; ${counted(values.length, "reading")}, at most ${rate(Math.max(0, ...values))}`)];
}

const share = (label, value, none, most = 0.95) => (value === null || value === undefined
  ? h("span", { class: "more" }, none)
  : meter(label, value, percent(value, 0), { kind: value > most ? "hot" : "" }));
