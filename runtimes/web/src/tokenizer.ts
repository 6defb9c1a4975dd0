/** From the text of a conversation to token ids, and the places of the pictures' rows. */
import { Tokenizer as Library } from "@huggingface/tokenizers";
import { BundleError, oneLine, PromptError } from "./errors.js";
import { pictureToken, type PromptSpec } from "./spec.js";
import { rowsOf, type Layout } from "./tiling.js";

interface TokenizerFile {
  added_tokens?: { id: number; content: string }[];
  model?: { vocab?: Record<string, number> | [string, number][] };
}

/** The checkpoint's tokenizer. */
export class Tokenizer {
  private readonly library: Library;

  /** Reads tokenizer.json. Throws BundleError when it cannot, or it does not know the image token. */
  constructor(
    bytes: Uint8Array,
    private readonly prompt: PromptSpec,
  ) {
    const token = prompt.image_token;
    try {
      const file = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)) as TokenizerFile;
      const added = (file.added_tokens ??= []);
      if (!added.some((one) => one.content === token) && knows(file, token, prompt.image_token_id)) {
        const plain = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
        added.push({ id: prompt.image_token_id, content: token, ...plain } as { id: number; content: string });
      }
      this.library = new Library(file, { clean_up_tokenization_spaces: false });
    } catch (error) {
      throw new BundleError(`the tokenizer cannot be read (${oneLine(error)}): export again`);
    }
    const known = this.library.token_to_id(token);
    if (known !== prompt.image_token_id) {
      throw new BundleError(
        `the tokenizer gives '${token}' the id ${known ?? "none"}, the model takes ${prompt.image_token_id}: ` +
          "tokenizer and model do not belong together",
      );
    }
  }

  /** Token ids of `text`, with the tokenizer's special tokens unless the text has its own (or begins with BOS). */
  encode(text: string): number[] {
    if (/\p{Surrogate}/u.test(text)) throw new PromptError("the prompt cannot be tokenized: is it valid Unicode?");
    const { special_tokens = true, bos_token } = this.prompt;
    const special = special_tokens && !(bos_token && text.startsWith(bos_token));
    return this.library.encode(text, { add_special_tokens: special }).ids;
  }

  /** The text of `ids` without special tokens; U+FFFD stands for bytes that are not (yet) a character. */
  decode(ids: readonly number[]): string {
    const known = ids.filter((id) => this.library.id_to_token(id) !== undefined);
    return known.length ? this.library.decode(known, { skip_special_tokens: true }) : "";
  }
}

/** Token ids of a rendered conversation about pictures of `layouts`, the image token once for each row. */
export function promptIds(
  text: string,
  layouts: readonly Layout[],
  encode: (text: string) => number[],
  prompt: PromptSpec,
): number[] {
  const [first, ...rest] = text.split(pictureToken(prompt));
  checkCount(rest.length, layouts.length, prompt);
  if (!prompt.chunked) {
    const whole = first + rest.map((piece, i) => layouts[i].text + piece).join("");
    return expand(
      encode(whole),
      prompt,
      layouts.flatMap((layout) => layout.runs),
    );
  }
  const lead = encode("");
  const ids = encode(first);
  rest.forEach((piece, i) => {
    const said = encode(piece);
    const led = lead.every((id, at) => said[at] === id);
    const rows = new Array<number>(rowsOf(layouts[i])).fill(prompt.image_token_id);
    ids.push(...rows, ...said.slice(led ? lead.length : 0));
  });
  return ids;
}

/** Throws PromptError where a prompt has more or fewer image tokens than images. */
export function checkCount(tokens: number, images: number, prompt: PromptSpec): void {
  if (tokens === images) return;
  const picture = pictureToken(prompt);
  throw new PromptError(
    `the prompt has ${tokens} ${picture}, but ${images} image${images === 1 ? " was" : "s were"} given: ` +
      `write ${picture} once for each image`,
  );
}

/** `ids` with the i-th image token repeated `runs[i]` times. */
function expand(ids: number[], prompt: PromptSpec, runs: number[]): number[] {
  const found = ids.filter((id) => id === prompt.image_token_id).length;
  checkCount(found, runs.length, prompt);
  let run = 0;
  return ids.flatMap((id) => (id === prompt.image_token_id ? new Array<number>(runs[run++]).fill(id) : [id]));
}

function knows(file: TokenizerFile, token: string, id: number): boolean {
  const vocab = file.model?.vocab ?? {};
  return Array.isArray(vocab) ? vocab[id]?.[0] === token : vocab[token] === id;
}
