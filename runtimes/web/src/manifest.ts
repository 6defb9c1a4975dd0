/** manifest.json: what a bundle holds, checked before anything else of it is read. */
import { BundleError, oneLine } from "./errors.js";
import type { VLMSpec } from "./spec.js";

export interface FileEntry {
  sha256: string;
  bytes: number;
}

export interface Part {
  graph: string;
  files: string[];
  precision: string;
  details?: Record<string, unknown>;
}

/** `rows` × `columns` numbers, row after row, little-endian; I8 is multiplied by the float32 scale of its row. */
export interface Table {
  file: string;
  dtype: "F32" | "F16" | "BF16" | "I8";
  rows: number;
  columns: number;
  scales?: string | null;
}

export interface Manifest {
  format: "vlm-bundle";
  version: 1;
  created: string;
  spec: VLMSpec;
  max_context: number;
  embedding: Table;
  tokenizer: string;
  files: Record<string, FileEntry>;
  parts: Record<PartName, Record<string, Part>>;
  recipes: Record<string, string>;
  parity: Record<string, Parity>;
  golden?: string | null;
  tools?: Record<string, string>;
  image_newline?: string | null;
  notes?: string[];
}

export interface Parity {
  passed: boolean;
  stages: Record<string, { threshold?: Record<string, number>; [measure: string]: unknown }>;
}

export const NAME = "manifest.json";
export const PARTS = ["vision_encoder", "projector", "language_model"] as const;
export type PartName = (typeof PARTS)[number];
export const ITEM_BYTES = { F32: 4, F16: 2, BF16: 2, I8: 1 } as const;

const TEXTS = ["created", "tokenizer"];
const OBJECTS = ["spec", "embedding", "files", "parts", "recipes", "parity"];
const SPEC = ["vision", "projector", "language", "preprocess", "prompt"];

/** The manifest in `text`, found at `where`. Throws BundleError, one line, whatever is wrong with it. */
export function parseManifest(text: string, where: string): Manifest {
  if (/^\s*</.test(text)) {
    throw new BundleError(`${where} is a web page, not a manifest: give the address of the bundle's folder`);
  }
  let data: Record<string, unknown>;
  try {
    data = JSON.parse(text) as Record<string, unknown>;
  } catch (error) {
    throw new BundleError(`${where} is not valid JSON (${oneLine(error)}): is it whole? Copy it again`);
  }
  if (!isObject(data) || data.format !== "vlm-bundle") {
    throw new BundleError(`${where} is not a vlm-export manifest (no "format": "vlm-bundle"): export the model again`);
  }
  if (data.version !== 1) {
    const got = JSON.stringify(data.version);
    throw new BundleError(`${where} has version ${got}, this runtime reads version 1: update it or export again`);
  }
  for (const problem of shapeProblems(data)) throw new BundleError(`${where}: ${problem}`);
  const manifest = data as unknown as Manifest;
  for (const problem of problems(manifest)) throw new BundleError(`${where}: ${problem}`);
  return manifest;
}

/** The files that this runtime reads, in the order in which it reads them. */
export function neededFiles(manifest: Manifest, engine: string): string[] {
  const { embedding, tokenizer, image_newline } = manifest;
  const names = [tokenizer, embedding.file, embedding.scales, image_newline];
  for (const part of PARTS) names.push(...(manifest.parts[part][engine]?.files ?? []));
  return [...new Set(names.filter((name): name is string => Boolean(name)))];
}

