// A PNG of 8-bit RGB to pixels: Node has no decoder, and the golden picture is a PNG.
import { inflateSync } from "node:zlib";

export function readPng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const data = [];
  let width, height;
  for (let at = 8; at < bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (type === "IHDR") {
      [width, height] = [view.getUint32(at + 8), view.getUint32(at + 12)];
      if (bytes[at + 16] !== 8 || bytes[at + 17] !== 2 || bytes[at + 20] !== 0) throw new Error("not 8-bit RGB");
    }
    if (type === "IDAT") data.push(bytes.subarray(at + 8, at + 8 + length));
    at += length + 12;
  }
  return { width, height, data: unfiltered(inflateSync(Buffer.concat(data)), width * 3, height) };
}

function unfiltered(raw, line, height) {
  const out = new Uint8Array(line * height);
  const at = (x, y) => (x < 0 || y < 0 ? 0 : out[y * line + x]);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (line + 1)];
    for (let x = 0; x < line; x++) {
      const [left, up, corner] = [at(x - 3, y), at(x, y - 1), x < 3 ? 0 : at(x - 3, y - 1)];
      const guess = [0, left, up, (left + up) >> 1, paeth(left, up, corner)][filter];
      out[y * line + x] = raw[y * (line + 1) + 1 + x] + guess;
    }
  }
  return out;
}

function paeth(left, up, corner) {
  const estimate = left + up - corner;
  const apart = [left, up, corner].map((value) => Math.abs(estimate - value));
  return [left, up, corner][apart.indexOf(Math.min(...apart))];
}
