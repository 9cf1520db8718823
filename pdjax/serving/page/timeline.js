// The newest requests side by side: a row each, with its phases, and its shipments below them.

import { bytes, duration, element, keyed, many, number, roundUp, shape, write } from "./draw.js";

const PHASES = ["queue", "prefill", "wait for row", "transfer", "wait for tick", "decode"];
const WINDOW_MS = 60000;
const LEAST_MS = 100;
const THIN = 0.15; // per cent of the width: what is shorter is drawn so wide, to be seen
const TOLD_SHIPMENTS = 4;

/** A sequence's name; that of a request with one choice is the request's. */
const named = (id) => id.replace(/#0$/, "");
const kind = (phase) => phase.replaceAll(" ", "-");
const ended = (request) => request.phases.at(-1)?.end_ms ?? request.age_ms;

/** What a request did, in words. */
function told(request) {
  const { input_len, cached_len, output_len, preemptions, shipments } = request;
  const cached = cached_len ? `, ${number(cached_len)} of them cached` : "";
  const parts = [
    `${named(request.id)}: ${many(input_len, "prompt token")}${cached}, ${many(output_len, "output token")}`,
    request.finish_reason === null ? "runs" : `ended by ${request.finish_reason}`,
    `TTFT ${duration(request.ttft_ms)}, TPOT ${duration(request.tpot_ms)}`,
  ];
  if (preemptions) parts.push(`started over ${many(preemptions, "time")}`);
  if (shipments.length) {
    const [{ engine, target }] = shipments;
    if (engine && target) parts.push(`${engine} to ${target}`);
    const each = shipments.slice(0, TOLD_SHIPMENTS).map((shipment) => {
      const [first, last] = shipment.layers;
      const wire = duration(shipment.arrived_ms - shipment.on_wire_ms);
      return `layers ${first} to ${last} at ${duration(shipment.on_wire_ms)} for ${wire} (${bytes(shipment.bytes)})`;
    });
    const more = shipments.length - each.length;
    parts.push(`on the wire: ${each.join(", ")}${more > 0 ? `, and ${more} more` : ""}`);
  }
  return `${parts.join("; ")}.`;
}

class Row {
  constructor(id) {
    this.bar = shape("svg", { class: "bar", "aria-hidden": "true" });
    this.tokens = element("span", "tokens");
    this.total = element("span", "total");
    this.node = element("li", "", element("span", "id", named(id)), this.bar, this.tokens, this.total);
    this.node.tabIndex = -1;
  }

  /** @param x from milliseconds after the arrival to per cent of the width */
  show({ request, x }) {
    this.request = request;
    write(this.tokens, `${number(request.input_len)} → ${number(request.output_len)}`);
    write(this.total, duration(ended(request)));
    this.node.classList.toggle("runs", request.finish_reason === null);
    this.node.classList.toggle("failed", ["error", "abort"].includes(request.finish_reason));
    this.node.setAttribute("aria-label", told(request));
    const box = (name, from, to, y, height) => {
      const width = Math.max(x(to) - x(from), THIN);
      const at = { x: `${x(from).toFixed(3)}%`, width: `${width.toFixed(3)}%`, y, height };
      return shape("rect", { class: name, ...at });
    };
    const parts = request.phases.map(({ name, start_ms, end_ms }) =>
      box(`phase ${kind(name)}`, start_ms, end_ms, 2, 8),
    );
    for (const { sent_ms, on_wire_ms, arrived_ms } of request.shipments) {
      parts.push(box("gather", sent_ms, on_wire_ms, 12, 1));
      parts.push(box("wire", on_wire_ms, arrived_ms, 11, 3));
    }
    if (request.ttft_ms !== null) {
      const at = `${x(request.ttft_ms).toFixed(3)}%`;
      parts.push(shape("line", { class: "first-token", x1: at, x2: at, y1: 0, y2: 12 }));
    }
    this.bar.replaceChildren(...parts);
  }
}

/** Shows what `/requests` tells. */
export class Timeline {
  #rows = new Map();
  #arrivals = new Map();
  #list = document.getElementById("request-rows");
  #about = document.getElementById("about");
  #note = document.getElementById("requests-note");
  #axis = document.getElementById("axis");
  #phases = document.getElementById("phases");
  #hint = this.#about.textContent;
  #chips = new Map();
  #looked = null; // the row that the mouse is over
  #last = null; // what was shown last

  constructor() {
    for (const phase of [...PHASES, "wire"]) {
      const spent = element("b");
      this.#chips.set(phase, spent);
      this.#phases.append(element("li", "", element("i", `key ${kind(phase)}`), phase, " ", spent));
    }
    for (const choice of document.getElementsByName("axis")) {
      choice.addEventListener("change", () => this.#last && this.show(...this.#last));
    }
    const list = this.#list;
    list.addEventListener("keydown", (event) => this.#walk(event));
    list.addEventListener("mouseover", (event) => this.#look(event.target.closest("li")));
    list.addEventListener("mouseleave", () => this.#look(null));
    list.addEventListener("focusin", (event) => this.#choose(event.target.closest("li")));
    list.addEventListener("focusout", () => this.#tell());
  }

  /** Draw the requests; `now` is of the page's clock, milliseconds. */
  show(requests, now) {
    this.#last = [requests, now];
    if (!requests.length) {
      keyed(this.#list, this.#rows, []);
      write(this.#note, "none yet");
      return;
    }
    const byClock = document.querySelector("input[name=axis]:checked").value === "clock";
    const arrivals = new Map();
    for (const { id, age_ms } of requests) arrivals.set(id, this.#arrivals.get(id) ?? now - age_ms);
    this.#arrivals = arrivals;
    const ends = requests.map((each) => arrivals.get(each.id) + ended(each));
    const right = Math.max(...ends);
    const shown = requests.filter((_, place) => ends[place] > right - WINDOW_MS);
    const left = Math.max(right - WINDOW_MS, Math.min(...shown.map(({ id }) => arrivals.get(id))));
    const longest = Math.max(...shown.map(ended));
    const span = Math.max(LEAST_MS, byClock ? right - left : longest);
    const entries = shown.map((request) => {
      const before = byClock ? span - (right - arrivals.get(request.id)) : 0;
      return [request.id, { request, x: (ms) => Math.max(0, ((before + ms) / span) * 100) }];
    });
    keyed(this.#list, this.#rows, entries.reverse(), (id) => new Row(id));
    this.#draw(span, byClock);
    const running = shown.filter((each) => each.finish_reason === null).length;
    const quiet = running ? "" : `, the last ended ${duration(now - right)} ago`;
    write(this.#note, `${shown.length} newest, ${running} under way${quiet}`);
    const rows = [...this.#list.children];
    if (!rows.some((row) => row.tabIndex === 0)) rows[0].tabIndex = 0;
    this.#tell();
  }

  /** Forget everything: it is another run of the server. */
  clear() {
    this.#arrivals.clear();
  }

  #draw(span, byClock) {
    const [step, parts] = [roundUp(span / 8), []];
    for (let at = 0; at <= span * 1.0001; at += step) {
      const place = `${((byClock ? span - at : at) / span) * 100}%`;
      const side = (byClock ? at === 0 : at > span * 0.97) ? "last" : !byClock && at === 0 ? "first" : "middle";
      const name = byClock ? (at ? `−${duration(at)}` : "now") : duration(at);
      parts.push(shape("line", { class: "grid", x1: place, x2: place, y1: 12, y2: 16 }));
      if (!byClock || at < span * 0.95) parts.push(shape("text", { class: `tick ${side}`, x: place, y: 9 }, name));
    }
    this.#axis.replaceChildren(...parts);
  }

  #walk(event) {
    const rows = [...this.#list.children];
    const place = rows.indexOf(event.target.closest("li"));
    const next = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (next === undefined || !rows[next]) return;
    event.preventDefault();
    rows[next].focus();
  }

  #choose(row) {
    if (!row) return;
    for (const each of this.#list.children) each.tabIndex = each === row ? 0 : -1;
    this.#tell();
  }

  #look(row) {
    this.#looked = row;
    this.#tell();
  }

  /** Tell the numbers of the row that the mouse is over, or else of the one with the focus. */
  #tell() {
    const focused = document.activeElement?.closest?.("#request-rows > li");
    const node = this.#looked?.isConnected ? this.#looked : focused;
    const row = [...this.#rows.values()].find((each) => each.node === node);
    for (const each of this.#rows.values()) each.node.classList.toggle("chosen", each === row);
    write(this.#about, row ? told(row.request) : this.#hint);
    const spent = new Map();
    for (const { name, start_ms, end_ms } of row?.request.phases ?? []) {
      spent.set(name, (spent.get(name) ?? 0) + end_ms - start_ms);
    }
    for (const { on_wire_ms, arrived_ms } of row?.request.shipments ?? []) {
      spent.set("wire", (spent.get("wire") ?? 0) + arrived_ms - on_wire_ms);
    }
    for (const [phase, chip] of this.#chips) {
      write(chip, spent.has(phase) ? duration(spent.get(phase)) : "");
    }
  }
}
