// The page: tasks, a conversation, and the picture of what answers.

import { Refused } from "./api.js";
import { startChat } from "./chat.js";
import { byId } from "./elements.js";
import { showPicture, showRouting, startPicture } from "./picture.js";
import { addTask, chosenTask, refreshTasks } from "./tasks.js";

const status = byId("status");

/** Show why something was refused, where answers to what was done are read. */
async function told(work) {
  try {
    await work;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    status.textContent = error.message;
  }
}

byId("describe").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = byId("description");
  const text = input.value.trim();
  if (!text) return;
  status.textContent = `selecting for ${text}…`;
  await told(
    addTask(text, showPicture).then(() => {
      status.textContent = `${text} answers now`;
      input.value = "";
    }),
  );
});

const drawRouting = () => told(showRouting());
startChat(chosenTask, drawRouting, () => told(refreshTasks(showPicture)).then(drawRouting));
await told(refreshTasks(showPicture).then(showPicture));
startPicture();
byId("prompt").focus();
