// The conversation: each turn is a question with pictures and its answer, shown as it comes.

import { figure } from "./pictures.js";
import { element, took } from "./took.js";

const WIDE = "(min-width: 58rem)";
const ENDS = {
  length: "Cut off at the longest answer that the settings allow.",
  context: "Cut off: the context of the model is full. Begin a new chat.",
  stopped: "Stopped.",
};

/** A turn in the list `parent`; `retry` is called when its button is pressed. */
export function addTurn(parent, question, pictures, retry) {
  const node = element("article", "turn");
  const shown = element("div", "pictures");
  shown.append(...pictures.map((picture, i) => figure(picture, i + 1)));
  const asked = element("h2", "question", question);
  asked.dir = "auto";
  const margin = element("div", "margin");
  const answer = element("div", "answer");
  const words = element("p", "words");
  words.dir = "auto";
  const state = element("p", "state");
  const again = element("button", "link", "Retry");
  again.type = "button";
  again.hidden = true;
  answer.append(words, state, again);
  const said = element("div", "said");
  said.append(asked, answer);
  node.append(shown, said, margin);
  parent.append(node);
  const turn = { question, pictures, text: "", status: "asking", node, words, state, margin, again };
  again.onclick = () => retry(turn);
  return turn;
}

/** Before the first and each further attempt: nothing said, nothing measured. */
export function begin(turn) {
  turn.text = "";
  turn.status = "asking";
  turn.words.replaceChildren(document.createTextNode(""));
  turn.margin.replaceChildren();
  turn.node.setAttribute("aria-busy", "true");
  turn.node.classList.remove("failed");
  say(turn, "");
}

/** A piece of the answer. */
export function append(turn, piece) {
  turn.text += piece;
  turn.words.firstChild.appendData(piece); // a text node: whatever it holds stays text
}

/** The line under the answer: what is waited for, or how it ended. */
export function say(turn, text, wrong = false) {
  turn.state.textContent = text;
  turn.state.classList.toggle("wrong", wrong);
}

/** The end of an answer: "stop", "length", "context", "stopped", or "failed" with a message. */
export function finish(turn, how, { message = "", timings, usage } = {}) {
  turn.node.removeAttribute("aria-busy");
  turn.status = how;
  turn.node.classList.toggle("failed", !counts(turn));
  const empty = turn.text || how === "failed" || how === "stopped" ? "" : "(an empty answer)";
  say(turn, message || ENDS[how] || empty, how === "failed");
  const measured = took(timings, usage, matchMedia(WIDE).matches);
  if (measured) turn.margin.replaceChildren(measured);
}

/** Whether a turn is part of what the model is told: one without a whole or broken-off answer is not. */
function counts(turn) {
  return turn.status !== "failed" && (turn.text !== "" || turn.status !== "stopped");
}

/** Only the last turn can be retried; one before it that was never answered is marked as left out. */
export function mark(turns, busy) {
  turns.forEach((turn, i) => {
    const last = i === turns.length - 1;
    turn.again.hidden = busy || !last;
    const left = !last && !counts(turn);
    if (left && !turn.node.classList.contains("left-out")) say(turn, `${turn.state.textContent} Left out.`.trim());
    turn.node.classList.toggle("left-out", left);
  });
}

/** The messages of OpenAI's API: the system's, the turns before `turn` that were answered, and `turn` itself. */
export function messages(turns, turn, system) {
  const made = system ? [{ role: "system", content: system }] : [];
  for (const one of turns.slice(0, turns.indexOf(turn)).filter(counts)) {
    made.push({ role: "user", content: content(one) }, { role: "assistant", content: one.text });
  }
  return [...made, { role: "user", content: content(turn) }];
}

function content(turn) {
  const pictures = turn.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return [...pictures, { type: "text", text: turn.question }];
}
