// A conversation with the model. Everything that it says is shown as text.

import { duration, element, number, write } from "./draw.js";
import { events } from "./server.js";

/** A message in the conversation. */
class Message {
  constructor(role, text = "") {
    this.role = role;
    this.text = text;
    this.reasoning = element("p", "body quiet");
    this.body = element("p", "body said", text);
    this.note = element("p", "note");
    this.node = element("article", role, this.reasoning, this.body, this.note);
  }

  add(text, reasoning) {
    this.text += text;
    if (text) this.body.append(text);
    if (reasoning) this.reasoning.append(reasoning);
  }
}

/** The chat box. */
export class Chat {
  #server;
  #turns = []; // {question, answer}, each a Message
  #hasTemplate = null;
  #under = null; // AbortController of the answer under way
  #talk = document.getElementById("talk");
  #question = document.getElementById("question");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #note = document.getElementById("chat-note");

  constructor(server) {
    this.#server = server;
    const form = document.getElementById("ask");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#under?.abort();
      const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (sends && event.target === this.#question) {
        event.preventDefault();
        this.#ask();
      }
    });
    this.#stop.addEventListener("click", () => this.#under?.abort());
    document.getElementById("forget").addEventListener("click", () => this.#forget());
  }

  #forget() {
    this.#under?.abort();
    this.#turns = [];
    this.#talk.replaceChildren();
    this.#question.focus();
  }

  async #ask() {
    const text = this.#question.value;
    if (this.#under || !text.trim()) return;
    this.#question.value = "";
    const answer = this.#begin(text);
    this.#under = new AbortController();
    this.#showBusy(true);
    try {
      await this.#answer(answer, text, this.#under.signal);
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (!stopped) this.#hasTemplate = null; // the next server may have another model
      write(answer.note, stopped ? "stopped" : error.message);
      answer.node.classList.toggle("failed", !stopped);
    }
    this.#under = null;
    this.#showBusy(false);
  }

  async #answer(answer, text, signal) {
    if (this.#hasTemplate === null) await this.#learn();
    const body = {
      stream: true,
      temperature: Number(document.getElementById("temperature").value) || 0,
      max_tokens: Number(document.getElementById("max-tokens").value) || 128,
    };
    const asked = performance.now();
    const response = this.#hasTemplate
      ? await this.#server.post("v1/chat/completions", { ...body, messages: this.#said() }, signal)
      : await this.#server.post("v1/completions", { ...body, prompt: text }, signal);
    let [chunks, first, last, reason] = [0, null, null, null];
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (!choice) continue;
      chunks += 1;
      last = performance.now();
      first ??= last;
      reason = choice.finish_reason ?? reason;
      const follows = this.#talk.scrollTop + this.#talk.clientHeight > this.#talk.scrollHeight - 40;
      answer.add(choice.delta?.content ?? choice.text ?? "", choice.delta?.reasoning);
      if (follows) this.#talk.scrollTop = this.#talk.scrollHeight;
    }
    if (first === null) return;
    const gap = chunks > 1 ? `, ${duration((last - first) / (chunks - 1))} each` : "";
    const cut = reason === "length" ? "; cut at max tokens" : "";
    write(answer.note, `${number(chunks)} chunks, the first after ${duration(first - asked)}${gap}${cut}`);
  }

  /** Whether the model has a chat template; without one a message is a text that is continued. */
  async #learn() {
    this.#hasTemplate = Boolean((await this.#server.get("tokenizer_info")).chat_template);
    write(this.#note, this.#hasTemplate ? "" : "no chat template: texts are continued");
  }

  /** The conversation, without questions that were not answered, but for the last one. */
  #said() {
    const said = ({ role, text }) => ({ role, content: text });
    const answered = this.#turns.filter(({ answer }) => answer.text);
    const last = this.#turns.at(-1).question;
    return [...answered.flatMap(({ question, answer }) => [said(question), said(answer)]), said(last)];
  }

  #begin(text) {
    const [question, answer] = [new Message("user", text), new Message("assistant")];
    this.#turns.push({ question, answer });
    this.#talk.append(question.node, answer.node);
    this.#talk.scrollTop = this.#talk.scrollHeight;
    return answer;
  }

  #showBusy(is) {
    this.#send.hidden = is;
    this.#stop.hidden = !is;
    this.#talk.setAttribute("aria-busy", is);
  }
}
