// The page: what is asked goes to the server, what it answers is shown while it comes.

import { ApiError, describe, stream } from "./api.js";
import { dropAndPaste, tray } from "./pictures.js";
import { keepKey, key, sampling, settings, settingsDialog } from "./settings.js";
import { addTurn, append, begin, finish, mark, messages, say } from "./turns.js";

const BUSY_TRIES = 3;
const byId = (id) => document.getElementById(id);
const question = byId("question");
const pictures = tray(byId("tray"), announce, problem);

let model = null; // of /v1/models
let turns = [];
let running = null; // the AbortController of the answer that is made

/** Tell a screen reader. */
function announce(text) {
  byId("announce").textContent = text;
}

/** A mistake in what was given, over the question; "" takes it away. */
function problem(text) {
  byId("problem").textContent = text;
}

/** What is served: its name, engines by part, precision, context. */
async function introduce() {
  try {
    model = await describe(key());
    byId("key-form").hidden = true;
    byId("model").textContent = model.id;
    document.title = `${model.id}: ask about a picture`;
    facts(model);
    return true;
  } catch (error) {
    if (error.status === 401) askForKey();
    else problem(error.message);
    return false;
  }
}

const PARTS = { vision_encoder: "vision", projector: "projector", language_model: "language" };

function facts({ engines = {}, precisions = {}, max_context: context }) {
  const known = Object.keys(PARTS).filter((part) => part in engines);
  const kinds = new Map(); // "onnx int8" → the parts that run so
  for (const part of known) {
    const kind = [engines[part], precisions[part]].filter(Boolean).join(" ");
    kinds.set(kind, [...(kinds.get(kind) ?? []), PARTS[part]]);
  }
  const each = [...kinds].map(([kind, parts]) => (kinds.size === 1 ? kind : `${parts.join(" and ")} ${kind}`));
  const room = context ? [`context ${context.toLocaleString("en")} tokens`] : [];
  byId("facts").replaceChildren(
    ...[...each, ...room].map((text) => Object.assign(document.createElement("span"), { textContent: text })),
  );
}

function askForKey() {
  const form = byId("key-form");
  if (key()) problem("The server refuses this API key.");
  form.hidden = false;
  byId("key").focus();
}

byId("key-form").onsubmit = async (event) => {
  event.preventDefault();
  problem("");
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  if (await introduce()) question.focus();
};

/** Ask what is written, with the waiting pictures. */
function ask() {
  const text = question.value.trim();
  if (running) return;
  if (!text) {
    problem(pictures.empty ? "" : "Write a question about the picture.");
    question.focus();
    return;
  }
  problem("");
  byId("welcome").hidden = true;
  turns.push(addTurn(byId("turns"), text, pictures.take(), run));
  question.value = "";
  grow();
  run(turns.at(-1));
}

/** One answer to `turn`, the last; asked again where the server is busy. */
async function run(turn) {
  const controller = new AbortController();
  running = controller;
  begin(turn);
  mark(turns, true);
  buttons();
  question.focus();
  follow(true);
  announce("Answering");
  const body = {
    model: model?.id ?? "",
    messages: messages(turns, turn, settings().system),
    stream: true,
    stream_options: { include_usage: true },
    ...sampling(settings()),
  };
  const end = {};
  let how = "failed";
  try {
    if (!model && !(await introduce())) throw new ApiError("The server was not asked: it needs an API key or is away.");
    body.model = model.id;
    how = await patiently(turn, body, end, controller.signal);
  } catch (error) {
    how = error.name === "AbortError" ? "stopped" : "failed";
    if (how === "failed") end.message = error.message;
    if (error.status === 401) askForKey();
  }
  if (!turns.includes(turn)) return; // a new chat began meanwhile
  running = null;
  const bottom = atBottom();
  finish(turn, how, end);
  mark(turns, false);
  buttons();
  follow(bottom);
  announce(end.message ?? (how === "stopped" ? `Stopped. ${turn.text}` : turn.text));
}

/** `answer`, again after as long as a busy server asks for; returns how it ended. */
async function patiently(turn, body, end, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await answer(turn, body, end, signal);
    } catch (error) {
      if (error.status !== 429 || tries > BUSY_TRIES) throw error;
      await countdown(error.retryAfter || 1, signal, (left) =>
        say(turn, `The server is busy. Asking again in ${left} s (${tries} of ${BUSY_TRIES}).`),
      );
    }
  }
}

/** Stream one answer into `turn`; `end` gets timings and usage; returns the finish_reason. */
async function answer(turn, body, end, signal) {
  let how = "stop";
  const started = performance.now();
  const clock = setInterval(() => say(turn, `Working, ${Math.round((performance.now() - started) / 1000)} s`), 1000);
  say(turn, "Working");
  try {
    for await (const chunk of stream(body, key(), signal)) {
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) {
        clearInterval(clock);
        if (!turn.text) say(turn, "");
        const bottom = atBottom();
        append(turn, choice.delta.content);
        follow(bottom);
      }
      how = choice?.finish_reason ?? how;
      end.usage = chunk.usage ?? end.usage;
      end.timings = chunk.timings_ms ?? end.timings;
    }
  } finally {
    clearInterval(clock);
  }
  const full = end.usage?.total_tokens >= model.max_context;
  return how === "length" && full ? "context" : how;
}

/** Wait for `seconds`, telling each; rejects with AbortError when stopped. */
function countdown(seconds, signal, tell) {
  return new Promise((resolve, reject) => {
    const until = performance.now() + seconds * 1000;
    const over = (settle, value) => {
      clearInterval(clock);
      settle(value);
    };
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      if (left > 0) tell(left);
      else over(resolve);
    };
    const clock = setInterval(tick, 250);
    signal.addEventListener("abort", () => over(reject, signal.reason), { once: true });
    tick();
  });
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  for (const turn of turns) for (const picture of turn.pictures) URL.revokeObjectURL(picture.preview);
  turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  problem("");
  announce("New chat");
  buttons();
  question.focus();
}

function buttons() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function atBottom() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
}

function follow(wanted) {
  if (wanted) scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}

/** The field is as high as its text, up to what the style sheet allows. */
function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
question.oninput = grow;
question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter picks a character
  event.preventDefault();
  ask();
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) stop();
});
byId("stop").onclick = () => {
  stop();
  question.focus();
};
byId("new-chat").onclick = newChat;
byId("add").onclick = byId("choose").onclick = () => byId("files").click();
byId("files").onchange = async (event) => {
  await add([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
};

async function add(files) {
  await pictures.add(files);
  question.focus();
}

dropAndPaste(add);
settingsDialog(() => location.reload());
introduce();
