/**
 * NumPy's `default_rng(seed).random()`, so that a seed gives the tokens that it gives in Python: SeedSequence and PCG64
 * (O'Neill, HMC-CS-2014-0905: XSL-RR 128/64; NumPy, `bit_generator.pyx`).
 */
const MASK = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** Numbers of 0 ≤ u < 1; without a seed, others each time. */
export function uniforms(seed: number | undefined): () => number {
  const words = seedWords(seed);
  const longs = [0, 1, 2, 3].map((i) => (BigInt(words[2 * i + 1]) << 32n) | BigInt(words[2 * i]));
  const start = (longs[0] << 64n) | longs[1];
  const increment = ((((longs[2] << 64n) | longs[3]) << 1n) | 1n) & MASK;
  let state = increment;
  const step = (): void => void (state = (state * MULTIPLIER + increment) & MASK);
  state = (state + start) & MASK;
  step();
  return () => {
    step();
    const turn = state >> 122n;
    const mixed = BigInt.asUintN(64, (state >> 64n) ^ state);
    const turned = BigInt.asUintN(64, (mixed >> turn) | (mixed << ((64n - turn) & 63n)));
    return Number(turned >> 11n) / 2 ** 53;
  };
}

/** SeedSequence(seed).generate_state(8, uint32). */
function seedWords(seed: number | undefined): Uint32Array {
  const entropy = seed === undefined ? crypto.getRandomValues(new Uint32Array(4)) : wordsOf(seed);
  let hash = 0x43b0d7e5;
  const hashed = (value: number): number => {
    value ^= hash;
    hash = Math.imul(hash, 0x931e8875);
    value = Math.imul(value, hash);
    return value ^ (value >>> 16);
  };
  const mixed = (x: number, y: number): number => {
    const made = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y);
    return (made | 0) ^ ((made | 0) >>> 16);
  };
  const pool = [0, 1, 2, 3].map((i) => hashed(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
    }
  }
  let other = 0x8b51f9dd;
  return Uint32Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % 4] ^ other;
    other = Math.imul(other, 0x58f38ded);
    value = Math.imul(value, other);
    return value ^ (value >>> 16);
  });
}

function wordsOf(seed: number): Uint32Array {
  return Uint32Array.of(seed % 2 ** 32, Math.floor(seed / 2 ** 32)); // seeds are safe integers: two words at most
}
