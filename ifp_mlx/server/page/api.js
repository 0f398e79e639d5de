// Requests to the server that sent this page, with the key if it asks for one.

import { byId } from "./elements.js";

const KEY = "ifp-api-key";
let asking = null; // one dialog for all requests that are refused together

export class Refused extends Error {}

/** Send a request; ask for a key and try again where one is missing. Throws Refused otherwise. */
export async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("the server does not answer; is it still running?");
    }
    if (response.ok) return response;
    const problem = await reasonOf(response);
    if (response.status !== 401) throw new Refused(problem);
    if (!(await askForKey(key ? problem : ""))) throw new Refused(problem);
  }
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function postJson(path, body, signal) {
  return send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

/** Yield the objects of a stream of server-sent events, until it says that it is done. */
export async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused("the answer broke off: the server closed the connection");
    waiting += decoder.decode(value, { stream: true });
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

/** Return whether a key was given. */
function askForKey(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    let isGiven = false;
    byId("key-problem").textContent = problem;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key").value);
      byId("key").value = "";
      isGiven = true;
      dialog.close();
    };
    dialog.onclose = () => {
      asking = null;
      resolve(isGiven);
    };
    dialog.showModal();
  });
  return asking;
}
