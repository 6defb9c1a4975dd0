/** Pictures into the prompt: the rows of the projector take the places of the image tokens. */
import type { EmbeddingTable } from "./embedding.js";
import { PromptError } from "./errors.js";

/** Embeddings (S, H) of expanded `ids`: image tokens become the picture rows (T, H) in order, exactly. */
export function splice(
  ids: readonly number[],
  rows: readonly Float32Array[],
  table: EmbeddingTable,
  imageToken: number,
): Float32Array {
  const width = table.columns;
  const places = ids.reduce((sum, id) => sum + Number(id === imageToken), 0);
  const given = rows.reduce((sum, picture) => sum + picture.length, 0) / width;
  if (places !== given) {
    throw new PromptError(
      `the prompt has ${places} image tokens, but ${rows.length} pictures give ${given} rows: ` +
        "write the image token once for each picture",
    );
  }
  const out = new Float32Array(ids.length * width);
  let [picture, row] = [0, 0];
  ids.forEach((id, i) => {
    if (id !== imageToken) return table.rowInto(id, out, i * width);
    while (row === rows[picture].length) [picture, row] = [picture + 1, 0];
    out.set(rows[picture].subarray(row, row + width), i * width);
    row += width;
  });
  return out;
}
