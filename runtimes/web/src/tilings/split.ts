/**
 * Idefics3 and SmolVLM: a picture resized to whole tiles, each announced by its row and column, then the whole of it
 * (arXiv:2408.12637, section 2.2; sizes are rounded as in transformers' image_processing_idefics3).
 */
import { preprocess, type RGB } from "../image.js";
import { resize } from "../resize.js";
import { tileTokens, type TilingSpec, type VLMSpec } from "../spec.js";
import type { Layout, Size } from "../tiling.js";
import { gridTiles } from "./ratio.js";

const LONGEST = 4096; // transformers' limit, whatever the checkpoint says

export function layout(size: Size, spec: VLMSpec): Layout {
  const { before = "", after = "", tag = "", max_tiles = 1, longest_edge = 0 } = spec.tiling as TilingSpec;
  const edge = spec.vision.image_size;
  const token = spec.prompt.image_token;
  const { height, width } = wholeTiles(scaled(size, longest_edge), edge);
  let [rows, columns] = [Math.floor(height / edge), Math.floor(width / edge)];
  if (max_tiles === 1 || rows * columns === 1) [rows, columns] = [0, 0];
  let text = "";
  for (let row = 1; row <= rows; row++) {
    for (let column = 1; column <= columns; column++) text += `${before}<row_${row}_col_${column}>${token}`;
    text += "\n";
  }
  text += (text ? "\n" : "") + before + tag + token + after;
  const tiles = rows * columns + 1;
  return { size, grid: [rows, columns], tiles, text, runs: new Array<number>(tiles).fill(tileTokens(spec)) };
}

export function tiles(image: RGB, spec: VLMSpec, layout: Layout): Float32Array[] {
  const { longest_edge = 0, max_tiles = 1 } = spec.tiling as TilingSpec;
  const resample = spec.preprocess.resample;
  if (longest_edge !== 0) {
    const { height, width } = scaled(layout.size, longest_edge);
    image = resize(image, width, height, resample);
  }
  if (max_tiles !== 1) {
    const { height, width } = wholeTiles(image, spec.vision.image_size);
    image = resize(image, width, height, resample);
  }
  return [...gridTiles(image, ...layout.grid, spec), preprocess(image, spec.preprocess)];
}

export function pack(rows: Float32Array): Float32Array {
  return rows;
}

/** The longer edge at `longest` (0: as it is) and the other rounded to an even number. */
function scaled(size: Size, longest: number): Size {
  if (longest === 0) return size;
  let { height, width } = size;
  let ratio = width / height;
  if (width >= height) {
    [width, height] = [longest, Math.trunc(longest / ratio)];
    height += height % 2;
  } else {
    [height, width] = [longest, Math.trunc(longest * ratio)];
    width += width % 2;
  }
  [height, width] = [Math.max(height, 1), Math.max(width, 1)];
  ratio = width / height;
  if (Math.max(height, width) > LONGEST) {
    [height, width] =
      width >= height ? [Math.trunc(LONGEST / ratio), LONGEST] : [LONGEST, Math.trunc(LONGEST * ratio)];
  }
  return { height: Math.max(height, 1), width: Math.max(width, 1) };
}

/** Whole tiles: the longer edge rounded up first, the other after it in proportion. */
function wholeTiles({ height, width }: Size, edge: number): Size {
  const ratio = width / height;
  const up = (pixels: number): number => Math.ceil(pixels / edge) * edge;
  if (width >= height) return { width: up(width), height: up(Math.trunc(up(width) / ratio)) };
  return { height: up(height), width: up(Math.trunc(up(height) * ratio)) };
}
