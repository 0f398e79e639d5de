// The picture of the chosen task's sub-network, drawn by the server, and the same as a table.

import { Refused, getJson, send } from "./api.js";
import { byId, make, percent } from "./elements.js";
import { chosenTask, comparedTasks, isMixture } from "./tasks.js";

const ROUTED = "routed";
const AGAINST = "against:";

const image = byId("picture");
const text = byId("picture-text");
const shown = byId("shown");
let latest = 0; // answers to older questions are dropped

/** Keep the picture as wide as its place. */
export function startPicture() {
  shown.addEventListener("change", showPicture);
  let width = image.parentElement.clientWidth;
  new ResizeObserver(() => {
    const now = image.parentElement.clientWidth;
    if (now !== width) showPicture();
    width = now;
  }).observe(image.parentElement);
}

/** Draw again where tokens go, if that is what is shown. */
export async function showRouting() {
  if (shown.value !== ROUTED) return;
  const turn = latest;
  const picture = await drawn(new URLSearchParams({ task: chosenTask().task.id }));
  if (turn === latest) showImage(picture);
}

/** Show the chosen task: its scores, where its tokens go, or what it shares with another one. */
export async function showPicture() {
  const turn = ++latest;
  const { id, task, name } = chosenTask();
  const isPart = comparedTasks().some((other) => other.id === id);
  offer(name, isPart ? comparedTasks().filter((other) => other.id !== id) : []);
  if (!isPart && shown.value !== ROUTED) {
    show(null, { description: "Every unit runs: there is nothing to leave out.", layers: [] });
    return;
  }
  const query = new URLSearchParams({ task: task.id });
  if (shown.value.startsWith(AGAINST)) query.set("against", shown.value.slice(AGAINST.length));
  try {
    const [units, picture] = await Promise.all([getJson(`/ifp/units?${query}`), drawn(query)]);
    if (turn === latest) show(picture, units);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (turn === latest) show(null, { description: error.message, layers: [] });
  }
}

/** Return the picture that the server draws. */
async function drawn(query) {
  const wanted = new URLSearchParams(query);
  if (shown.value === ROUTED) wanted.set("routed", "1");
  wanted.set("width", Math.round(image.parentElement.clientWidth));
  return (await send(`/ifp/picture?${wanted}`)).blob();
}

/** Offer what can be shown of a task; what was shown before stays if it can. */
function offer(name, others) {
  const before = shown.value;
  const choices = others.map((other) => [AGAINST + other.id, `what it shares with ${other.id}`]);
  if (comparedTasks().some((task) => task.id === name)) choices.unshift(["score", "its scores"]);
  if (isMixture()) choices.unshift([ROUTED, "where its tokens go"]);
  shown.replaceChildren(...choices.map(([value, label]) => make("option", { value }, label)));
  shown.value = choices.some(([value]) => value === before) ? before : (choices[0]?.[0] ?? "");
  shown.parentElement.hidden = choices.length === 0;
}

function show(picture, units) {
  image.hidden = picture === null;
  showImage(picture);
  image.alt = units.description;
  text.textContent = picture === null ? units.description : "";
  byId("by-layer").hidden = picture === null;
  showLayers(units.layers);
}

function showImage(picture) {
  URL.revokeObjectURL(image.src);
  if (picture === null) image.removeAttribute("src");
  else image.src = URL.createObjectURL(picture);
}

function showLayers(layers) {
  const isCompared = layers[0]?.shared !== undefined;
  const headings = ["layer", "kept", ...(isCompared ? ["in common", "share"] : [])];
  byId("layers-head").replaceChildren(
    make("tr", {}, ...headings.map((heading) => make("th", { scope: "col" }, heading))),
  );
  byId("layers").replaceChildren(
    ...layers.map(({ layer, kept, shared }) => {
      const figures = [kept, ...(isCompared ? [shared, percent(shared / kept)] : [])];
      const cells = figures.map((figure) => make("td", {}, String(figure)));
      return make("tr", {}, make("th", { scope: "row" }, String(layer)), ...cells);
    }),
  );
}
