import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import test, { after, afterEach, before } from "node:test";
import { BundleError, load } from "../dist/index.js";
import { casesOf } from "./cases.js";

const { folder } = casesOf("bundle");
const original = (name) => readFileSync(join(folder, name));
const manifest = JSON.parse(original("manifest.json"));
let url, change, asked;

const server = createServer((request, response) => {
  const name = request.url.slice(1).split("?")[0];
  asked.push(name);
  const answer = { status: 200, type: "application/octet-stream", body: null, ...change[name] };
  try {
    answer.body ??= original(name);
  } catch {
    answer.status = 404;
  }
  response.writeHead(answer.status, { "Content-Type": answer.type });
  if (answer.cut) {
    response.write(answer.body.subarray(0, answer.cut), () => response.destroy());
    return;
  }
  response.end(answer.body ?? "");
});

/** The Cache API as far as the reader needs it. */
class Store {
  kept = new Map();
  async open() {
    return this;
  }
  async match(key) {
    return this.kept.get(key)?.clone();
  }
  async put(key, response) {
    this.kept.set(key, response);
  }
  async delete(key) {
    return this.kept.delete(key);
  }
}

before(async () => {
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  url = `http://127.0.0.1:${server.address().port}`;
  [change, asked] = [{}, []];
});
afterEach(() => {
  [change, asked] = [{}, []];
  delete globalThis.caches;
});
after(() => server.close());

const page = { type: "text/html; charset=utf-8", body: "<!doctype html><title>Not here</title>" };
const json = (changes) => ({ body: JSON.stringify({ ...manifest, ...changes }) });
const table = "embedding.bin";
const TROUBLES = {
  "a page in place of the manifest": [{ "manifest.json": page }, /is a web page.*address of the bundle's folder/],
  "a page without a type": [{ "manifest.json": { body: page.body } }, /is a web page, not a manifest/],
  "a page in place of a file": [{ [table]: page }, /embedding.bin is a web page/],
  "no manifest": [{ "manifest.json": { status: 404 } }, /manifest.json answered 404/],
  "a manifest that is cut off": [
    { "manifest.json": { body: original("manifest.json").subarray(0, 99) } },
    /not valid JSON/,
  ],
  "another JSON file": [{ "manifest.json": { body: "{}" } }, /is not a vlm-export manifest/],
  "a list": [{ "manifest.json": { body: "[]" } }, /is not a vlm-export manifest/],
  "a later version": [{ "manifest.json": json({ version: 2 }) }, /version 2, this runtime reads version 1/],
  "no files": [{ "manifest.json": json({ files: undefined }) }, /files is missing/],
  "no parts": [{ "manifest.json": json({ parts: {} }) }, /parts are/],
  "a file outside": [{ "manifest.json": json({ tokenizer: "../secret" }) }, /tokenizer names '..\/secret'/],
  "another engine": [
    { "manifest.json": json({ parts: renamed(manifest.parts, "gguf") }) },
    /has its vision_encoder for gguf: export with --target onnx/,
  ],
  "a short file": [{ [table]: { body: original(table).subarray(0, 100) } }, /has 100 bytes instead of/],
  "a long file": [{ [table]: { body: Buffer.concat([original(table), Buffer.alloc(9)]) } }, /has more than \d+ bytes/],
  "a file that breaks off": [{ [table]: { cut: 50 } }, /broke off after \d+ bytes/],
  "a damaged file": [{ [table]: { body: damaged(original(table)) } }, /embedding.bin does not match its sha256/],
  "a tokenizer that is none": [
    { "manifest.json": json({ tokenizer: table }) },
    /the tokenizer cannot be read/,
  ],
  "a graph that is none": [
    { "manifest.json": json({ parts: { ...manifest.parts, projector: graphOf(table) } }) },
    /the projector cannot be opened by ONNX Runtime/,
  ],
  "a part of another model": [
    { "manifest.json": json({ spec: { ...manifest.spec, fingerprint: "0".repeat(64) } }) },
    /is a part of another model/,
  ],
};

function renamed(parts, engine) {
  return Object.fromEntries(Object.entries(parts).map(([name, { onnx }]) => [name, { [engine]: onnx }]));
}

function damaged(bytes) {
  const out = Buffer.from(bytes);
  out[7] ^= 1;
  return out;
}

function graphOf(file) {
  return { onnx: { graph: file, files: [file], precision: "fp32" } };
}

for (const [name, [wrong, message]] of Object.entries(TROUBLES)) {
  test(`${name} is refused in one line`, async () => {
    change = wrong;
    await assert.rejects(load(url, { threads: 1 }), (error) => {
      assert.ok(error instanceof BundleError, String(error.stack));
      assert.match(error.message, message);
      assert.ok(!error.message.includes("\n"));
      return true;
    });
  });
}

test("a server that is not there is named", async () => {
  await assert.rejects(load("http://127.0.0.1:9/bundle"), /:9\/bundle\/manifest.json cannot be fetched/);
});

test("options out of range say what is allowed", async () => {
  await assert.rejects(load(url, { threads: 0 }), /threads is 0: it must be 1 or more/);
  await assert.rejects(load(url, { executionProviders: ["cuda"] }), /choose one of wasm, webgpu/);
});

test("progress reaches the sum of all files and never goes back", async () => {
  const seen = [];
  const model = await load(new URL(`${url}/manifest.json`), { threads: 1, onProgress: (one) => seen.push({ ...one }) });
  const total = asked.slice(1).reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  assert.deepEqual(seen.at(-1), { file: seen.at(-1).file, loaded: total, total });
  assert.ok(seen.every((one, i) => i === 0 || one.loaded >= seen[i - 1].loaded));
  const answer = await model.answer("What colour is it?", { maxNewTokens: 3 });
  assert.equal(answer.tokenIds.length, 3);
  await model.dispose();
});

test("kept files are not fetched again, and a damaged copy is", async () => {
  const store = (globalThis.caches = new Store());
  await (await load(url, { threads: 1 })).dispose();
  const first = asked.length;
  asked = [];
  await (await load(url, { threads: 1 })).dispose();
  assert.deepEqual(asked, ["manifest.json"]);
  assert.equal(store.kept.size, first - 1);
  const key = [...store.kept.keys()].find((one) => one.includes(table));
  store.kept.set(key, new Response(damaged(original(table))));
  asked = [];
  await (await load(url, { threads: 1 })).dispose();
  assert.deepEqual(asked, ["manifest.json", table]);
});

test("a file that arrives damaged is not kept", async () => {
  const store = (globalThis.caches = new Store());
  change = { [table]: { body: damaged(original(table)) } };
  await assert.rejects(load(url, { threads: 1 }), /does not match its sha256/);
  assert.ok(![...store.kept.keys()].some((key) => key.includes(table)));
  change = {};
  await (await load(url, { threads: 1 })).dispose();
});
