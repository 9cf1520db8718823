// Times to first token and times per output token, as they happen: a dot a request.

import { duration, quantile, shape, ticks, write } from "./draw.js";

const WINDOW_MS = 120000;
const MOST = 1500;
const HEIGHT = 96;

/** Dots over time on a logarithmic scale, with lines at the median and the 99th percentile. */
class Dots {
  /** @param name of the elements `name` and `name-note` */
  constructor(name, what) {
    this.place = document.getElementById(name);
    this.note = document.getElementById(`${name}-note`);
    this.what = what;
    this.points = [];
    this.svg = shape("svg", { role: "img", height: HEIGHT });
    this.place.append(this.svg);
  }

  /** A value in milliseconds at a moment of the page's clock. */
  add(moment, value) {
    this.points.push({ moment, value });
  }

  clear() {
    this.points = [];
  }

  /** Draw it, and tell the statistics as a figure. */
  show(now) {
    this.points = this.points.filter((point) => point.moment > now - WINDOW_MS).slice(-MOST);
    const values = this.points.map((point) => point.value).sort((one, other) => one - other);
    const [half, most] = [quantile(values, 0.5), quantile(values, 0.99)];
    write(this.note, values.length ? `median ${duration(half)}, p99 ${duration(most)}` : "none yet");
    this.svg.setAttribute(
      "aria-label",
      `${this.what} of ${values.length} requests in two minutes: ${this.note.textContent}`,
    );
    this.#draw(now, values, half, most);
    return { text: duration(half), level: half ?? 0 };
  }

  #draw(now, values, half, most) {
    const width = this.place.clientWidth;
    const low = Math.max(0.001, (values[0] ?? 1) * 0.8);
    const high = Math.max(low * 2, (values.at(-1) ?? 100) * 1.25);
    const [left, bottom] = [52, HEIGHT - 16];
    const x = (moment) => left + (1 - (now - moment) / WINDOW_MS) * (width - left - 6);
    const y = (value) => 4 + (1 - Math.log(value / low) / Math.log(high / low)) * (bottom - 8);
    const parts = [];
    for (const step of ticks(low, high)) {
      const at = y(step).toFixed(1);
      parts.push(shape("line", { class: "grid", x1: left, x2: width, y1: at, y2: at }));
      parts.push(shape("text", { x: left - 6, y: at, class: "tick left" }, duration(step)));
    }
    for (const seconds of [120, 90, 60, 30, 0]) {
      const at = x(now - seconds * 1000).toFixed(1);
      const name = seconds ? `−${seconds} s` : "now";
      const side = seconds === 120 ? "first" : seconds ? "middle" : "last";
      parts.push(shape("text", { x: at, y: HEIGHT - 3, class: `tick ${side}` }, name));
    }
    for (const [kind, value] of [["half", half], ["most", most]]) {
      if (value === null) continue;
      const at = y(value).toFixed(1);
      parts.push(shape("line", { class: kind, x1: left, x2: width, y1: at, y2: at }));
    }
    for (const { moment, value } of this.points) {
      parts.push(shape("circle", { cx: x(moment).toFixed(1), cy: y(value).toFixed(1), r: 2 }));
    }
    this.svg.setAttribute("width", width);
    this.svg.replaceChildren(...parts);
  }
}

/** Both plots, of what `/requests` tells. */
export class Latency {
  #first = new Dots("ttft", "Time to first token");
  #each = new Dots("tpot", "Time per output token");
  #seen = new Map();

  /** Take what is new; the figures, [name, figure]. */
  show(requests, now) {
    const seen = new Map();
    for (const request of requests) {
      const known = this.#seen.get(request.id) ?? { first: false, ended: false };
      const arrived = now - request.age_ms;
      if (!known.first && request.ttft_ms !== null) {
        known.first = true;
        this.#first.add(arrived + request.ttft_ms, request.ttft_ms);
      }
      if (!known.ended && request.finish_reason !== null) {
        known.ended = true;
        const end = request.phases.at(-1)?.end_ms ?? request.ttft_ms ?? 0;
        if (request.tpot_ms !== null) this.#each.add(arrived + end, request.tpot_ms);
      }
      seen.set(request.id, known);
    }
    this.#seen = seen; // ids that are not told any more never come again
    return [
      ["median TTFT", this.#first.show(now)],
      ["median TPOT", this.#each.show(now)],
    ];
  }

  /** Forget everything: it is another run of the server. */
  clear() {
    this.#seen.clear();
    this.#first.clear();
    this.#each.clear();
  }
}
