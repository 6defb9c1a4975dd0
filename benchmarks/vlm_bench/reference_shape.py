"""`python -m vlm_bench.reference_shape OUT`: checkpoints of real shapes with random weights, under CLIP ViT-L/14-336.

"1.5b" is Qwen2-1.5B (1.85 B parameters in all, bf16), "7b" LLaVA-1.5-7B (7.06 B, fp16), "135m" SmolLM2-135M (0.44 B).
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

VOCAB = {"1.5b": 151936, "7b": 32064, "135m": 49153}
# begin of text, begin and end of a turn, image
SPECIAL = {"1.5b": (151643, 151644, 151645, 151646), "7b": (1, 32001, 2, 32000), "135m": (0, 1, 2, 49152)}
_SHARD = 2_000_000_000  # bytes
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, seed: int = 0, shape: str = "1.5b") -> Path:
    """Write config, weights, tokenizer and processor into a new folder; returns it. Raises InputError if it exists."""
    if shape not in VOCAB:
        raise InputError(f"unknown shape {shape!r}: choose one of {', '.join(VOCAB)}")
    if folder.exists():
        raise InputError(f"{folder} exists: give a new folder")
    folder.mkdir(parents=True)
    config = _config(shape)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    _weights(folder, config, seed)
    _processor(folder, shape)
    return folder


def _config(shape: str) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=_text(shape),
        image_token_index=SPECIAL[shape][3],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
        tie_word_embeddings=shape != "7b",
        dtype="float16" if shape == "7b" else "bfloat16",
    )


def _text(shape: str) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    begin, _, end, _ = SPECIAL[shape]
    if shape == "7b":
        return LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=VOCAB[shape],
            max_position_embeddings=4096,
            bos_token_id=begin,
            eos_token_id=end,
        )
    if shape == "135m":
        return LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=VOCAB[shape],
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            bos_token_id=begin,
            eos_token_id=end,
        )
    return Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=VOCAB[shape],
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=end,
    )


def _tensors(config: Any, seed: int) -> Iterator[tuple[str, Any]]:
    """Name and values of every parameter: matrices of random multiples of one step, norms 1, biases 0."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if p.dim() > 1:
            steps = torch.randint(-127, 128, p.shape, dtype=torch.int8, generator=generator)
            yield name, steps.to(config.dtype) * (0.02 / 73)
        else:
            yield name, torch.full(p.shape, float("norm" in name and name.endswith("weight")), dtype=config.dtype)


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


def _processor(folder: Path, shape: str) -> None:
    """A byte-level tokenizer whose ids fill the vocabulary, with `<image>` and the chat tokens at the shape's ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    size = VOCAB[shape]
    special = dict(zip(SPECIAL[shape], ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"), strict=True))
    free = (i for i in range(size) if i not in special)
    width = math.ceil(math.log10(size))
    vocab = {text: i for i, text in special.items()}
    vocab |= {letters: next(free) for letters in [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]}
    vocab |= {f"<unused{i:0{width}d}>": i for i in free}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
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
        model_max_length=4096 if shape == "7b" else 32768,
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


def command(
    out: Annotated[Path, typer.Argument(help="A new folder; 3.7 GB, 14 GB for 7b, 0.9 GB for 135m.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(VOCAB)}.")] = "1.5b",
) -> None:
    """Write a checkpoint of a real shape, random weights: CLIP ViT-L/14-336, MLP, Qwen2-1.5B, Llama-2-7B or SmolLM2."""
    write(out, shape=shape)
    Console().print(str(out), highlight=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
