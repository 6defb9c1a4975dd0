/** One answer: pictures encoded, prompt prefilled, tokens decoded until the end; text comes while it is made. */
import type { Decoder } from "./decoder.js";
import type { EmbeddingTable } from "./embedding.js";
import { InputError } from "./errors.js";
import type { RGB } from "./image.js";
import { Sampler, type Sampling } from "./sampling.js";
import { splice } from "./splice.js";
import { TextStream } from "./text.js";
import { rowsOf, type Layout } from "./tiling.js";

/** The length, the texts that end an answer, and how tokens are chosen. */
export interface Settings extends Sampling {
  maxNewTokens?: number;
  stop?: string | readonly string[];
}

/** Milliseconds by stage; `ttft` from the call to the first token, `decode` all further tokens. */
export type Timings = Record<"load" | "preprocess" | "vision" | "projector" | "prefill" | "ttft" | "decode", number>;

/**
 * What was said, and what it took. `tokenIds` are all generated ids, the one that ended the answer included;
 * `promptTokens` counts the prompt with its `imageTokens`, of which `reusedTokens` were still in the KV cache.
 */
export interface Answer {
  text: string;
  tokenIds: number[];
  promptTokens: number;
  imageTokens: number;
  reusedTokens: number;
  timingsMs: Timings;
  finishReason: "stop" | "length" | "context";
}

/**
 * A preprocessed picture: pixel values of its tiles, its layout, a name that no other picture has, and the picture
 * itself where it would be cut differently among more or fewer of them.
 */
export interface Picture {
  tiles: Float32Array[];
  layout: Layout;
  name: string;
  source: RGB | null;
}

/** What a row of the prompt will be: a token id, or the name of a picture. */
export type Key = number | string;

export interface Request {
  ids: number[];
  keys: Key[];
  pictures: Picture[];
  imageTokens: number;
  /** Rows that see one another both ways. */
  blocks: [number, number][];
  sampling: Sampling;
  stop: string[];
  maxNewTokens: number;
  /** How many tokens fit after the prompt. */
  room: number;
  /** Whether the beginning that the KV cache already holds is kept. */
  reuse: boolean;
  started: number;
  timingsMs: Timings;
}

/** A decoder and what lies in its KV cache. */
export class Context {
  turn = 0;
  private keys: Key[] = [];

  constructor(readonly decoder: Decoder) {}

  /** A new turn: rewind to the longest common beginning (all but one key at most); its length. */
  begin(keys: readonly Key[], reuse: boolean, blocks: readonly [number, number][]): number {
    this.turn++;
    const limit = reuse ? Math.min(this.keys.length, this.decoder.position, keys.length - 1) : 0;
    let common = 0;
    while (common < limit && this.keys[common] === keys[common]) common++;
    common = blocks.find(([start, stop]) => start < common && common < stop)?.[0] ?? common;
    this.keys.length = common;
    this.decoder.rewind(common);
    return common;
  }

  async prefill(
    embeds: Float32Array,
    keys: readonly Key[],
    blocks: readonly [number, number][],
  ): Promise<Float32Array> {
    const logits = await this.decoder.prefill(embeds, blocks);
    this.keys.push(...keys);
    return logits;
  }

  async decode(embed: Float32Array, key: Key): Promise<Float32Array> {
    const logits = await this.decoder.decode(embed);
    this.keys.push(key);
    return logits;
  }
}

/** What an answer is made with; `pictureRows` gives (T, H) and adds to the timings that it is handed. */
export interface Speaker {
  context: Context;
  embedding: EmbeddingTable;
  imageTokenId: number;
  eosTokenIds: ReadonlySet<number>;
  decode(ids: number[]): string;
  pictureRows(picture: Picture, times: Timings): Promise<Float32Array>;
  /** Runs one thing at a time on the engine: ONNX Runtime refuses two calls at once. */
  alone<T>(work: () => Promise<T>): Promise<T>;
}

/** Yields the pieces of the answer to a checked request; returns the whole. */
export async function* speak(speaker: Speaker, request: Request): AsyncGenerator<string, Answer, void> {
  const { context, embedding } = speaker;
  const times = request.timingsMs;
  const sampler = new Sampler(request.sampling);
  const text = new TextStream(speaker.decode, request.stop);
  const limit = Math.min(request.maxNewTokens, request.room);
  const row = new Float32Array(embedding.columns);
  const generated: number[] = [];
  const ids = [...request.ids];
  let finishReason: Answer["finishReason"] = limit === request.maxNewTokens ? "length" : "context";
  let [said, whole] = [0, ""];
  const first = await speaker.alone(() => prefill(speaker, request));
  let token = sampler.pick(first.logits, ids);
  let clock = performance.now();
  times.ttft = clock - request.started;
  for (;;) {
    generated.push(token);
    ids.push(token);
    if (speaker.eosTokenIds.has(token)) {
      finishReason = "stop";
      break;
    }
    const piece = text.push(token);
    if (piece) {
      whole += piece;
      said += performance.now() - clock;
      yield piece;
      clock = performance.now();
    }
    if (text.stopped) {
      finishReason = "stop";
      break;
    }
    if (generated.length === limit) break;
    await breathe();
    const key = token;
    const logits = await speaker.alone(() => {
      if (context.turn !== first.turn) {
        throw new InputError(
          "this answer was broken off by a later one of the same model: finish one, or load it twice",
        );
      }
      embedding.rowInto(key, row, 0);
      return context.decode(row, key);
    });
    token = sampler.pick(logits, ids);
  }
  times.decode = said + performance.now() - clock;
  const rest = text.finish();
  whole += rest;
  if (rest) yield rest;
  return {
    text: whole,
    tokenIds: generated,
    promptTokens: request.ids.length,
    imageTokens: request.imageTokens,
    reusedTokens: first.kept,
    timingsMs: times,
    finishReason,
  };
}

/** Lets the page draw and listen: WebAssembly itself never gives way. */
function breathe(): Promise<void> {
  const { scheduler, setImmediate: soon } = globalThis as {
    scheduler?: { yield?(): Promise<void> };
    setImmediate?: (then: () => void) => unknown;
  };
  if (scheduler?.yield) return scheduler.yield();
  return new Promise((then) => (soon ? soon(then) : setTimeout(then)));
}

/** Encode the pictures whose rows are not in the KV cache, splice, prefill. */
async function prefill(
  speaker: Speaker,
  request: Request,
): Promise<{ logits: Float32Array; turn: number; kept: number }> {
  const { context, embedding, imageTokenId } = speaker;
  const { timingsMs: times, blocks } = request;
  const kept = context.begin(request.keys, request.reuse, blocks);
  const known = request.keys.slice(0, kept).filter((key) => typeof key === "string").length;
  const rows: Float32Array[] = [];
  let end = 0;
  for (const picture of request.pictures) {
    const start = end;
    end += rowsOf(picture.layout);
    if (end <= known) continue;
    const all = await speaker.pictureRows(picture, times);
    rows.push(all.subarray(Math.max(0, known - start) * embedding.columns));
  }
  const clock = performance.now();
  const left = blocks.filter(([start]) => start >= kept).map(([a, b]): [number, number] => [a - kept, b - kept]);
  const embeds = splice(request.ids.slice(kept), rows, embedding, imageTokenId);
  const logits = await context.prefill(embeds, request.keys.slice(kept), left);
  times.prefill = performance.now() - clock;
  return { logits, turn: context.turn, kept };
}
