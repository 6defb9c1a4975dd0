/** Pictures to the rows that stand for them in a prompt: preprocessed, encoded, projected, packed. */
import type { InferenceSession } from "onnxruntime-web";
import type { Picture, Timings } from "./answer.js";
import { joined } from "./arrays.js";
import { BundleError } from "./errors.js";
import type { Manifest, PartName } from "./manifest.js";
import { openPicture, type Source } from "./picture.js";
import { runEncoder } from "./session.js";
import { tileTokens, type VLMSpec } from "./spec.js";
import { pack, rowsOf, ruleOf, type Layout } from "./tiling.js";

const PICTURES_KEPT = 8;
const TILES_AT_ONCE = 4;

/** Numbers with their shape, the first axis first. */
export interface Shaped {
  data: Float32Array;
  shape: readonly number[];
}

export interface Encoders {
  manifest: Manifest;
  sessions: Record<PartName, InferenceSession>;
  newline: Float32Array | null;
}

interface Kept {
  picture: Picture;
  rows: Float32Array | null;
}

/** The vision encoder and the projector; what the last pictures gave is kept. */
export class PictureEncoder {
  private readonly spec: VLMSpec;
  private readonly kept: Kept[] = []; // the last one used stands last
  private count = 0;

  constructor(private readonly parts: Encoders) {
    this.spec = parts.manifest.spec;
  }

  /** One of the `pictures` pictures of a prompt, opened and preprocessed. Throws ImageError. */
  async open(source: Source, pictures = 1): Promise<Picture> {
    const image = await openPicture(source);
    const rule = ruleOf(this.spec);
    const layout = rule.layout({ height: image.height, width: image.width }, this.spec, pictures);
    const tiles = rule.tiles(image, this.spec, layout);
    const again = this.kept.find(({ picture }) => isSame(picture, layout, tiles));
    if (again) return this.keep(again).picture;
    const name = `picture ${++this.count}`;
    const picture = { tiles, layout, name, source: this.spec.tiling?.single ? image : null };
    return this.keep({ picture, rows: null }).picture;
  }

  /** A known picture as one of so many in its prompt, which may cut it otherwise. */
  async among(picture: Picture, pictures: number): Promise<Picture> {
    if (picture.source === null) return picture;
    const layout = ruleOf(this.spec).layout(picture.layout.size, this.spec, pictures);
    return layout.tiles === picture.layout.tiles ? picture : this.open(picture.source, pictures);
  }

  /** The rows (R, H) of a picture; what they took is added to `times`. */
  async rows(picture: Picture, times: Timings): Promise<Float32Array> {
    const known = this.kept.find((one) => one.picture.name === picture.name) ?? { picture, rows: null };
    if (known.rows === null) {
      let clock = performance.now();
      const features = await this.features(picture.tiles);
      times.vision += performance.now() - clock;
      clock = performance.now();
      known.rows = pack(await this.project(features), this.spec, picture.layout, this.parts.newline);
      times.projector += performance.now() - clock;
    }
    return this.keep(known).rows as Float32Array;
  }

  /** Features (N, T, F) of all tiles, a few at a time: attention within a tile takes T² numbers a head. */
  async features(tiles: readonly Float32Array[]): Promise<Shaped> {
    const edge = Math.sqrt(tiles[0].length / 3);
    const made: Shaped[] = [];
    for (let n = 0; n < tiles.length; n += TILES_AT_ONCE) {
      const some = tiles.slice(n, n + TILES_AT_ONCE);
      made.push(await runEncoder(this.parts.sessions.vision_encoder, joined(some), [some.length, 3, edge, edge]));
    }
    return { data: joined(made.map((one) => one.data)), shape: [tiles.length, ...made[0].shape.slice(1)] };
  }

  /** The projector's rows (N, T', H) of features (N, T, F). */
  async project(features: Shaped): Promise<Float32Array> {
    const [tiles, ...rest] = features.shape;
    const size = features.data.length / tiles;
    const made: Float32Array[] = [];
    for (let n = 0; n < tiles; n += TILES_AT_ONCE) {
      const count = Math.min(TILES_AT_ONCE, tiles - n);
      const x = features.data.subarray(n * size, (n + count) * size);
      const { data, shape } = await runEncoder(this.parts.sessions.projector, x, [count, ...rest]);
      if (shape[1] !== tileTokens(this.spec) || shape[2] !== this.spec.language.hidden_size) {
        throw new BundleError(
          `the projector gave rows of shape ${shape.join(" × ")}: the parts are not of the same model; export again`,
        );
      }
      made.push(data);
    }
    return joined(made);
  }

  private keep(one: Kept): Kept {
    const at = this.kept.indexOf(one);
    if (at >= 0) this.kept.splice(at, 1);
    this.kept.push(one);
    if (this.kept.length > PICTURES_KEPT) this.kept.shift();
    return one;
  }
}

/** Whether a picture has the same pixel values in the same places of the prompt. */
function isSame(picture: Picture, layout: Layout, tiles: readonly Float32Array[]): boolean {
  const { size, grid } = picture.layout;
  return (
    size.width === layout.size.width &&
    size.height === layout.size.height &&
    String(grid) === String(layout.grid) &&
    rowsOf(picture.layout) === rowsOf(layout) &&
    tiles.length === picture.tiles.length &&
    tiles.every((tile, n) => tile.every((value, i) => value === picture.tiles[n][i]))
  );
}
