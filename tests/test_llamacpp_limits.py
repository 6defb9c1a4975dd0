"""What llama.cpp's own image path changes, measured on tiny checkpoints: every limit the docs tell of shows."""

from __future__ import annotations

from pathlib import Path

from conftest import MakeTiny
from vlm_bench.llamacpp_limits import limits


def test_the_limits_of_llama_cpp_are_measured_one_by_one(tiny: Path, make_tiny: MakeTiny, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "siglip").mkdir()
    clip = {(one.limit, one.measured): one for one in limits(tiny, tmp_path / "clip", 0, 1)}
    siglip = {
        (one.limit, one.measured): one
        for one in limits(make_tiny(tower="siglip", strategy="full"), tmp_path / "siglip", 0, 1)
    }
    order = ("class row last, patch 0 dropped", "rows, cosine")
    assert clip[order].llamacpp < 0.9 < clip[order].ours
    assert order not in siglip
    scaled = ("picture of 500 × 372, padded and scaled", "rows, cosine")
    assert siglip["the same with our mmproj.gguf", "rows, cosine"].llamacpp > 0.9999
    tokens = ("template never sees the picture", "prompt tokens")
    for found in (clip, siglip):
        assert found[scaled].llamacpp < 0.95
        assert found[tokens].llamacpp == found[tokens].ours - 1
        assert any("tiles" in limit and one.llamacpp != one.ours for (limit, _), one in found.items())
        gelu = found["GELU by tanh where the checkpoint has erf", "rows, relative L2"]
        assert 1e-6 < gelu.llamacpp < 1e-3
