// One job: its prompt beside its answer, and where the answer came from. Both are strangers' texts: shown, never believed.

import { Refused, ask } from "./client.js";
import { h, render } from "./dom.js";
import { outcomeOf, sourceOf } from "./jobs.js";
import { facts, sorry } from "./parts.js";
import { poll } from "./poll.js";
import { clock, count, counted, json, percent } from "./words.js";

const EVERY_S = 3;
const SHOWN = 20_000; // characters at first; a line may have 32 million

/** Open the view of job `line` of batch `id`; returns how to close it. */
export function open(root, [id, line]) {
  let job = null;
  let refused = null;
  const whole = new Set(); // the texts that are shown to their end
  const path = encodeURIComponent(id);
  const reading = poll(async (signal) => {
    if (job?.outcome) return; // ended: it changes no more
    try {
      job = await ask(`v1/stoker/batches/${path}/jobs/${encodeURIComponent(line)}`, { signal });
      refused = null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refused = error.message;
    }
    draw();
  }, { every_s: EVERY_S });

  const text = (name, value, kind) => {
    const isLong = value.length > SHOWN && !whole.has(name);
    return [
      h("pre", { key: `text ${name}`, class: kind, tabindex: kind === "code" ? 0 : null }, isLong ? value.slice(0, SHOWN) : value),
      isLong && h("button", { key: `more ${name}`, type: "button", class: "link", onclick: () => { whole.add(name); draw(); } }, `Show all ${counted(value.length, "character")}`),
    ];
  };

  function draw() {
    const up = h("p", { key: "crumbs", class: "crumbs" }, h("a", { href: "#/batches" }, "Batches"), " / ", h("a", { class: "mono", href: `#/batches/${path}` }, id), ` / line ${line}`);
    if (refused) render(root, up, sorry("This job cannot be shown", refused), steps(path, line, !refused));
    else if (!job) render(root, up);
    else {
      render(root, up,
        h("div", { key: "heading", class: "heading" }, h("h1", { class: "mono", tabindex: -1 }, job.custom_id), outcomeOf(job), steps(path, line, true)),
        h("div", { key: "both", class: "both" },
          h("section", { key: "prompt" }, h("h2", null, "Prompt"), prompt(job, text)),
          h("section", { key: "answer" }, h("h2", null, "Answer"), answer(job, text))),
        job.truncated && h("p", { key: "cut", class: "notice" }, "It is long: some of its texts or lists are cut here. The batch's files have them whole."),
        h("section", { key: "about", class: "about" }, h("h2", null, "About it"), facts(about(job))),
        passages(job, text),
        raw(job, text));
    }
  }

  return { close: reading.stop };
}

const steps = (path, line, isThere) => h("div", { key: "steps", class: "actions" },
  Number(line) > 0 && h("a", { key: "before", class: "button", href: `#/batches/${path}/jobs/${Number(line) - 1}` }, "Line before"),
  isThere && h("a", { key: "after", class: "button", href: `#/batches/${path}/jobs/${Number(line) + 1}` }, "Line after"));

function prompt(job, text) {
  const { messages, prompt: plain, input, model: _model, ...settings } = job.request ?? {};
  const turns = job.settings?.turns ?? [];
  const said = [
    ...(Array.isArray(messages) ? messages : []),
    ...turns.map((turn, place) => ({ role: `user, turn ${place + 1}`, content: turn })),
  ];
  const rest = plain ?? input;
  return [
    said.map((message, place) => spoken(`prompt ${place}`, message, text)),
    rest !== undefined && text("prompt", typeof rest === "string" ? rest : json(rest), "prose"),
    !said.length && rest === undefined && text("request", json(job.request), "code"),
    Object.keys(settings).length > 0 && h("details", { key: "settings" }, h("summary", null, "Its settings"), text("settings", json(settings), "code")),
  ];
}

/** One message of a conversation; what is not text is named, not shown. */
function spoken(name, message, text) {
  const { role, content, tool_calls: calls } = message ?? {};
  const kind = String(role ?? "").split(",")[0];
  const parts = Array.isArray(content) ? content : [content];
  return h("article", { key: name, class: `message ${["system", "user", "assistant", "tool", "developer"].includes(kind) ? kind : ""}` },
    h("h3", null, String(role ?? "message")),
    parts.filter((part) => part !== null && part !== undefined).map((part, place) => text(`${name} ${place}`, partWords(part), "prose")),
    calls && text(`${name} calls`, json(calls), "code"));
}

function partWords(part) {
  if (typeof part === "string") return part;
  if (typeof part?.text === "string") return part.text;
  const url = part?.image_url?.url;
  if (typeof url === "string") return `[image: ${url.startsWith("data:") ? `${url.slice(0, 30)}… ${count(url.length)} characters` : url}]`;
  return json(part);
}

