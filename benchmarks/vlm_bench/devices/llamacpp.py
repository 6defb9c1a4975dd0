"""llama.cpp's `llama-mtmd-cli`: the command of one answer, and the times that it prints. Read from tools/mtmd.

It is a process for each answer. What it does not tell (preprocessing, sampling, single tokens) is not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_models.errors import BundleError, CheckError, InputError
from vlm_runtime.bundle import Bundle

PROGRAM = "llama-mtmd-cli"
# ELF's e_machine → Android's names for it.
_MACHINES = {183: ("arm64-v8a",), 40: ("armeabi-v7a", "armeabi"), 62: ("x86_64",), 3: ("x86",), 243: ("riscv64",)}
_ENCODED = re.compile(r"encod(?:ing done|ed) in\s+(\d+(?:\.\d+)?) ms")
_ROWS = re.compile(r"decoding (?:image|media|embd) batch \d+/\d+, n_tokens_batch = (\d+)")
_PROMPT = re.compile(r"prompt eval time =\s*(\d+\.\d+) ms /\s*(\d+) tokens")
_EVAL = re.compile(r"(?<!prompt )eval time =\s*(\d+\.\d+) ms /\s*(\d+) runs")


@dataclass(frozen=True)
class Models:
    """What llama.cpp opens of a bundle: the language model, and vision encoder and projector in one file."""

    language: Path
    vision: Path
    precision: str
    context: int


def models(bundle: Bundle) -> Models:
    """The GGUF files of a bundle. Raises BundleError where it has none."""
    part = bundle.manifest.parts["language_model"].get("gguf")
    vision = next((file for file in part.files if "mmproj" in file), None) if part else None
    if part is None or vision is None:
        raise BundleError(
            f"{bundle.folder.name} has no {'mmproj' if part else 'language model'} for llama.cpp: "
            "add it with vlm-export --target gguf"
        )
    return Models(bundle.path(part.graph), bundle.path(vision), part.precision, bundle.manifest.max_context)


def programs(folder: Path, abis: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder of binaries by name, of a machine that runs one of `abis`. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"no such folder of binaries: {folder}")
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    if PROGRAM not in files:
        raise InputError(f"{folder} has no {PROGRAM}: build llama.cpp's tools with the Android NDK and give build/bin")
    with files[PROGRAM].open("rb") as file:
        head = file.read(20)
    machine = _MACHINES.get(int.from_bytes(head[18:20], "little"), ("no Android",)) if head[:4] == b"\x7fELF" else ()
    if not set(machine) & set(abis):
        kind = f"a program for {machine[0]}" if machine else "no ELF program"
        raise InputError(f"{files[PROGRAM]} is {kind}, the phone runs {', '.join(abis)}: build it with the Android NDK")
    return files


def arguments(prompt: str, threads: int | None, context: int, new_tokens: int) -> list[str]:
    """Of the program, but for its files: greedy, as many tokens as asked for, the times at the end."""
    words = ["-p", prompt, "-n", str(new_tokens), "-c", str(context), "--temp", "0", "--ignore-eos", "-lv", "4"]
    return [*words, "--jinja", *(["-t", str(threads)] if threads is not None else [])]


def reply(text: str, said: str, new_tokens: int) -> dict[str, Any]:
    """What a contestant answers, from what the program printed on stdout and stderr. Raises CheckError.

    The prefill is that of text and picture rows, the wall time the sum of the stages: starting the program, reading the
    files and the picture, resizing and sampling are not in it. `tokens_per_s` is of the tokens after the first.
    """
    prompt, rest, vision = _PROMPT.search(said), _EVAL.search(said), [float(ms) for ms in _ENCODED.findall(said)]
    if not prompt or not rest or not vision:
        lines = [line.strip() for line in said.splitlines() if re.search("error|failed|invalid|unknown", line, re.I)]
        raise CheckError(f"{PROGRAM} gave no times ({lines[0][:200] if lines else 'another version of llama.cpp?'})")
    stages = {"vision": sum(vision), "prefill": float(prompt[1]), "decode": float(rest[1])}
    rows = [int(count) for count in _ROWS.findall(said)]
    return {
        "text": text.strip(),
        "stages_ms": stages,
        "wall_ms": sum(stages.values()),
        "ttft_ms": stages["vision"] + stages["prefill"],
        "tokens_per_s": int(rest[2]) / stages["decode"] * 1e3 if stages["decode"] else None,
        "new_tokens": new_tokens,
        "prompt_tokens": int(prompt[2]),
        "image_tokens": sum(rows) if rows else None,
    }


def engines() -> Mapping[str, str]:
    """As a row names them."""
    return dict.fromkeys(("vision_encoder", "projector", "language_model"), "llama.cpp")
