/** The facts of a model as they stand in manifest.json under "spec"; fields as in the Python package's `VLMSpec`. */
export interface VLMSpec {
  family: string;
  name: string;
  fingerprint: string;
  vision: { image_size: number; patch_size: number; image_tokens: number };
  projector: { out_features: number; out_tokens?: number | null };
  language: LanguageSpec;
  preprocess: PreprocessSpec;
  prompt: PromptSpec;
  tiling?: TilingSpec | null;
}

export interface LanguageSpec {
  vocab_size: number;
  hidden_size: number;
  layers: number;
  kv_heads: number;
  head_dim: number;
  embed_multiplier?: number;
  both_ways?: "none" | "pictures" | "prompt";
}

export interface PreprocessSpec {
  size: number;
  resize: "shortest_edge" | "longest_edge" | "exact" | "none";
  crop: number;
  /** Pillow's number of the filter. */
  resample: number;
  rescale: number;
  mean: [number, number, number];
  std: [number, number, number];
  pad?: "none" | "square";
  pad_color?: [number, number, number];
  least?: number;
}

export interface TilingSpec {
  rule: string;
  /** (height, width) in pixels. */
  resolutions?: [number, number][];
  min_tiles?: number;
  max_tiles?: number;
  longest_edge?: number;
  max_grid?: number;
  overview?: "none" | "first" | "last";
  newline?: boolean;
  single?: boolean;
  before?: string;
  after?: string;
  tag?: string;
}

export interface PromptSpec {
  image_token: string;
  image_token_id: number;
  image_tokens: number;
  eos_token_ids: number[];
  bos_token?: string | null;
  eos_token?: string | null;
  chat_template?: string | null;
  placeholder?: string | null;
  chunked?: boolean;
  stop?: string[];
  before?: string;
  after?: string;
  special_tokens?: boolean;
}

/** What stands for one picture in a rendered conversation. */
export function pictureToken(prompt: PromptSpec): string {
  return prompt.placeholder || prompt.image_token;
}

/** Rows that the projector gives for one tile. */
export function tileTokens(spec: VLMSpec): number {
  return spec.projector.out_tokens || spec.vision.image_tokens;
}
