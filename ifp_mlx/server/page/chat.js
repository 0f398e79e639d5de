// The conversation: sends it, shows the answer as it comes, stops it.

import { Refused, events, postJson } from "./api.js";
import { byId, make } from "./elements.js";

const log = byId("messages");
const status = byId("status");
const prompt = byId("prompt");

let conversation = [];
let stopping = null; // an AbortController while an answer comes

/**
 * Make the conversation work.
 *
 * chosen: returns the task that answers, as {name, fields}: what it is called, and what a request
 * for it says. answering: called about every second while an answer comes, and answered after it.
 */
export function startChat(chosen, answering, answered) {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(chosen(), answering, answered);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopping?.abort();
  });
  byId("stop").addEventListener("click", () => stopping?.abort());
  byId("anew").addEventListener("click", () => {
    stopping?.abort();
    conversation = [];
    log.replaceChildren();
    status.textContent = "a new conversation";
    prompt.focus();
  });
}

async function ask(task, answering, answered) {
  const text = prompt.value.trim();
  if (!text || stopping || !task) return;
  const mine = conversation; // a new conversation may begin before the answer ends
  mine.push({ role: "user", content: text });
  prompt.value = "";
  show("you", text, "user");
  const answer = new Answer(task.name);
  stopping = new AbortController();
  byId("stop").disabled = false;
  status.textContent = "reading…";
  const clock = setInterval(answering, 1000);
  try {
    await answer.read(task.fields, mine, stopping.signal);
    status.textContent = "done";
  } catch (error) {
    if (error.name === "AbortError") {
      status.textContent = "stopped";
      answer.note("stopped");
    } else {
      status.textContent = "";
      answer.fail(error instanceof Refused ? error.message : String(error));
    }
  }
  clearInterval(clock);
  stopping = null;
  byId("stop").disabled = true;
  if (answer.text) {
    mine.push({ role: "assistant", content: answer.text });
  } else {
    mine.pop(); // what got no answer can be sent again
    prompt.value ||= text;
  }
  answer.end();
  answered();
}

/** One answer in the log. */
class Answer {
  constructor(name) {
    this.text = "";
    this.thought = "";
    this.body = show(name, "", "assistant");
    this.body.setAttribute("aria-busy", "true"); // read out when it is whole, not word by word
    this.facts = make("p", { className: "facts" });
    this.body.after(this.facts);
    this.isDrawn = true;
  }

  async read(fields, messages, signal) {
    const body = { ...fields, messages, stream: true, stream_options: { include_usage: true } };
    const begun = performance.now();
    let first = null;
    const response = await postJson("/v1/chat/completions", body, signal);
    for await (const event of events(response)) {
      const delta = event.choices?.[0]?.delta ?? {};
      if (delta.content || delta.reasoning_content) {
        if (first === null) {
          first = performance.now();
          status.textContent = "writing…";
        }
        this.text += delta.content ?? "";
        this.thought += delta.reasoning_content ?? "";
        this.draw();
      }
      if (event.choices?.[0]?.finish_reason === "length") this.note("cut off: longest answer");
      if (event.usage) this.count(event.usage, begun, first);
    }
  }

  count(usage, begun, first) {
    const tokens = usage.completion_tokens;
    const seconds = (performance.now() - first) / 1000;
    this.note(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
    if (first === null) return;
    this.note(`first after ${((first - begun) / 1000).toFixed(1)} s`);
    if (tokens > 1 && seconds > 0) this.note(`${((tokens - 1) / seconds).toFixed(0)} tokens/s`);
  }

  note(fact) {
    this.facts.textContent += (this.facts.textContent ? " · " : "") + fact;
  }

  fail(reason) {
    this.facts.after(make("p", { className: "problem", role: "alert" }, reason));
  }

  /** Show what there is, at most once a frame. */
  draw() {
    if (!this.isDrawn) return;
    this.isDrawn = false;
    requestAnimationFrame(() => this.end(false));
  }

  end(isWhole = true) {
    const wasAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this.isDrawn = true;
    const thought = this.thought && make("p", { className: "thought" }, this.thought);
    this.body.replaceChildren(...(thought ? [thought] : []), ...paragraphs(this.text));
    if (isWhole) this.body.removeAttribute("aria-busy");
    if (wasAtEnd) log.scrollTop = log.scrollHeight;
  }
}

/** Return elements for a text in which lines of ``` begin and end code. */
function paragraphs(text) {
  return text.split(/^ *```.*\n?/m).flatMap((part, index) => {
    if (!part.trim()) return [];
    const isCode = index % 2 === 1;
    return [isCode ? make("pre", {}, make("code", {}, part)) : make("p", {}, part.trim())];
  });
}

function show(who, text, role) {
  const body = make("div", { className: "body" }, ...paragraphs(text));
  log.append(make("article", { className: role }, make("h3", {}, who), body));
  log.scrollTop = log.scrollHeight;
  return body;
}
