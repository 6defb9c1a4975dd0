/** A picture as tiles of the vision encoder's size, and the tiles' projected rows as the rows of the picture. */
import { BundleError } from "./errors.js";
import type { RGB } from "./image.js";
import { tileTokens, type VLMSpec } from "./spec.js";
import * as anyres from "./tilings/anyres.js";
import * as ratio from "./tilings/ratio.js";
import * as split from "./tilings/split.js";
import * as whole from "./tilings/whole.js";

/** Pixels from top to bottom and from left to right. */
export interface Size {
  height: number;
  width: number;
}

/**
 * What becomes of a picture of `size`: `tiles` squares, those of the `grid` (rows, columns) and the overview. `text`
 * stands for it in the prompt; it holds the image token once for each of `runs`, the numbers of rows without text
 * between them.
 */
export interface Layout {
  size: Size;
  grid: [number, number];
  tiles: number;
  text: string;
  runs: number[];
}

/** What a module of `tilings` offers; pixel values are (3, s, s) a tile, rows are (tiles, T, H) flat. */
export interface Rule {
  layout(size: Size, spec: VLMSpec, pictures: number): Layout;
  tiles(image: RGB, spec: VLMSpec, layout: Layout): Float32Array[];
  pack(rows: Float32Array, spec: VLMSpec, layout: Layout, newline: Float32Array | null): Float32Array;
}

const RULES: Record<string, Rule> = { anyres, ratio, split, whole };

/** How the pictures of a model are cut. */
export function ruleOf(spec: VLMSpec): Rule {
  const name = spec.tiling?.rule ?? "whole";
  if (!Object.hasOwn(RULES, name)) {
    throw new BundleError(
      `pictures are cut by rule '${name}', this runtime knows ${Object.keys(RULES).join(", ")}: ` +
        "update vlm-runtime-web or use another runtime",
    );
  }
  return RULES[name];
}

/** How many rows of the prompt a picture takes. */
export function rowsOf(layout: Layout): number {
  return layout.runs.reduce((sum, run) => sum + run, 0);
}

/** The rows (rows, H) of a picture from those of its tiles (tiles, T, H). */
export function pack(rows: Float32Array, spec: VLMSpec, layout: Layout, newline: Float32Array | null): Float32Array {
  const wanted = layout.tiles * tileTokens(spec) * spec.language.hidden_size;
  if (rows.length !== wanted) {
    throw new BundleError(
      `the projector gave ${rows.length} numbers, the manifest says ${wanted} for ${layout.tiles} tiles: ` +
        "the parts are not of the same model; export again",
    );
  }
  return ruleOf(spec).pack(rows, spec, layout, newline);
}
