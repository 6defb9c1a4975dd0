/** ONNX Runtime sessions for the parts of a bundle. */
import * as ort from "onnxruntime-web";
import { BundleError, oneLine } from "./errors.js";
import { metadataOf, withOpenCache } from "./graph.js";
import type { PartName } from "./manifest.js";
import type { VLMSpec } from "./spec.js";

export type Provider = "wasm" | "webgpu";

/** What a part is opened from: its graph, and the files beside it by the name that the graph calls them. */
export interface PartFiles {
  name: PartName;
  graph: Uint8Array;
  data: { path: string; data: Uint8Array }[];
}

/** Opens a part and checks that it is one of this model. Throws BundleError. */
export async function openSession(
  files: PartFiles,
  spec: VLMSpec,
  providers: readonly Provider[],
): Promise<ort.InferenceSession> {
  const { name, data } = files;
  let session: ort.InferenceSession;
  let written: Map<string, string>;
  try {
    written = metadataOf(files.graph);
    const graph = name === "language_model" ? withOpenCache(files.graph) : files.graph;
    const onGpu = providers[0] === "webgpu" && name === "language_model";
    session = await ort.InferenceSession.create(graph, {
      executionProviders: [...providers],
      externalData: data,
      logSeverityLevel: 4,
      ...(onGpu ? { preferredOutputLocation: cacheOnGpu(spec.language.layers) } : {}),
    });
  } catch (error) {
    throw new BundleError(
      `the ${name} cannot be opened by ONNX Runtime (${oneLine(error)}): is there memory enough? If so, export again`,
    );
  }
  if (written.get("vlm.part") !== name || written.get("vlm.fingerprint") !== spec.fingerprint) {
    await session.release();
    throw new BundleError(`the file of the ${name} is a part of another model: it is not that of ${spec.name}`);
  }
  return session;
}

/** Threads for all sessions of this page, which ONNX Runtime fixes with the first one it opens. */
export function setThreads(threads: number | undefined): void {
  if (threads !== undefined) ort.env.wasm.numThreads = threads;
}

/** A graph of one input and one output: (N, …) → (N, rows, channels), of `shape` without N. */
export async function runEncoder(
  session: ort.InferenceSession,
  x: Float32Array,
  shape: readonly number[],
): Promise<{ data: Float32Array; shape: readonly number[] }> {
  const input = new ort.Tensor("float32", x, shape);
  const output = (await session.run({ [session.inputNames[0]]: input }))[session.outputNames[0]];
  const data = (await output.getData(true)) as Float32Array;
  return { data, shape: output.dims };
}

function cacheOnGpu(layers: number): Record<string, "gpu-buffer"> {
  const kinds = ["key", "value"];
  const names = Array.from({ length: layers }, (_, layer) => kinds.map((kind) => `present.${layer}.${kind}`)).flat();
  return Object.fromEntries(names.map((name) => [name, "gpu-buffer"]));
}
