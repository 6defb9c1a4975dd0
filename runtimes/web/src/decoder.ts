/** The language model with its KV cache, for one sequence. */
import * as ort from "onnxruntime-web";
import { BundleError, PromptError } from "./errors.js";
import type { VLMSpec } from "./spec.js";

const PREFILL_ROWS = 192; // at once: attention computes a whole rectangle, half of it in vain for long blocks

/**
 * `position` rows are in the cache, at most `maxContext` fit. The cache tensors of one call are those of the next; they
 * may be longer than `position` after a rewind, which costs nothing, since the graph reads `position` rows alone.
 */
export class Decoder {
  position = 0;
  private cache: Record<string, ort.Tensor> = {};
  private readonly width: number;
  private readonly takesBlock: boolean;

  constructor(
    private readonly session: ort.InferenceSession,
    spec: VLMSpec,
    readonly maxContext: number,
  ) {
    const { layers, kv_heads, head_dim, hidden_size } = spec.language;
    this.width = hidden_size;
    this.takesBlock = session.inputNames.includes("block");
    const declared = session.inputNames.filter((name) => name.startsWith("past_key_values."));
    if (declared.length !== 2 * layers) {
      throw new BundleError(`language_model has ${declared.length} KV cache inputs, its spec says ${2 * layers}`);
    }
    for (const name of declared) {
      this.cache[name] = new ort.Tensor("float32", new Float32Array(kv_heads * head_dim), [1, kv_heads, 1, head_dim]);
    }
  }

  /** Append rows (S, H), those of each block seeing one another; the logits (V,) after the last one. */
  async prefill(embeds: Float32Array, blocks: readonly [number, number][] = []): Promise<Float32Array> {
    const rows = embeds.length / this.width;
    if (this.position + rows > this.maxContext) {
      throw new PromptError(
        `${this.position} + ${rows} tokens do not fit the context of ${this.maxContext}: shorten the prompt or ` +
          "export with a larger --max-context",
      );
    }
    if (blocks.length && !this.takesBlock) {
      throw new BundleError("language_model lets no row see those after it: export the model again");
    }
    const pieces = [...piecesOf(rows, blocks)];
    for (const { start, stop, block } of pieces.slice(0, -1)) await this.run(embeds, start, stop, block);
    const { start, stop, block } = pieces[pieces.length - 1];
    return this.run(embeds, start, stop, block);
  }

  /** Append one row (H,); its logits (V,). */
  decode(embed: Float32Array): Promise<Float32Array> {
    return this.prefill(embed);
  }

  /** Forget all rows from `position` on. */
  rewind(position: number): void {
    this.position = Math.min(position, this.position);
  }

  /** Free the cache's memory on the GPU, if it is there. */
  dispose(): void {
    for (const tensor of Object.values(this.cache)) tensor.dispose();
  }

  private async run(embeds: Float32Array, start: number, stop: number, block: boolean): Promise<Float32Array> {
    const rows = stop - start;
    const total = this.position + rows;
    const part = embeds.subarray(start * this.width, stop * this.width);
    const feeds: Record<string, ort.Tensor> = {
      inputs_embeds: new ort.Tensor("float32", part, [1, rows, this.width]),
      seqlens_k: new ort.Tensor("int32", Int32Array.of(total - 1), [1]),
      total_sequence_length: new ort.Tensor("int32", Int32Array.of(total), []),
      ...this.cache,
    };
    if (this.takesBlock) feeds.block = new ort.Tensor("bool", Uint8Array.of(Number(block)), []);
    const made = await this.session.run(feeds);
    for (const [name, past] of Object.entries(this.cache)) {
      this.cache[name] = made[name.replace("past_key_values", "present")];
      if (past.location === "gpu-buffer") past.dispose();
    }
    this.position = total;
    return (await made.logits.getData(true)) as Float32Array;
  }
}

/** Each block in one piece; what lies between them in chunks of about one length. */
function* piecesOf(
  rows: number,
  blocks: readonly [number, number][],
): Generator<{ start: number; stop: number; block: boolean }> {
  let done = 0;
  for (const [from, to] of [...blocks, [rows, rows]]) {
    const chunk = Math.ceil((from - done) / Math.ceil((from - done) / PREFILL_ROWS));
    for (; done < from; done += chunk) yield { start: done, stop: Math.min(done + chunk, from), block: false };
    if (from < to) yield { start: from, stop: to, block: true };
    done = to;
  }
}
