/**
 * InternVL: the picture squashed to the grid of tiles whose aspect ratio is closest to its own, and an overview
 * (arXiv:2404.16821, section 3.2; of equally close grids a larger one where the picture has half of its pixels).
 */
import { cropped, preprocess, type RGB } from "../image.js";
import { resize } from "../resize.js";
import { tileTokens, type TilingSpec, type VLMSpec } from "../spec.js";
import type { Layout, Size } from "../tiling.js";

export function layout(size: Size, spec: VLMSpec): Layout {
  const { before = "", after = "", min_tiles = 1, max_tiles = 1, overview = "first" } = spec.tiling as TilingSpec;
  const [rows, columns] = gridOf(size, spec.vision.image_size, min_tiles, max_tiles);
  let tiles = rows * columns;
  if (tiles > 1 && overview === "last") tiles += 1;
  const text = before + spec.prompt.image_token + after;
  return { size, grid: [rows, columns], tiles, text, runs: [tiles * tileTokens(spec)] };
}

export function tiles(image: RGB, spec: VLMSpec, layout: Layout): Float32Array[] {
  const [rows, columns] = layout.grid;
  const edge = spec.vision.image_size;
  const squashed = resize(image, columns * edge, rows * edge, spec.preprocess.resample);
  const out = gridTiles(squashed, rows, columns, spec);
  if (layout.tiles > out.length) out.push(preprocess(image, spec.preprocess));
  return out;
}

export function pack(rows: Float32Array): Float32Array {
  return rows;
}

/** Pixel values of the tiles of a picture that has been resized to whole tiles, line by line. */
export function gridTiles(image: RGB, rows: number, columns: number, spec: VLMSpec): Float32Array[] {
  const edge = spec.vision.image_size;
  const out: Float32Array[] = [];
  for (let tile = 0; tile < rows * columns; tile++) {
    const [top, left] = [Math.floor(tile / columns) * edge, (tile % columns) * edge];
    out.push(preprocess(cropped(image, left, top, edge, edge), { ...spec.preprocess, resize: "none" }));
  }
  return out;
}

function gridOf(size: Size, edge: number, least: number, most: number): [number, number] {
  const shapes: [number, number][] = [];
  for (let columns = 1; columns <= most; columns++) {
    for (let rows = 1; rows * columns <= most; rows++) {
      if (least <= columns * rows) shapes.push([columns, rows]);
    }
  }
  shapes.sort((a, b) => a[0] * a[1] - b[0] * b[1]); // stable, as Python's
  let best: [number, number] = [1, 1];
  let nearest = Infinity;
  for (const [columns, rows] of shapes) {
    const apart = Math.abs(size.width / size.height - columns / rows);
    const large = size.width * size.height > 0.5 * edge * edge * columns * rows;
    if (apart < nearest || (apart === nearest && large)) [best, nearest] = [[rows, columns], apart];
  }
  return best;
}
