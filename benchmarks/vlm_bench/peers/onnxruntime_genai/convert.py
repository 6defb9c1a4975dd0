"""Runs in the peer's environment: the language model by GenAI's builder, vision and embedding as graphs beside it.

GenAI's pipeline wants three graphs: pixel_values → image_features → inputs_embeds → logits. The one for vision hands
rows on that plain ONNX Runtime made with vision.onnx.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

_INT4 = ("int4_block_size=32", "int4_accuracy_level=4")
_OPSET, _IR = 17, 10


class Vision(torch.nn.Module):
    """pixel_values (1, 3, s, s) → image_features (T, H), tower and projector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.model.get_image_features(pixel_values=pixel_values)
        rows = getattr(found, "pooler_output", found)
        rows = rows[0] if isinstance(rows, list | tuple) else rows
        return rows.reshape(-1, rows.shape[-1])  # type: ignore[no-any-return]


def convert(checkpoint: str, folder: str, precision: str) -> None:
    """Write everything GenAI opens into `folder`, and vision.onnx."""
    out = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        image_id = _write_parts(
            checkpoint, Path(scratch) / "text", out, np.float16 if precision == "int4" else np.float32
        )
        _build(Path(scratch), folder, precision)  # with nothing else in memory: it takes much itself
    _describe(out, image_id)


def _write_parts(checkpoint: str, text: Path, out: Path, table: Any) -> int:
    """Everything but what the builder makes, which gets the folder `text` to read; the image token's id."""
    load: Any = AutoModelForImageTextToText
    whole, loaded = load.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    if names := sorted(loaded["missing_keys"]):  # transformers would make random weights for them
        raise ValueError(f"transformers finds no {names[0]} and {len(names) - 1} other tensors: take another version")
    whole.eval()
    _write_language(whole, checkpoint, text)
    _write_vision(whole, out)
    _write_embedding(whole, out, table)
    _write_rows(whole.config.text_config.hidden_size, out)
    return int(whole.config.image_token_id)


def _write_vision(whole: Any, out: Path) -> None:
    size = whole.config.vision_config.image_size
    torch.onnx.export(
        Vision(whole.model).eval(),
        (torch.zeros(1, 3, size, size),),
        str(out / "vision.onnx"),
        input_names=["pixel_values"],
        output_names=["image_features"],
        dynamo=True,
        external_data=True,
    )


def _write_language(whole: Any, checkpoint: str, folder: Path) -> None:
    """The language model as a text-only folder, which is what the builder reads."""
    kind: Any = AutoModelForCausalLM
    with torch.device("meta"):  # no second copy in memory
        text = kind.from_config(whole.config.text_config, dtype=torch.float32)
    text.model.load_state_dict(whole.model.language_model.state_dict(), assign=True)
    text.lm_head.load_state_dict(whole.lm_head.state_dict(), assign=True)
    text.tie_weights()
    text.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer
    tokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def _build(scratch: Path, folder: str, precision: str) -> None:
    """GenAI's builder, as a command; it takes inputs_embeds, so that a picture's rows can be among them."""
    options = ["exclude_embeds=true", *(_INT4 if precision == "int4" else ())]
    paths = ["-i", str(scratch / "text"), "-o", folder, "-c", str(scratch / "cache")]
    builder = [sys.executable, "-I", "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, *paths, "-p", precision, "-e", "cpu", "--extra_options", *options], check=True)


def _write_embedding(whole: Any, out: Path, dtype: Any) -> None:
    """input_ids (1, S), image_features (T, H) → inputs_embeds (1, S, H): rows looked up, the picture's put in."""
    layer = whole.get_input_embeddings()
    table = layer.weight.detach() * getattr(layer, "embed_scale", 1.0)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["stored"]),
        helper.make_node("Cast", ["stored"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Equal", ["input_ids", "image_id"], ["is_image"]),
        helper.make_node("NonZero", ["is_image"], ["places"]),
        helper.make_node("Transpose", ["places"], ["at"], perm=[1, 0]),
        helper.make_node("ScatterND", ["rows", "at", "image_features"], ["inputs_embeds"]),
    ]
    width = table.shape[1]
    given = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["images", width]),
    ]
    made = [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", width])]
    known = [
        numpy_helper.from_array(table.numpy().astype(dtype), "table"),
        numpy_helper.from_array(np.array(whole.config.image_token_id, np.int64), "image_id"),
    ]
    _save(helper.make_graph(nodes, "embedding", given, made, known), out / "embedding.onnx")


def _write_rows(width: int, out: Path) -> None:
    """Rows as they are."""
    names = "pixel_values", "image_features"
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["images", width]) for name in names)
    node = helper.make_node("Identity", ["pixel_values"], ["image_features"])
    _save(helper.make_graph([node], "rows", [given], [made]), out / "rows.onnx")


def _save(graph: onnx.GraphProto, path: Path) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.save(model, path, save_as_external_data=bool(graph.initializer), location=f"{path.name}.data")


def _describe(out: Path, image_id: int) -> None:
    """Make the builder's genai_config.json that of a pipeline of three graphs.

    Its end token is the image token, which no answer has: GenAI pads after an end token, and answers end by length.
    """
    path = out / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    model = config["model"]
    model["type"], model["eos_token_id"] = "gemma3", image_id
    model["vision"] = {
        "filename": "rows.onnx",
        "inputs": {"pixel_values": "pixel_values"},
        "outputs": {"image_features": "image_features"},
    }
    model["embedding"] = {
        "filename": "embedding.onnx",
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    path.write_text(json.dumps(config, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    convert(**json.loads(sys.argv[1]))
