"""Pictures: equal to transformers' own processors, right for every kind of file, one line for every bad one."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_models.errors import ImageError
from vlm_models.spec import PreprocessSpec
from vlm_runtime.image import MAX_PIXELS, open_image, preprocess

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
RESCALE = 0.00392156862745098
CLIP = PreprocessSpec(56, "shortest_edge", 56, 3, RESCALE, CLIP_MEAN, CLIP_STD)
SMALL_CROP = PreprocessSpec(40, "shortest_edge", 33, 2, RESCALE, CLIP_MEAN, CLIP_STD)
LARGE_CROP = PreprocessSpec(25, "shortest_edge", 56, 3, RESCALE, CLIP_MEAN, CLIP_STD)
ONLY_CROP = PreprocessSpec(56, "none", 56, 3, RESCALE, CLIP_MEAN, CLIP_STD)
SIGLIP = PreprocessSpec(48, "exact", 0, 3, RESCALE, HALF, HALF)
RAW = PreprocessSpec(48, "exact", 0, 3, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SQUARE = PreprocessSpec(
    56, "shortest_edge", 56, 3, RESCALE, CLIP_MEAN, CLIP_STD, "square", tuple(int(m * 255) for m in CLIP_MEAN)
)
SIZES = [
    *[(1, 1), (1, 2), (3, 1), (2, 3), (7, 5), (55, 56), (56, 56), (57, 56), (56, 57), (33, 34), (101, 77), (64, 64)],
    *[(9, 500), (500, 9), (640, 427), (333, 1000), (1000, 3), (3, 1000), (40, 12), (12, 40), (24, 57), (113, 24)],
]


def processor(spec: PreprocessSpec) -> Any:
    """transformers' own processor of the same preprocessing."""
    common = {
        "do_resize": spec.resize != "none",
        "resample": spec.resample,
        "do_rescale": spec.rescale != 1.0,
        "rescale_factor": spec.rescale,
        "do_normalize": spec.std != (1.0, 1.0, 1.0),
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if spec.resize == "exact":
        return SiglipImageProcessorPil(size={"height": spec.size, "width": spec.size}, **common)
    size, crop = {"shortest_edge": spec.size}, {"height": spec.crop, "width": spec.crop}
    if spec.pad == "square":
        return LlavaImageProcessorPil(size=size, crop_size=crop, do_pad=True, **common)
    return CLIPImageProcessorPil(size=size, crop_size=crop, do_center_crop=spec.crop > 0, **common)


def wanted(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    return np.asarray(processor(spec)(images=image, return_tensors="np")["pixel_values"][0])


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = Image.new(mode, (1, 1)).getbands()
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(bands)), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for headers that Pillow would not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "spec",
    [CLIP, SMALL_CROP, LARGE_CROP, ONLY_CROP, SIGLIP, RAW, SQUARE],
    ids=["clip", "small-crop", "large-crop", "only-crop", "siglip", "raw", "square"],
)
def test_pixel_values_equal_the_checkpoints_own_processor(size: tuple[int, int], spec: PreprocessSpec) -> None:
    image = noise(*size, seed=sum(size))
    out = preprocess(open_image(image), spec)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, wanted(image, spec))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    crop=st.integers(1, 50),
    resample=st.integers(0, 5),
    pad=st.sampled_from(["none", "square"]),
)
def test_any_size_crop_filter_and_padding_equal_transformers(
    width: int, height: int, size: int, crop: int, resample: int, pad: Any
) -> None:
    spec = PreprocessSpec(size, "shortest_edge", crop, resample, RESCALE, CLIP_MEAN, CLIP_STD, pad, SQUARE.pad_color)
    image = noise(width, height, seed=width * height)
    np.testing.assert_array_equal(preprocess(image, spec), wanted(image, spec))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA", "RGBX", "I", "F"])
def test_every_mode_equals_the_checkpoints_own_processor(mode: str) -> None:
    colour = noise(61, 47)
    image = colour.convert("L").convert(mode) if mode in ("PA", "I", "F") else colour.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(noise(61, 47, "L", seed=1))
    np.testing.assert_array_equal(preprocess(open_image(image), CLIP), wanted(image, CLIP))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG"])
def test_files_of_every_format_equal_the_checkpoints_own_processor(kind: str) -> None:
    image = noise(61, 47)
    options = {"quality": 80} if kind in ("JPEG", "WEBP") else {}
    data = encoded(image.quantize(32) if kind == "GIF" else image, kind, **options)
    with Image.open(io.BytesIO(data)) as theirs:
        np.testing.assert_array_equal(preprocess(open_image(data), CLIP), wanted(theirs, CLIP))


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_white_as_in_the_checkpoints_own_processor(mode: str) -> None:
    image = noise(30, 30).convert(mode)
    transparent: Any = {"P": 3, "RGB": image.getpixel((4, 4)), "L": image.getpixel((4, 4))}[mode]
    data = encoded(image, "PNG", transparency=transparent)
    with Image.open(io.BytesIO(data)) as theirs:
        np.testing.assert_array_equal(preprocess(open_image(data), CLIP), wanted(theirs, CLIP))
    if mode != "P":
        assert open_image(data).getpixel((4, 4)) == (255, 255, 255)


