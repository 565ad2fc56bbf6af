// SPDX-License-Identifier: Apache-2.0
// What is asked of the server, by the same routes and in the same words as by any other client.

const FIELD = "ficoco-api-key"; // in this tab's storage

/** Where the server is, with a slash at its end; behind a proxy there may be a path before it. */
export const base = new URL(".", document.baseURI).href;

export const key = () => sessionStorage.getItem(FIELD) ?? "";

export function keep(text) {
  if (text) sessionStorage.setItem(FIELD, text);
  else sessionStorage.removeItem(FIELD);
}

/** An answer that is none: the status, the server's words, and when to come again. */
export class Refusal extends Error {
  constructor(response, text) {
    let said = null;
    try {
      said = JSON.parse(text).error;
    } catch { /* a proxy's page */ }
    super(said?.message ?? said ?? `${response.status} ${response.statusText}`);
    this.status = response.status;
    this.after = Number(response.headers.get("Retry-After")) || 1; // seconds
  }
}

/** GET a path, or POST a body to it. */
export async function call(path, body, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(base + path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (!response.ok) throw new Refusal(response, await response.text());
  return response;
}

export const json = async (...asked) => (await call(...asked)).json();

/** The events of a stream, one after the other. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line.startsWith("data: [DONE]")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** The values of /metrics: of a series, with the labels that hold a text. */
export async function metrics() {
  const samples = [];
  for (const line of (await (await call("metrics")).text()).split("\n")) {
    const found = /^(vllm[\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (found) samples.push([found[1], found[2] ?? "", Number(found[3])]);
  }
  return (name, label = "") => samples
    .filter(([other, labels]) => other === name && labels.includes(label))
    .map(([, , value]) => value);
}
