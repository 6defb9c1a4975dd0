/**
 * Pillow's resampling of 8-bit RGB, number for number (Pillow, src/libImaging/Resample.c and Geometry.c): weights in
 * double precision, rounded to 22 bits, summed as integers; first along lines, then along columns, but the other way
 * round where the height shrinks much more (Pillow 13).
 */
import type { RGB } from "./image.js";

const PRECISION_BITS = 22;

interface Filter {
  support: number;
  weight(x: number): number;
}

function sinc(x: number): number {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function bicubic(x: number): number {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

const HAMMING = [Math.fround(0.54), Math.fround(0.46)]; // single precision in Pillow

function hamming(x: number): number {
  x = Math.abs(x);
  if (x === 0) return 1;
  return x >= 1 ? 0 : (Math.sin(x * Math.PI) / (x * Math.PI)) * (HAMMING[0] + HAMMING[1] * Math.cos(x * Math.PI));
}

/** By Pillow's number: 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming; 0, nearest, is none of them. */
const FILTERS: Record<number, Filter> = {
  1: { support: 3, weight: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  3: { support: 2, weight: bicubic },
  4: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  5: { support: 1, weight: hamming },
};

/** A picture of `width` × `height` pixels by Pillow's filter number `resample`; the same picture at its own size. */
export function resize(image: RGB, width: number, height: number, resample: number): RGB {
  if (width === image.width && height === image.height) return image;
  if (resample === 0) return nearest(image, width, height);
  const filter = FILTERS[resample];
  const lines = (from: RGB): RGB => (width === from.width ? from : alongLines(from, width, filter));
  const columns = (from: RGB): RGB => (height === from.height ? from : alongColumns(from, height, filter));
  const lost = image.height - height;
  return lost > 0 && lost > 2 * (image.width - width) ? lines(columns(image)) : columns(lines(image));
}

interface Weights {
  first: Int32Array;
  count: Int32Array;
  /** `size` integers for each output position. */
  values: Int32Array;
  size: number;
}

function weightsOf(from: number, to: number, filter: Filter): Weights {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  const size = Math.ceil(support) * 2 + 1;
  const made = { first: new Int32Array(to), count: new Int32Array(to), values: new Int32Array(to * size), size };
  const row = new Float64Array(size);
  for (let at = 0; at < to; at++) {
    const centre = (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const count = Math.min(from, Math.trunc(centre + support + 0.5)) - first;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      row[i] = filter.weight((i + first - centre + 0.5) * (1 / stretch));
      sum += row[i];
    }
    for (let i = 0; i < count; i++) {
      const scaled = (sum === 0 ? row[i] : row[i] / sum) * (1 << PRECISION_BITS);
      made.values[at * size + i] = Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    made.first[at] = first;
    made.count[at] = count;
  }
  return made;
}

const HALF = 1 << (PRECISION_BITS - 1);

function alongLines(image: RGB, width: number, filter: Filter): RGB {
  const { first, count, values, size } = weightsOf(image.width, width, filter);
  const from = image.data;
  const data = new Uint8ClampedArray(width * image.height * 3);
  for (let y = 0, out = 0; y < image.height; y++) {
    for (let x = 0; x < width; x++) {
      let [red, green, blue] = [HALF, HALF, HALF];
      let at = (y * image.width + first[x]) * 3;
      for (let i = x * size, end = i + count[x]; i < end; i++, at += 3) {
        red += from[at] * values[i];
        green += from[at + 1] * values[i];
        blue += from[at + 2] * values[i];
      }
      data[out++] = red >> PRECISION_BITS;
      data[out++] = green >> PRECISION_BITS;
      data[out++] = blue >> PRECISION_BITS;
    }
  }
  return { width, height: image.height, data };
}

function alongColumns(image: RGB, height: number, filter: Filter): RGB {
  const { first, count, values, size } = weightsOf(image.height, height, filter);
  const line = image.width * 3;
  const from = image.data;
  const data = new Uint8ClampedArray(line * height);
  const sums = new Int32Array(line);
  for (let y = 0; y < height; y++) {
    sums.fill(HALF);
    for (let i = 0; i < count[y]; i++) {
      const weight = values[y * size + i];
      const start = (first[y] + i) * line;
      for (let x = 0; x < line; x++) sums[x] += from[start + x] * weight;
    }
    for (let x = 0; x < line; x++) data[y * line + x] = sums[x] >> PRECISION_BITS;
  }
  return { width: image.width, height, data };
}

function nearest(image: RGB, width: number, height: number): RGB {
  const data = new Uint8ClampedArray(width * height * 3);
  const columns = places(image.width, width);
  let out = 0;
  for (const y of places(image.height, height)) {
    for (const x of columns) {
      const at = (y * image.width + x) * 3;
      for (let channel = 0; channel < 3; channel++) data[out++] = image.data[at + channel];
    }
  }
  return { width, height, data };
}

/** The nearest of `from` places for each of `to`; steps are added up, rounding errors included, as Pillow does. */
function places(from: number, to: number): number[] {
  const step = from / to;
  let at = step * 0.5;
  return Array.from({ length: to }, () => {
    const place = Math.min(Math.trunc(at), from - 1);
    at += step;
    return place;
  });
}
