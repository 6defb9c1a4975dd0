/** From a conversation to its text: the checkpoint's chat template, run by an interpreter that has no way out. */
import { Template } from "@huggingface/jinja";
import { oneLine, PromptError } from "./errors.js";
import { pictureToken, type PromptSpec } from "./spec.js";
import { checkCount } from "./tokenizer.js";

export type ContentPart = { type: "image" } | { type: "text"; text: string };

export interface Message {
  role: string;
  content: string | ContentPart[];
}

const MAX_RENDERED = 4_000_000; // characters of one rendered conversation
const DUMPED = /['"]type['"]:/; // a list of parts written out as it is, by a template that takes text only

/** A user's turn with `images` pictures: where `text` holds the picture token, else before the text. */
export function userMessage(text: string, images: number, prompt: PromptSpec): Message {
  const pieces = text.split(pictureToken(prompt));
  const pictures = (count: number): ContentPart[] => Array.from({ length: count }, () => ({ type: "image" }));
  if (pieces.length === 1) {
    const said: ContentPart[] = text || !images ? [{ type: "text", text }] : [];
    return { role: "user", content: [...pictures(images), ...said] };
  }
  checkCount(pieces.length - 1, images, prompt);
  const parts: ContentPart[] = [];
  let leading = true; // the space around pictures that come before any text is the template's to write
  pieces.forEach((piece, i) => {
    if (i) parts.push({ type: "image" });
    if (leading && (i || !piece.trim())) piece = piece.trimStart();
    leading &&= !piece;
    if (piece) parts.push({ type: "text", text: piece });
  });
  return { role: "user", content: parts };
}

/** The message that begins a conversation, if there is one. */
export function systemMessage(system: string | undefined): Message[] {
  return system === undefined ? [] : [{ role: "system", content: [{ type: "text", text: system }] }];
}

/** The conversation as text, by the checkpoint's template, or as LLaVA-1.5 writes it where there is none. */
export function render(messages: readonly Message[], prompt: PromptSpec): string {
  if (prompt.chat_template === null || prompt.chat_template === undefined) return llava(messages, prompt);
  const form = formOf(prompt);
  return run(
    messages.map((message) => fit(message, form, pictureToken(prompt))),
    prompt,
    true,
  );
}

/** What a template takes: which roles as a list of parts, and where it writes a user's pictures. */
interface Form {
  lists: Set<string>;
  images: "in place" | "first" | "as text";
}

const FORMS = new WeakMap<PromptSpec, Form>();

/** Finds out by trying what the template of `prompt` does with text, image, text in one message. */
function formOf(prompt: PromptSpec): Form {
  const found = FORMS.get(prompt);
  if (found) return found;
  const [before, after, token] = ["vlmbefore", "vlmafter", pictureToken(prompt)];
  const first: ContentPart = { type: "text", text: before };
  const last: ContentPart = { type: "text", text: after };
  const form: Form = { lists: new Set(), images: "as text" };
  for (const lead of [[first], []]) {
    const out = attempt([{ role: "user", content: [...lead, { type: "image" }, last] }], prompt);
    const once = out.split(token).length === 2 && !DUMPED.test(out) && out.includes(after);
    if (!once || (lead.length && !out.includes(before))) continue;
    form.lists.add("user");
    const inPlace = out.indexOf(before) < out.indexOf(token) && out.indexOf(token) < out.indexOf(after);
    form.images = lead.length && inPlace ? "in place" : "first";
    break;
  }
  const user: Message = { role: "user", content: form.lists.size ? [last] : after };
  for (const role of ["system", "assistant"]) {
    const [asList, asText] = [[first], before].map((content) => {
      const message = { role, content };
      const out = attempt(role === "system" ? [message, user] : [user, message], prompt);
      return out.includes(before) && !DUMPED.test(out);
    });
    if (asList && (form.lists.size || !asText)) form.lists.add(role);
  }
  FORMS.set(prompt, form);
  return form;
}

/** `message` as a template of this form takes it. */
function fit(message: Message, form: Form, token: string): Message {
  const { role, content } = message;
  let parts: ContentPart[] = typeof content === "string" ? [{ type: "text", text: content }] : [...content];
  if (!form.lists.has(role)) return { role, content: flat(parts, token) };
  const text = parts.findIndex((part) => part.type === "text");
  if (form.images === "first" && text >= 0 && parts.slice(text).some((part) => part.type === "image")) {
    parts = [{ type: "text", text: flat(parts, token) }];
  }
  return { role, content: parts };
}

function attempt(messages: readonly Message[], prompt: PromptSpec): string {
  try {
    return run(messages, prompt, false);
  } catch {
    return "";
  }
}

function run(messages: readonly Message[], prompt: PromptSpec, add_generation_prompt: boolean): string {
  const { bos_token, eos_token, image_token } = prompt;
  const tokens = Object.entries({ bos_token, eos_token, image_token }).filter(([, token]) => typeof token === "string");
  let out: string;
  try {
    out = new Template(prompt.chat_template ?? "").render({
      messages,
      tools: null,
      documents: null,
      add_generation_prompt,
      ...Object.fromEntries(tokens),
    });
  } catch (error) {
    throw new PromptError(`the checkpoint's chat template refuses the conversation: ${oneLine(error)}`);
  }
  if (out.length > MAX_RENDERED) {
    throw new PromptError(`the chat template writes more than ${MAX_RENDERED} characters: it is refused`);
  }
  return out;
}

function llava(messages: readonly Message[], prompt: PromptSpec): string {
  const said = messages.map(({ role, content }) => {
    const text = typeof content === "string" ? content : flat(content, pictureToken(prompt));
    if (role === "system") return `${text} `;
    if (role === "user") return `USER: ${text} `;
    if (role === "assistant") return `ASSISTANT: ${text}${prompt.eos_token ?? ""}`;
    throw new PromptError(`unknown role '${role}': choose one of system, user, assistant`);
  });
  return said.join("") + "ASSISTANT:";
}

/** Parts as one text: pictures before any text on lines of their own, later ones where they stand. */
function flat(parts: readonly ContentPart[], token: string): string {
  let leading = true;
  return parts
    .map((part) => {
      leading &&= part.type === "image";
      return part.type === "text" ? part.text : token + (leading ? "\n" : "");
    })
    .join("");
}
