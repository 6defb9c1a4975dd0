/** Tensors of a .safetensors file (github.com/huggingface/safetensors, "Format"). */
import { BundleError } from "./errors.js";

export interface Tensors {
  metadata: Record<string, string>;
  /** float32 as it is, int64 as numbers. */
  get(name: string): Float32Array;
  shapeOf(name: string): number[];
}

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** Reads a file of F32 and I64 tensors. Throws BundleError. */
export function readTensors(bytes: Uint8Array): Tensors {
  const length = bytes.length < 8 ? 0 : Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (!length || length > bytes.length - 8) throw new BundleError("the golden vectors are damaged: export again");
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length))) as Record<string, Entry>;
  const entryOf = (name: string): Entry => {
    if (!Object.hasOwn(header, name)) throw new BundleError(`the golden vectors have no '${name}': export again`);
    return header[name];
  };
  return {
    metadata: (header.__metadata__ ?? {}) as unknown as Record<string, string>,
    shapeOf: (name) => entryOf(name).shape,
    get(name) {
      const { dtype, data_offsets } = entryOf(name);
      const [start, end] = data_offsets;
      const raw = bytes.slice(8 + length + start, 8 + length + end).buffer;
      if (dtype === "F32") return new Float32Array(raw);
      if (dtype === "I64") return Float32Array.from(new BigInt64Array(raw), Number);
      throw new BundleError(`the golden vectors hold '${name}' as ${dtype}: export again`);
    },
  };
}
