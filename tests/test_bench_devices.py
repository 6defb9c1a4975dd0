"""vlm-bench on another machine, over a real OpenSSH server on loopback: copied once, resumed, never trusted blindly."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from bundles import tiny_bundle
from running import running_bundle
from sshd import Server, serving
from vlm_bench import cli
from vlm_bench.devices import agent, job, source, ssh, transfer
from vlm_bench.devices.address import Address, parse
from vlm_bench.devices.device import measure_on
from vlm_bench.devices.job import Job
from vlm_bench.results import Accuracy, Asked, Environment, Results, Settings
from vlm_bench.results_file import read_results
from vlm_models.errors import BundleError, CheckError, DependencyError, InputError
from vlm_models.plain import to_plain

# What runs on the device in most tests: it writes partial results, waits for a file, and writes the complete ones.
MEASURES = """
import json, pathlib, sys, time

def main():
    options = sys.argv[1:]
    gate = pathlib.Path(pathlib.Path(options[options.index("--prompts") + 1]).read_text())
    results = json.loads(pathlib.Path(__file__).with_name("results").read_text())
    results["command"] = " ".join(options)
    out = pathlib.Path(options[options.index("--json") + 1])
    out.write_text(json.dumps(results))
    with open("started", "a") as started:
        started.write("x")
    end = time.monotonic() + 120  # a test that failed must not leave it running
    while not gate.exists() and time.monotonic() < end:
        time.sleep(0.02)
    said = gate.read_text()
    if said.startswith("error: "):
        sys.stderr.write(said)
        sys.exit(2)
    results["complete"] = True
    partial = out.with_name("partial")
    partial.write_text(json.dumps(results))
    partial.replace(out)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with TemporaryDirectory(prefix="vlm-") as place, serving(Path(place)) as running:
        yield running


