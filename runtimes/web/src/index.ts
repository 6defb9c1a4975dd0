/**
 * Runs a vlm-export bundle with ONNX Runtime Web: `const model = await load(url)`, then
 * `for await (const piece of model.generate("What is this?", { images: [picture] })) …`.
 */
export type { Answer, Settings, Timings } from "./answer.js";
export { Chat } from "./chat.js";
export { BundleError, CheckError, ImageError, InputError, PromptError, VLMError } from "./errors.js";
export { replay, type Replay, type Stage } from "./golden.js";
export type { RGB } from "./image.js";
export { load, type LoadOptions, type Progress } from "./load.js";
export type { Manifest } from "./manifest.js";
export { VLM, type Question } from "./model.js";
export type { Source } from "./picture.js";
export { urlReader, type Reader } from "./reader.js";
export type { Sampling } from "./sampling.js";
