"""manifest.json: what is written is read again; what is not sound is refused in one line, by the schema too."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundles import SPEC, tiny_bundle
from vlm_models.errors import BundleError
from vlm_runtime.manifest import FileEntry, Manifest, Part, read_manifest, safe_path, write_manifest

SCHEMA = json.loads(resources.files("vlm_runtime").joinpath("manifest.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def written(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def rewrite(folder: Path, data: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def outcome(folder: Path, content: bytes) -> str:
    """What reading `content` as the manifest gives; the sound one is put back."""
    good = (folder / "manifest.json").read_bytes()
    try:
        (folder / "manifest.json").write_bytes(content)
        read_manifest(folder)
    except BundleError as error:
        return str(error)
    finally:
        (folder / "manifest.json").write_bytes(good)
    return "read"


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def inside(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.spec == SPEC
    assert manifest.parts["projector"]["onnx"].files == ("onnx/projector.onnx", "onnx/projector.onnx.data")
    assert isinstance(manifest.files["golden.npz"], FileEntry)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_the_schema_takes_what_is_written(folder: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(written(folder))


def test_the_schema_names_the_same_fields_as_the_dataclasses() -> None:
    def check(cls: Any, schema: Any) -> None:
        fields = dataclasses.fields(cls)
        assert list(schema["properties"]) == [f.name for f in fields], cls
        without_default = [
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        assert schema["required"] == without_default, cls
        assert schema["additionalProperties"] is False
        for hint in typing.get_type_hints(cls).values():
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner):
                    check(inner, SCHEMA["$defs"][typing.cast(type, inner).__name__])

    check(Manifest, SCHEMA)
    check(Part, SCHEMA["$defs"]["Part"])
    check(FileEntry, SCHEMA["$defs"]["FileEntry"])


def test_every_missing_required_key_is_refused_by_reader_and_schema(folder: Path) -> None:
    data = written(folder)
    optional = {
        f.name
        for c in (type(SPEC), *(type(s) for s in (SPEC.language, SPEC.preprocess, SPEC.prompt, SPEC.projector)))
        for f in dataclasses.fields(c)
        if f.default is not dataclasses.MISSING
    }
    optional |= {"type", "scaling", "details", "opset", "factor", "reference", "greedy"}
    removed = 0
    for path in [p for p in paths(data) if isinstance(p[-1], str)]:
        if path[-1] in optional or path[0] in ("recipes", "tools") or path == ("parity", "onnx"):
            continue
        if path[0] == "parity" and len(path) > 3:
            continue
        changed = copy.deepcopy(data)
        del inside(changed, path[:-1])[path[-1]]
        rewrite(folder, changed)
        assert refusal(folder), path
        if path[0] != "files" or len(path) > 2:  # that a name is listed is more than a schema can say
            if path[:1] == ("parts",) and len(path) == 3:
                assert changed["parts"][path[1]] == {}
            assert not VALIDATOR.is_valid(changed), path
        removed += 1
    assert removed > 60


def test_every_unknown_key_is_refused_by_reader_and_schema(folder: Path) -> None:
    data = written(folder)
    open_ended = ("parity", "recipes", "tools", "files", "details", "scaling")
    for path in [(), *(p for p in paths(data) if isinstance(inside(data, p), dict))]:
        if path and ((path[0] in open_ended and len(path) == 1) or path[-1] in open_ended or path[0] == "parity"):
            continue
        changed = copy.deepcopy(data)
        inside(changed, path)["surprise"] = {}
        rewrite(folder, changed)
        assert refusal(folder), path
        assert not VALIDATOR.is_valid(changed), path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_context",), 0),
        (("max_context",), True),
        (("max_context",), 1.5),
        (("spec", "language", "layers"), -1),
        (("spec", "language", "norm_eps"), "small"),
        (("spec", "language", "tied"), 1),
        (("spec", "preprocess", "std"), [0.5, 0.0, 0.5]),
        (("spec", "preprocess", "std"), [0.5, 0.5]),
        (("spec", "preprocess", "resize"), "wide"),
        (("spec", "preprocess", "resample"), 9),
        (("spec", "prompt", "image_token"), ""),
        (("spec", "prompt", "eos_token_ids"), ["</s>"]),
        (("embedding", "dtype"), "F64"),
        (("embedding", "rows"), 0),
        (("files", "golden.npz", "sha256"), "F" * 64),
        (("files", "golden.npz", "sha256"), "f" * 63),
        (("files", "golden.npz", "bytes"), -1),
        (("parts", "projector"), {}),
        (("parts", "projector", "onnx", "files"), []),
        (("parity", "onnx"), {}),
        (("parity", "onnx"), []),
        (("version",), 2),
        (("version",), "1"),
        (("format",), "zip"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_value_is_refused_by_reader_and_schema(folder: Path, path: tuple[str, ...], value: Any) -> None:
    data = written(folder)
    inside(data, path[:-1])[path[-1]] = value
    rewrite(folder, data)
    assert refusal(folder)
    assert not VALIDATOR.is_valid(data)


BAD_PATHS = [
    *["/etc/passwd", "../x", "a/../../x", "a/..", "..", ".", "./a", "a//b", "a/", "", "C:/x", "a\\b", "a\0b", "a\nb"],
    "manifest.json",
]


@pytest.mark.parametrize("name", BAD_PATHS, ids=repr)
def test_a_path_out_of_the_bundle_is_refused_by_reader_and_schema(folder: Path, name: str) -> None:
    assert not safe_path(name)
    for place in (("embedding", "file"), ("tokenizer",), ("golden",), ("parts", "projector", "onnx", "graph")):
        data = written(folder)
        data["files"][name] = dict(data["files"]["golden.npz"])
        inside(data, place[:-1])[place[-1]] = name
        rewrite(folder, data)
        assert refusal(folder)
        assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize("name", ["a", "onnx/x.onnx.data", "..a/b..", "manifest.json/x", "ä b"])
def test_a_path_inside_the_bundle_is_taken(name: str) -> None:
    assert safe_path(name)
    assert jsonschema.Draft202012Validator(SCHEMA["$defs"]["path"]).is_valid(name)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="./ab\\:\n\0", max_size=8))
def test_reader_and_schema_agree_on_every_path(name: str) -> None:
    assert safe_path(name) == jsonschema.Draft202012Validator(SCHEMA["$defs"]["path"]).is_valid(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["files"].pop("golden.npz"), "golden names 'golden.npz', which is not in 'files'"),
        (lambda d: d["embedding"].update(rows=36), "the embedding table is 36 × 8, the language model needs 37 × 8"),
        (lambda d: d["embedding"].update(dtype="F16"), "37 × 8 numbers of F16 are 592 bytes"),
        (lambda d: d["spec"]["projector"].update(out_features=9), "the language model takes 8"),
        (lambda d: d["spec"]["vision"].update(hidden_size=9), "the projector takes 16"),
        (lambda d: d["spec"]["prompt"].update(image_tokens=9), "prompt has 9 tokens a picture"),
        (lambda d: d["spec"]["language"].update(windows=[0]), "2 layers, but windows of 1"),
        (lambda d: d["parts"]["projector"]["onnx"].update(graph="golden.npz"), "is not one of its files"),
        (lambda d: d.update(version=2), "version 2, this vlm-export reads version 1"),
        (lambda d: d["parts"].pop("projector"), "a bundle has vision_encoder, projector, language_model"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_parts_that_do_not_fit_each_other_are_named(folder: Path, change: Any, words: str) -> None:
    data = written(folder)
    change(data)
    rewrite(folder, data)
    assert words in refusal(folder)


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no such folder: .*nowhere"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    assert "is not a bundle" in refusal(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        read_manifest(tmp_path / "manifest.json" / "x")


@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"{", b"\xff\xfe{}", b"[]", b"null", b"7", b'{"format": "vlm-bundle", "max_context": NaN}'],
        *[b'{"format": "vlm-bundle", "version": 1, "max_context": 1e999}', b"[" * 100_000, b'{"a": ' * 100_000],
        b'{"format": "vlm-bundle", "version": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda c: repr(c[:30]),
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert refusal(tmp_path)


def test_numbers_that_are_not_finite_are_written_as_null(folder: Path) -> None:
    manifest = read_manifest(folder)
    stage = {"cosine": math.nan, "max_abs": math.inf, "kl": 0.5, "threshold": {"cosine": 0.99}}
    record = {"passed": False, "stages": {"logits": stage}, "greedy": {"equal": 0, "of": 32}, "reference": "torch"}
    write_manifest(folder, dataclasses.replace(manifest, parity={"onnx": record}))
    back = read_manifest(folder).parity["onnx"]["stages"]["logits"]
    assert back == {"cosine": None, "max_abs": None, "kl": 0.5, "threshold": {"cosine": 0.99}}
    VALIDATOR.validate(written(folder))


def test_a_manifest_that_could_not_be_read_is_not_written(folder: Path) -> None:
    manifest, before = read_manifest(folder), (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="tokenizer names 'other', which is not in 'files'"):
        write_manifest(folder, dataclasses.replace(manifest, tokenizer="other"))
    assert (folder / "manifest.json").read_bytes() == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_read_or_refused_but_never_crashes(folder: Path, data: st.DataObject) -> None:
    document = written(folder)
    places = list(paths(document))
    for path in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        try:
            parent = inside(document, path[:-1])
            parent[path[-1]] = data.draw(JSON)
        except (KeyError, IndexError, TypeError):
            continue
    assert "\n" not in outcome(folder, json.dumps(document).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_but_never_crash(folder: Path, data: st.DataObject) -> None:
    good = (folder / "manifest.json").read_bytes()
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in outcome(folder, bytes(damaged))