@pytest.fixture
def device(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty device, and a runtime that measures nothing."""
    for name, value in {"RETRY_S": 0.1, "PATIENCE_S": 60.0}.items():
        monkeypatch.setattr(transfer, name, value)
    monkeypatch.setattr(ssh, "ALIVE_S", 1)
    monkeypatch.setattr(source, "archive", fake_archive)
    server.wire.mend()
    return dataclasses.replace(server, folder=tmp_path / "device")


def fake_archive() -> bytes:
    content = io.BytesIO()
    asked = (Asked("1", "images/0/a.png", "What?", "this", "that"), Asked("2", "data:,", "What?", "this", "that"))
    results = Results(
        created="2026-01-01T00:00:00+00:00",
        command="there",
        environment=Environment("chip", 4, 8.0, "Linux", "3.11"),
        settings=Settings(2, 3, 8, images=("images/0/a.png",)),
        accuracy=(Accuracy("tiny", "demo", 2, 0.0, 0.0, 0.0, per_question=asked),),
    )
    folder = Path(agent.__file__).parent
    files = {
        f"vlm_bench/devices/{name}.py": (folder / f"{name}.py").read_text("utf-8") for name in ("__init__", "agent")
    }
    files |= {
        "vlm_bench/__init__.py": "",
        "vlm_bench/cli.py": MEASURES,
        "vlm_bench/results": json.dumps(to_plain(results)),
    }
    with zipfile.ZipFile(content, "w") as out:
        for name, text in files.items():
            out.writestr(zipfile.ZipInfo(name), text)
    return content.getvalue()


def gated(work: Job, gate: Path) -> Job:
    """A job whose prompts tell the runtime for which file to wait."""
    prompts = gate.with_name("prompts")
    prompts.write_text(str(gate))
    return dataclasses.replace(work, prompts=prompts)


class Run:
    """`measure_on` in a thread, so that a test can pull the wire meanwhile."""

    def __init__(self, device: Server, work: Job, gate: Path) -> None:
        self.said, self.kept = list[str](), list[Results]()
        self.error: BaseException | None = None
        self.results: Results | None = None
        self._arguments = device.url, gated(work, gate)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.results = measure_on(*self._arguments, say=self.said.append, keep=self.kept.append)
        except BaseException as error:
            self.error = error

    def wait(self) -> Results:
        self._thread.join(90)
        assert not self._thread.is_alive(), self.said
        if self.error is not None:
            raise self.error
        assert self.results is not None
        return self.results


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, f"it never came to this: {what}"
        time.sleep(0.02)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def test_results_come_back_stamped_with_the_device_and_nothing_stays_but_the_files(
    device: Server, bundle: Path, gate: Path, picture_file: Path
) -> None:
    picture = gate.with_name("a.png")
    picture.write_bytes(picture_file.read_bytes())
    gate.touch()
    run = Run(device, Job((bundle,), (picture,), engines=("onnx",), runs=3, threads=2), gate)
    results = run.wait()
    assert results.complete
    assert results.environment.device == "ssh://device"
    assert results.command == (
        "bundles/0/bundle --image images/0/a.png --prompts prompts/prompts --engine onnx --runs 3 --max-new-tokens 64 "
        "--idle 8.0 --threads 2 --json results.json"
    )
    # Pictures have their names of this machine again, so that a report finds them.
    assert results.settings.images == (str(picture),)
    assert [asked.image for asked in results.accuracy[0].per_question] == [str(picture), "data:,"]
    assert run.kept[-1] == results
    assert list((device.folder / "runs").iterdir()) == []
    assert any("sources copied from here" in line for line in run.said)


def grown(bundle: Path, seed: int, size: int = 4_000_000) -> bytes:
    """Give a bundle a large file, noise that does not compress."""
    content = np.random.default_rng(seed).bytes(size)
    (bundle / "onnx/projector.onnx.data").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": size}
    manifest["files"]["onnx/projector.onnx.data"] = entry
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return content


def copied(device: Server, bundle: Path, said: list[str] | None = None) -> dict[str, str]:
    """Copy a bundle to the device; what is stored there: name → SHA-256 of the content."""
    files = [transfer.local_file(path) for path in job.inputs(Job((bundle,))).values()]
    with ssh.Ssh(parse(device.url)) as link:
        link.ask("probe", modules=[])
        transfer.copy(link, {file.sha256: file for file in files}, (said if said is not None else []).append)
    stored = (device.folder / "files").iterdir()
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in stored}


def test_what_is_there_is_not_copied_again_and_one_changed_file_alone_is(device: Server, bundle: Path) -> None:
    sent = []
    for seed in (1, 1, 2):
        grown(bundle, seed)
        before = device.wire.sent
        stored = copied(device, bundle)
        sent.append(device.wire.sent - before)
    assert sent[0] > 4_000_000
    assert sent[1] < 200_000
    assert 4_000_000 < sent[2] < 4_200_000
    assert hashlib.sha256((bundle / "embedding.bin").read_bytes()).hexdigest() in stored
    assert all(name == sha256 for name, sha256 in stored.items())


def test_a_link_lost_while_copying_costs_no_more_than_what_was_under_way(device: Server, bundle: Path) -> None:
    size, said = 16_000_000, list[str]()
    content = grown(bundle, 3, size)
    before = device.wire.sent
    device.wire.cut_at = before + size // 2
    mend = threading.Thread(target=mend_after_loss, args=(device, said), daemon=True)
    mend.start()
    stored = copied(device, bundle, said)
    mend.join()
    assert stored[hashlib.sha256(content).hexdigest()] == hashlib.sha256(content).hexdigest()
    assert device.wire.sent - before < size * 1.4


def mend_after_loss(device: Server, said: list[str]) -> None:
    until(lambda: [line for line in said if line.startswith("lost the link")], "the loss is noticed")
    device.wire.mend()


@pytest.mark.parametrize("start", ["right", "wrong"])
def test_a_copy_that_broke_off_goes_on_where_it_was_unless_that_is_damaged(
    device: Server, bundle: Path, start: str
) -> None:
    content = grown(bundle, 4)
    name = hashlib.sha256(content).hexdigest()
    (device.folder / "files").mkdir(parents=True)
    there = content if start == "right" else bytes(len(content))
    (device.folder / "files" / f"{name}.partial").write_bytes(there[:-700_000])
    before = device.wire.sent
    assert copied(device, bundle)[name] == name
    sent = device.wire.sent - before
    assert sent < 1_000_000 if start == "right" else sent > 4_000_000


@pytest.mark.parametrize("how", ["cut", pytest.param("freeze", marks=pytest.mark.slow)])
def test_a_lost_link_does_not_end_the_run(device: Server, bundle: Path, gate: Path, how: str) -> None:
    run = Run(device, Job((bundle,)), gate)
    until(lambda: run.kept, "partial results are here")
    assert not run.kept[0].complete
    getattr(device.wire, how)()
    gate.touch()  # the run ends while nobody is there
    until(lambda: [line for line in run.said if line.startswith("lost the link")], "the loss is noticed")
    until(lambda: list(device.folder.glob("runs/*/rc")), "the run has ended there")
    device.wire.mend()
    assert run.wait().complete
    assert list((device.folder / "runs").iterdir()) == []


def test_the_same_command_takes_up_a_run_whose_asker_went_away(
    device: Server, bundle: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_S", 0.0)
    first = Run(device, Job((bundle,)), gate)
    until(lambda: first.kept, "partial results are here")
    device.wire.cut()
    with pytest.raises(DependencyError, match="give the same command again to take it up"):
        first.wait()
    device.wire.mend()
    monkeypatch.setattr(transfer, "PATIENCE_S", 60.0)
    second = Run(device, Job((bundle,)), gate)
    until(lambda: second.kept, "partial results are here again")
    (started,) = device.folder.glob("runs/*/started")
    assert started.read_text() == "x", "it was started twice"
    gate.touch()
    assert second.wait().complete
    assert any("taking up the run" in line for line in second.said)


def test_ctrl_c_stops_the_run_there_and_keeps_what_it_measured(
    device: Server, bundle: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[Results]()

    def keep(results: Results) -> None:
        kept.append(results)
        if len(kept) == 1:
            raise KeyboardInterrupt

    work = gated(Job((bundle,)), gate)
    with pytest.raises(KeyboardInterrupt):
        measure_on(device.url, work, say=lambda line: None, keep=keep)
    assert kept[-1].environment.device == "ssh://device"
    assert not kept[-1].complete
    assert list((device.folder / "runs").iterdir()) == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(gate) not in running


def test_a_run_that_is_killed_there_says_so(device: Server, bundle: Path, gate: Path) -> None:
    run = Run(device, Job((bundle,)), gate)
    until(lambda: run.kept, "partial results are here")
    (pid,) = device.folder.glob("runs/*/pid")
    group = int(pid.read_text())
    listed = subprocess.run(["ps", "-o", "ppid=", "-p", str(group)], capture_output=True, text=True, check=True)
    subprocess.run(["kill", "-9", listed.stdout.strip(), str(group)], check=True)
    with pytest.raises(CheckError, match="ssh://device was killed there"):
        run.wait()


def test_an_error_over_there_is_one_line_here_with_its_exit_code(device: Server, bundle: Path, gate: Path) -> None:
    gate.write_text("error: bundles/0/bundle has no vision_encoder for engine 'gguf'\n")
    with pytest.raises(BundleError, match=r"^on ssh://device: bundles/0/bundle has no vision_encoder") as raised:
        Run(device, Job((bundle,)), gate).wait()
    assert raised.value.exit_code == 2


def test_a_crash_over_there_is_no_success(device: Server, bundle: Path, gate: Path) -> None:
    gate.write_bytes(b"\xff")  # the runtime stumbles over it
    run = Run(device, Job((bundle,)), gate)
    with pytest.raises(CheckError, match=r"vlm-bench on ssh://device ended with exit code 1 \(UnicodeDecodeError"):
        run.wait()
    assert run.kept, "what was measured before is here"


def quick(url: str, bundle: Path) -> Results:
    return measure_on(url, Job((bundle,)), say=lambda line: None, keep=lambda results: None)


def test_an_unknown_host_is_refused_and_never_added(device: Server, bundle: Path) -> None:
    known = device.keys / "known_hosts"
    right = known.read_text()
    known.write_text("")
    # Even where the user's own configuration would accept it.
    with (device.keys / "config").open("a") as config:
        config.write("  StrictHostKeyChecking no\n")
    try:
        with pytest.raises(DependencyError, match="host key of ssh://device is not in known_hosts, so it is refused"):
            quick(device.url, bundle)
        assert known.read_text() == ""
    finally:
        known.write_text(right)
    assert not device.folder.exists()


def test_another_host_key_is_refused(device: Server, bundle: Path) -> None:
    known = device.keys / "known_hosts"
    right = known.read_text()
    known.write_text(f"{right.split()[0]} {(device.keys / 'user.pub').read_text()}")
    try:
        with pytest.raises(DependencyError, match=r"another host key than known_hosts says \(line .*known_hosts:1\)"):
            quick(device.url, bundle)
    finally:
        known.write_text(right)
    assert not device.folder.exists()


def test_a_key_that_is_not_welcome_says_what_to_do(device: Server, bundle: Path) -> None:
    welcome = device.keys / "authorized_keys"
    right = welcome.read_text()
    welcome.write_text("")
    try:
        with pytest.raises(DependencyError, match=r"refused to log in .*must work without a password"):
            quick(device.url, bundle)
    finally:
        welcome.write_text(right)


def test_a_host_that_is_not_there_says_so(device: Server, bundle: Path) -> None:
    device.wire.cut()
    with pytest.raises(DependencyError, match="cannot reach ssh://device "):
        quick(device.url, bundle)
    with pytest.raises(DependencyError, match=r"cannot reach ssh://nowhere\.invalid "):
        quick(f"ssh://nowhere.invalid?config={device.keys}/config", bundle)


def test_no_python_there_or_one_without_the_packages_says_what_to_install(
    device: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DependencyError, match=r"ssh://device has no /no/python .*install Python 3\.11"):
        quick(device.url.replace(sys.executable, "/no/python"), bundle)
    with pytest.raises(DependencyError, match="/bin/false on ssh://device failed"):
        quick(device.url.replace(sys.executable, "/bin/false"), bundle)
    monkeypatch.setattr("vlm_bench.devices.remote.NEEDED", {"numpy": "numpy", "no_such_module": "the-package"})
    with pytest.raises(DependencyError, match=r"lacks the-package: run there .* -m pip install the-package"):
        quick(device.url, bundle)


def test_a_device_without_room_is_left_alone(device: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MARGIN", 1 << 60)
    with pytest.raises(InputError, match=r"ssh://device has .* free in .*device, the copy takes"):
        quick(device.url, bundle)
    assert list((device.folder / "files").iterdir()) == []
    blocked = device.folder.parent / "file"
    blocked.touch()
    with pytest.raises(InputError, match=r"Not a directory .*name another folder"):
        quick(device.url.replace(str(device.folder), f"{blocked}/folder"), bundle)


def test_what_the_disk_does_not_take_is_told_and_taken_away(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full."""
    (tmp_path / "files").mkdir()
    line = json.dumps({"do": "receive", "folder": str(tmp_path), "files": [["a", 1 << 20, 0]]}).encode()
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "-", sys.executable, agent.__file__]
    done = subprocess.run(limited, input=line + b"\n" + bytes(1 << 20), capture_output=True, check=True)
    assert done.stdout.startswith(agent.MARK.encode())
    assert json.loads(done.stdout[len(agent.MARK) :])["error"] == "File too large"
    assert list((tmp_path / "files").iterdir()) == []


