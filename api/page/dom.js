// Elements from plain descriptions, drawn again in place: what stays keeps its focus, selection and scroll position.
// Text becomes text nodes and never markup, whatever is in it; nothing here or elsewhere sets innerHTML.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected"]);
const KEY = Symbol("key");
const PROPS = Symbol("props");

/** A description of an element. `props.key` tells siblings apart; `on…` are handlers; `style` is an object of CSS properties. */
export function h(tag, props, ...children) {
  return { tag, props: props ?? {}, children: flattened(children) };
}

/** Make the children of an element these. */
export function render(parent, ...children) {
  reconcile(parent, flattened(children), parent.namespaceURI === SVG);
}

function flattened(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && typeof child !== "boolean");
}

function reconcile(parent, wanted, inSvg) {
  const keyed = new Map();
  const stays = new Set(wanted.map((one) => one.props?.key).filter((key) => key !== undefined));
  for (const node of [...parent.childNodes]) {
    if (node[KEY] === undefined) continue;
    // Gone before anything is placed: a neighbour that is moved would lose its focus.
    if (stays.has(node[KEY])) keyed.set(node[KEY], node);
    else node.remove();
  }
  let next = parent.firstChild;
  for (const one of wanted) {
    const [found, place] = matching(one, next, keyed);
    next = place;
    const node = found ?? created(one, inSvg);
    if (node === next) next = next.nextSibling;
    else parent.insertBefore(node, next);
    update(node, one, inSvg);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

/** The node that becomes this description, and where to go on; unkeyed ones that it is not are dropped on the way. */
function matching(one, next, keyed) {
  const tag = typeof one === "object" ? one.tag : "#text";
  const key = one.props?.key;
  if (key !== undefined) {
    const known = keyed.get(key);
    if (known?.localName !== tag) return [undefined, next];
    let place = next;
    while (place && place !== known && place[KEY] === undefined) place = dropped(place);
    return [known, place];
  }
  for (let node = next; node && node[KEY] === undefined; node = node.nextSibling) {
    if ((node.localName ?? "#text") !== tag) continue;
    while (next !== node) next = dropped(next);
    return [node, node];
  }
  return [undefined, next];
}

function dropped(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

function created(one, inSvg) {
  if (typeof one !== "object") return document.createTextNode("");
  const node = inSvg || one.tag === "svg" ? document.createElementNS(SVG, one.tag) : document.createElement(one.tag);
  if (one.props.key !== undefined) node[KEY] = one.props.key;
  return node;
}

function update(node, one, inSvg) {
  if (typeof one !== "object") {
    const text = String(one);
    if (node.data !== text) node.data = text;
    return;
  }
  const before = node[PROPS] ?? {};
  for (const name of Object.keys(before)) if (!(name in one.props)) setProp(node, name, null, before[name]);
  reconcile(node, one.children, inSvg || one.tag === "svg");
  // After the children: a select takes only a value that it has.
  for (const [name, value] of Object.entries(one.props)) setProp(node, name, value, before[name]);
  node[PROPS] = one.props;
}

function setProp(node, name, value, before) {
  if (name === "key") return;
  if (name === "style") setStyle(node, value ?? {}, before ?? {});
  else if (name.startsWith("on")) node[name] = value;
  else if (PROPERTIES.has(name)) {
    if (node[name] !== value) node[name] = value ?? "";
  } else if (value !== before) {
    if (value === null || value === undefined || value === false) node.removeAttribute(name);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
}

// Through the object model: a style attribute would be refused by the page's policy.
function setStyle(node, wanted, before) {
  for (const name of Object.keys(before)) if (!(name in wanted)) node.style.removeProperty(name);
  for (const [name, value] of Object.entries(wanted)) if (before[name] !== value) node.style.setProperty(name, value);
}