function answer(job, text) {
  if (!job.outcome) return h("p", { class: "more" }, "It has not run yet.");
  const told = job.stoker?.conversation?.messages;
  const choices = job.response?.choices;
  const vectors = job.response?.data;
  return [
    job.error && h("div", { key: "error", class: "notice bad" }, h("p", null, h("b", { class: "mono" }, job.error.code)), text("error", String(job.error.message ?? ""), "prose")),
    Array.isArray(told) && [
      h("h3", { key: "told" }, "The whole conversation"),
      told.map((message, place) => spoken(`told ${place}`, message, text)),
    ],
    !told && Array.isArray(choices) && choices.map((choice, place) => choiceOf(choice, place, choices.length, text)),
    !choices && isVectors(vectors) && h("p", { key: "vectors" }, vectorWords(vectors)),
    job.response && !job.error && !choices && !isVectors(vectors) && text("response", json(job.response), "code"),
    !job.response && !job.error && h("p", { key: "none", class: "more" }, "It has no answer."),
  ];
}

function choiceOf(choice, place, all, text) {
  const message = choice?.message ?? { role: "assistant", content: choice?.text };
  const reasoning = message.reasoning_content ?? message.reasoning;
  return h("div", { key: `choice ${place}` },
    all > 1 && h("h3", null, `Choice ${place + 1} of ${all}`),
    typeof reasoning === "string" && reasoning && h("details", { key: "reasoning" }, h("summary", null, "Its reasoning"), text(`reasoning ${place}`, reasoning, "prose")),
    spoken(`answer ${place}`, message, text),
    message.content === "" && h("p", { key: "empty", class: "more" }, "An empty text."),
    choice?.finish_reason && choice.finish_reason !== "stop" && h("p", { key: "finish", class: "more" }, "It ended by ", h("span", { class: "mono" }, String(choice.finish_reason)), choice.finish_reason === "length" ? ": cut by its token limit." : "."));
}

const isVectors = (list) => Array.isArray(list) && list.length > 0 && list.every((one) => one?.embedding !== undefined);

function vectorWords(list) {
  const { embedding } = list[0];
  const length = Array.isArray(embedding) ? embedding.length : Math.floor((String(embedding).length * 3) / 16);
  return `${counted(list.length, "vector")} of ${count(length)} numbers: ${Array.isArray(embedding) ? `${embedding.slice(0, 6).map((one) => Number(one).toFixed(4)).join(", ")}…` : "base64"}`;
}

function about(job) {
  const usage = job.response?.usage;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const reasoning = usage?.completion_tokens_details?.reasoning_tokens;
  const leader = job.stoker?.leader;
  return [
    ["Answer from", job.outcome && `${sourceOf(job)}${typeof job.similarity === "number" ? `, similarity ${job.similarity.toFixed(4)}` : ""}${leader ? `, of ${leader}` : ""}`],
    ["Model", job.response?.model ?? job.request?.model],
    ["Tokens in", usage && `${count(usage.prompt_tokens)}${cached ? `, ${percent(cached / usage.prompt_tokens)} in the engine's prefix cache` : ""}`],
    ["Tokens out", usage && `${count(usage.completion_tokens ?? 0)}${reasoning ? `, ${count(reasoning)} of them reasoning` : ""}`],
    ["Ended", job.ended_at && clock(job.ended_at)],
    ["Its own settings", job.settings && Object.keys(job.settings).filter((name) => name !== "turns").map((name) => `${name}: ${JSON.stringify(job.settings[name])}`).join(", ")],
  ];
}

/** The passages that it was given, those that its answer cites marked; of a conversation turn by turn. */
function passages(job, text) {
  const told = job.stoker?.conversation ?? job.stoker;
  if (!Array.isArray(told?.passages) || !told.passages.length) return null;
  const isByTurn = Array.isArray(told.passages[0]);
  const lists = isByTurn ? told.passages : [told.passages];
  const cited = isByTurn ? (told.citations ?? []) : [told.citations ?? []];
  return h("section", { key: "passages" }, h("h2", null, "Passages in its prompt"), lists.map((list, turn) => [
    isByTurn && h("h3", { key: `turn ${turn}` }, `Turn ${turn + 1}`),
    h("ol", { key: `list ${turn}`, class: "passages" }, list.map((one, place) => h("li", { key: place },
      h("b", null, String(one.source ?? "")),
      [one.page && `page ${one.page}`, one.heading, typeof one.score === "number" && `score ${one.score.toFixed(3)}`].filter(Boolean).map((part) => h("span", { class: "part" }, String(part))),
      cited[turn]?.includes(place + 1) && h("span", { key: "cited", class: "state good" }, "cited"),
      typeof one.text === "string" && text(`passage ${turn} ${place}`, one.text, "prose")))),
  ]));
}

const raw = (job, text) => h("details", { key: "raw" }, h("summary", null, "As JSON"),
  text("raw request", json(job.request), "code"), text("raw response", json(job.response ?? job.error), "code"), job.stoker && text("raw stoker", json(job.stoker), "code"));
