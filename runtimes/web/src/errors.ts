/** What can be wrong, each with one line that says what was given, what is allowed and what to do. */
export class VLMError extends Error {
  override name = "VLMError";
}

/** A bundle that is damaged, of another version, or not one at all. */
export class BundleError extends VLMError {
  override name = "BundleError";
}

/** A picture that cannot be used. */
export class ImageError extends VLMError {
  override name = "ImageError";
}

/** A question or conversation that the model cannot take. */
export class PromptError extends VLMError {
  override name = "PromptError";
}

/** An option out of its range. */
export class InputError extends VLMError {
  override name = "InputError";
}

/** A model that computes what are not numbers. */
export class CheckError extends VLMError {
  override name = "CheckError";
}

/** Whatever was thrown, as one line of at most 300 characters. */
export function oneLine(error: unknown): string {
  const text = error instanceof Error ? error.message || error.name : String(error);
  return text.split(/\s+/).filter(Boolean).join(" ").slice(0, 300);
}
