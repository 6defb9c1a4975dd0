// What an answer took: one bar of its stages, and the numbers behind it.

const STAGES = [
  ["queue", "queue"],
  ["preprocess", "preprocess"],
  ["vision", "vision"],
  ["projector", "projector"],
  ["prefill", "prefill"],
  ["decode", "decode"],
];

/** Milliseconds as people read them: 0 ms, 0.4 ms, 38 ms, 1.24 s. */
export function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  if (ms < 0.05) return "0 ms";
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

/** Tokens a second after the first token; null where there is nothing to divide. */
export function rate(tokens, decodeMs) {
  return tokens > 1 && decodeMs > 0 ? ((tokens - 1) / decodeMs) * 1000 : null;
}

/** A <details> of `timings` (ms by stage, ttft) and `usage` (OpenAI's); null where the server told neither. */
export function took(timings, usage, open) {
  if (!timings && !usage) return null;
  const details = element("details", "took");
  details.open = open;
  const summary = element("summary");
  const said = usage?.completion_tokens ?? 0;
  const speed = rate(said, timings?.decode ?? 0);
  if (timings?.ttft !== undefined) summary.append(figure(duration(timings.ttft), "first token"));
  if (speed !== null) summary.append(figure(speed.toFixed(speed < 10 ? 1 : 0), "tokens/s"));
  if (!summary.firstChild) summary.append(figure(said, "tokens"));
  details.append(summary);
  const stages = STAGES.filter(([name]) => timings?.[name] !== undefined);
  if (stages.length) details.append(bar(stages, timings), table(stages, timings));
  if (usage) details.append(element("p", "counts", counts(usage)));
  return details;
}

function figure(value, unit) {
  const made = element("span", "", ` ${unit}`);
  made.prepend(element("b", "", String(value)));
  return made;
}

function bar(stages, timings) {
  const line = element("div", "bar");
  line.setAttribute("aria-hidden", "true");
  for (const [name] of stages.filter(([name]) => timings[name] > 0)) {
    const part = element("i", name);
    part.style.flexGrow = String(timings[name]);
    line.append(part);
  }
  return line;
}

function table(stages, timings) {
  const list = element("dl");
  for (const [name, label] of stages) {
    const row = element("div");
    const term = element("dt", "", label);
    term.prepend(element("i", name));
    row.append(term, element("dd", "", duration(timings[name])));
    list.append(row);
  }
  return list;
}

function counts(usage) {
  const { image_tokens: pictures = 0, cached_tokens: cached = 0 } = usage.prompt_tokens_details ?? {};
  const of = [pictures && `${pictures} of pictures`, cached && `${cached} cached`].filter(Boolean).join(", ");
  return `${usage.prompt_tokens} tokens in${of && ` (${of})`}, ${usage.completion_tokens} out`;
}

/** An element with a class and a text; text is never markup. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