def test_what_is_installed_there_is_used_where_that_is_asked_for(
    device: Server, bundle: Path, gate: Path, tmp_path: Path
) -> None:
    """A Python that has another runtime in its path stands for one where it is installed."""
    gate.touch()
    with zipfile.ZipFile(io.BytesIO(fake_archive())) as archive:
        archive.extractall(tmp_path / "installed")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/installed exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    there = dataclasses.replace(device, options=f"&python={python}&runtime=installed")
    run = Run(there, Job((bundle,)), gate)
    assert run.wait().complete
    assert list((device.folder / "runtimes").iterdir()) == []
    assert any("vlm-export installed there" in line for line in run.said)


def test_names_that_are_no_utf8_travel_as_they_are(device: Server, gate: Path, tmp_path: Path) -> None:
    gate.touch()
    odd = tmp_path / os.fsdecode(b"caf\xe9 'x'")
    results = Run(device, Job((tiny_bundle(odd),)), gate).wait()
    assert results.complete
    assert "bundles/0/" in results.command


@pytest.mark.slow
def test_the_real_command_measures_there_with_the_sources_of_here(
    server: Server, tmp_path: Path, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.wire.mend()
    bundle = running_bundle(tmp_path / "bundle")
    url = dataclasses.replace(server, folder=tmp_path / "device").url
    output = tmp_path / "out.json"
    words = ["vlm-bench", bundle, "--image", picture_file, "--runs", "1", "--max-new-tokens", "2", "--threads", "1"]
    words += ["--idle", "0", "--device", url, "--json", output]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert not exited.value.code
    results = read_results(output)
    assert results.complete
    assert results.environment.device == "ssh://device"
    assert results.command.startswith(f"vlm-bench {bundle} --image")
    assert [row.name for row in results.rows] == ["bundle"]
    assert results.rows[0].new_tokens == 2
    assert results.settings.images == (str(picture_file),)


def test_questions_of_ones_own_travel_with_their_pictures(bundle: Path, tmp_path: Path, picture_file: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a b.png").write_bytes(picture_file.read_bytes())
    row = {"image": "sub/a b.png", "question": "What?", "answer": "this"}
    (folder / "mine.jsonl").write_text(json.dumps(row) + "\n")
    work = Job((bundle,), questions=str(folder / "mine.jsonl"))
    files = job.inputs(work)
    assert files["questions/sub/a b.png"] == folder / "sub/a b.png"
    assert files["questions/mine.jsonl"] == folder / "mine.jsonl"
    assert work.command()[:3] == ["bundles/0/bundle", "--questions", "questions/mine.jsonl"]
    demo = Job((bundle,), questions="demo:4")
    assert demo.command()[:3] == ["bundles/0/bundle", "--questions", "demo:4"]
    assert job.inputs(demo).keys() == {f"bundles/0/bundle/{f}" for f in files_of(bundle)}


def files_of(bundle: Path) -> set[str]:
    return {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()}


def test_the_copied_sources_are_small_the_same_each_time_and_need_no_torch(tmp_path: Path) -> None:
    content = source.archive()
    assert content == source.archive()
    assert len(content) < 2_000_000
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    assert "vlm_bench/results.schema.json" in names
    assert not [name for name in names if name.endswith((".safetensors", ".pyc"))]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vlm_bench.cli, vlm_runtime; "
        f"assert vlm_bench.cli.__file__.startswith({str(tmp_path)!r}); "
        "print({'torch', 'transformers', 'vlm_export', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://jetson", Address("ssh", "jetson")),
        ("ssh://me@Box:2222/mnt/big?python=~/v/python", Address("ssh", "Box", "me", 2222, "/mnt/big", "~/v/python")),
        ("ssh://[fe80::1%25eth0]:22", Address("ssh", "fe80::1%eth0", None, 22)),
        ("ssh://host/~/bench?runtime=installed", Address("ssh", "host", folder="~/bench", runtime="installed")),
        ("adb://192.168.1.5:5555", Address("adb", "192.168.1.5:5555")),
        ("adb://R5CT10ABCDE?port=9022&user=u0_a1", Address("adb", "R5CT10ABCDE", "u0_a1", 9022)),
    ],
)  # fmt: skip
def test_addresses_that_are_understood(url: str, expected: Address) -> None:
    assert parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "jetson",
        "http://jetson",
        "ssh://",
        "ssh://-oProxyCommand=evil",
        "ssh://-l@host",
        "ssh://ho st",
        "ssh://me:secret@host",
        "ssh://host:0",
        "ssh://host:99999",
        "ssh://fe80::1",
        "ssh://host?shell=sh",
        "ssh://host?runtime=other",
        "adb://",
        "adb://-s",
    ],
)
def test_addresses_that_are_none_say_what_is_allowed(url: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(url)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
