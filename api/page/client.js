// Questions to the API with the user's key, which lives in this tab's session storage and nowhere else.

const KEY = "stoker.key";
const TIMEOUT_MS = 20_000;
const SOURCE = document.baseURI.split("#")[0].replace(/[^/]*$/, "");
let key = stored();
let locked = false;
let skew_ms = 0;
export const events = new EventTarget();

/** The API has said no: what, and why. */
export class Refused extends Error {
  constructor(status, message, code, retryAfter_s) {
    super(message);
    Object.assign(this, { status, code, retryAfter_s });
  }
}

/** No answer, or one of a gateway in trouble (then with its status): worth another try. */
export class Unreachable extends Error {
  constructor(message, status, retryAfter_s) {
    super(message);
    Object.assign(this, { status, retryAfter_s });
  }
}

/** The key does not open the door any more; the page asks for another one. */
export class Locked extends Error {}

export const hasKey = () => key !== null;

/** Whether the key was refused, and no other one was given since. */
export const isLocked = () => locked;

export function setKey(value) {
  key = value;
  locked = false;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // Storage is forbidden: the key holds until the page is left.
  }
}

/** The server's clock, in unix seconds. */
export const now = () => (Date.now() + skew_ms) / 1000;

/** Where a path of the API is, also behind a proxy that puts a folder before it. */
export const address = (path) => SOURCE + path;

/** The JSON that a path of the API answers with. Throws Refused, Unreachable, or Locked. */
export async function ask(path, { method = "GET", signal } = {}) {
  const response = await send(path, { method, signal });
  try {
    return await response.json();
  } catch (error) {
    throw signal?.aborted ? error : new Unreachable("its answer is not whole");
  }
}

/** The response itself, for what is not JSON. */
export async function send(path, { method = "GET", signal, timeout_ms = TIMEOUT_MS } = {}) {
  const limits = [signal, timeout_ms && AbortSignal.timeout(timeout_ms)].filter(Boolean);
  const used = key;
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers: { Authorization: `Bearer ${used ?? ""}`, Accept: "application/json" },
      signal: AbortSignal.any(limits),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    throw signal?.aborted ? error : new Unreachable("no connection");
  }
  const date = Date.parse(response.headers.get("date") ?? "");
  if (!Number.isNaN(date) && Math.abs(date + 500 - Date.now() - skew_ms) > 2_000) skew_ms = date + 500 - Date.now();
  if (response.ok) return response;
  throw await fault(response, used === key);
}

async function fault(response, isOfThisKey) {
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `it answered ${response.status}`;
  const wait_s = Number(response.headers.get("retry-after")) || undefined;
  if (response.status === 401 && isOfThisKey) {
    locked = true;
    events.dispatchEvent(new CustomEvent("locked", { detail: message }));
    return new Locked(message);
  }
  if (response.status >= 500 || [401, 429].includes(response.status)) return new Unreachable(message, response.status, wait_s);
  return new Refused(response.status, message, said?.error?.code, wait_s);
}

function stored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
