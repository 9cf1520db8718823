// Asks a server with OpenAI's Node client: a line of JSON in, {name, body}, is a line of JSON out,
// {told} or {error}. The first argument is the server's base URL.

import { createInterface } from "node:readline";

import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });

async function answer(made) {
  if (!(Symbol.asyncIterator in made)) return made;
  const chunks = [];
  for await (const chunk of made) chunks.push(chunk);
  return chunks;
}

const asks = {
  chat: async (body) => answer(await client.chat.completions.create(body)),
  helper: async (body) => client.chat.completions.stream(body).finalChatCompletion(),
  completion: async (body) => answer(await client.completions.create(body)),
  response: async (body) => client.responses.stream(body).finalResponse(),
  models: async () => (await client.models.list()).data,
  many: async (bodies) => Promise.all(bodies.map((body) => asks.helper(body))),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { name, body } = JSON.parse(line);
  let told;
  try {
    told = { told: await asks[name](body) };
  } catch (error) {
    const { status, code, param, message } = error;
    told = { error: { name: error.constructor.name, status, code, param, message } };
  }
  console.log(JSON.stringify(told));
}
