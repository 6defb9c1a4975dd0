/** Opening a bundle: its files read and checked, its parts ready to run. */
import { EmbeddingTable } from "./embedding.js";
import { BundleError, InputError } from "./errors.js";
import { checkFile, urlReader, type Reader } from "./reader.js";
import { NAME, neededFiles, PARTS, parseManifest, type Manifest, type PartName } from "./manifest.js";
import { VLM } from "./model.js";
import { openSession, setThreads, type PartFiles, type Provider } from "./session.js";
import { ruleOf } from "./tiling.js";
import { Tokenizer } from "./tokenizer.js";

const ENGINE = "onnx";

/** How far reading is: bytes of all files together, and the file that is being read. */
export interface Progress {
  file: string;
  loaded: number;
  total: number;
}

/**
 * `cache` keeps the files in the browser (on by default), `verify` compares their SHA-256 (on by default, where the
 * browser offers it), `threads` are those of WebAssembly (more than one needs a cross-origin isolated page; fixed by
 * the first model that is loaded), `maxContext` lowers the bundle's own. `executionProviders` are those of ONNX
 * Runtime, the first one preferred: "wasm", or "webgpu" before it.
 */
export interface LoadOptions {
  onProgress?: (progress: Progress) => void;
  cache?: boolean;
  verify?: boolean;
  threads?: number;
  maxContext?: number;
  executionProviders?: readonly Provider[];
}

/** Opens the bundle at an address, or the one that a Reader reads. Throws BundleError or InputError, one line. */
export async function load(source: string | URL | Reader, options: LoadOptions = {}): Promise<VLM> {
  const started = performance.now();
  const { cache = true, verify = true, threads, maxContext, executionProviders = ["wasm"] } = options;
  for (const [name, value] of Object.entries({ threads, maxContext })) {
    if (value !== undefined && !(Number.isSafeInteger(value) && value >= 1)) {
      throw new InputError(`${name} is ${value}: it must be 1 or more`);
    }
  }
  for (const provider of executionProviders) {
    if (provider !== "wasm" && provider !== "webgpu") {
      throw new InputError(`unknown execution provider '${String(provider)}': choose one of wasm, webgpu`);
    }
  }
  setThreads(threads);
  const reader = typeof source === "string" || source instanceof URL ? urlReader(source, cache) : source;
  const manifest = await readManifest(reader);
  checkRuns(manifest, reader.where);
  const files = await readFiles(reader, manifest, verify, options.onProgress ?? (() => undefined));
  const take = (name: string): Uint8Array<ArrayBuffer> => files.get(name) as Uint8Array<ArrayBuffer>;
  const { embedding, image_newline, spec } = manifest;
  const tokenizer = new Tokenizer(take(manifest.tokenizer), spec.prompt);
  const table = new EmbeddingTable(manifest, take(embedding.file), embedding.scales ? take(embedding.scales) : null);
  const sessions = {} as VLMSessions;
  for (const name of PARTS) {
    const part = partFiles(manifest, name, take);
    sessions[name] = await openSession(part, spec, executionProviders);
    for (const file of manifest.parts[name][ENGINE].files) files.delete(file); // ONNX Runtime has its own copy
  }
  return new VLM({
    manifest,
    sessions,
    tokenizer,
    embedding: table,
    newline: image_newline ? new Float32Array(take(image_newline).slice().buffer) : null,
    maxContext: Math.min(maxContext ?? manifest.max_context, manifest.max_context),
    loadMs: performance.now() - started,
    read: (name) => readFile(reader, manifest, name, verify),
  });
}

type VLMSessions = ConstructorParameters<typeof VLM>[0]["sessions"];

async function readManifest(reader: Reader): Promise<Manifest> {
  const bytes = await reader.read(NAME, null, () => undefined);
  return parseManifest(new TextDecoder().decode(bytes), `${reader.where}${NAME}`);
}

function checkRuns(manifest: Manifest, where: string): void {
  ruleOf(manifest.spec);
  for (const name of PARTS) {
    const engines = Object.keys(manifest.parts[name]);
    if (!engines.includes(ENGINE)) {
      throw new BundleError(
        `${where} has its ${name} for ${engines.join(", ") || "no engine"}: export with --target ${ENGINE}`,
      );
    }
  }
}

async function readFiles(
  reader: Reader,
  manifest: Manifest,
  verify: boolean,
  onProgress: (progress: Progress) => void,
): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const names = neededFiles(manifest, ENGINE);
  const total = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  const files = new Map<string, Uint8Array<ArrayBuffer>>();
  let loaded = 0;
  for (const file of names) {
    onProgress({ file, loaded, total });
    const before = loaded;
    const bytes = await readFile(reader, manifest, file, verify, (count) => {
      loaded = Math.min(loaded + count, before + manifest.files[file].bytes);
      onProgress({ file, loaded, total });
    });
    files.set(file, bytes);
    loaded = before + bytes.length;
    onProgress({ file, loaded, total });
  }
  return files;
}

/** One file, checked; a kept copy that is damaged is read once more from where it came. */
async function readFile(
  reader: Reader,
  manifest: Manifest,
  name: string,
  verify: boolean,
  onBytes: (count: number) => void = () => undefined,
): Promise<Uint8Array<ArrayBuffer>> {
  const entry = manifest.files[name];
  for (let again = true; ; again = false) {
    try {
      const bytes = await reader.read(name, entry, onBytes);
      await checkFile(bytes, name, entry, verify);
      return bytes;
    } catch (error) {
      const wasKept = (await reader.forget?.(name, entry)) ?? false;
      if (!again || !wasKept) throw error;
    }
  }
}

function partFiles(manifest: Manifest, name: PartName, take: (name: string) => Uint8Array): PartFiles {
  const { graph, files } = manifest.parts[name][ENGINE];
  const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
  const others = files.filter((file) => file !== graph);
  const data = others.map((file) => ({
    path: file.startsWith(folder) ? file.slice(folder.length) : file,
    data: take(file),
  }));
  return { name, graph: take(graph), data };
}
