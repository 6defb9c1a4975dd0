/** A bundle ready to answer: `generate("What is this?", { images: [picture] })` yields text. */
import type { InferenceSession } from "onnxruntime-web";
import { Context, speak, type Speaker } from "./answer.js";
import type { Answer, Picture, Request, Settings, Timings } from "./answer.js";
import { Chat } from "./chat.js";
import { Decoder } from "./decoder.js";
import type { EmbeddingTable } from "./embedding.js";
import { PictureEncoder } from "./encoder.js";
import { InputError, PromptError } from "./errors.js";
import type { Manifest, PartName } from "./manifest.js";
import type { Source } from "./picture.js";
import { render, systemMessage, userMessage } from "./prompt.js";
import { Sampler } from "./sampling.js";
import { pictureToken, type VLMSpec } from "./spec.js";
import { rowsOf } from "./tiling.js";
import { checkCount, promptIds, type Tokenizer } from "./tokenizer.js";

/** What a question is asked with. `raw` takes the prompt as it is, without the chat template. */
export interface Question extends Settings {
  images?: readonly Source[];
  system?: string;
  raw?: boolean;
}

/** The parts of a bundle, opened. */
export interface Parts {
  manifest: Manifest;
  sessions: Record<PartName, InferenceSession>;
  tokenizer: Tokenizer;
  embedding: EmbeddingTable;
  newline: Float32Array | null;
  maxContext: number;
  loadMs: number;
  /** Reads one more file of the bundle, checked. */
  read(name: string): Promise<Uint8Array<ArrayBuffer>>;
}

/** The parts of one bundle, opened: `generate`, `answer` and `chat` use them, one at a time. */
export class VLM {
  readonly manifest: Manifest;
  readonly spec: VLMSpec;
  readonly tokenizer: Tokenizer;
  readonly embedding: EmbeddingTable;
  readonly maxContext: number;
  readonly loadMs: number;
  readonly pictures: PictureEncoder;
  private readonly parts: Parts;
  private readonly speaker: Speaker;
  private last: Promise<unknown> = Promise.resolve();

  constructor(parts: Parts) {
    this.parts = parts;
    ({ manifest: this.manifest, tokenizer: this.tokenizer, embedding: this.embedding } = parts);
    ({ maxContext: this.maxContext, loadMs: this.loadMs } = parts);
    this.spec = this.manifest.spec;
    this.pictures = new PictureEncoder(parts);
    const { image_token_id, eos_token_ids } = this.spec.prompt;
    this.speaker = {
      context: new Context(new Decoder(parts.sessions.language_model, this.spec, parts.maxContext)),
      embedding: parts.embedding,
      imageTokenId: image_token_id,
      eosTokenIds: new Set(eos_token_ids),
      decode: (ids) => this.tokenizer.decode(ids),
      pictureRows: (picture, times) => this.pictures.rows(picture, times),
      alone: (work) => this.alone(work),
    };
  }

  /** The language model; who uses it directly ends what a chat had in its KV cache, and costs it time only. */
  get decoder(): Decoder {
    this.speaker.context.begin([], false, []);
    return this.speaker.context.decoder;
  }

  /**
   * Yields the answer to `prompt` about `images` piece by piece and returns the whole as an Answer; to stop it, leave
   * the loop. The checkpoint's chat template is applied, pictures first, unless the prompt itself holds the image token
   * once for each. Throws PromptError, ImageError or InputError before any work.
   */
  async *generate(prompt: string, question: Question = {}): AsyncGenerator<string, Answer, void> {
    const started = performance.now();
    const { images = [], system, raw = false, ...settings } = question;
    if (raw && system !== undefined) {
      throw new PromptError("a raw prompt is taken as it is: write the system message into it");
    }
    const spec = this.spec.prompt;
    const text = raw ? prompt : render([...systemMessage(system), userMessage(prompt, images.length, spec)], spec);
    return yield* this.speak(await this.request(text, images, settings, { started }));
  }

  /** The same as `generate`, all at once and with what it took. */
  async answer(prompt: string, question: Question = {}): Promise<Answer> {
    const pieces = this.generate(prompt, question);
    for (;;) {
      const next = await pieces.next();
      if (next.done) return next.value;
    }
  }

  /** A conversation of several turns that keeps its KV cache from turn to turn. */
  chat(system?: string): Chat {
    return new Chat(this, system);
  }

  /** The rows (R, H) of one of the `pictures` pictures of a prompt; those of the last few are kept. */
  async encodeImage(image: Source, pictures = 1): Promise<Float32Array> {
    const picture = await this.pictures.open(image, pictures);
    return this.alone(() => this.pictures.rows(picture, noTimes(0)));
  }

