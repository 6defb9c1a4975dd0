import assert from "node:assert/strict";
import test from "node:test";
import { resize } from "../dist/resize.js";
import { bytes, casesOf, picture } from "./cases.js";

const FILTERS = ["nearest", "Lanczos", "bilinear", "bicubic", "box", "Hamming"];

for (const [n, { image, to, resample, expected }] of casesOf("resizing").entries()) {
  const name = `${FILTERS[resample]} from ${image.width} × ${image.height} to ${to.join(" × ")} (${n}) equals Pillow's`;
  test(name, () => {
    const made = resize(picture(image), to[0], to[1], resample);
    assert.deepEqual([made.width, made.height], to);
    assert.deepEqual(Buffer.from(made.data), Buffer.from(bytes(expected)));
  });
}
