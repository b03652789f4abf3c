// The page's frame: who is logged in, which view is open, light or dark.

import * as batch from "./batch.js";
import * as batches from "./batches.js";
import * as budgets from "./budgets.js";
import * as cache from "./cache.js";
import { Locked, Unreachable, ask, events, hasKey, setKey } from "./client.js";
import { h, render } from "./dom.js";
import * as job from "./job.js";
import * as webhooks from "./webhooks.js";
import * as workers from "./workers.js";

const VIEWS = [
  [/^#\/batches\/([^/]+)\/jobs\/(\d+)$/, job],
  [/^#\/batches\/([^/]+)$/, batch],
  [/^#\/batches$/, batches],
  [/^#\/workers$/, workers],
  [/^#\/cache$/, cache],
  [/^#\/budgets$/, budgets],
  [/^#\/webhooks$/, webhooks],
];
const TABS = [["batches", "Batches"], ["workers", "Workers"], ["cache", "Cache"], ["budgets", "Budgets"], ["webhooks", "Webhooks"]];
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const [top, main, nav, who, login] = ["top", "main", "nav", "who", "login"].map((id) => document.getElementById(id));
const scrolled = new Map();
let me = null;
let view = null;
let shown = null;
let lockedAt = 0; // where the page was scrolled to when the key ended

const session = { may: (scope) => Boolean(me?.scopes.includes("admin") || me?.scopes.includes(scope)) };

events.addEventListener("locked", (event) => askForKey(me ? `The key no longer works: ${event.detail}` : event.detail));
addEventListener("hashchange", () => me && route());
systemIsDark.addEventListener("change", () => me && frame());
addEventListener("pagehide", () => view?.close());
addEventListener("pageshow", (event) => event.persisted && location.reload());
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault();
  main.focus();
};
if (hasKey()) enter();
else askForKey("");

/** Ask whose key it is, and open the view that the address names. */
async function enter() {
  try {
    const found = await ask("v1/stoker/me");
    if (me && me.tenant !== found.tenant) return location.reload(); // nothing of the first one's may stay
    const isAnother = me?.key !== found.key; // which may do more, or less
    const isBack = me !== null && !isAnother;
    me = found;
    login.hidden = true;
    render(login);
    [top.hidden, main.hidden] = [false, false];
    frame();
    if (isBack) {
      events.dispatchEvent(new Event("unlocked"));
      main.querySelector("h1")?.focus({ preventScroll: true });
      scrollTo(0, lockedAt);
    } else route(lockedAt);
    return null;
  } catch (error) {
    if (error instanceof Locked) return null; // its event has asked again
    const isAway = error instanceof Unreachable && error.status === undefined;
    return askForKey(isAway ? `The gateway does not answer: ${error.message}. Try again.` : error.message);
  }
}

function askForKey(problem) {
  const wasHidden = login.hidden;
  if (wasHidden) lockedAt = scrollY;
  const submit = (event) => {
    event.preventDefault();
    const value = event.target.elements.key.value.trim();
    if (!value) return;
    setKey(value);
    enter();
  };
  login.hidden = false;
  // What was open stays as it was, unseen, until the next key.
  [top.hidden, main.hidden] = [true, true];
  document.querySelectorAll("dialog").forEach((dialog) => dialog.close("no"));
  render(login, h("form", { onsubmit: submit },
    h("p", { class: "brand" }, h("img", { src: "page/icon.svg", alt: "", width: 32, height: 32 }), h("span", null, "Stoker")),
    h("h1", { id: "login-title" }, "Log in"),
    h("label", { for: "key" }, "Key"),
    h("input", { id: "key", name: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "problem" }),
    h("p", { id: "problem", class: "problem", role: "alert" }, problem),
    h("button", { type: "submit", class: "do" }, "Log in"),
    h("p", { class: "more" }, "The key stays in this tab until you log out or close it. To make one:"),
    h("code", null, "stoker keys create --name me --scope admin")));
  if (wasHidden || problem) login.querySelector("input").select();
}

function logOut() {
  setKey(null);
  history.replaceState(null, "", location.pathname);
  location.reload(); // with it goes all that was read
}

function frame() {
  const other = isDark() ? "light" : "dark";
  const here = location.hash.split("/")[1];
  render(nav, TABS.map(([name, label]) => h("a", { href: `#/${name}`, "aria-current": here === name ? "page" : null }, label)));
  render(who,
    h("span", { class: "key", title: `key ${me.key} of tenant ${me.tenant}, scopes ${me.scopes.join(", ")}; Stoker ${me.version}` }, me.name),
    h("button", { type: "button", class: "theme", title: `Change to ${other}`, "aria-label": `Change to the ${other} theme`, onclick: () => setTheme(other) }, themeMark(other)),
    h("button", { type: "button", onclick: logOut }, "Log out"));
}

function themeMark(theme) {
  const paths = {
    dark: "M13.500 9.800A6 6 0 0 1 6.200 2.500a6 6 0 1 0 7.300 7.300z",
    light: "M8 4.800a3.200 3.200 0 1 0 0 6.400 3.200 3.200 0 0 0 0-6.400zM8 .8v2M8 13.200v2M.8 8h2M13.200 8h2M2.900 2.900l1.400 1.400M11.700 11.700l1.400 1.400M2.900 13.100l1.400-1.400M11.700 4.300l1.400-1.400",
  };
  return h("svg", { viewBox: "0 0 16 16", width: 16, height: 16, class: theme, "aria-hidden": "true" }, h("path", { d: paths[theme] }));
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

/** Choose a theme; the one that the system has follows the system from then on. */
function setTheme(theme) {
  const isSystems = theme === (systemIsDark.matches ? "dark" : "light");
  if (isSystems) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    if (isSystems) localStorage.removeItem("stoker.theme");
    else localStorage.setItem("stoker.theme", theme);
  } catch {
    // Storage is forbidden: it holds until the page is left.
  }
  frame();
}

/** Open the view that the address names; `left_px` is where the one before was scrolled to. */
function route(left_px = scrollY) {
  const hash = location.hash || "#/batches";
  const found = VIEWS.map(([pattern, module]) => [hash.match(pattern), module]).find(([match]) => match);
  if (!found) {
    location.replace("#/batches");
    return;
  }
  const isFirst = shown === null;
  if (!isFirst) scrolled.set(shown, left_px);
  view?.close();
  render(main);
  const root = document.createElement("div");
  root.className = "view";
  main.append(root);
  shown = hash;
  const [[, ...parts], module] = found;
  view = module.open(root, parts.map((part) => decoded(part)), session);
  frame();
  document.title = `${TABS.find(([name]) => hash.startsWith(`#/${name}`))[1]} · Stoker`;
  if (!isFirst) arrive(root, scrolled.get(hash) ?? 0);
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** Once the view has its title: the focus goes there, and the scroll position of the last time comes back. */
function arrive(root, top_px) {
  const title = root.querySelector("h1");
  if (!title) {
    const waiting = new MutationObserver(() => {
      if (!root.querySelector("h1")) return;
      waiting.disconnect();
      arrive(root, top_px);
    });
    waiting.observe(root, { childList: true });
    return;
  }
  title.focus({ preventScroll: true });
  scrollTo(0, top_px);
}
