// Joins the parts of the page: polls the server, and shows what it tells.

import { Chat } from "./chat.js";
import { duration, write } from "./draw.js";
import { Latency } from "./latency.js";
import { Gone, Polls, Refused, Server } from "./server.js";
import { State } from "./state.js";
import { Timeline } from "./timeline.js";

const server = new Server();
const [state, latency, timeline] = [new State(), new Latency(), new Timeline()];
new Chat(server);

const status = document.getElementById("status");
const model = document.getElementById("model");
const access = document.getElementById("access");
const [keyForm, key] = [document.getElementById("key-form"), document.getElementById("key")];

function tell(kind, text) {
  status.dataset.state = kind;
  document.body.classList.toggle("stale", kind !== "live" && kind !== "draining");
  write(status, text);
}

let steps = 0;
let isNamed = false; // whether the model is the one that the server has now

/** Forget the past where counts have begun anew: the server is another run. */
function checkRun(engines) {
  const sum = Object.values(engines).reduce((total, engine) => total + engine.steps, 0);
  if (sum < steps) {
    latency.clear();
    timeline.clear();
  }
  steps = sum;
}

async function poll() {
  const [told, { requests }] = await Promise.all([server.get("engines"), server.get("requests")]);
  const now = performance.now();
  if (!isNamed) {
    const { data } = await server.get("v1/models");
    write(model, data[0].id);
    document.title = `${data[0].id} · pdjax`;
    isNamed = true;
  }
  checkRun(told.engines);
  state.show(told, latency.show(requests, now));
  timeline.show(requests, now);
  if (status.dataset.state === "locked") access.open = false;
  access.hidden = !server.hasKey;
  tell(told.draining ? "draining" : "live", told.draining ? "draining: no further requests" : "live");
}

function failed(error, wait) {
  isNamed = false;
  const again = `next try in ${duration(wait)}`;
  if (error instanceof Refused && error.status === 401) {
    access.hidden = false;
    access.open = true;
    tell("locked", server.hasKey ? "this key is not known" : "an API key is needed");
  } else if (error instanceof Refused && error.code === "loading") {
    tell("waiting", `the model is loading, ${again}`);
  } else if (error instanceof Refused) {
    tell("gone", `${error.message}; ${again}`);
  } else if (error instanceof Gone) {
    tell("gone", `server gone, ${again}`);
  } else {
    console.error(error);
    tell("gone", `this page failed: ${error.message}; ${again}`);
  }
}

const polls = new Polls(poll, failed);
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  server.key = key.value;
  polls.now();
});
polls.now();
