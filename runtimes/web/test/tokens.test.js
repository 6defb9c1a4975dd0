import assert from "node:assert/strict";
import test from "node:test";
import { BundleError, PromptError } from "../dist/errors.js";
import { TextStream } from "../dist/text.js";
import { Tokenizer } from "../dist/tokenizer.js";
import { casesOf } from "./cases.js";

const cases = casesOf("tokens");
const made = (tokenizer, prompt) => new Tokenizer(new TextEncoder().encode(JSON.stringify(tokenizer)), prompt);

for (const { name, tokenizer, prompt, texts } of cases) {
  test(`a tokenizer like ${name}'s gives Python's ids, texts and pieces`, () => {
    const ours = made(tokenizer, prompt);
    for (const { text, ids, decoded, pieces } of texts) {
      assert.deepEqual(ours.encode(text), ids, text);
      assert.equal(ours.decode(ids), decoded);
      const stream = new TextStream((some) => ours.decode(some));
      assert.deepEqual([...ids.map((id) => stream.push(id)), stream.finish()], pieces, text);
    }
  });
}

test("a tokenizer of another model is refused", () => {
  const { tokenizer, prompt } = cases[0];
  const other = { ...prompt, image_token_id: 1 };
  assert.throws(() => made(tokenizer, other), /do not belong together/);
  assert.throws(() => new Tokenizer(Uint8Array.of(123), prompt), BundleError);
});

test("text that is not Unicode is refused", () => {
  const { tokenizer, prompt } = cases[0];
  assert.throws(() => made(tokenizer, prompt).encode("a\ud800b"), PromptError);
});

test("stop strings are never shown, wherever the borders of tokens are", () => {
  const letters = (ids) => ids.map((id) => String.fromCharCode(id)).join("");
  const stream = new TextStream(letters, ["STOP", "TOP"]);
  const pieces = [..."to the STOPPED"].map((letter) => stream.push(letter.charCodeAt(0)));
  assert.equal(pieces.join(""), "to the ");
  assert.ok(stream.stopped);
  assert.equal(stream.finish(), "");
  const held = new TextStream(letters, ["STOP"]);
  assert.equal([..."a ST"].map((letter) => held.push(letter.charCodeAt(0))).join(""), "a ");
  assert.equal(held.finish(), "ST");
  assert.throws(() => new TextStream(letters, [""]), /an empty stop string/);
});
