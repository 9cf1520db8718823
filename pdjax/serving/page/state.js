// Engines, pools, links and the figures above them: what `/engines` tells.

import { Sparkline, bytes, element, keyed, many, number, percent, rate, write } from "./draw.js";

/** A bar whose parts have classes, and lengths as their counts. Its numbers stand beside it. */
class Bar {
  constructor(...kinds) {
    this.parts = kinds.map((kind) => element("span", kind));
    this.node = element("span", "stack", ...this.parts);
    this.node.setAttribute("aria-hidden", "true");
  }

  show(...counts) {
    counts.forEach((count, place) => (this.parts[place].style.flexGrow = count));
  }
}

class EngineRow {
  constructor(name) {
    this.accepts = element("td", "quiet");
    this.bar = new Bar("active", "free");
    this.rows = element("span");
    this.cells = Array.from({ length: 6 }, () => element("td", "number"));
    this.name = element("th", "name", name);
    this.name.scope = "row";
    const rows = element("td", "wide", element("span", "beside", this.bar.node, this.rows));
    this.node = element("tr", "", this.name, this.accepts, rows, ...this.cells);
  }

  show({ now, busy, stepsPerSecond }) {
    const other = now.status && now.status !== "serving" ? ` (${now.status})` : "";
    const state = other || now.paused ? other || " (paused)" : now.losses ? ` (lost ${now.losses} times)` : "";
    write(this.accepts, (now.accepts ?? []).join(", ") + state);
    const used = now.rows - now.free_rows;
    this.bar.node.hidden = !now.rows;
    this.bar.show(used, now.free_rows);
    write(this.rows, now.rows ? `${used} of ${now.rows}` : "–");
    const values = [
      ...[now.prefilling, now.decoding, now.steps_in_flight].map(number),
      ...[percent(busy), number(stepsPerSecond), percent(now.occupancy)],
    ];
    values.forEach((value, place) => write(this.cells[place], value));
  }
}

class PoolRow {
  constructor(name) {
    this.bar = new Bar("used", "cached", "free");
    this.text = element("span", "told");
    this.node = element("li", "", element("span", "name", name), this.bar.node, this.text);
  }

  show(pool) {
    const counts = [pool.used_pages, pool.cached_pages, pool.free_pages - pool.cached_pages];
    this.bar.show(...counts);
    const [used, cached, free] = counts.map(number);
    write(this.text, `${used} used, ${cached} cached, ${free} free`);
    this.node.title = `${number(pool.pages)} pages of ${pool.page_size} tokens`;
  }
}

class LinkRow {
  constructor(name) {
    this.spark = new Sparkline();
    this.now = element("span", "told");
    this.text = element("span", "told whole");
    this.node = element("li", "", element("span", "name", name), this.spark.node, this.now, this.text);
  }

  show({ now, grown }) {
    this.spark.push(grown.last);
    const peak = now.of_peak ? `, ${percent(now.of_peak)} of its peak` : "";
    const wire = `${rate(now.bytes_per_s ?? null)} on the wire${peak}`;
    write(this.now, rate(grown.long));
    write(this.text, `${bytes(now.bytes)} in ${many(now.shipments, "shipment")}, ${wire}`);
  }
}

/** A number with a name, and how it went. */
class Figure {
  constructor(name) {
    this.value = element("dd");
    this.spark = new Sparkline();
    this.node = element("dl", "figure", element("dt", "", name), this.value, this.spark.node);
  }

  show({ text, level }) {
    write(this.value, text);
    this.spark.push(level);
  }
}

const LONG_MS = 10000;

/** How fast totals grow. */
class Rates {
  #past = new Map();

  /** Growth a second of the total of a name: since it was last asked for, and over ten seconds. */
  of(name, total, now) {
    const past = this.#past.get(name) ?? [];
    if (past.length && total < past.at(-1).total) past.length = 0; // counted anew
    const since = (then) => (then ? ((total - then.total) * 1000) / (now - then.now) : 0);
    const [last, long] = [since(past.at(-1)), since(past[0])];
    past.push({ total, now });
    while (past.length > 2 && past[1].now < now - LONG_MS) past.shift();
    this.#past.set(name, past);
    return { last, long };
  }
}

/** Shows what `/engines` tells. */
export class State {
  #rates = new Rates();
  #shown = { engines: new Map(), pools: new Map(), links: new Map(), figures: new Map() };
  #at = Object.fromEntries(
    Object.entries({
      engines: "engine-rows",
      pools: "pool-rows",
      links: "link-rows",
      figures: "figures",
    }).map(([name, id]) => [name, document.getElementById(id)]),
  );

  /** @param latency [name, figure] pairs that stand beside the figures of this */
  show(state, latency) {
    const now = performance.now();
    const { queue, tokens } = state;
    const grown = (name, total) => this.#rates.of(name, total, now);
    const perSecond = ({ last, long }) => ({ text: number(Math.round(long)), level: last });
    this.#list("figures", (name) => new Figure(name), [
      ["running", { text: number(queue.running), level: queue.running }],
      ["waiting", { text: `${number(queue.waiting)} of ${number(queue.max_waiting)}`, level: queue.waiting }],
      ["prompt tokens/s", perSecond(grown("prompt tokens", tokens.prompt))],
      ["output tokens/s", perSecond(grown("output tokens", tokens.output))],
      ...latency,
    ]);
    const engines = Object.entries(state.engines).map(([name, engine]) => {
      const busy = Math.min(1, grown(`${name} busy`, engine.busy_seconds).long);
      const stepsPerSecond = grown(`${name} steps`, engine.steps).long;
      return [name, { now: engine, busy, stepsPerSecond }];
    });
    this.#list("engines", (name) => new EngineRow(name), engines);
    this.#list("pools", (name) => new PoolRow(name), Object.entries(state.pools));
    const links = Object.entries(state.links).map(([name, link]) => {
      return [name, { now: link, grown: grown(`${name} bytes`, link.bytes) }];
    });
    this.#list("links", (name) => new LinkRow(name.replace("->", " → ")), links);
  }

  #list(name, make, entries) {
    keyed(this.#at[name], this.#shown[name], entries, make);
  }
}
