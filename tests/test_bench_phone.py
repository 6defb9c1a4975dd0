"""vlm-bench on a phone, through the real adb client and a server that speaks its protocol; no phone was ever near."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest

from adb_server import Phone
from bundles import tiny_bundle
from sshd import serving
from test_bench_devices import fake_archive, gated
from vlm_bench.devices import llamacpp, source, ssh, transfer
from vlm_bench.devices.device import measure_on
from vlm_bench.devices.job import Job
from vlm_bench.results import Results
from vlm_bench.results_file import read_results, write_results
from vlm_models.errors import BundleError, CheckError, DependencyError, InputError
from vlm_runtime.manifest import FileEntry, Part, read_manifest, write_manifest

SERIAL = "FAKE123"
URL = f"adb://{SERIAL}"
# What llama-mtmd-cli 0.5.0 printed for a 72 × 72 picture, without the lines on loading.
SAID = """\
0.00.549.324 I main: loading model: language_model.gguf
0.00.549.640 W WARN: This is an experimental CLI for testing multimodal capability.
0.00.577.867 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.00.591.453 I mtmd batch encoding done in 13 ms
0.00.592.749 I decoding image batch 1/1, n_tokens_batch = 36
0.00.746.637 I image decoded (batch 1/1) in 154 ms
0.00.906.994 I llama_perf_context_print:        load time =     594.00 ms
0.00.907.015 I llama_perf_context_print: prompt eval time =     253.37 ms /    51 tokens (    4.97 ms per token)
0.00.907.029 I llama_perf_context_print:        eval time =      81.92 ms /     7 runs   (   11.70 ms per token)
0.00.907.043 I llama_perf_context_print:       total time =     693.22 ms /    58 tokens
"""
# And a version of a year before.
SAID_BEFORE = """\
encoding image slice...
image slice encoded in 13 ms
decoding image batch 1/1, n_tokens_batch = 36
image decoded (batch 1/1) in 154 ms
llama_perf_context_print: prompt eval time =     253.37 ms /    51 tokens (    4.97 ms per token)
llama_perf_context_print:        eval time =      81.92 ms /     7 runs   (   11.70 ms per token)
"""
PROGRAM = f"""#!/bin/sh
echo "$@" >>"$(dirname "$0")/../asked"
while [ -f "$(dirname "$0")/../busy" ]; do sleep 0.05; done
echo "A red square"
cat >&2 <<'END'
{SAID}END
exit $(cat "$(dirname "$0")/../code" 2>/dev/null || echo 0)
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    assert shutil.which("adb"), "these tests need Android's adb client: apt-get install adb"
    monkeypatch.setattr(transfer, "RETRY_S", 0.1)
    phone = Phone(tmp_path / "phone", SERIAL)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(phone.port))
    yield phone
    phone.close()


@pytest.fixture
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers as llama.cpp's does; it is a script, and no ELF program."""
    folder = tmp_path / "binaries"
    folder.mkdir()
    (folder / "llama-mtmd-cli").write_text(PROGRAM)
    (folder / "libggml.so").write_bytes(b"library")
    monkeypatch.setattr(llamacpp, "programs", lambda folder, abis: {file.name: file for file in folder.iterdir()})
    return folder


def gguf_bundle(folder: Path, seed: int = 0) -> Path:
    """A tiny bundle with files that are named like GGUF."""
    tiny_bundle(folder)
    manifest, files = read_manifest(folder), dict(read_manifest(folder).files)
    (folder / "gguf").mkdir()
    for name in ("gguf/language_model.gguf", "gguf/mmproj.gguf"):
        content = f"GGUF {name} {seed}".encode() * 1000
        (folder / name).write_bytes(content)
        files[name] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    part = Part("gguf/language_model.gguf", ("gguf/language_model.gguf", "gguf/mmproj.gguf"), "q4_k_m")
    parts = {**manifest.parts, "language_model": {"gguf": part}}
    write_manifest(folder, dataclasses.replace(manifest, files=files, parts=parts))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return gguf_bundle(tmp_path / "one")


def run(job: Job, binaries: Path | None, said: list[str] | None = None, kept: list[Results] | None = None) -> Results:
    say, keep = (said if said is not None else []).append, (kept if kept is not None else []).append
    return measure_on(URL, job, say=say, keep=keep, binaries=binaries)


def there(phone: Phone) -> Path:
    return phone.folder / "tmp/vlm-bench"


