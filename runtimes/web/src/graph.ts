/**
 * What the runtime reads and changes in an ONNX file (onnx.proto): its metadata, and how long its KV cache is. Exported
 * graphs fix the cache at the whole context, for runtimes that write into it in place. Here every call copies it, so
 * its length is left open and only the rows that there are get copied.
 */

/** One field of a protobuf message: bytes `start` to `end` of which `body` on is the content. */
interface Field {
  number: number;
  wire: number;
  start: number;
  body: number;
  end: number;
}

function varint(bytes: Uint8Array, at: number): [number, number] {
  let value = 0;
  for (let factor = 1; ; factor *= 128) {
    if (at >= bytes.length || factor > 2 ** 63) throw new RangeError("not a protobuf message");
    const byte = bytes[at++];
    value += (byte & 127) * factor;
    if (byte < 128) return [value, at];
  }
}

function* fieldsOf(bytes: Uint8Array): Generator<Field> {
  for (let at = 0; at < bytes.length; ) {
    const start = at;
    let key: number;
    [key, at] = varint(bytes, at);
    const wire = key % 8;
    let body = at;
    if (wire === 0) [, at] = varint(bytes, at);
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      let length: number;
      [length, body] = varint(bytes, at);
      at = body + length;
    } else throw new RangeError("not a protobuf message");
    if (at > bytes.length) throw new RangeError("not a protobuf message");
    yield { number: Math.floor(key / 8), wire, start, body, end: at };
  }
}

function encoded(value: number): number[] {
  const out: number[] = [];
  for (; value >= 128; value = Math.floor(value / 128)) out.push((value % 128) + 128);
  return [...out, value];
}

function joined(pieces: Uint8Array[]): Uint8Array {
  const out = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    out.set(piece, at);
    at += piece.length;
  }
  return out;
}

/** A message whose sub-messages of some fields are changed; the rest is copied as it is. */
function changed(message: Uint8Array, fields: number[], change: (body: Uint8Array) => Uint8Array): Uint8Array {
  const pieces: Uint8Array[] = [];
  for (const { number, wire, start, body, end } of fieldsOf(message)) {
    if (wire !== 2 || !fields.includes(number)) {
      pieces.push(message.subarray(start, end));
      continue;
    }
    const made = change(message.subarray(body, end));
    pieces.push(Uint8Array.from([...encoded(number * 8 + 2), ...encoded(made.length)]), made);
  }
  return joined(pieces);
}

function textOf(message: Uint8Array, number: number): string {
  for (const field of fieldsOf(message)) {
    if (field.number === number) return new TextDecoder().decode(message.subarray(field.body, field.end));
  }
  return "";
}

const [GRAPH, METADATA] = [7, 14]; // of ModelProto
const [INPUT, OUTPUT] = [11, 12]; // of GraphProto
const [NAME, TYPE, TENSOR, SHAPE, DIM] = [1, 2, 1, 2, 1]; // of ValueInfoProto, TypeProto, Tensor, TensorShapeProto

/** The custom metadata of an ONNX file. Throws RangeError for what is none. */
export function metadataOf(model: Uint8Array): Map<string, string> {
  const found = new Map<string, string>();
  for (const { number, body, end } of fieldsOf(model)) {
    if (number !== METADATA) continue;
    const entry = model.subarray(body, end);
    found.set(textOf(entry, 1), textOf(entry, 2));
  }
  return found;
}

/** The ONNX file with KV cache inputs and outputs (1, KV, positions, D) of any length. */
export function withOpenCache(model: Uint8Array): Uint8Array {
  const positions = Uint8Array.from([18, 9, ...new TextEncoder().encode("positions")]); // dim_param
  const shape = (body: Uint8Array): Uint8Array => {
    let axis = 0;
    return changed(body, [DIM], (dim) => (axis++ === 2 ? positions : dim));
  };
  const value = (body: Uint8Array): Uint8Array => {
    if (!/^(past_key_values|present)\./.test(textOf(body, NAME))) return body;
    return changed(body, [TYPE], (type) => changed(type, [TENSOR], (tensor) => changed(tensor, [SHAPE], shape)));
  };
  return changed(model, [GRAPH], (graph) => changed(graph, [INPUT, OUTPUT], value));
}
