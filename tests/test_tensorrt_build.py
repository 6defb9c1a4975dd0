"""Engines are built, checked, listed and found again; what stops a build leaves a sound bundle and one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fake_tensorrt
from exporting import Command, command
from running import entry, running_bundle
from tensorrt_graphs import linear, refused, save
from tensorrt_layout import CHUNK, CONTEXT, LAYERS, tensorrt_bundle
from vlm_export.tensorrt import build, facts, machine, plan, process, sdk
from vlm_export.tensorrt.build import build_bundle, build_engines
from vlm_models.errors import BundleError, CheckError, InputError, RecipeError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.manifest import Manifest, Part, read_manifest, write_manifest

run = pytest.fixture(command)
USUAL = "rtx30-rtx40-rtx50"
PARTS = ("vision_encoder", "projector", "language_model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for the usual boards and a cache in place. Read only."""
    folder = tensorrt_bundle(tmp_path_factory.mktemp("finished") / "bundle", "scatter", "fp16")
    build_bundle(folder)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A bundle without engines, whose cache grows."""
    return tensorrt_bundle(tmp_path / "bundle", "concat", "fp16")


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(request: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        raise AssertionError(f"built {request['graph']}")

    monkeypatch.setattr(build, "ask", ask)


def engines(manifest: Manifest, part: str) -> list[dict[str, Any]]:
    return [dict(one) for one in manifest.parts[part]["tensorrt"].details["engines"]]


def worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the builder be a process that does something else."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))


def ask_linear(folder: Path, kind: str, capability: str, **size: int) -> dict[str, Any]:
    graph = save(linear(kind, **size), folder / f"{kind}.onnx")
    request = {"sdk": "tensorrt_rtx", "graph": str(graph), "io": {}, "capabilities": [capability]}
    return process.ask({**request, "engine": str(folder / f"{kind}.engine"), "timing_cache": None}, who="x")


def test_each_part_gets_an_engine_and_the_manifest_says_what_it_is(finished: Path) -> None:
    manifest = open_bundle(finished).manifest
    for part in PARTS:
        (one,) = engines(manifest, part)
        assert one["file"] == f"tensorrt/engines/{USUAL}/{part}.engine"
        assert one["file"] in manifest.parts[part]["tensorrt"].files
        assert manifest.files[one["file"]].bytes == one["bytes"] > 1000
        assert (one["profile"], one["compute_capabilities"]) == (USUAL, ["8.6", "8.9", "12.0"])
        assert (one["sdk"], one["version"]) == ("tensorrt_rtx", manifest.tools["tensorrt-rtx"])
        assert one["seconds"] > 0
        assert 50 << 20 < one["peak_rss"] < 8 << 30
        assert manifest.parts[part]["tensorrt"] == manifest.parts[part]["tensorrt_onnx"]
    assert not list(finished.rglob("*.partial"))


def test_a_cache_in_place_stays_in_place_and_one_that_grows_has_a_range(finished: Path, plain: Path) -> None:
    (one,) = engines(read_manifest(finished), "language_model")
    assert one["layers"]["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert set(one["shapes"]) == {"inputs_embeds"}
    (one,) = engines(build_bundle(plain, ["rtx40"]), "language_model")
    assert one["shapes"]["inputs_embeds"] == [[1, 1, 32], [1, 1, 32], [1, CHUNK, 32]]
    assert [shape[2] for shape in one["shapes"]["past_key"]] == [0, CONTEXT // 2, CONTEXT - 1]
    assert one["compute_capabilities"] == ["8.9"]


@pytest.mark.usefixtures("no_builder")
def test_a_finished_bundle_is_left_as_it_is(finished: Path) -> None:
    before = (finished / "manifest.json").read_bytes()
    build_bundle(finished)
    build_bundle(finished, ["rtx40"])  # one of those that share the engine
    assert (finished / "manifest.json").read_bytes() == before


def test_a_build_that_was_stopped_goes_on_where_it_was(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, asked = build.ask, []

    def interrupted(request: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        asked.append(Path(request["graph"]).stem)
        if len(asked) == 2:
            Path(request["engine"]).write_bytes(b"half")
            raise KeyboardInterrupt
        return ask(request, **more)

    monkeypatch.setattr(build, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(plain, ["rtx40"])
    held = open_bundle(plain).manifest  # sound, every file as listed
    assert [len(held.parts[part]["tensorrt"].details["engines"]) for part in asked] == [1, 0]
    assert not list(plain.rglob("*.partial"))
    done = build_bundle(plain, ["rtx40"])
    assert len(asked) == 4
    assert sorted(asked[1:]) == sorted([asked[1], asked[1], asked[3]])
    assert all(engines(done, part) for part in PARTS)
    open_bundle(plain)


def test_an_engine_of_another_version_is_built_again_in_its_place(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "bundle"))
    manifest = read_manifest(folder)
    old = manifest.parts["projector"]["tensorrt"]
    listed = [{**old.details["engines"][0], "version": "1.6.0.1"}]
    older = dataclasses.replace(old, details={**old.details, "engines": listed})
    write_manifest(folder, dataclasses.replace(manifest, parts={**manifest.parts, "projector": {"tensorrt": older}}))
    (folder / listed[0]["file"]).write_bytes((folder / listed[0]["file"]).read_bytes())
    (one,) = engines(build_bundle(folder), "projector")
    assert one["version"] != "1.6.0.1"
    open_bundle(folder)


def test_a_graph_that_was_damaged_is_not_built(plain: Path) -> None:
    graph = plain / "tensorrt/projector.onnx"
    data = bytearray(graph.read_bytes())
    data[-200] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleError, match=r"projector\.onnx does not match its sha256.*export again"):
        build_bundle(plain, ["rtx40"])


def test_a_bundle_of_other_targets_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no TensorRT parts: export them with vlm-export --target tensorrt"):
        build_bundle(running_bundle(tmp_path / "bundle"))
    with pytest.raises(BundleError, match="no such folder"):
        build_bundle(tmp_path / "none")


@pytest.mark.usefixtures("no_builder")
def test_devices_and_precisions_are_refused_before_the_build(plain: Path) -> None:
    with pytest.raises(InputError, match="unknown device profile 'rtx60'"):
        build_bundle(plain, ["rtx60"])
    manifest = read_manifest(plain)
    fp8 = {name: {"tensorrt": dataclasses.replace(manifest.parts[name]["tensorrt"], precision="fp8")} for name in PARTS}
    write_manifest(plain, dataclasses.replace(manifest, parts=fp8))
    with pytest.raises(RecipeError, match=r"'orin' \(compute capability 8\.7\) cannot take .*=fp8"):
        build_bundle(plain, ["orin"])


@pytest.mark.usefixtures("no_builder")
def test_too_little_memory_or_disk_is_said_before_the_build(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_free", lambda: 100 << 20)
    with pytest.raises(
        InputError, match=r"language_model engine takes about 70\d.*100\.0 MiB with swap are free: .*swap"
    ):
        build_bundle(plain)
    monkeypatch.setattr(machine, "memory_free", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(InputError, match=r"takes 6\d.* of disk in .* which has 1\.0 MiB free: make room"):
        build_bundle(plain)


def test_memory_counts_swap_and_what_a_container_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    3000 kB\nSwapFree:  2000 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", meminfo)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.memory_free() == 5000 << 10
    (tmp_path / "memory.max").write_text("4096000\n")
    (tmp_path / "memory.current").write_text("3072000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1024\n")
    assert machine.memory_free() == 4096000 - 3072000 + 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_free() == 5000 << 10
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "none")
    assert machine.memory_free() is None


def test_an_operator_that_the_parser_refuses_is_named(plain: Path) -> None:
    save(refused(), plain / "tensorrt/projector.onnx")
    manifest = read_manifest(plain)
    files = {**manifest.files, "tensorrt/projector.onnx": entry(plain / "tensorrt/projector.onnx")}
    write_manifest(plain, dataclasses.replace(manifest, files=files))
    with pytest.raises(CheckError) as error:
        build_bundle(plain, ["rtx40"])
    for text in ("TensorRT-RTX 1.", "projector for rtx40", "'projector.odd' (Celu6)", "plugin", "--target onnx"):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_precision_that_the_builder_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"Cannot compile for target\(s\) sm86.*fp8_e4m3.*try another --precision"):
        ask_linear(tmp_path, "fp8", "8.6")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(signal 11\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"killed.*memory runs out.*add swap"),
        ("import sys; sys.exit('out of tactics')", r"crashed \(exit code 1\), its last words: 'out of tactics'"),
    ],
)
def test_a_builder_that_dies_is_one_line(plain: Path, code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.find_sdks()  # asked once, before
    worker(monkeypatch, f"import sys; sys.stdin.read(); {code}")
    with pytest.raises(CheckError, match=rf"^TensorRT-RTX \S+: \w+ for rtx40: the builder (was )?{words}"):
        build_bundle(plain, ["rtx40"])
    open_bundle(plain)


def test_an_int4_engine_keeps_four_bits(tmp_path: Path) -> None:
    size = {"columns": 2048, "rows": 2048, "layers": 2}
    four, sixteen = (ask_linear(tmp_path, kind, "8.6", **size) for kind in ("int4", "fp16"))
    assert four["weights"] == {"INT4": 2 * 2048**2}
    assert sixteen["weights"] == {"HALF": 2 * 2048**2}
    assert four["bytes"] < facts.INT4_LIMIT * sixteen["bytes"]
    assert (tmp_path / "int4.engine").stat().st_size == four["bytes"]
    for told in (four, sixteen):
        assert facts.verify("x", told, told["constant_bytes"], {}) == []


def told(**changes: Any) -> dict[str, Any]:
    plain = {"bytes": 200 << 20, "constant_bytes": 190 << 20, "layers": {"ATTENTION": 2, "KV_CACHE_UPDATE": 4}}
    return {**plain, "weights": {"HALF": 95 << 20}, **changes}


def test_weights_stored_twice_or_wider_and_a_lost_cache_update_fail() -> None:
    scatter = {"kv": "scatter", "layers": 2}
    assert facts.verify("x", told(), 190 << 20, scatter) == []
    with pytest.raises(CheckError, match=r"400\.0 MiB for 190\.0 MiB of weights: they were stored twice"):
        facts.verify("x", told(bytes=400 << 20), 190 << 20, scatter)
    four = told(weights={"INT4": 380 << 20}, bytes=220 << 20)
    assert facts.verify("x", four, 190 << 20, {}) == []
    with pytest.raises(CheckError, match=r"int4 engine has 380\.0 MiB, more than 0\.45 of what fp16 takes \(760"):
        facts.verify("x", {**four, "bytes": 380 << 20, "constant_bytes": 260 << 20}, 190 << 20, {})
    with pytest.raises(CheckError, match=r"0 of 4 KV caches are updated in place; try --tensorrt-kv concat"):
        facts.verify("x", told(layers={"ATTENTION": 2}), 190 << 20, scatter)
    (note,) = facts.verify("x", told(layers={"KV_CACHE_UPDATE": 4}), 190 << 20, scatter)
    assert "2 of 2 layers" in note


def test_an_export_notes_the_devices_that_build_for_themselves(plain: Path) -> None:
    parts = {"projector": read_manifest(plain).parts["projector"]["tensorrt"]}
    built = build_engines(plain, parts, ["orin", "rtx40"])["projector"]
    assert [one["profile"] for one in built.details["engines"]] == ["rtx40"]
    assert built.details["notes"] == [
        "engines for orin are built there: vlm-export --build BUNDLE, or tensorrt/build.sh in the bundle"
    ]
    assert (plain / built.files[-1]).is_file()


def test_progress_goes_up_to_the_end(plain: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    parts: dict[str, Part] = {"projector": read_manifest(plain).parts["projector"]["tensorrt"]}
    build_engines(plain, parts, ["rtx40"], lambda *now: seen.append(now))
    done = [done for stage, done, of in seen if (stage, of) == ("projector engine", 100)]
    assert len(done) == len(seen) > 3
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 100)


def test_the_command_builds_and_shows_what_it_built(finished: Path, run: Command) -> None:
    ran = run("--build", finished)
    assert (ran.code, ran.err) == (0, "")
    for text in (*PARTS, USUAL, "built by tensorrt_rtx 1."):
        assert text in ran.out
    ran = run("--build", finished, "--json")
    report = json.loads(ran.out)
    assert {part: len(some) for part, some in report["engines"].items()} == dict.fromkeys(PARTS, 1)
    assert run("--build", finished, "--quiet").out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["checkpoint", "--build", "b"], "--build takes no a CHECKPOINT: it finishes a bundle that is there"),
        (["--build", "b", "-t", "onnx", "-o", "x"], "--build takes no --target, --output"),
        (["checkpoint", "-o", "x"], "missing --target: give CHECKPOINT --target NAME -o OUT, or --build BUNDLE"),
        (["-t", "onnx"], "missing CHECKPOINT, --output"),
        (["c", "-t", "onnx", "-o", "x", "--device-profile", "rtx40"], "device profiles are for target 'tensorrt'"),
        (["c", "-t", "onnx", "-o", "x", "--tensorrt-kv", "ring"], "unknown TensorRT KV cache 'ring': choose one of"),
        (["--build", "b"], "no such folder: b"),
    ],
)
def test_usage_mistakes_are_one_line(arguments: list[str], words: str, run: Command) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {words}"), ran.err
    assert len(ran.err.splitlines()) == 1


def test_building_on_a_device_needs_neither_torch_nor_onnx(finished: Path) -> None:
    script = (
        "import sys\nfrom vlm_export.cli import main\n"
        f"sys.argv = ['vlm-export', '--build', {str(finished)!r}, '--quiet']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_full_tensorrt_builds_on_the_device_with_a_timing_cache(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdk").mkdir()
    shutil.copy(fake_tensorrt.__file__, tmp_path / "sdk/tensorrt.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "sdk"))
    monkeypatch.syspath_prepend(str(tmp_path / "sdk"))
    for module in (plan, sdk):
        monkeypatch.setattr(module, "gpu_at_hand", lambda: sdk.Gpu("Orin", "8.7", 16 << 30))
    try:
        done = build_bundle(plain)
        exported = build_engines(plain, {"projector": read_manifest(plain).parts["projector"]["tensorrt"]}, ["orin"])
    finally:
        sdk._probed.cache_clear()
    assert exported["projector"] == done.parts["projector"]["tensorrt"]
    listed = {part: engines(done, part)[0] for part in PARTS}
    assert {one["sdk"] for one in listed.values()} == {"tensorrt"}
    assert {(one["profile"], *one["compute_capabilities"]) for one in listed.values()} == {("orin", "8.7")}
    engine = json.loads((plain / listed["language_model"]["file"]).read_text())
    assert engine["flags"] == 1 << fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert engine["shapes"]["position"] == [[0], [CONTEXT // 2], [CONTEXT - 1]]  # values: the SDK asked for them
    open_bundle(plain)


def test_the_timing_cache_grows_beside_the_manifest(plain: Path, tmp_path: Path) -> None:
    """Each engine adds to it, so its sha256 in a manifest would not hold."""
    cache, code = tmp_path / "timing.cache", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    shutil.copy(fake_tensorrt.__file__, tmp_path / "tensorrt.py")
    code += "from vlm_export.tensorrt.worker import main; main()"
    for part, held in (("projector", b"t"), ("vision_encoder", b"tt")):
        graph = str(plain / f"tensorrt/{part}.onnx")
        request = {"sdk": "tensorrt", "graph": graph, "io": {}, "capabilities": [], "engine": str(tmp_path / "e")}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps({**request, "timing_cache": str(cache)}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert list(json.loads(ran.stdout)) == ["result"]  # what the SDK prints went to stderr
        assert "greeting" in ran.stderr
        assert cache.read_bytes() == held


def test_an_input_of_no_known_range_says_to_export_again(plain: Path) -> None:
    manifest = read_manifest(plain)
    old = manifest.parts["language_model"]["tensorrt"]
    part = dataclasses.replace(old, details={"io": {"kv": "concat", "layers": LAYERS}})
    with pytest.raises(
        CheckError, match=r"its input 'inputs_embeds' is \[1, -1, 32\], of which no range is known; exp"
    ):
        build_engines(plain, {"language_model": part}, ["rtx40"])
