// One line that says what has just happened, seen for a while and read aloud.

const SHOWN_MS = 6_000;
const line = document.getElementById("news");
let timer;

/** Say it. kind: "" or "bad". */
export function tell(text, kind = "") {
  clearTimeout(timer);
  line.textContent = text;
  line.className = `shown ${kind}`;
  timer = setTimeout(() => { line.className = "unseen"; }, SHOWN_MS);
}

/** Say it only aloud. */
export function murmur(text) {
  if (line.className === "unseen") line.textContent = text;
}
