import assert from "node:assert/strict";
import test from "node:test";
import { CheckError, InputError } from "../dist/errors.js";
import { Sampler } from "../dist/sampling.js";
import { casesOf, floats } from "./cases.js";

for (const { settings, logits, expected } of casesOf("sampling")) {
  test(`${JSON.stringify(settings)} draws Python's tokens`, () => {
    const sampler = new Sampler(settings);
    const previous = [3, 5];
    const rows = floats(logits);
    for (let n = 0; n < 6; n++) previous.push(sampler.pick(rows.subarray(n * 1500, (n + 1) * 1500), previous));
    assert.deepEqual(previous.slice(2), expected);
  });
}

test("logits that are not numbers are an error, not a token", () => {
  for (const value of [NaN, Infinity]) {
    const logits = Float32Array.of(1, value, 2);
    assert.throws(() => new Sampler({}).pick(logits, []), CheckError);
    assert.throws(() => new Sampler({ temperature: 1 }).pick(logits, []), CheckError);
  }
});

test("without a seed answers differ", () => {
  const logits = new Float32Array(4096);
  const drawn = Array.from({ length: 4 }, () => new Sampler({ temperature: 1 }).pick(logits, []));
  assert.ok(new Set(drawn).size > 1);
});

test("a value out of range says what is allowed", () => {
  const cases = [{ temperature: -1 }, { topK: 1.5 }, { topP: 0 }, { minP: 2 }, { repetitionPenalty: 0 }, { seed: -1 }];
  for (const wrong of cases) {
    const [[name, value]] = Object.entries(wrong);
    assert.throws(
      () => new Sampler(wrong),
      (error) => error instanceof InputError && error.message.startsWith(`${name} is ${value}: it must be `),
    );
  }
});
