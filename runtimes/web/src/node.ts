/** Bundles on the disk, for Node. */
import { readFile } from "node:fs/promises";
import { join, resolve, sep } from "node:path";
import { BundleError, oneLine } from "./errors.js";
import type { Reader } from "./reader.js";

/** Reads the files of a bundle's folder. */
export function folderReader(folder: string): Reader {
  const root = resolve(folder);
  return {
    where: root + sep,
    async read(name, _entry, onBytes) {
      try {
        const bytes = new Uint8Array(await readFile(join(root, name)));
        onBytes(bytes.length);
        return bytes;
      } catch (error) {
        throw new BundleError(`${join(root, name)} cannot be read (${oneLine(error)}): is it a whole bundle?`);
      }
    },
  };
}
