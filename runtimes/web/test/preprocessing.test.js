import assert from "node:assert/strict";
import test from "node:test";
import { ImageError } from "../dist/errors.js";
import { preprocess } from "../dist/image.js";
import { openPicture } from "../dist/picture.js";
import { apart, casesOf, floats, picture } from "./cases.js";

for (const { spec, image, expected, error } of casesOf("preprocessing")) {
  const name = `${image.width} × ${image.height} ${spec.resize} ${spec.size}, crop ${spec.crop}, pad ${spec.pad}`;
  if (error) {
    test(`${name} is refused as in Python`, () => {
      assert.throws(() => preprocess(picture(image), spec), new ImageError(error));
    });
  } else {
    test(`${name} gives Python's pixel values bit for bit`, () => {
      assert.equal(apart(preprocess(picture(image), spec), floats(expected)), 0);
    });
  }
}

test("transparent pixels are laid over white", async () => {
  const data = Uint8ClampedArray.of(10, 20, 30, 255, 0, 0, 0, 0, 100, 0, 255, 128);
  const { data: opaque } = await openPicture({ width: 3, height: 1, data });
  assert.deepEqual([...opaque], [10, 20, 30, 255, 255, 255, 177, 127, 255]);
});

test("pixels of another number than the size says are refused", async () => {
  const short = { width: 2, height: 2, data: new Uint8Array(11) };
  await assert.rejects(openPicture(short), /2 × 2 are 12 bytes of RGB or 16 of RGBA, not 11/);
});

test("a file is refused in Node, which has no decoder, saying what to give", async () => {
  await assert.rejects(openPicture(Uint8Array.of(1, 2, 3)), /give RGB pixels as \{ width, height, data \}/);
});
