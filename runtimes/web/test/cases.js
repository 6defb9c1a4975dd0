// What Python wrote for one test file: numbers and bytes are base64.
import { readFileSync } from "node:fs";
import { join } from "node:path";

const folder = process.env.VLM_WEB_CASES;
if (!folder) throw new Error("set VLM_WEB_CASES to the folder that tests/test_web_node.py writes");

export function casesOf(topic) {
  const cases = JSON.parse(readFileSync(join(folder, `${topic}.json`), "utf-8"));
  if (Array.isArray(cases) && cases.length === 0) throw new Error(`${topic}.json holds no cases`);
  return cases;
}

export function bytes(text) {
  return new Uint8Array(Buffer.from(text, "base64"));
}

export function floats(text) {
  return new Float32Array(bytes(text).buffer);
}

export function picture({ width, height, data }) {
  return { width, height, data: bytes(data) };
}

/** The largest difference of two arrays of one length. */
export function apart(one, other) {
  if (one.length !== other.length) return Infinity;
  return one.reduce((most, value, i) => Math.max(most, Math.abs(value - other[i])), 0);
}

/** All pieces and the whole answer of a generator. */
export async function heard(pieces) {
  const said = [];
  for (;;) {
    const next = await pieces.next();
    if (next.done) return { said, answer: next.value };
    said.push(next.value);
  }
}
