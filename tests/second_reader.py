"""A second reader of bundles, written from runtimes/BUNDLE.md alone: NumPy, ONNX Runtime, tokenizers and Jinja2.

`python second_reader.py BUNDLE` replays the golden vectors and prints what each stage gives, held against the manifest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image  # decodes files only

from second_reader_pictures import cut
from second_reader_text import open_tokenizer, question, render, token_ids

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}
TYPES = {"F32": "<f4", "I64": "<i8"}
STAGES = ("pixel_values", "image_features", "image_embeds", "inputs_embeds", "logits")


def open_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert (manifest["format"], manifest["version"]) == ("vlm-bundle", 1)
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == entry["bytes"], name
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
    return manifest


def read_safetensors(path):
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header, data, out = json.loads(content[8 : 8 + n]), content[8 + n :], {}
    about = header.pop("__metadata__")
    for name, t in header.items():
        a, b = t["data_offsets"]
        out[name] = np.frombuffer(data[a:b], TYPES[t["dtype"]]).reshape(t["shape"])
    return about, out


# --- embeddings and splice


def open_table(folder, manifest):
    e = manifest["embedding"]
    stored = np.fromfile(folder / e["file"], STORED[e["dtype"]]).reshape(e["rows"], e["columns"])
    multiplier = np.float32(manifest["spec"]["language"].get("embed_multiplier", 1.0))

    def rows(ids):
        found = stored[np.asarray(ids, int)]
        if e["dtype"] == "BF16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        found = found.astype(np.float32)
        if e["dtype"] == "I8":
            found *= np.fromfile(folder / e["scales"], "<f4")[np.asarray(ids, int), None]
        return found * multiplier

    return rows


def splice(ids, rows, table, image):
    out = table(ids)
    out[np.asarray(ids) == image] = np.concatenate(rows) if rows else np.empty((0, out.shape[1]))
    return out


# --- running the parts


class Reader:
    """An opened bundle, its parts on ONNX Runtime."""

    def __init__(self, folder):
        self.folder, self.manifest = folder, open_manifest(folder)
        self.spec, self.prompt = self.manifest["spec"], self.manifest["spec"]["prompt"]
        self.tokenizer = open_tokenizer(folder / self.manifest["tokenizer"], self.prompt)
        self.table = open_table(folder, self.manifest)
        newline = self.manifest.get("image_newline")
        self.newline = None if newline is None else np.fromfile(folder / newline, "<f4")
        self.vision, self.projector, self.language = (
            self.session(part) for part in ("vision_encoder", "projector", "language_model")
        )
        self.cache, self.position = {}, 0

    def session(self, part):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.folder / self.manifest["parts"][part]["onnx"]["graph"]
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        assert (about["vlm.part"], about["vlm.fingerprint"]) == (part, self.spec["fingerprint"])
        return session

    def append(self, rows, block=False):
        """Logits (V,) after the rows (S, H)."""
        inputs = {i.name: i.shape for i in self.language.get_inputs()}
        if not self.cache:
            for name, shape in inputs.items():
                if name.startswith("past_key_values."):
                    length = shape[2] if isinstance(shape[2], int) else self.manifest["max_context"]
                    self.cache[name] = np.zeros((1, shape[1], length, shape[3]), np.float32)
        end = self.position + len(rows)
        feeds = {"inputs_embeds": rows[None], "seqlens_k": np.array([end - 1], np.int32)}
        feeds["total_sequence_length"] = np.array(end, np.int32)
        if "block" in inputs:
            feeds["block"] = np.array(block)
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.cache)]
        logits, *presents = self.language.run(names, {**feeds, **self.cache})
        self.cache, self.position = dict(zip(self.cache, presents, strict=True)), end
        return logits[0, 0]

    def prefill(self, ids, rows):
        both_ways, image = self.spec["language"].get("both_ways", "none"), self.prompt["image_token_id"]
        seen = {"none": [False] * len(ids), "prompt": [True] * len(ids), "pictures": [i == image for i in ids]}[
            both_ways
        ]
        self.position = start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or seen[end] != seen[start]:
                logits, start = self.append(rows[start:end], block=seen[start]), end
        return logits

    def greedy(self, logits, count):
        out = [int(logits.argmax())]
        while len(out) < count and out[-1] not in self.prompt["eos_token_ids"]:
            out.append(int(self.append(self.table(out[-1:])).argmax()))
        return out

    def stages(self, pictures, text):
        """By name, what each stage makes of a rendered conversation about pictures of levels (h, w, 3)."""
        cuts = [cut(pixels, self.spec, len(pictures), self.newline) for pixels in pictures]
        out = {"pixel_values": [], "image_features": [], "image_embeds": []}
        rows = []
        for tiles, _, runs, pack in cuts:
            (features,) = self.vision.run(None, {"pixel_values": tiles})
            (embeds,) = self.projector.run(None, {"image_features": features})
            rows.append(pack(embeds))
            assert len(rows[-1]) == sum(runs)
            for name, value in zip(out, (tiles, features, embeds), strict=True):
                out[name].append(value)
        stages = {name: np.concatenate(values) for name, values in out.items() if values}
        ids = token_ids(text, [(said, runs) for _, said, runs, _ in cuts], self.tokenizer, self.prompt)
        stages["prompt_ids"] = np.array(ids)
        stages["inputs_embeds"] = splice(ids, rows, self.table, self.prompt["image_token_id"])
        stages["logits"] = self.prefill(ids, stages["inputs_embeds"])
        return stages


# --- golden vectors


def distances(golden, got):
    a, b = golden.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
    return {
        "max_abs": float(np.abs(a - b).max()),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        "kl": float((np.exp(p) * (p - q)).sum()),
    }


def replay(folder):
    """By stage, its distances and whether it keeps the manifest's threshold; the ids; how many greedy tokens agree."""
    reader = Reader(folder)
    golden = folder / reader.manifest["golden"]
    about, want = read_safetensors(golden)
    picture = np.asarray(Image.open(golden.parent / about["image"]).convert("RGB"))
    message = question("Describe the image.", 1, reader.prompt)
    got = reader.stages([picture], about["prompt"])
    parity, report = reader.manifest["parity"]["onnx"], {}
    for name, stage in parity["stages"].items():
        assert got[name].shape == want[name].shape, name
        apart = distances(want[name], got[name])
        kept = all(
            apart[metric] >= limit if metric in ("cosine", "top1") else apart[metric] <= limit
            for metric, limit in stage["threshold"].items()
        )
        report[name] = {**apart, "kept": kept}
    tokens = reader.greedy(got["logits"], len(want["greedy_tokens"]))
    pairs = zip(tokens, want["greedy_tokens"].tolist(), strict=False)
    equal = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(tokens))
    return {
        "stages": report,
        "ids_equal": got["prompt_ids"].tolist() == want["prompt_ids"].tolist(),
        "prompt_equal": render([message], reader.prompt) == about["prompt"],
        "greedy": {"equal": equal, "said": parity["greedy"]},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(replay(Path(sys.argv[1]))) + "\n")
