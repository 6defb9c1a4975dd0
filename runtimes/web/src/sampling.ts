/** From logits to the next token: the maths and the order of transformers' logits processors. */
import { CheckError, InputError } from "./errors.js";
import { uniforms } from "./random.js";

/**
 * How the next token is chosen; the default is greedy. Applied in this order: `repetitionPenalty` (> 0, 1: none) on
 * tokens that occurred, then `temperature` (0: greedy), `topK` (0: all), `topP` (0 < p ≤ 1), `minP` (0 … 1, relative to
 * the best token). Same `seed`, same tokens, in Python too.
 */
export interface Sampling {
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  seed?: number;
}

/** Picks tokens one after another; holds the random numbers of one answer. InputError: a value out of range. */
export class Sampler {
  private readonly sampling: Required<Omit<Sampling, "seed">>;
  private readonly random: () => number;

  constructor({ temperature = 0, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seed }: Sampling) {
    this.sampling = { temperature, topK, topP, minP, repetitionPenalty };
    check("temperature", temperature, temperature >= 0 && temperature < Infinity, "0 (greedy) or more");
    check("topK", topK, Number.isSafeInteger(topK) && topK >= 0, "0 (off) or more");
    check("topP", topP, topP > 0 && topP <= 1, "more than 0 and at most 1 (off)");
    check("minP", minP, minP >= 0 && minP <= 1, "from 0 (off) to 1");
    const sound = repetitionPenalty > 0 && repetitionPenalty < Infinity;
    check("repetitionPenalty", repetitionPenalty, sound, "more than 0 (1 is off)");
    check("seed", seed, seed === undefined || (Number.isSafeInteger(seed) && seed >= 0), "0 or more");
    this.random = uniforms(seed);
  }

  /** The next token id from logits (V,), which are left as they are; `previous` are all ids so far. */
  pick(logits: Float32Array, previous: readonly number[]): number {
    const { temperature, repetitionPenalty } = this.sampling;
    if (repetitionPenalty !== 1) logits = penalized(logits, previous, Math.fround(repetitionPenalty));
    let best = 0;
    for (let i = 0; i < logits.length; i++) {
      if (!(logits[i] <= logits[best])) best = i; // NaN wins, to be seen
      if (Number.isNaN(logits[best])) break;
    }
    if (!Number.isFinite(logits[best])) {
      throw new CheckError(`the language model gave ${logits[best]} as a logit: export it again at a higher precision`);
    }
    if (temperature === 0) return best;
    const left = filtered(logits, logits[best], this.sampling);
    return left.ids[draw(left.scores.map(Math.exp), this.random())];
  }
}

interface Candidates {
  ids: Int32Array;
  /** 0 for the best, below it for the others. */
  scores: Float32Array;
}

function penalized(logits: Float32Array, previous: readonly number[], penalty: number): Float32Array {
  const out = logits.slice();
  for (const id of new Set(previous)) {
    if (id >= 0 && id < out.length) out[id] = out[id] < 0 ? out[id] * penalty : out[id] / penalty;
  }
  return out;
}

/** Temperature, top-k, top-p, min-p. */
function filtered(logits: Float32Array, best: number, sampling: Required<Omit<Sampling, "seed">>): Candidates {
  const { temperature, topK, topP, minP } = sampling;
  let left: Candidates = { ids: Int32Array.from(logits, (_, i) => i), scores: logits.map((logit) => logit - best) };
  if (topK > 0 && topK < logits.length) {
    const least = left.scores.slice().sort()[logits.length - topK]; // ties with the k-th best stay, as in transformers
    left = only(left, (score) => score >= least);
  }
  const divisor = Math.fround(Math.max(temperature, 1e-30)); // smaller is 0 as float32
  left.scores.forEach((score, i) => (left.scores[i] = score / divisor));
  if (topP < 1) left = nucleus(left, topP);
  if (minP > 0) left = only(left, (score) => score >= Math.log(minP));
  return left;
}

function only({ ids, scores }: Candidates, keep: (score: number) => boolean): Candidates {
  const places: number[] = [];
  scores.forEach((score, i) => keep(score) && places.push(i));
  return chosen({ ids, scores }, places);
}

function chosen({ ids, scores }: Candidates, places: readonly number[]): Candidates {
  return { ids: Int32Array.from(places, (i) => ids[i]), scores: Float32Array.from(places, (i) => scores[i]) };
}

const STEPS = 1024;

/** The fewest best scores whose probabilities reach `topP` together; sorted only where the sum reaches it. */
function nucleus(all: Candidates, topP: number): Candidates {
  const wanted = topP * all.scores.reduce((sum, score) => sum + Math.fround(Math.exp(score)), 0);
  // Scores below this weigh less than 1 - topP all together, the best one weighing 1: none can be in the nucleus.
  const near = only(all, (score) => score >= Math.log((1 - topP) / all.scores.length));
  const weights = near.scores.map(Math.exp);
  const steps = Int32Array.from(near.scores, (score) => Math.min(score * -32, STEPS - 1));
  const sums = new Float64Array(STEPS);
  steps.forEach((step, i) => (sums[step] += weights[i]));
  let [last, before] = [0, 0];
  const most = Math.max(...steps);
  while (last < most && before + sums[last] < wanted) before += sums[last++];
  const inside: number[] = [];
  const border: number[] = [];
  steps.forEach((step, i) => (step < last ? inside.push(i) : step === last && border.push(i)));
  border.sort((a, b) => near.scores[b] - near.scores[a]);
  let count = 0;
  while (count < border.length && before < wanted) before += weights[border[count++]];
  return chosen(near, [...inside, ...border.slice(0, Math.max(count, 1))]);
}

/** The index in which `uniform` (0 ≤ u < 1) of the summed weights falls. */
function draw(weights: Float32Array, uniform: number): number {
  const wanted = uniform * weights.reduce((sum, weight) => sum + weight, 0);
  let reached = 0;
  for (let i = 0; i < weights.length - 1; i++) {
    reached += weights[i];
    if (wanted < reached) return i;
  }
  return weights.length - 1;
}

function check(name: string, value: unknown, allowed: boolean, what: string): void {
  if (!allowed) throw new InputError(`${name} is ${String(value)}: it must be ${what}`);
}
