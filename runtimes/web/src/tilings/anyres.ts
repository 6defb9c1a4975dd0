/**
 * LLaVA-NeXT and OneVision: the whole picture, and the picture at the best of several resolutions, cut into tiles.
 * Rows that show padding are left out, each line of patches ends with the newline row, and OneVision shrinks what would
 * be too many lines (arXiv:2408.03326, figure 2). Rounded as transformers rounds.
 */
import { joined } from "../arrays.js";
import { cropped, placed, preprocess, roundHalfEven, type RGB } from "../image.js";
import { resize } from "../resize.js";
import { tileTokens, type TilingSpec, type VLMSpec } from "../spec.js";
import type { Layout, Size } from "../tiling.js";

const SHRINKS = 1.1; // how many times longer lines may be than `max_grid` asks before they are shrunk

export function layout(size: Size, spec: VLMSpec, pictures: number): Layout {
  const { single = false, newline = false, resolutions = [] } = spec.tiling as TilingSpec;
  const text = spec.prompt.image_token;
  if (single && pictures > 1) {
    return { size, grid: [1, 1], tiles: 1, text, runs: [tileTokens(spec) + Number(newline)] };
  }
  const [height, width] = bestResolution(size, resolutions);
  const grid: [number, number] = [
    Math.floor(height / spec.vision.image_size),
    Math.floor(width / spec.vision.image_size),
  ];
  const [lines, columns] = shrunk(unpadded(size, grid, spec), spec);
  const rows = tileTokens(spec) + lines * (columns + Number(newline));
  return { size, grid, tiles: 1 + grid[0] * grid[1], text, runs: [rows] };
}

export function tiles(image: RGB, spec: VLMSpec, layout: Layout): Float32Array[] {
  const { preprocess: pixels, vision } = spec;
  const edge = vision.image_size;
  if (layout.tiles === 1) return [preprocess(image, { ...pixels, pad: "square" })];
  const out = [preprocess(resize(image, pixels.size, pixels.size, pixels.resample), pixels)];
  const [rows, columns] = layout.grid;
  const { height, width } = fitted(layout.size, rows * edge, columns * edge);
  const [left, top] = [Math.floor((columns * edge - width) / 2), Math.floor((rows * edge - height) / 2)];
  const small = resize(image, width, height, pixels.resample);
  const canvas = placed(small, columns * edge, rows * edge, left, top);
  for (let tile = 0; tile < rows * columns; tile++) {
    const square = cropped(canvas, (tile % columns) * edge, Math.floor(tile / columns) * edge, edge, edge);
    out.push(preprocess(square, pixels));
  }
  return out;
}

export function pack(rows: Float32Array, spec: VLMSpec, layout: Layout, newline: Float32Array | null): Float32Array {
  const hidden = spec.language.hidden_size;
  const tile = tileTokens(spec) * hidden;
  const overview = rows.subarray(0, tile);
  if (layout.tiles === 1) return newline === null ? overview : joined([overview, newline]);
  const [down, across] = layout.grid;
  const side = sideOf(spec);
  const [height, width] = unpadded(layout.size, layout.grid, spec);
  const [top, left] = [Math.floor((down * side - height) / 2), Math.floor((across * side - width) / 2)];
  let lines = new Float32Array(height * width * hidden);
  for (let y = 0, out = 0; y < height; y++) {
    for (let x = 0; x < width; x++, out += hidden) {
      const [line, column] = [y + top, x + left];
      const square = 1 + Math.floor(line / side) * across + Math.floor(column / side);
      const at = square * tile + ((line % side) * side + (column % side)) * hidden;
      lines.set(rows.subarray(at, at + hidden), out);
    }
  }
  const [lineCount, columns] = shrunk([height, width], spec);
  if (lineCount !== height || columns !== width) {
    lines = bilinear(lines, [height, width, hidden], 0, lineCount);
    lines = bilinear(lines, [lineCount, width, hidden], 1, columns);
  }
  if (newline === null) return joined([overview, lines]);
  const pieces = [overview];
  for (let y = 0; y < lineCount; y++) {
    pieces.push(lines.subarray(y * columns * hidden, (y + 1) * columns * hidden), newline);
  }
  return joined(pieces);
}