def test_bundles_take_turns_and_rows_hold_what_llamacpp_tells_and_nothing_else(
    phone: Phone, binaries: Path, bundle: Path, tmp_path: Path, picture_file: Path
) -> None:
    other, none = gguf_bundle(tmp_path / "two", 1), tiny_bundle(tmp_path / "three")
    prompts = tmp_path / "prompts"
    prompts.write_text('What\'s "this"; `date`?\n')
    kept: list[Results] = []
    work = Job((bundle, other, none), (picture_file,), prompts, runs=2, max_new_tokens=8, threads=3)
    results = run(work, binaries, kept=kept)
    assert results.complete
    assert [(len(one.rows), one.rows[0].of, one.complete) for one in kept] == [(2, 1, False), (2, 2, False)]
    asked = (there(phone) / "asked").read_text().splitlines()
    models = [line.split()[1].rpartition("/")[2] for line in asked]
    assert len(models) == 6
    assert models == models[:2] * 3
    assert models[0] != models[1]
    assert all(' -p What\'s "this"; `date`? -n 8 ' in line for line in asked)
    assert all(line.endswith(" -t 3") for line in asked)
    row = results.rows[0]
    assert {stage: stat.median for stage, stat in row.stages_ms.items()} == {
        "vision": 13.0,
        "prefill": 253.37,
        "decode": 81.92,
    }
    assert row.wall_ms.median == pytest.approx(13 + 253.37 + 81.92)
    assert row.ttft_ms is not None
    assert row.ttft_ms.median == pytest.approx(13 + 253.37)
    assert row.tokens_per_s is not None
    assert row.tokens_per_s.median == pytest.approx(7 / 81.92 * 1e3)
    assert (row.prompt_tokens, row.image_tokens, row.new_tokens) == (51, 36, 8)
    assert (row.token_ms, row.peak_rss_mb, row.energy, row.load_ms.cold) == (None, None, None, None)
    assert (row.precision, set(row.engines.values())) == ("q4_k_m", {"llama.cpp"})
    assert [one.name for one in results.skipped] == ["three"]
    assert "--target gguf" in results.skipped[0].reason
    place = results.environment
    assert (place.device, place.processor, place.system) == (URL, "Acme Pad 3 (AC100)", "Android 15")
    assert (place.after.temperature_c, place.after.throttled) == (31.4, True)
    assert list((there(phone) / "runs").iterdir()) == []
    # It is a file like any other, and a table can be made of it.
    assert read_results(write_results(tmp_path / "out.json", results)) == results


def test_what_is_on_the_phone_is_not_pushed_again(phone: Phone, binaries: Path, bundle: Path) -> None:
    run(Job((bundle,), runs=1), binaries)
    assert len(phone.pushed) == 5  # two programs, two models, a picture
    run(Job((bundle,), runs=1), binaries)
    assert len(phone.pushed) == 5


def test_a_phone_that_was_unplugged_is_waited_for_and_its_answer_kept(
    phone: Phone, binaries: Path, bundle: Path
) -> None:
    said, results = list[str](), list[Results]()
    thread = Thread(target=lambda: results.append(run(Job((bundle,), runs=1), binaries, said)), daemon=True)
    there(phone).mkdir(parents=True)
    (there(phone) / "busy").touch()
    thread.start()
    wait_for(there(phone) / "asked")
    phone.unplug()
    end = time.monotonic() + 60
    while not any(line.startswith("lost the link") for line in said):
        assert time.monotonic() < end, said
        time.sleep(0.02)
    (there(phone) / "busy").unlink()  # it answers while it is away
    phone.plugged = True
    thread.join(60)
    assert results
    assert results[0].complete
    assert len((there(phone) / "asked").read_text().splitlines()) == 2, "an answer was asked for twice"


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, f"{file} never came"
        time.sleep(0.02)


def test_phones_that_are_not_there_or_do_not_trust_us_say_what_to_do(
    phone: Phone, binaries: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Job((bundle,), runs=1)
    with pytest.raises(DependencyError, match=r"cannot reach adb://OTHER .*'adb devices' must list it"):
        measure_on("adb://OTHER", work, say=lambda line: None, keep=lambda results: None, binaries=binaries)
    phone.refuses = "device unauthorized."
    with pytest.raises(DependencyError, match="does not trust this machine: unlock it, allow USB debugging"):
        run(work, binaries)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DependencyError, match="needs Android's adb"):
        run(work, binaries)