/** Whether a path of a manifest is relative, normal and stays inside the folder, on every system. */
export function safePath(name: string): boolean {
  if (!name || /[\\:\0\n\r?#%]/.test(name) || name.startsWith("/") || name === NAME) return false;
  return name.split("/").every((piece) => !["", ".", ".."].includes(piece));
}

function* shapeProblems(data: Record<string, unknown>): Generator<string> {
  for (const key of TEXTS) {
    if (typeof data[key] !== "string" || !data[key]) yield `${key} must be a text`;
  }
  for (const key of OBJECTS) {
    if (!isObject(data[key])) yield `${key} is missing or no object`;
  }
  for (const key of SPEC) {
    if (!isObject((data.spec as Record<string, unknown>)[key])) yield `spec.${key} is missing or no object`;
  }
  for (const [name, entry] of Object.entries(data.files as Record<string, unknown>)) {
    const sound = isObject(entry) && Number.isSafeInteger(entry.bytes) && (entry.bytes as number) >= 0;
    if (!sound) yield `file '${name}' has no size`;
    else if (!/^[0-9a-f]{64}$/.test(String(entry.sha256))) yield `file '${name}' has no valid sha256`;
  }
  const parts = data.parts as Record<string, unknown>;
  for (const name of PARTS) {
    if (!isObject(parts[name])) yield `parts are ${Object.keys(parts).join(", ")}; a bundle has ${PARTS.join(", ")}`;
    for (const [engine, part] of Object.entries(parts[name] as object)) {
      if (!isObject(part) || typeof part.graph !== "string" || !Array.isArray(part.files)) {
        yield `${name} of engine '${engine}' has no graph or no files`;
      }
    }
  }
}

function* problems(manifest: Manifest): Generator<string> {
  for (const name of Object.keys(manifest.files)) {
    if (!safePath(name)) yield `file '${name}' does not stay inside the bundle`;
  }
  for (const [use, name] of references(manifest)) {
    if (!Object.hasOwn(manifest.files, name)) yield `${use} names '${name}', which is not in 'files'`;
  }
  const { embedding: table, spec, max_context } = manifest;
  const { vocab_size, hidden_size, layers, kv_heads, head_dim } = spec.language;
  for (const [name, value] of Object.entries({ vocab_size, hidden_size, layers, kv_heads, head_dim, max_context })) {
    if (!Number.isSafeInteger(value) || value < 1) yield `${name} is ${String(value)}; it must be positive`;
  }
  if (table.rows !== vocab_size || table.columns !== hidden_size) {
    const needed = `${vocab_size} × ${hidden_size}`;
    yield `the embedding table is ${table.rows} × ${table.columns}, the language model needs ${needed}`;
  }
  if (!Object.hasOwn(ITEM_BYTES, table.dtype)) {
    yield `the embedding table is of ${String(table.dtype)}; this runtime reads ${Object.keys(ITEM_BYTES).join(", ")}`;
  }
  const size = table.rows * table.columns * ITEM_BYTES[table.dtype];
  const { bytes } = manifest.files[table.file];
  if (bytes !== size) yield `${table.file} has ${bytes} bytes, its ${table.rows} rows of ${table.dtype} are ${size}`;
  if ((table.dtype === "I8") !== Boolean(table.scales)) {
    yield `the embedding table of ${table.dtype} and its scales do not agree`;
  }
  if (table.scales && manifest.files[table.scales].bytes !== 4 * table.rows) {
    yield `${table.scales} does not hold ${table.rows} scales`;
  }
  if (manifest.image_newline && manifest.files[manifest.image_newline].bytes !== 4 * hidden_size) {
    yield `image_newline does not hold ${hidden_size} numbers`;
  }
  if (spec.projector.out_features !== hidden_size) {
    yield `the projector gives rows of ${spec.projector.out_features}, the language model takes ${hidden_size}`;
  }
}

function* references(manifest: Manifest): Generator<[string, string]> {
  yield ["embedding", manifest.embedding.file];
  yield ["tokenizer", manifest.tokenizer];
  if (manifest.embedding.scales) yield ["embedding", manifest.embedding.scales];
  if (manifest.golden) yield ["golden", manifest.golden];
  if (manifest.image_newline) yield ["image_newline", manifest.image_newline];
  for (const name of PARTS) {
    for (const [engine, part] of Object.entries(manifest.parts[name])) {
      for (const file of [part.graph, ...part.files]) yield [`${name} of engine '${engine}'`, file];
    }
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