/** (height, width) that keeps most of the pixels, of equal ones the one that wastes least, then the first. */
function bestResolution(size: Size, resolutions: [number, number][]): [number, number] {
  let [best, most, least] = [resolutions[0], -1, 0];
  for (const one of resolutions) {
    const scale = Math.min(one[1] / size.width, one[0] / size.height);
    const area = Math.trunc(size.width * scale) * Math.trunc(size.height * scale);
    const kept = Math.min(area, size.width * size.height);
    const wasted = one[0] * one[1] - kept;
    if (kept > most || (kept === most && wasted < least)) [best, most, least] = [one, kept, wasted];
  }
  return best;
}

/** The picture's size inside a resolution, its aspect ratio kept. */
function fitted({ height, width }: Size, rows: number, columns: number): Size {
  if (columns / width < rows / height) {
    return { height: Math.min(Math.ceil(height * (columns / width)), rows), width: columns };
  }
  return { height: rows, width: Math.min(Math.ceil(width * (rows / height)), columns) };
}

/** How many lines and columns of patches of a grid show the picture, padding left out on both sides alike. */
function unpadded({ height, width }: Size, grid: [number, number], spec: VLMSpec): [number, number] {
  const side = sideOf(spec);
  let [lines, columns] = [grid[0] * side, grid[1] * side];
  const inner = (x: number): number => Math.trunc(roundHalfEven(x * 1e7) / 1e7);
  if (width / height > columns / lines) {
    lines -= Math.floor((lines - inner(height * (columns / width))) / 2) * 2;
  } else {
    columns -= Math.floor((columns - inner(width * (lines / height))) / 2) * 2;
  }
  return [lines, columns];
}

/** What is left of them where they are clearly more than `max_grid` tiles have. */
function shrunk([lines, columns]: [number, number], spec: VLMSpec): [number, number] {
  const most = (spec.tiling?.max_grid ?? 0) * tileTokens(spec);
  const ratio = most ? Math.sqrt((lines * columns) / most) : 0;
  return ratio > SHRINKS ? [wholeTimes(lines, ratio), wholeTimes(columns, ratio)] : [lines, columns];
}

/** How often `part` fits into `x`, by the remainder, as Python divides: x / part may round up. */
function wholeTimes(x: number, part: number): number {
  return Math.round((x - (x % part)) / part);
}

/** (h, w, H) with `count` places on `axis`, between the two nearest, as torch interpolates without aligned corners. */
function bilinear(
  from: Float32Array,
  shape: [number, number, number],
  axis: 0 | 1,
  count: number,
): Float32Array<ArrayBuffer> {
  const [height, width, hidden] = shape;
  const length = shape[axis];
  const [outer, inner] = axis === 0 ? [1, width * hidden] : [height, hidden];
  const out = new Float32Array(outer * count * inner);
  const scale = Math.fround(length / count);
  for (let place = 0; place < count; place++) {
    const at = Math.max(Math.fround(Math.fround(Math.fround(place + 0.5) * scale) - 0.5), 0);
    const low = Math.floor(at);
    const part = Math.fround(at - low);
    const rest = Math.fround(1 - part);
    const high = Math.min(low + 1, length - 1);
    for (let o = 0; o < outer; o++) {
      const [below, above, to] = [(o * length + low) * inner, (o * length + high) * inner, (o * count + place) * inner];
      for (let i = 0; i < inner; i++) {
        out[to + i] = Math.fround(from[below + i] * rest) + Math.fround(from[above + i] * part);
      }
    }
  }
  return out;
}

/** Patches along an edge of a tile, one row each. */
function sideOf(spec: VLMSpec): number {
  return Math.floor(Math.sqrt(tileTokens(spec)));
}
