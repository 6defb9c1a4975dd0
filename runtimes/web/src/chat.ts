/** A conversation: each turn is rendered as a whole, and only what the KV cache does not hold yet is prefilled. */
import type { Answer, Picture, Settings } from "./answer.js";
import type { VLM } from "./model.js";
import type { Source } from "./picture.js";
import { render, systemMessage, userMessage, type Message } from "./prompt.js";

/**
 * Several turns about pictures, each given once. A turn that throws leaves the conversation as it was; one that is
 * broken off keeps what was said so far. `last` is the last whole answer.
 */
export class Chat {
  last: Answer | null = null;
  private messages: Message[];
  private pictures: Picture[] = [];

  constructor(
    private readonly model: VLM,
    private readonly system?: string,
  ) {
    this.messages = systemMessage(system);
  }

  /** Yields the answer to the next turn and returns the whole. Throws before any work what `generate` does. */
  async *ask(
    text: string,
    { images = [], ...settings }: Settings & { images?: readonly Source[] } = {},
  ): AsyncGenerator<string, Answer, void> {
    const started = performance.now();
    const spec = this.model.spec.prompt;
    const messages = [...this.messages, userMessage(text, images.length, spec)];
    const about = { pictures: this.pictures, started, reuse: true };
    const request = await this.model.request(render(messages, spec), images, settings, about);
    const pieces = this.model.speak(request);
    let said = "";
    this.last = null;
    try {
      for (;;) {
        const next = await pieces.next();
        if (next.done) return (this.last = next.value);
        said += next.value;
        yield next.value;
      }
    } finally {
      if (said || this.last) {
        this.messages = [...messages, { role: "assistant", content: [{ type: "text", text: said }] }];
        this.pictures = request.pictures;
      }
    }
  }

  /** Forget the conversation; the system message stays. */
  reset(): void {
    [this.messages, this.pictures, this.last] = [systemMessage(this.system), [], null];
  }
}
