/** No tiles: the picture is resized and cropped to the one square that the tower takes. */
import { preprocess, type RGB } from "../image.js";
import type { VLMSpec } from "../spec.js";
import type { Layout, Size } from "../tiling.js";

export function layout(size: Size, spec: VLMSpec): Layout {
  const { before = "", image_token, after = "", image_tokens } = spec.prompt;
  return { size, grid: [1, 1], tiles: 1, text: before + image_token + after, runs: [image_tokens] };
}

export function tiles(image: RGB, spec: VLMSpec): Float32Array[] {
  return [preprocess(image, spec.preprocess)];
}

export function pack(rows: Float32Array): Float32Array {
  return rows;
}
