/** The embedding table of a bundle: rows looked up as float32. */
import { BundleError, PromptError } from "./errors.js";
import type { Manifest, Table } from "./manifest.js";

export class EmbeddingTable {
  readonly rows: number;
  readonly columns: number;
  private readonly table: Table;
  private readonly stored: Float32Array | Uint16Array | Int8Array;
  private readonly scales: Float32Array | null;
  private readonly multiplier: number;

  constructor(manifest: Manifest, bytes: Uint8Array, scales: Uint8Array | null) {
    const table = (this.table = manifest.embedding);
    [this.rows, this.columns] = [table.rows, table.columns];
    this.stored = { F32: floats, F16: halves, BF16: halves, I8: integers }[table.dtype](bytes);
    this.scales = scales && floats(scales);
    this.multiplier = Math.fround(manifest.spec.language.embed_multiplier ?? 1);
    if (this.stored.length !== this.rows * this.columns) {
      throw new BundleError(`${table.file} does not hold ${this.rows} × ${this.columns} numbers of ${table.dtype}`);
    }
  }

  /** Writes the row of `id` to `out` from `at` on. Throws PromptError for an id outside the table. */
  rowInto(id: number, out: Float32Array, at: number): void {
    if (!(id >= 0 && id < this.rows)) {
      throw new PromptError(
        `token id ${id} is outside the embedding table of ${this.rows} rows: ` +
          "tokenizer and language model do not belong together",
      );
    }
    const start = id * this.columns;
    const { stored, columns, multiplier } = this;
    const { dtype } = this.table;
    if (dtype === "F16") {
      for (let i = 0; i < columns; i++) out[at + i] = HALVES[stored[start + i]];
    } else if (dtype === "BF16") {
      const bits = new Uint32Array(out.buffer, out.byteOffset + at * 4, columns);
      for (let i = 0; i < columns; i++) bits[i] = stored[start + i] << 16;
    } else {
      const scale = this.scales?.[id] ?? 1;
      for (let i = 0; i < columns; i++) out[at + i] = stored[start + i] * scale;
    }
    if (multiplier !== 1) {
      for (let i = 0; i < columns; i++) out[at + i] *= multiplier;
    }
  }

  /** The rows of `ids`, (n, H). */
  lookUp(ids: readonly number[]): Float32Array {
    const out = new Float32Array(ids.length * this.columns);
    ids.forEach((id, i) => this.rowInto(id, out, i * this.columns));
    return out;
  }
}

/** Every float16 as float32 (IEEE 754 binary16). */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
});

function floats(bytes: Uint8Array): Float32Array {
  return new Float32Array(...aligned(bytes, 4));
}

function halves(bytes: Uint8Array): Uint16Array {
  return new Uint16Array(...aligned(bytes, 2));
}

function integers(bytes: Uint8Array): Int8Array {
  return new Int8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The arguments for a view of numbers of `size` bytes; bytes that lie askew are copied. */
function aligned(bytes: Uint8Array, size: number): [ArrayBufferLike, number, number] {
  const even = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  return [even.buffer, even.byteOffset, Math.floor(even.byteLength / size)];
}
