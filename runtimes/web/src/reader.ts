/** Where the files of a bundle come from: an address, with progress and a cache, or whatever an app gives. */
import { BundleError, oneLine } from "./errors.js";
import type { FileEntry } from "./manifest.js";

/** Reads the files of one bundle; `where` names it in messages. */
export interface Reader {
  where: string;
  /**
   * The bytes of one file; `onBytes` is told how many came since the last time. `entry` is what the manifest says of
   * it, and nothing for the manifest itself. Throws BundleError where it cannot be read.
   */
  read(name: string, entry: FileEntry | null, onBytes: (count: number) => void): Promise<Uint8Array<ArrayBuffer>>;
  /** Forget the kept copy of a file, which turned out to be damaged; whether there was one. */
  forget?(name: string, entry: FileEntry): Promise<boolean>;
}

const MAX_MANIFEST = 64 << 20;
const CACHE = "vlm-bundles";

/**
 * Files below `url`, the bundle's folder. With `cache`, they are kept by the browser (Cache API) under their SHA-256,
 * so that another version of the bundle is never mixed with an old one; the manifest is always asked for.
 */
export function urlReader(url: string | URL, cache: boolean): Reader {
  const folder = folderOf(url);
  const addressOf = (name: string): string => new URL(name, folder).href;
  return {
    where: folder.href,
    async read(name, entry, onBytes) {
      const address = addressOf(name);
      const store = cache && entry !== null ? await openCache() : null;
      const key = `${address}?sha256=${entry?.sha256 ?? ""}`;
      const kept = await store?.match(key).catch(() => undefined);
      if (kept && entry) return whole(kept, address, entry, onBytes);
      const bytes = await whole(await answerOf(address), address, entry, onBytes);
      await store?.put(key, new Response(bytes)).catch(() => undefined); // no room: it is fetched again next time
      return bytes;
    },
    async forget(name, entry) {
      const store = cache ? await openCache() : null;
      return (await store?.delete(`${addressOf(name)}?sha256=${entry.sha256}`).catch(() => false)) ?? false;
    },
  };
}

/** Checks size and SHA-256 as the manifest has them. Without a secure context the browser offers no SHA-256. */
export async function checkFile(
  bytes: Uint8Array<ArrayBuffer>,
  name: string,
  entry: FileEntry,
  verify: boolean,
): Promise<void> {
  if (bytes.length !== entry.bytes) {
    throw new BundleError(`${name} has ${bytes.length} bytes instead of ${entry.bytes}: copy the bundle again, whole`);
  }
  const subtle = verify ? (globalThis.crypto as Crypto | undefined)?.subtle : undefined;
  if (!subtle) return;
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== entry.sha256) {
    throw new BundleError(`${name} does not match its sha256: the bundle is damaged; copy it again or export again`);
  }
}

function folderOf(url: string | URL): URL {
  const base = (globalThis as { document?: { baseURI: string } }).document?.baseURI ?? globalThis.location?.href;
  let folder: URL;
  try {
    folder = new URL(url, base);
  } catch {
    throw new BundleError(`'${String(url)}' is no address: give the http(s) address of the bundle's folder`);
  }
  folder.search = folder.hash = "";
  folder.pathname = folder.pathname.replace(/\/manifest\.json$/, "/").replace(/\/?$/, "/");
  return folder;
}

async function openCache(): Promise<Cache | null> {
  try {
    return await globalThis.caches.open(CACHE);
  } catch {
    return null; // not offered here, or storage is switched off
  }
}

async function answerOf(address: string): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(address);
  } catch (error) {
    throw new BundleError(
      `${address} cannot be fetched (${oneLine(error)}): is the server running, and does it allow this page (CORS)?`,
    );
  }
  if (!response.ok) {
    throw new BundleError(`${address} answered ${response.status}: is it the address of a whole bundle?`);
  }
  return response;
}

/** The body, which has the size that the manifest says: neither a page in its place nor a part of it. */
async function whole(
  response: Response,
  address: string,
  entry: FileEntry | null,
  onBytes: (count: number) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const limit = entry?.bytes ?? MAX_MANIFEST;
  const isPage = /^text\/html/.test(response.headers.get("content-type") ?? "");
  if (isPage) {
    await response.body?.cancel();
    throw new BundleError(`${address} is a web page, not a file of a bundle: give the address of the bundle's folder`);
  }
  let bytes = new Uint8Array(entry?.bytes ?? 1 << 16);
  let length = 0;
  const reader = response.body?.getReader();
  try {
    for (let chunk = await reader?.read(); chunk && !chunk.done; chunk = await reader?.read()) {
      if (length + chunk.value.length > limit) {
        await reader?.cancel();
        throw new BundleError(`${address} has more than ${limit} bytes: it is not the file that was exported`);
      }
      if (length + chunk.value.length > bytes.length) {
        const larger = new Uint8Array(Math.max(bytes.length * 2, length + chunk.value.length));
        larger.set(bytes);
        bytes = larger;
      }
      bytes.set(chunk.value, length);
      length += chunk.value.length;
      onBytes(chunk.value.length);
    }
  } catch (error) {
    if (error instanceof BundleError) throw error;
    throw new BundleError(`${address} broke off after ${length} bytes (${oneLine(error)}): try again`);
  }
  if (entry && length !== entry.bytes) {
    throw new BundleError(`${address} has ${length} bytes instead of ${entry.bytes}: copy the bundle again, whole`);
  }
  return bytes.subarray(0, length);
}
