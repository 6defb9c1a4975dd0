"""llama.cpp is loaded only in the release whose structs are known, stays quiet and gives its reasons in one line."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from ggufs import language_gguf
from running import running_spec
from vlm_models.errors import BundleError, DependencyError
from vlm_runtime import llama


def test_a_sound_file_that_llama_cpp_cannot_load_is_one_quiet_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = language_gguf(tmp_path / "model.gguf", running_spec())
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(BundleError, match=r"model\.gguf cannot be opened by llama\.cpp \(.*ffn_up") as error:
        llama.load_model(path)
    assert "\n" not in str(error.value)
    with pytest.raises(BundleError, match="cannot be opened"):
        llama.load_model(tmp_path / "none.gguf")
    assert capfd.readouterr() == ("", "")


def test_another_release_of_llama_cpp_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.35")
    with pytest.raises(DependencyError, match=r"llama-cpp-python 0\.3\.35 is installed.* known for 0\.3\.36 only"):
        llama.check_installed()


@pytest.mark.parametrize("name", ["LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"])
def test_a_library_from_the_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, os.sep)
    with pytest.raises(DependencyError, match=f"{name} is set"):
        llama.check_installed()


def test_structs_that_read_back_wrong_are_refused() -> None:
    class Shifted:
        """A library whose context parameters lie one flag further."""

        def __init__(self, **changes: Any) -> None:
            self.changes = changes

        def __getattr__(self, name: str) -> Any:
            return self.changes.get(name) or getattr(llama.library(), name)

    params = llama.library().llama_context_default_params()
    params.offload_kqv = False
    with pytest.raises(DependencyError, match=r"llama_context_default_params\(\)\.offload_kqv is False, not True"):
        llama._check_structs(Shifted(llama_context_default_params=lambda: params))
    with pytest.raises(DependencyError, match=r"came with llama\.cpp 0\.6\.1 instead of 0\.5\.0"):
        llama._check_structs(Shifted(llama_version=lambda: b"0.6.1"))
    llama._check_structs(llama.library())


def test_messages_are_lines_without_their_functions(tmp_path: Path) -> None:
    llama.library()
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + bytes(60))
    with pytest.raises(BundleError, match=r"\(invalid magic characters: 'GGML', expected 'GGUF'\)"):
        llama.load_model(tmp_path / "bad.gguf")
    assert any(line.endswith("failed to load model") for line in llama.last_messages())
    assert llama.last_error().startswith("invalid magic")
    llama.forget_messages()
    assert llama.last_messages() == []
    assert llama.last_error() == "it gave no reason"


def test_the_image_library_is_quiet_too(capfd: pytest.CaptureFixture[str]) -> None:
    mtmd = llama.multimodal()
    assert mtmd.mtmd_default_marker()
    assert capfd.readouterr() == ("", "")


def test_pointers_become_numbers() -> None:
    buffer = (ctypes.c_float * 2)()
    assert llama.address(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_float))) == ctypes.addressof(buffer)
    assert llama.address(ctypes.POINTER(ctypes.c_float)()) == 0
