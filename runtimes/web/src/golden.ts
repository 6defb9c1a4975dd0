/** The bundle's golden vectors replayed here: what this browser computes beside what the checkpoint computed. */
import { joined } from "./arrays.js";
import { BundleError } from "./errors.js";
import type { VLM } from "./model.js";
import { openPicture, type Source } from "./picture.js";
import { readTensors } from "./safetensors.js";
import { splice } from "./splice.js";
import { pack, ruleOf } from "./tiling.js";
import { promptIds } from "./tokenizer.js";

/** How far one stage is from the reference, and what the manifest allows. */
export interface Stage {
  name: string;
  cosine: number;
  maxAbs: number;
  relativeL2: number;
  threshold: Record<string, number>;
  passed: boolean;
}

/** `greedy` are the tokens chosen here after the golden prompt, `reference` those of the checkpoint. */
export interface Replay {
  stages: Stage[];
  promptEqual: boolean;
  greedy: number[];
  reference: number[];
}

const TOLERANCES: Record<string, Record<string, number>> = {
  pixel_values: { max_abs: 1e-5 },
  image_features: { cosine: 0.99 },
  image_embeds: { cosine: 0.99 },
  inputs_embeds: { cosine: 0.99 },
  logits: { cosine: 0.9 },
};

/**
 * Replays pixel values, features, projected rows, spliced embeddings, logits and greedy tokens of the golden picture.
 * `picture` replaces golden/image.png where PNG cannot be decoded (Node). Throws BundleError where the bundle has none.
 */
export async function replay(model: VLM, picture?: Source): Promise<Replay> {
  const { manifest, spec } = model;
  if (!manifest.golden) throw new BundleError("the bundle has no golden vectors: export without --no-check");
  const golden = readTensors(await model.readFile(manifest.golden));
  const folder = manifest.golden.slice(0, manifest.golden.lastIndexOf("/") + 1);
  const image = await openPicture(picture ?? (await model.readFile(`${folder}${golden.metadata.image}`)));
  const rule = ruleOf(spec);
  const layout = rule.layout({ height: image.height, width: image.width }, spec, 1);
  const tiles = rule.tiles(image, spec, layout);
  const features = await model.pictures.features(tiles);
  const projected = await model.pictures.project(features);
  const ids = promptIds(golden.metadata.prompt, [layout], (text) => model.tokenizer.encode(text), spec.prompt);
  const rows = pack(projected, spec, layout, model.newline);
  const embeds = splice(ids, [rows], model.embedding, spec.prompt.image_token_id);
  const reference = [...golden.get("greedy_tokens")];
  const { logits, greedy } = await model.greedy(ids, embeds, reference.length);
  const made = {
    pixel_values: joined(tiles),
    image_features: features.data,
    image_embeds: projected,
    inputs_embeds: embeds,
    logits,
  };
  const allowed = manifest.parity.onnx?.stages ?? {};
  return {
    stages: Object.entries(made).map(([name, values]) =>
      compare(name, values, golden.get(name), allowed[name]?.threshold ?? TOLERANCES[name]),
    ),
    promptEqual: String(ids) === String([...golden.get("prompt_ids")]),
    greedy,
    reference,
  };
}

function compare(name: string, got: Float32Array, wanted: Float32Array, threshold: Record<string, number>): Stage {
  if (got.length !== wanted.length) {
    throw new BundleError(`${name} has ${got.length} numbers here and ${wanted.length} in the golden vectors`);
  }
  let [product, own, other, apart, maxAbs] = [0, 0, 0, 0, 0];
  for (let i = 0; i < got.length; i++) {
    const difference = Math.abs(got[i] - wanted[i]);
    product += got[i] * wanted[i];
    own += got[i] ** 2;
    other += wanted[i] ** 2;
    apart += difference ** 2;
    maxAbs = Math.max(maxAbs, difference);
  }
  const cosine = product / Math.sqrt(own * other);
  const relativeL2 = Math.sqrt(apart / other);
  const near = maxAbs <= (threshold.max_abs ?? Infinity) && cosine >= (threshold.cosine ?? -1);
  const passed = near && relativeL2 <= (threshold.relative_l2 ?? Infinity);
  return { name, cosine, maxAbs, relativeL2, threshold, passed };
}
