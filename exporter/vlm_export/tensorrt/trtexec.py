"""tensorrt/build.sh: the engines by `trtexec`, for a device where there is TensorRT but no Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_export.tensorrt.machine import disk_needed, memory_needed
from vlm_export.tensorrt.shapes import MAX_BATCH, Shapes, shapes
from vlm_models.spec import VLMSpec
from vlm_runtime.manifest import Part

SCRIPT = "tensorrt/build.sh"

_HEAD = """\
#!/usr/bin/env bash
# Builds the engines of this bundle with trtexec, one part after the other: bash tensorrt/build.sh [NAME]
# They go to tensorrt/engines/NAME/ (NAME: "device"). Started again, it leaves the finished ones alone.
# TRTEXEC names the program where it is not in the PATH or in JetPack's place.
# FORCE=1 skips the look at memory and disk.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-device}
engines=tensorrt/engines/$name
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
if [ ! -x "$trtexec" ]; then
  echo "no trtexec at $trtexec: install TensorRT (Jetson: JetPack), or set TRTEXEC to its place" >&2
  exit 3
fi
flags=()
# Later versions build strongly typed networks only, and no longer know the flag.
if "$trtexec" --help 2>&1 | grep -q -e --stronglyTyped; then flags+=(--stronglyTyped); fi
mkdir -p "$engines"

# build PART MEMORY_MIB DISK_MIB ARGUMENT...
build() {
  local part=$1 memory=$2 disk=$3
  shift 3
  if [ -s "$engines/$part.engine" ]; then
    echo "$part: $engines/$part.engine is there"
    return
  fi
  if [ "${FORCE:-0}" != 1 ]; then
    local free
    free=$(awk '/^(MemAvailable|SwapFree):/ { sum += $2 } END { print int(sum / 1024) }' /proc/meminfo)
    if [ "$free" -lt "$memory" ]; then
      echo "$part takes about $memory MiB of memory, $free with swap are free:" \\
        "close other programs (sudo init 3), add swap, or set FORCE=1" >&2
      exit 2
    fi
    free=$(df -Pm "$engines" | awk 'NR == 2 { print $4 }')
    if [ "$free" -lt "$disk" ]; then
      echo "$part takes $disk MiB of disk, $free are free: make room, or set FORCE=1" >&2
      exit 2
    fi
  fi
  echo "$part: building, which takes minutes; the log is $engines/$part.log"
  if ! "$trtexec" --onnx="tensorrt/$part.onnx" --saveEngine="$engines/$part.engine.partial" --skipInference \\
    --timingCacheFile=tensorrt/timing.cache "${flags[@]}" "$@" >"$engines/$part.log" 2>&1; then
    rm -f "$engines/$part.engine.partial"
    echo "$part: trtexec failed; its first error:" >&2
    grep -m 1 -e '\\[E\\]' "$engines/$part.log" >&2 || tail -n 1 "$engines/$part.log" >&2
    exit 1
  fi
  mv "$engines/$part.engine.partial" "$engines/$part.engine"
}

"""
_TAIL = """
echo "done: $engines"
echo "For vlm-run, build them by 'vlm-export --build .' instead: it lists them in manifest.json, and the timing cache"
echo "of this run makes it quick."
"""


def write_script(root: Path, spec: VLMSpec, parts: Mapping[str, Part]) -> str:
    """Write tensorrt/build.sh for `parts` into the bundle; its name there."""
    path = root / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script(root, spec, parts), encoding="utf-8", newline="\n")
    path.chmod(0o755)
    return SCRIPT


def script(root: Path, spec: VLMSpec, parts: Mapping[str, Part]) -> str:
    """The text of build.sh: the smallest part first."""
    sizes = {name: _weights(root, part) for name, part in parts.items()}
    lines = []
    for name in sorted(parts, key=lambda name: sizes[name]):
        words = ["build", name, str(_mib(memory_needed(sizes[name]))), str(_mib(disk_needed(sizes[name])))]
        lines.append(" \\\n  ".join([" ".join(words), *_arguments(_inputs(name, spec, parts[name]))]))
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def _inputs(name: str, spec: VLMSpec, part: Part) -> dict[str, Shapes]:
    """The three shapes of each input of a part that has an open dimension."""
    io: dict[str, Any] = {"max_batch": MAX_BATCH, **part.details.get("io", {})}
    vision, language = spec.vision, spec.language
    open_ones: dict[str, tuple[int, ...]]
    if name == "vision_encoder":
        open_ones = {"pixel_values": (-1, 3, vision.image_size, vision.image_size)}
    elif name == "projector":
        open_ones = {"image_features": (-1, vision.image_tokens, spec.projector.in_features)}
    else:
        open_ones = {"inputs_embeds": (1, -1, language.hidden_size)}
        if io["kv"] == "concat":
            past = (1, language.kv_heads, -1, language.head_dim)
            open_ones |= {f"past_{kind}.{i}": past for i in range(language.layers) for kind in ("key", "value")}
    found = {input: shapes(input, dimensions, io) for input, dimensions in open_ones.items()}
    return {input: three for input, three in found.items() if three is not None}


def _arguments(inputs: Mapping[str, Shapes]) -> list[str]:
    """--minShapes=a:1x2,b:3x4 and its siblings."""
    flags = []
    for i, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        flags.append(
            f"--{flag}=" + ",".join(f"{name}:{'x'.join(map(str, three[i]))}" for name, three in inputs.items())
        )
    return flags


def _weights(root: Path, part: Part) -> int:
    files = [root / file for file in part.files if file in (part.graph, f"{part.graph}.data")]
    return sum(path.stat().st_size for path in files)


def _mib(size: float) -> int:
    return -(-int(size) // (1 << 20))
