import assert from "node:assert/strict";
import test from "node:test";
import { joined } from "../dist/arrays.js";
import { pack, ruleOf } from "../dist/tiling.js";
import { apart, casesOf, floats, picture } from "./cases.js";

const cases = casesOf("tiling");
const named = ({ name, size, pictures }) => `${name}: ${size.join(" × ")}, one of ${pictures}`;

test("layouts equal Python's", () => {
  for (const one of cases) {
    const { spec, size, pictures, layout, error } = one;
    const [height, width] = size;
    const made = () => {
      const found = ruleOf(spec).layout({ height, width }, spec, pictures);
      return { grid: found.grid, tiles: found.tiles, text: found.text, runs: found.runs };
    };
    if (!error) assert.deepEqual(made(), layout, named(one));
  }
});

for (const one of cases.filter(({ image }) => image)) {
  test(`${named(one)}: tiles and rows equal Python's`, () => {
    const { spec, image, pictures, pixels, newline, rows } = one;
    const rule = ruleOf(spec);
    const layout = rule.layout(picture(image), spec, pictures);
    const tiles = rule.tiles(picture(image), spec, layout);
    assert.equal(tiles.length, layout.tiles);
    assert.equal(apart(joined(tiles), floats(pixels)), 0);
    const count = layout.tiles * spec.vision.image_tokens * spec.language.hidden_size;
    const given = Float32Array.from({ length: count }, (_, i) => (i % 1009) / 64);
    const packed = pack(given, spec, layout, newline && floats(newline));
    assert.ok(apart(packed, floats(rows)) <= 1e-6, `rows are ${apart(packed, floats(rows))} apart`);
  });
}

test("pictures that Python refuses are refused", () => {
  for (const { spec, size, pictures, error } of cases.filter((one) => one.error)) {
    const [height, width] = size;
    const image = { height, width, data: new Uint8Array(height * width * 3) };
    assert.throws(() => {
      const layout = ruleOf(spec).layout(image, spec, pictures);
      ruleOf(spec).tiles(image, spec, layout);
    }, new RegExp(error.slice(0, 20)));
  }
});

test("a rule of a later version is refused by name", () => {
  const spec = { ...cases[0].spec, tiling: { rule: "spiral" } };
  assert.throws(() => ruleOf(spec), /rule 'spiral', this runtime knows anyres, ratio, split, whole/);
});

test("rows of another model are refused", () => {
  const { spec } = cases[0];
  const layout = ruleOf(spec).layout({ height: 28, width: 28 }, spec, 1);
  assert.throws(() => pack(new Float32Array(7), spec, layout, null), /gave 7 numbers, the manifest says 512/);
});
