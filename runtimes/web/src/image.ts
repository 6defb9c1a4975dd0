/** RGB pictures to the pixel values that the checkpoint's own processor makes, by `vlm_runtime.image`'s arithmetic. */
import { ImageError } from "./errors.js";
import { resize } from "./resize.js";
import type { PreprocessSpec } from "./spec.js";

/** Three bytes a pixel, lines from top to bottom. */
export interface RGB {
  width: number;
  height: number;
  data: Uint8Array | Uint8ClampedArray;
}

export const MAX_PIXELS = 178_956_970;
const MAX_RESIZED_PIXELS = 64_000_000;

/** Pixel values (3, s, s) of a picture: pad, resize, centre crop, rescale, normalise. s is `crop`, or else `size`. */
export function preprocess(image: RGB, spec: PreprocessSpec): Float32Array {
  if (spec.pad === "square") image = padded(image, spec.pad_color ?? [0, 0, 0]);
  if (spec.resize !== "none") image = resized(image, spec);
  if (spec.crop) image = centreCrop(image, spec.crop);
  const edge = spec.crop || spec.size;
  if (image.width !== edge || image.height !== edge) {
    throw new ImageError(
      `the picture came out as ${image.width} × ${image.height} pixels, the vision encoder takes ${edge} × ${edge}: ` +
        "crop it to a square first",
    );
  }
  const out = new Float32Array(3 * edge * edge);
  for (let channel = 0; channel < 3; channel++) {
    const values = levels(spec, channel);
    const start = channel * edge * edge;
    for (let i = 0; i < edge * edge; i++) out[start + i] = values[image.data[i * 3 + channel]];
  }
  return out;
}

/** The value of each of the 256 levels of a channel; every step rounds to float32, as transformers does. */
function levels(spec: PreprocessSpec, channel: number): Float32Array {
  const [mean, std] = [Math.fround(spec.mean[channel]), Math.fround(spec.std[channel])];
  return Float32Array.from({ length: 256 }, (_, level) => {
    return Math.fround(Math.fround(level * spec.rescale) - mean) / std;
  });
}

function resized(image: RGB, spec: PreprocessSpec): RGB {
  const { width, height } = image;
  const { size, resample } = spec;
  if (spec.resize === "exact") return resize(image, size, size, resample);
  if (spec.resize === "longest_edge") {
    const scale = size / Math.max(width, height);
    const least = spec.least ?? 1;
    const fitted = [width, height].map((edge) => Math.max(roundHalfEven(edge * scale), least));
    return padded(resize(image, fitted[0], fitted[1], resample), spec.pad_color ?? [0, 0, 0]);
  }
  const longer = Math.trunc((size * Math.max(width, height)) / Math.min(width, height));
  if (longer * size > MAX_RESIZED_PIXELS) {
    throw new ImageError(
      `a picture of ${width} × ${height} pixels is too long and thin: with its shorter edge at ${size} it would be ` +
        `${longer} long; crop it first`,
    );
  }
  return width <= height ? resize(image, size, longer, resample) : resize(image, longer, size, resample);
}

/** The picture in the middle of a square of one colour. */
function padded(image: RGB, color: [number, number, number]): RGB {
  const { width, height } = image;
  if (width === height) return image;
  const edge = Math.max(width, height);
  if (edge * edge > MAX_PIXELS) {
    const most = Math.floor(Math.sqrt(MAX_PIXELS));
    throw new ImageError(
      `a picture of ${width} × ${height} pixels padded to a square would have ${edge} × ${edge} pixels, at most ` +
        `${most} × ${most} are allowed: scale it down or crop it first`,
    );
  }
  return placed(image, edge, edge, Math.floor((edge - width) / 2), Math.floor((edge - height) / 2), color);
}

/** The picture on a canvas of `width` × `height` pixels of one colour, its corner at (left, top). */
export function placed(
  image: RGB,
  width: number,
  height: number,
  left: number,
  top: number,
  color: [number, number, number] = [0, 0, 0],
): RGB {
  const data = new Uint8ClampedArray(width * height * 3);
  if (color.some(Boolean)) {
    for (let i = 0; i < data.length; i++) data[i] = color[i % 3];
  }
  for (let y = 0; y < image.height; y++) {
    const line = image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3);
    data.set(line, ((y + top) * width + left) * 3);
  }
  return { width, height, data };
}

/** The rectangle of a picture, which lies inside it. */
export function cropped(image: RGB, left: number, top: number, width: number, height: number): RGB {
  const data = new Uint8ClampedArray(width * height * 3);
  for (let y = 0; y < height; y++) {
    const start = ((y + top) * image.width + left) * 3;
    data.set(image.data.subarray(start, start + width * 3), y * width * 3);
  }
  return { width, height, data };
}

/** The middle edge × edge pixels; a smaller picture stands in the middle of black, where transformers puts it. */
function centreCrop(image: RGB, edge: number): RGB {
  const [width, height] = [Math.max(edge, image.width), Math.max(edge, image.height)];
  let [left, top] = [Math.floor((image.width - edge) / 2), Math.floor((image.height - edge) / 2)];
  if (left < 0 || top < 0) {
    const before = -Math.floor((image.width - width) / 2);
    const above = -Math.floor((image.height - height) / 2);
    image = placed(image, width, height, before, above);
    [left, top] = [Math.max(0, left + before), Math.max(0, top + above)];
  }
  return cropped(image, left, top, edge, edge);
}

/** As Python rounds: halves to the even neighbour. */
export function roundHalfEven(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}
