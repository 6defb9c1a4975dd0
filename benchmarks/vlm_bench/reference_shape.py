"""`python -m vlm_bench.reference_shape OUT`: CLIP ViT-L/14-336 + MLP + Qwen2-1.5B, 1.85 B random parameters, bf16.

Written tensor by tensor, so that it takes little memory; as transformers' own save_pretrained would spell it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_models.command import run
from vlm_models.errors import InputError

VOCAB, IMAGE_TOKEN_ID, END_TOKEN_ID = 151936, 151646, 151645
_SHARD = 2_000_000_000  # bytes
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, seed: int = 0) -> Path:
    """Write config, weights, tokenizer and processor into a new folder; returns it. Raises InputError if it exists."""
    if folder.exists():
        raise InputError(f"{folder} exists: give a new folder")
    folder.mkdir(parents=True)
    config = _config()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    _weights(folder, config, seed)
    _processor(folder)
    return folder


def _config() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=END_TOKEN_ID,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _tensors(config: Any, seed: int) -> Iterator[tuple[str, Any]]:
    """Name and values of every parameter: matrices of random multiples of one step, norms 1, biases 0."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name == "lm_head.weight":
            continue  # tied
        if p.dim() > 1:
            steps = torch.randint(-127, 128, p.shape, dtype=torch.int8, generator=generator)
            yield name, steps.to(torch.bfloat16) * (0.02 / 73)
        else:
            yield name, torch.full(p.shape, float("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)


def _weights(folder: Path, config: Any, seed: int) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Any] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        save_file(held, folder / f"{len(shards):05d}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    for name, tensor in _tensors(config, seed):
        if held and size + tensor.nbytes > _SHARD:
            flush()
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number:05d}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _processor(folder: Path) -> None:
    """A byte-level tokenizer whose ids fill the vocabulary, with `<image>` and the chat tokens at Qwen2's ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    special = {151643: "<|endoftext|>", 151644: "<|im_start|>", END_TOKEN_ID: "<|im_end|>", IMAGE_TOKEN_ID: "<image>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    width = math.ceil(math.log10(VOCAB))
    vocab = {special.get(i, alphabet[i] if i < len(alphabet) else f"<unused{i:0{width}d}>"): i for i in range(VOCAB)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special.values()))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def command(out: Annotated[Path, typer.Argument(help="A new folder; 3.7 GB.")]) -> None:
    """Write the reference shape, CLIP ViT-L/14-336 + MLP + Qwen2-1.5B with random weights."""
    write(out)
    Console().print(str(out), highlight=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