def test_a_phone_without_room_gets_nothing(
    phone: Phone, binaries: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MARGIN", 1 << 60)
    with pytest.raises(InputError, match=f"{URL} has .* free in /data/local/tmp/vlm-bench, the copy takes"):
        run(Job((bundle,), runs=1), binaries)
    assert phone.pushed == []


def test_a_disk_that_is_full_all_the_same_is_one_line(phone: Phone, binaries: Path, bundle: Path) -> None:
    phone.full = True
    with pytest.raises(InputError, match=rf"{URL} is full \(.*No space left on device\)") as raised:
        run(Job((bundle,), runs=1), binaries)
    assert "\n" not in str(raised.value)
    assert list((there(phone) / "files").iterdir()) == []


def test_a_file_that_arrives_damaged_is_taken_away(phone: Phone, binaries: Path, bundle: Path) -> None:
    phone.program("sha256sum", "echo 0000  $1\n")
    with pytest.raises(CheckError, match="arrived damaged"):
        run(Job((bundle,), runs=1), binaries)
    assert list((there(phone) / "files").iterdir()) == []


def test_a_program_that_fails_there_is_one_line(phone: Phone, binaries: Path, bundle: Path) -> None:
    there(phone).mkdir(parents=True)
    (there(phone) / "code").write_text("134")
    with pytest.raises(CheckError, match=f"llama-mtmd-cli on {URL} ended with exit code 134") as raised:
        run(Job((bundle,), runs=1), binaries)
    assert "\n" not in str(raised.value)


def test_jobs_that_llamacpp_cannot_do_are_refused(phone: Phone, binaries: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave --questions and --engine out"):
        run(Job((bundle,), questions="demo"), binaries)
    with pytest.raises(BundleError, match="--target gguf"):
        run(Job((tiny_bundle(tmp_path / "three"),)), binaries)
    with pytest.raises(InputError, match="--device-binaries are for a phone"):
        measure_on("ssh://host", Job((bundle,)), say=lambda line: None, keep=lambda results: None, binaries=binaries)


@pytest.mark.parametrize("said", [SAID, SAID_BEFORE])
def test_times_of_old_and_new_versions_are_read(said: str) -> None:
    reply = llamacpp.reply("text\n", said, 8)
    assert reply["stages_ms"] == {"vision": 13.0, "prefill": 253.37, "decode": 81.92}
    assert (reply["image_tokens"], reply["prompt_tokens"]) == (36, 51)


def test_output_without_times_is_an_error_that_shows_llamacpps_own() -> None:
    with pytest.raises(CheckError, match=r"gave no times .*failed to load model"):
        llamacpp.reply("", "loading\nerror: failed to load model 'x'\n", 8)
    with pytest.raises(CheckError, match="another version"):
        llamacpp.reply("", "", 8)


def elf(machine: int) -> bytes:
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + bytes(44)


def test_programs_for_another_processor_are_refused_before_they_are_copied(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        llamacpp.programs(tmp_path / "none", ("arm64-v8a",))
    with pytest.raises(InputError, match=r"has no llama-mtmd-cli: build llama\.cpp's tools with the Android NDK"):
        llamacpp.programs(tmp_path, ("arm64-v8a",))
    program = tmp_path / "llama-mtmd-cli"
    program.write_bytes(elf(62))
    with pytest.raises(InputError, match="is a program for x86_64, the phone runs arm64-v8a, armeabi-v7a"):
        llamacpp.programs(tmp_path, ("arm64-v8a", "armeabi-v7a"))
    program.write_text("#!/bin/sh\n")
    with pytest.raises(InputError, match="is no ELF program"):
        llamacpp.programs(tmp_path, ("arm64-v8a",))
    program.write_bytes(elf(183))
    assert llamacpp.programs(tmp_path, ("arm64-v8a",)) == {"llama-mtmd-cli": program}


def test_termux_is_reached_through_a_port_that_is_led_there_again(
    phone: Phone, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "archive", fake_archive)
    monkeypatch.setattr(ssh, "ALIVE_S", 1)
    gate, said, kept, results = tmp_path / "gate", list[str](), list[Results](), list[Results]()
    with TemporaryDirectory(prefix="vlm-") as place, serving(Path(place)) as server:
        url = server.url.replace(f"ssh://device{server.folder}", f"{URL}{server.folder}") + f"&port={server.wire.port}"
        work = gated(Job((bundle,)), gate)

        def measure() -> None:
            results.append(measure_on(url, work, say=said.append, keep=kept.append))

        # A key for 127.0.0.1 says nothing of a phone: it has a name of its own.
        with pytest.raises(DependencyError, match=f"HostKeyAlias=adb-{SERIAL}"):
            measure()
        known = server.keys / "known_hosts"
        known.write_text(f"adb-{SERIAL} {(server.keys / 'host.pub').read_text()}")
        thread = Thread(target=measure, daemon=True)
        thread.start()
        end = time.monotonic() + 60
        while not kept:
            assert time.monotonic() < end, said
            time.sleep(0.02)
        phone.unplug()
        gate.touch()
        phone.plugged = True
        thread.join(60)
        assert results, said
    assert results[0].complete
    assert results[0].environment.device == URL
    assert any(line.startswith(f"lost the link to {URL}") for line in said)
    assert phone.forwards == {}, "a port was left open"
