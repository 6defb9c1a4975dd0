import assert from "node:assert/strict";
import test from "node:test";
import { PromptError } from "../dist/errors.js";
import { render, userMessage } from "../dist/prompt.js";
import { casesOf } from "./cases.js";

const cases = casesOf("prompts");

for (const { name, prompt, messages, expected } of cases) {
  const text = JSON.stringify(messages).slice(0, 60);
  if (expected === null) {
    test(`${name} refuses ${text} in one line`, () => {
      assert.throws(
        () => render(messages, prompt),
        (error) => error instanceof PromptError && !error.message.includes("\n"),
      );
    });
  } else {
    test(`${name} writes ${text} as Python does`, () => assert.equal(render(messages, prompt), expected));
  }
}

test("pictures stand where the text places them, as in Python", () => {
  const { prompt } = cases[0];
  assert.deepEqual(userMessage(" \n<image>\n What?", 1, prompt).content, [
    { type: "image" },
    { type: "text", text: "What?" },
  ]);
  assert.deepEqual(userMessage("A <image> b", 1, prompt).content, [
    { type: "text", text: "A " },
    { type: "image" },
    { type: "text", text: " b" },
  ]);
});

test("more or fewer places than pictures are refused with both numbers", () => {
  const { prompt } = cases[0];
  assert.throws(() => userMessage("<image><image>", 1, prompt), /has 2 <image>, but 1 image was given/);
});
