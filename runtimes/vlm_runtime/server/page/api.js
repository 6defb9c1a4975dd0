// The server's two addresses that the page uses, as OpenAI's API defines them. Addresses are relative to the page.

/** What went wrong, in one line for people; `status` is 0 where no answer came at all. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

/** The first model of /v1/models. */
export async function describe(key) {
  const response = await send("v1/models", { headers: authorized(key) });
  const listed = await response.json().catch(() => null);
  if (!listed?.data?.[0]?.id) throw new ApiError("The server names no model: is this the address of vlm-serve?");
  return listed.data[0];
}

/** The chunks of a streamed answer, each as an object; ends after [DONE]. */
export async function* stream(body, key, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { ...authorized(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body.pipeThrough(new TextDecoderStream()))) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(sentence(chunk.error.message), response.status);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something else than an answer.");
  }
}

/** The data of each server-sent event. */
async function* events(texts) {
  const reader = texts.getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.replace(/\r$/, "");
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The connection broke off before the answer ended.");
  } finally {
    reader.cancel().catch(() => {}); // the server stops at the next token
  }
}

function authorized(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(address, options) {
  let response;
  try {
    response = await fetch(address, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer: is vlm-serve still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  throw new ApiError(sentence(message), response.status, Number(response.headers.get("Retry-After")) || 0);
}

/** A message with a capital at its beginning, unless that is the name of a field. */
function sentence(message) {
  return message.replace(/^[a-z]+(?=[ ,])/, (word) => word[0].toUpperCase() + word.slice(1));
}
