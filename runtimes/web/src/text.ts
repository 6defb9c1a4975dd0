/** Token ids to text while they come: whole characters only, stop strings never shown. */
import { InputError } from "./errors.js";

const LIMIT = 32; // tokens decoded again at most; a character has four bytes, so four tokens, in any real text
const UNFINISHED = "\ufffd";

/**
 * Turns ids into pieces of text whose concatenation is the text of all ids, up to the first stop string. Only the ids
 * of the last piece and those after it are decoded again: how a token reads depends on its neighbours alone.
 */
export class TextStream {
  stopped = false;
  private readonly longest: number;
  private ids: number[] = []; // those of the last piece (`known` of them), then those not yet shown
  private known = 0;
  private knownText = "";
  private held = ""; // shown only when it cannot become a stop string any more

  constructor(
    private readonly decode: (ids: number[]) => string,
    private readonly stop: readonly string[] = [],
  ) {
    if (stop.some((s) => !s)) throw new InputError("an empty stop string: give the text that ends an answer");
    this.longest = Math.max(0, ...stop.map((s) => s.length));
  }

  /** The text that is certain now, often empty. */
  push(token: number): string {
    if (this.stopped) return "";
    this.ids.push(token);
    const text = this.decode(this.ids);
    if (text.endsWith(UNFINISHED)) return this.ids.length > LIMIT ? this.shorten() : "";
    if (text.length <= this.knownText.length) {
      if (this.ids.length > LIMIT) this.ids.pop(); // a special token adds nothing; keep the context of the last piece
      return "";
    }
    return this.release(this.advance(text, this.known));
  }

  /** The rest, when no more ids come. */
  finish(): string {
    if (this.stopped) return "";
    const text = this.decode(this.ids);
    const shown = this.release(text.slice(this.knownText.length));
    [this.ids, this.known, this.knownText] = [[], 0, ""];
    const rest = shown + this.held;
    this.held = "";
    return rest;
  }

  /** Everything in `text` beyond the known part; the ids from `drop` on become the known ones. */
  private advance(text: string, drop: number): string {
    const fresh = text.slice(this.knownText.length);
    this.ids = this.ids.slice(drop);
    [this.known, this.knownText] = [this.ids.length, this.decode(this.ids)];
    return fresh;
  }

  /** Bytes that never become a character: show those before a border that later ids cannot move. */
  private shorten(): string {
    const text = this.decode(this.ids);
    for (let border = this.ids.length - 1; border > this.known; border--) {
      const before = this.decode(this.ids.slice(0, border));
      if (before + this.decode(this.ids.slice(border)) === text) {
        const fresh = before.slice(this.knownText.length);
        [this.ids, this.known, this.knownText] = [this.ids.slice(border), 0, ""];
        return this.release(fresh);
      }
    }
    return this.release(this.advance(text, this.ids.length));
  }

  /** `fresh` after what is held, without what may be the beginning of a stop string. */
  private release(fresh: string): string {
    if (!this.stop.length) return fresh;
    const text = this.held + fresh;
    const found = this.stop.map((s) => ({ at: text.indexOf(s), end: text.indexOf(s) + s.length }));
    const first = found.filter(({ at }) => at >= 0).sort((a, b) => a.end - b.end || a.at - b.at)[0];
    if (first) {
      [this.stopped, this.held] = [true, ""];
      return text.slice(0, first.at); // the one complete first, wherever the borders of tokens are
    }
    let keep = Math.min(text.length, this.longest - 1);
    while (keep > 0 && !this.stop.some((s) => s.startsWith(text.slice(-keep)))) keep--;
    const shown = keep > 0 ? text.slice(0, -keep) : text;
    this.held = text.slice(shown.length);
    return shown;
  }
}
