/**
 * Serves the example with one bundle: node example/serve.mjs BUNDLE [PORT]
 * The two headers of cross-origin isolation let the browser use more than one thread.
 */
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
const roots = { bundle: resolve(process.argv[2] ?? "bundle"), web: fileURLToPath(new URL("..", import.meta.url)) };

/** The file of an address, or nothing where it is none or lies elsewhere. */
function fileOf(url) {
  const pieces = decodeURIComponent(new URL(url, "http://localhost").pathname).split("/").slice(1);
  const root = roots[pieces[0]];
  if (root === undefined) return undefined;
  const path = resolve(join(root, ...pieces.slice(1)));
  if (!path.startsWith(resolve(root) + sep)) return undefined;
  return statSync(path, { throwIfNoEntry: false })?.isFile() ? path : undefined;
}

const server = createServer((request, response) => {
  if (request.url === "/") {
    response.writeHead(302, { Location: "/web/example/index.html" }).end();
    return;
  }
  let path;
  try {
    path = fileOf(request.url);
  } catch {
    path = undefined; // an address that cannot be decoded
  }
  if (path === undefined) {
    response.writeHead(404, { "Content-Type": "text/plain" }).end("not found\n");
    return;
  }
  response.writeHead(200, {
    "Content-Type": TYPES[extname(path)] ?? "application/octet-stream",
    "Content-Length": statSync(path).size,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  if (request.method === "HEAD") response.end();
  else createReadStream(path).pipe(response);
});

server.listen(Number(process.argv[3] ?? 8080), "127.0.0.1", () => {
  process.stdout.write(`http://127.0.0.1:${server.address().port}/\n`);
});