  /** Checks a rendered prompt about known `pictures` and then `images`. Throws what `generate` does. */
  async request(
    text: string,
    images: readonly Source[],
    settings: Settings,
    { pictures = [], started, reuse = false }: { pictures?: readonly Picture[]; started: number; reuse?: boolean },
  ): Promise<Request> {
    const { maxNewTokens = 256, stop = [], ...sampling } = settings;
    if (!Number.isSafeInteger(maxNewTokens) || maxNewTokens < 1) {
      throw new InputError(`maxNewTokens is ${maxNewTokens}: it must be 1 or more`);
    }
    const spec = this.spec.prompt;
    const count = pictures.length + images.length;
    checkCount(text.split(pictureToken(spec)).length - 1, count, spec);
    const clock = performance.now();
    const all: Picture[] = [];
    for (const picture of pictures) all.push(await this.pictures.among(picture, count));
    for (const image of images) all.push(await this.pictures.open(image, count));
    const timingsMs = { ...noTimes(this.loadMs), preprocess: images.length ? performance.now() - clock : 0 };
    const layouts = all.map((picture) => picture.layout);
    const ids = promptIds(text, layouts, (piece) => this.tokenizer.encode(piece), spec);
    const imageTokens = layouts.reduce((sum, layout) => sum + rowsOf(layout), 0);
    if (ids.length >= this.maxContext) {
      throw new PromptError(
        `the prompt has ${ids.length} tokens (${imageTokens} of them image tokens) and the bundle's context is ` +
          `${this.maxContext}: shorten it, or export with a larger --max-context`,
      );
    }
    if (!ids.length) throw new PromptError("the prompt is empty: write a question");
    const names = all.flatMap((picture) => new Array<string>(rowsOf(picture.layout)).fill(picture.name));
    let row = 0;
    return {
      ids,
      keys: ids.map((id) => (id === spec.image_token_id ? names[row++] : id)),
      pictures: all,
      imageTokens,
      blocks: blocksOf(ids, this.spec),
      sampling,
      stop: [...(typeof stop === "string" ? [stop] : stop), ...(spec.stop ?? [])],
      maxNewTokens,
      room: this.maxContext - ids.length,
      reuse,
      started,
      timingsMs,
    };
  }

  /** Yields the answer to a checked request; returns the whole. */
  speak(request: Request): AsyncGenerator<string, Answer, void> {
    return speak(this.speaker, request);
  }

  /** The row (H,) that ends a line of patches; null where the model has none. */
  get newline(): Float32Array | null {
    return this.parts.newline;
  }

  /** Logits (V,) after the rows (S, H) of a prompt, and `count` greedy tokens, whatever they are. */
  greedy(
    ids: readonly number[],
    embeds: Float32Array,
    count: number,
  ): Promise<{ logits: Float32Array; greedy: number[] }> {
    return this.alone(async () => {
      const decoder = this.decoder;
      const logits = await decoder.prefill(embeds, blocksOf(ids, this.spec));
      const sampler = new Sampler({});
      const greedy = [sampler.pick(logits, [])];
      while (greedy.length < count) {
        const row = this.embedding.lookUp(greedy.slice(-1));
        greedy.push(sampler.pick(await decoder.decode(row), []));
      }
      return { logits, greedy };
    });
  }

  /** The bytes of one file of the bundle, checked as the others were. */
  readFile(name: string): Promise<Uint8Array<ArrayBuffer>> {
    return this.parts.read(name);
  }

  /** Frees the memory of ONNX Runtime; the model answers no more. */
  async dispose(): Promise<void> {
    await this.alone(async () => {
      this.speaker.context.decoder.dispose();
      for (const session of Object.values(this.parts.sessions)) await session.release();
    });
  }

  private alone<T>(work: () => Promise<T>): Promise<T> {
    const done = this.last.then(work);
    this.last = done.catch(() => undefined);
    return done;
  }

}

/** The rows of a prompt that see one another both ways, by (start, stop). */
function blocksOf(ids: readonly number[], spec: VLMSpec): [number, number][] {
  const { both_ways = "none" } = spec.language;
  if (both_ways === "prompt") return [[0, ids.length]];
  if (both_ways === "none") return [];
  const blocks: [number, number][] = [];
  ids.forEach((id, i) => {
    if (id !== spec.prompt.image_token_id) return;
    const last = blocks[blocks.length - 1];
    if (last?.[1] === i) last[1]++;
    else blocks.push([i, i + 1]);
  });
  return blocks;
}

function noTimes(load: number): Timings {
  return { load, preprocess: 0, vision: 0, projector: 0, prefill: 0, ttft: 0, decode: 0 };
}