def test_half_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 0))
    image.putpixel((0, 0), (0, 100, 200, 255))
    opened = open_image(encoded(image))
    assert opened.getpixel((0, 0)) == (0, 100, 200)
    assert opened.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    levels = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    opened = np.asarray(open_image(encoded(Image.fromarray(levels), kind)))
    np.testing.assert_array_equal(opened, np.repeat((levels >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
    swapped = Image.frombytes("I;16B", (64, 48), levels.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(open_image(swapped)), opened)


def test_sixteen_bit_grey_with_a_transparent_level_is_white_there() -> None:
    levels = np.array([[0, 30000], [65535, 40000]], np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(levels), transparency=30000)))
    assert opened[:, :, 0].tolist() == [[0, 255], [255, 40000 >> 8]]


def test_sixteen_bit_colour_is_scaled_not_clipped() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32768, 0, 256, 512, 40000)
    assert np.asarray(open_image(png(2, 1, 16, 2, row))).tolist() == [[[255, 128, 0], [1, 2, 156]]]


@pytest.mark.parametrize("values", [[0.0, 1.0], [-5.0, 20.0], [0.0, 3e9], [0.0, float("nan")]], ids=str)
def test_floating_point_pictures_of_unknown_range_are_refused(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    with pytest.raises(ImageError, match="save it with 8 or 16 bits"):
        open_image(encoded(image, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_rotated_photo_stands_upright(orientation: int, kind: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # white at the top left
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif))
    assert opened.size == (48, 32)
    assert np.abs(np.asarray(opened).astype(int) - upright).max() < 40


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    data = encoded(noise(20, 10), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage")
    assert open_image(data).size == (20, 10)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((0, 0)) == (255, 0, 0), kind


def test_a_path_bytes_and_a_pillow_image_give_the_same(tmp_path: Path) -> None:
    image, path = noise(20, 30), tmp_path / "ä b.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_one_pixel_is_a_picture() -> None:
    out = preprocess(open_image(encoded(Image.new("RGB", (1, 1), (10, 20, 30)))), SIGLIP)
    expected = (np.array([10, 20, 30]) / 255 - 0.5) / 0.5
    assert np.abs(out - expected[:, None, None]).max() < 1e-6


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("pad", ["none", "square"])
def test_a_line_of_pixels_is_refused_before_it_fills_the_memory(size: tuple[int, int], pad: Any) -> None:
    image = open_image(encoded(noise(*size)))
    spec = PreprocessSpec(224, "shortest_edge", 224, 3, RESCALE, CLIP_MEAN, CLIP_STD, pad)
    with pytest.raises(ImageError, match=f"{size[0]} × {size[1]}.*crop it first"):
        preprocess(image, spec)
    assert preprocess(image, SIGLIP).shape == (3, 48, 48)


@pytest.mark.parametrize(
    "size", [(20_000, 1), (12_000, 12_000), (MAX_PIXELS + 1, 1), (60_000, 60_000), (2**31 - 1,) * 2]
)
def test_a_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    data = png(*size, 8, 2, b"")
    reason = "scale it down first" if size[0] * size[1] > MAX_PIXELS else "cannot be decoded"
    if size[0] < 2**31 - 1:
        with pytest.raises(ImageError, match=reason):
            open_image(data)
    else:
        with pytest.raises(ImageError):
            open_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_an_image_error_wherever_it_is_cut(kind: str) -> None:
    data = encoded(noise(40, 40), kind)
    for cut in range(0, len(data) * 9 // 10, max(1, len(data) // 60)):
        with pytest.raises(ImageError) as error:
            open_image(data[:cut])
        assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_a_picture_or_an_image_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    damaged = bytearray(encoded(noise(12, 9), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert open_image(bytes(damaged)).mode == "RGB"


def test_what_is_not_a_picture_is_named_with_the_allowed_formats(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    with pytest.raises(ImageError, match=r"notes\.txt is not a picture: allowed are PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        open_image(text)
    with pytest.raises(ImageError, match="is not a picture"):
        open_image(b"")
    with pytest.raises(ImageError, match="is not a picture"):
        open_image(encoded(noise(5, 5), "ICO"))


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such image: .*missing\.png"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path / "pipe")
    with pytest.raises(ImageError):
        open_image("a\0b.png")
    with pytest.raises(ImageError, match="not int"):
        open_image(7)  # type: ignore[arg-type]


def test_a_picture_that_cannot_come_out_square_is_refused() -> None:
    with pytest.raises(ImageError, match="20 × 10 pixels, the vision encoder takes 56 × 56"):
        preprocess(noise(20, 10), PreprocessSpec(56, "none", 0, 3, RESCALE, HALF, HALF))
