// node ask.mjs BUNDLE PICTURE.ppm QUESTION: in Node, which decodes no pictures itself (a PPM file is pixels already)
import { readFile } from "node:fs/promises";
import { load } from "vlm-runtime-web";
import { folderReader } from "vlm-runtime-web/node";

const [bundle, picture, question] = process.argv.slice(2);
const file = await readFile(picture);
const [header, width, height] = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(file.toString("latin1", 0, 64));
const pixels = { width: +width, height: +height, data: new Uint8Array(file.subarray(header.length)) };

const model = await load(folderReader(bundle));
for await (const piece of model.generate(question, { images: [pixels], maxNewTokens: 64 })) {
  process.stdout.write(piece);
}
process.stdout.write("\n");
await model.dispose();
