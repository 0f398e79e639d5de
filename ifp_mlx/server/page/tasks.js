// The tasks: which one answers, what each takes, what they have in common.

import { getJson, postJson } from "./api.js";
import { byId, make, megabytes, percent } from "./elements.js";

const WHOLE = "the whole model";
const MOST_DESCRIBED = 8; // that the server tells of at a time
const described = []; // tasks of this tab

let known = null; // what the server last said
let chosenId = null;

/** Return the chosen task as {id, name, fields, keepsAll}; null before the server has answered. */
export function chosenTask() {
  return known && choices().find((choice) => choice.id === chosenId);
}

/** Return every task that leaves something out: what others can be compared with. */
export function comparedTasks() {
  return known.tasks.filter((task) => !task.error && task.num_kept_units < known.num_units);
}

/** Whether a router chooses among the units for each token. */
export const isMixture = () => known.is_mixture;

/** Ask the server for the tasks and show them. Throws Refused. */
export async function refreshTasks(changed) {
  const query = new URLSearchParams(described.map((text) => ["task", text]));
  known = await getJson(`/ifp/tasks?${query}`);
  if (!chosenTask()) {
    const usual = known.default === "dense" ? known.tasks[0]?.id : known.default;
    chosenId = usual ?? known.whole.id;
  }
  byId("model").textContent = known.model;
  document.title = `${known.model} · ifp`;
  byId("held").textContent =
    `the server holds ${megabytes(known.memory_bytes)} with all tasks and caches, ` +
    `${megabytes(known.memory_peak_bytes)} at its peak`;
  showChoices(changed);
  showMemory();
  showOverlaps();
}

/** Add a task that is described here, and choose it. Throws Refused. */
export async function addTask(text, changed) {
  await postJson("/ifp/select", { task: text });
  if (!described.includes(text)) described.push(text);
  if (described.length > MOST_DESCRIBED) described.shift();
  await refreshTasks(changed);
  chosenId = text;
  showChoices(changed);
  showMemory();
  changed();
}

function choices() {
  const tasks = known.tasks.map((task) => ({
    id: task.id,
    name: task.id,
    task,
    fields: task.model ? { model: task.model } : { model: known.model, task: task.id },
  }));
  const { id, model } = known.whole;
  return [...tasks, { id, name: WHOLE, task: known.whole, fields: { model } }];
}

function showChoices(changed) {
  const focused = document.activeElement?.name === "task";
  byId("task-list").replaceChildren(
    ...choices().map(({ id, name, task }) => {
      const radio = make("input", { type: "radio", name: "task", value: id });
      radio.checked = id === chosenId;
      radio.disabled = Boolean(task.error);
      radio.addEventListener("change", () => {
        chosenId = id;
        showMemory();
        changed();
      });
      const facts = make("span", { className: "facts" }, factsOf(task));
      const text = make("span", { className: "choice" }, make("span", { className: "name" }, name));
      if (task.description && task.description !== name) {
        text.append(make("span", { className: "quiet" }, task.description));
      }
      text.append(facts);
      return make("label", {}, radio, text);
    }),
  );
  if (focused) byId("task-list").querySelector("input:checked")?.focus();
}

function factsOf(task) {
  if (task.error) return task.error;
  const facts = [megabytes(task.bytes)];
  if (task !== known.whole) facts.push(`${percent(task.num_kept_units / known.num_units)} of units`);
  if (task.tokens_per_s) facts.push(`${Math.round(task.tokens_per_s)}\u00a0tokens/s`);
  return facts.join(" · ");
}

function showMemory() {
  const { name, task } = chosenTask();
  const bars = [["whole model", known.whole.bytes]];
  if (task !== known.whole && task.bytes) bars.push([name, task.bytes]);
  byId("memory").replaceChildren(
    ...bars.flatMap(([label, bytes]) => {
      const bar = make("span", { className: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--share", bytes / known.whole.bytes);
      return [make("dt", {}, label), make("dd", {}, bar, make("span", {}, megabytes(bytes)))];
    }),
  );
}

function showOverlaps() {
  const names = known.overlap_names;
  byId("comparison").hidden = names.length < 2;
  const kept = known.tasks.filter((task) => !task.error).map((task) => task.num_kept_units);
  const chance = Math.max(...kept) / known.num_units;
  byId("overlaps-text").textContent =
    `Share of ${known.unit_label} in common; random ones would have ${chance.toFixed(2)}.`;
  const [head, body] = byId("overlaps").children;
  const columns = names.map((name, index) =>
    make("th", { scope: "col", title: name, "aria-label": name }, String(index + 1)),
  );
  head.replaceChildren(make("tr", {}, make("td"), ...columns));
  body.replaceChildren(
    ...known.overlaps.map((row, index) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `${index + 1} ${names[index]}`),
        ...row.map((share) => {
          const cell = make("td", {}, share.toFixed(2));
          const above = chance < 1 ? Math.max(0, (share - chance) / (1 - chance)) : 0;
          cell.style.setProperty("--share", above);
          return cell;
        }),
      ),
    ),
  );
}
