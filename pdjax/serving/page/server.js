// Requests to the server, and the polls that keep the page up to date.

const EACH_MS = 1000;
const HIDDEN_MS = 15000;
const MOST_MS = 15000;
const PATIENCE_MS = 8000;

/** A response that is no success; `status` is that of HTTP, `code` that of the error's body. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** No response came. */
export class Gone extends Error {}

/** The server that this page came from. The key stays in this object and goes nowhere else. */
export class Server {
  #key = "";

  set key(value) {
    this.#key = value;
  }

  get hasKey() {
    return this.#key !== "";
  }

  /**
   * Ask for a path, relative to the page.
   *
   * @throws {Refused} the server answered with an error
   * @throws {Gone} it did not answer
   */
  async ask(path, options = {}) {
    const headers = { ...options.headers };
    if (this.#key) headers.authorization = `Bearer ${this.#key}`;
    const response = await fetch(path, { cache: "no-store", ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Gone("the server does not answer");
    });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      const error = body?.error ?? {};
      const message = error.message ?? `HTTP status ${response.status}`;
      throw new Refused(response.status, error.code ?? null, message);
    }
    return response;
  }

  /** The JSON of a path. */
  async get(path) {
    return (await this.ask(path, { signal: AbortSignal.timeout(PATIENCE_MS) })).json();
  }

  /** Send a JSON body; the response is still to be read. */
  post(path, body, signal) {
    const headers = { "content-type": "application/json" };
    return this.ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  }
}

/**
 * Calls `poll` about once a second: seldom while nobody sees the page, ever less often while it
 * fails, and at once when that changes.
 */
export class Polls {
  /**
   * @param poll an async function
   * @param failed called with the error and the milliseconds until the next attempt
   */
  constructor(poll, failed) {
    this.poll = poll;
    this.failed = failed;
    this.failures = 0;
    this.timer = null;
    this.running = this.again = false;
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
    window.addEventListener("online", () => this.now());
  }

  /** Poll now, or once more after the poll that is under way. */
  async now() {
    this.again = this.running;
    if (this.running) return;
    this.running = true;
    clearTimeout(this.timer);
    let wait = EACH_MS;
    try {
      await this.poll();
      this.failures = 0;
      if (document.hidden) wait = HIDDEN_MS;
    } catch (error) {
      this.failures += 1;
      wait = Math.min(MOST_MS, EACH_MS * 2 ** Math.min(this.failures - 1, 5));
      this.failed(error, wait);
    }
    this.running = false;
    this.timer = setTimeout(() => this.now(), this.again ? 0 : wait);
  }
}

/**
 * The data of server-sent events, as they come in the body of a response.
 *
 * @yields {string} the data of an event
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
