// What all parts of the page share: elements, numbers as text, and small drawings.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with a class and children; a string is a child of text. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** An SVG element with attributes and children. */
export function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Set a node's text, where it is another one: what has not changed is not announced. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Let the children of `parent` be those of `entries`, [key, value] in order. A child stays the same
 * node for as long as its key is there, so that it keeps its focus.
 *
 * @param make gives {node, show(value)} for a key
 * @param shown a Map that belongs to this parent
 */
export function keyed(parent, shown, entries, make) {
  const keys = new Set(entries.map(([key]) => key));
  for (const [key, part] of shown) {
    if (!keys.has(key)) {
      part.node.remove();
      shown.delete(key);
    }
  }
  let place = parent.firstChild;
  for (const [key, value] of entries) {
    let part = shown.get(key);
    if (!part) shown.set(key, (part = make(key)));
    part.show(value);
    if (part.node === place) place = place.nextSibling;
    else parent.insertBefore(part.node, place);
  }
}

const decimals = [0, 1, 2].map(
  (most) => new Intl.NumberFormat("en", { minimumFractionDigits: most, maximumFractionDigits: most }),
);

/** A number with about three digits that count. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 100) return decimals[0].format(value);
  return decimals[size >= 10 ? 1 : 2].format(value);
}

/** A number of things: "1 token", "2 tokens". */
export const many = (count, thing) => `${number(count)} ${thing}${count === 1 ? "" : "s"}`;

const scaled = (value, step, units) => {
  let unit = 0;
  while (Math.abs(value) >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${number(unit ? value : Math.round(value))} ${units[unit]}`;
};

/** Bytes, as "1.24 MB". */
export const bytes = (value) => scaled(value, 1000, ["B", "kB", "MB", "GB", "TB", "PB"]);

/** Bytes a second; null where nothing has moved. */
export const rate = (value) => (value === null ? "–" : `${bytes(value)}/s`);

/** Milliseconds, as "812 µs", "8.14 ms" or "1.24 s". */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms === 0) return "0";
  if (ms < 1) return `${number(Math.round(ms * 1000))} µs`;
  return ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000)} s`;
}

/** A share of 1 in per cent. */
export const percent = (share) =>
  share === null || share === undefined ? "–" : `${decimals[0].format(share * 100)} %`;

/** The value that a share of sorted values does not exceed; null of none. */
export function quantile(sorted, share) {
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
}

/** The least of 1, 2, 5, 10, ... times any power of ten that is not below a value. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= value * 0.9999);
}

/** Round numbers in a range, three or four: by powers of ten where it is wide, else at even distances. */
export function ticks(low, high) {
  const found = [];
  if (high / low < 12) {
    const step = roundUp((high - low) / 4);
    for (let at = Math.ceil(low / step); at * step <= high; at += 1) found.push(at * step);
    return found;
  }
  for (let at = roundUp(low); at <= high; at = roundUp(at * 1.5)) found.push(at);
  const apart = Math.ceil(found.length / 4);
  return found.filter((_, place) => place % apart === 0);
}

/** A line of the last values, newest at the right; nothing is said of it but by its neighbours. */
export class Sparkline {
  constructor(most = 120) {
    this.most = most;
    this.values = [];
    this.area = shape("polygon");
    this.line = shape("polyline");
    const box = { viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" };
    this.node = shape("svg", { class: "spark", ...box }, this.area, this.line);
  }

  push(value) {
    this.values.push(value ?? 0);
    if (this.values.length > this.most) this.values.shift();
    const top = Math.max(...this.values) || 1;
    const step = 100 / (this.most - 1);
    const first = 100 - step * (this.values.length - 1);
    const points = this.values.map(
      (each, place) => `${(first + place * step).toFixed(2)},${(19 - (each / top) * 18).toFixed(2)}`,
    );
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", `${first.toFixed(2)},20 ${points.join(" ")} 100,20`);
  }
}
