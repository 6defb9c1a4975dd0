"""The header reader agrees with the gguf package on sound files and answers all others with one line."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ggufs import language_gguf
from running import running_spec
from vlm_models.errors import BundleError
from vlm_runtime.gguf_header import BLOCKS, check_language_model, check_part, read_header

SPEC = running_spec()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", SPEC, dtype=np.float16)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "damaged.gguf"


def refused(path: Path, content: bytes) -> str:
    """The one line with which a file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(BundleError) as error:
        read_header(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def one_line_or_nothing() -> Iterator[None]:
    """Whatever happens inside, it is success or a BundleError of one line."""
    try:
        yield
    except BundleError as error:
        if "\n" in str(error):
            raise AssertionError(f"two lines: {error}") from None


def written(path: Path, arrays: bool = True) -> Path:
    """A file with every kind of value, lists of each kind and a quantized tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"a.{name}", 100)
    writer.add_float32("a.float32", 1.5)
    writer.add_float64("a.float64", -2.25)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "größe 東京\n")
    if arrays:
        writer.add_array("b.texts", ["", "a", "東京"])
        writer.add_array("b.numbers", [1, 2, 3, 4])
        writer.add_array("b.reals", [0.5, 1.5])
        writer.add_array("b.flags", [True, False])
    writer.add_custom_alignment(64)
    quantized = gguf.quants.quantize(np.ones((4, 64), np.float32), GGMLQuantizationType.Q4_0)
    writer.add_tensor("q", quantized, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("one", np.ones(3, np.float32))
    writer.add_tensor("cube", np.ones((2, 3, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = written(tmp_path / "all.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert header.alignment == reader.alignment == 64
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {*header.values, *header.arrays} == set(fields)
    for name, value in header.values.items():
        assert value == fields[name].contents()
        assert type(value) is type(fields[name].contents())
    assert header.arrays == {name: len(fields[name].contents()) for name in header.arrays}
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape)
        assert (info.type, info.offset, info.bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    assert {number: GGML_QUANT_SIZES[GGMLQuantizationType(number)] for number in BLOCKS} == BLOCKS


def test_the_language_model_of_the_spec_passes(model: Path) -> None:
    check_language_model(read_header(model), model, SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "general.architecture is 'llama', its bundle says 'qwen2'"),
        ({"hidden_size": 64}, "llama.embedding_length is 32, its bundle says 64"),
        ({"layers": 3}, "llama.block_count is 2, its bundle says 3"),
        ({"heads": 4}, "llama.attention.head_count is 2"),
        ({"kv_heads": 2}, "llama.attention.head_count_kv is 1"),
        ({"head_dim": 32}, "llama.attention.key_length is 16"),
        ({"intermediate_size": 17}, "llama.feed_forward_length is 16"),
        ({"vocab_size": 321}, r"token_embd.weight is \(32, 320\), its bundle says \(32, 321\)"),
    ],
)
def test_a_file_of_other_sizes_than_the_bundle_is_refused(model: Path, change: dict[str, Any], message: str) -> None:
    spec = dataclasses.replace(SPEC, language=dataclasses.replace(SPEC.language, **change))
    with pytest.raises(BundleError, match=message):
        check_language_model(read_header(model), model, spec)


def test_a_part_of_another_model_or_another_part_is_refused(model: Path, tmp_path: Path) -> None:
    header = read_header(model)
    with pytest.raises(BundleError, match="is a part of another model: it is not the language_model of tiny"):
        check_language_model(header, model, dataclasses.replace(SPEC, fingerprint="0" * 64))
    with pytest.raises(BundleError, match="it is not the mmproj of tiny"):
        check_part(header, model, SPEC, "mmproj")
    unmarked = written(tmp_path / "foreign.gguf")
    with pytest.raises(BundleError, match=r"foreign\.gguf is a part of another model"):
        check_language_model(read_header(unmarked), unmarked, SPEC)


def test_a_model_with_a_block_too_few_is_refused(model: Path) -> None:
    header = read_header(model)
    tensors = {name: info for name, info in header.tensors.items() if not name.startswith("blk.1.")}
    with pytest.raises(BundleError, match="number of its blocks is 1, its bundle says 2"):
        check_language_model(dataclasses.replace(header, tensors=tensors), model, SPEC)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BundleError, match="cannot read"):
            read_header(path)


def test_a_file_cut_at_any_byte_is_refused(model: Path, scratch: Path) -> None:
    content, header = model.read_bytes(), read_header(model)
    last = list(header.tensors.values())[-1]
    end = next(iter(header.tensors.values())).offset
    for size in (*range(0, end, 7), end, last.offset, last.offset + last.bytes - 1):
        refused(scratch, content[:size])
    scratch.write_bytes(content[: last.offset + last.bytes])  # without the padding at the end it is whole
    read_header(scratch)


HEAD = b"GGUF" + struct.pack("<I", 3)


def counts(tensors: int, keys: int) -> bytes:
    return HEAD + struct.pack("<QQ", tensors, keys)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"GGML" + bytes(64), "does not start with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "version 50331648 instead of 3"),
        (b"GGUF" + struct.pack("<I", 2) + bytes(64), "version 2 instead of 3"),
        (counts(2**63, 0) + bytes(64), "tensor name '' is too long, not printable or there twice"),
        (counts(0, 2**64 - 1) + bytes(64), "a key has no name"),
        (counts(0, 1) + struct.pack("<Q", 2**63) + bytes(64), "cut short"),
        (counts(0, 1) + text(b"a") + struct.pack("<I", 13) + bytes(64), "unknown type 13"),
        (counts(0, 1) + text(b"a") + struct.pack("<IB", 7, 2), "a boolean is 2"),
        (counts(0, 1) + text(b"\xff\xfe") + bytes(64), "is not UTF-8"),
        (counts(0, 2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2, "key 'a' is there twice"),
        (counts(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "elements of the unknown type 9"),
        (counts(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64), "texts does not fit"),
        (counts(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 6, 2**62) + bytes(64), "cut short"),
        (counts(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
        (counts(0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 24), "general.alignment is 24"),
        (counts(0, 1) + text(b"general.alignment") + struct.pack("<IB", 7, 1), "general.alignment is True"),
        (counts(1, 0) + tensor(b"n" * 64) + bytes(512), "is too long"),
        (counts(1, 0) + tensor(b"a\x00b") + bytes(512), "not printable"),
        (counts(2, 0) + tensor() + tensor() + bytes(512), "there twice"),
        (counts(1, 0) + tensor(shape=(1,) * 5) + bytes(512), "t has 5 dimensions"),
        (counts(1, 0) + tensor(shape=()) + bytes(512), "t has 0 dimensions"),
        (counts(1, 0) + tensor(shape=(32, 0)) + bytes(512), "t has the shape"),
        (counts(1, 0) + tensor(shape=(33,), kind=2) + bytes(512), "multiples of 32"),
        (counts(1, 0) + tensor(shape=(2**63, 2**63)) + bytes(512), "it is cut short"),
        (counts(1, 0) + tensor(kind=4) + bytes(512), "unknown type 4"),
        (counts(1, 0) + tensor(offset=32) + bytes(512), "starts at byte"),
        (counts(1, 0) + tensor(offset=2**64 - 1) + bytes(512), "starts at byte"),
        (counts(2, 0) + tensor() + tensor(b"u") + bytes(512), "u starts at byte"),
    ],
)
def test_each_kind_of_damage_has_its_reason(scratch: Path, content: bytes, message: str) -> None:
    assert message in refused(scratch, content)


def test_numbers_in_the_file_size_nothing(scratch: Path) -> None:
    """A header that promises a vocabulary of 2^40 texts costs neither memory nor time."""
    lie = counts(0, 1) + text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2**40)
    with scratch.open("wb") as file:
        file.write(lie)
        file.truncate(4 << 30)  # sparse: as many empty texts as 4 GiB of zeros are
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(BundleError, match="does not fit it"):
        read_header(scratch)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_read_or_refused_in_one_line(model: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes()[:3000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 8))
        kind = data.draw(st.sampled_from(("byte", "u64", "cut", "insert")))
        if kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "u64":
            number = data.draw(st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)))
            content[at : at + 8] = struct.pack("<Q", number)
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        if len(content) < 16:
            break
    whole = bytes(content) + model.read_bytes()[len(content) :]
    scratch.write_bytes(whole)
    with one_line_or_nothing():
        header = read_header(scratch)
        check_language_model(header, scratch, SPEC)
        assert all(info.offset + info.bytes <= len(whole) for info in header.tensors.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
@example(b"GGUF")
def test_any_bytes_at_all_are_read_or_refused_in_one_line(scratch: Path, content: bytes) -> None:
    for start in (b"", HEAD, counts(1, 1)):
        scratch.write_bytes(start + content)
        with one_line_or_nothing():
            read_header(scratch)
