"""Files as strangers send them: what becomes of each, and what each that is refused is told."""

import io
import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from flux_lora.drawing.opening import FORMATS, fitted_size, read_image, read_mask
from flux_lora.errors import RequestError

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
PROFILES = {name: ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("sRGB", "LAB")}


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def equal(image: Image.Image, pixels: np.ndarray) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


# What is accepted


@pytest.mark.parametrize("options", [{}, {"lossless": True, "kind": "WEBP"}], ids=str)
def test_lossless_files_keep_their_pixels(options: dict[str, Any]) -> None:
    assert equal(read_image(file(RGB, **options), "image"), PIXELS)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_what_pillow_reads(kind: str) -> None:
    image = RGB.quantize(64) if kind == "GIF" else RGB
    data = file(image, kind)
    assert equal(read_image(data, "image"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "lime", "blue")]
    data = file(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert equal(read_image(data, "image"), np.asarray(frames[0]))


def test_grey_and_palette_become_rgb() -> None:
    grey = RGB.convert("L")
    assert equal(read_image(file(grey), "image"), np.stack([np.asarray(grey)] * 3, -1))
    palette = RGB.quantize(16)
    assert equal(read_image(file(palette), "image"), np.asarray(palette.convert("RGB")))
    bits = grey.convert("1")
    assert equal(read_image(file(bits), "image"), np.stack([np.asarray(bits) * np.uint8(255)] * 3, -1))


def test_16_bits_become_8() -> None:
    values = RNG.integers(0, 2**16, (40, 60), dtype=np.uint16)
    read = read_image(file(Image.fromarray(values)), "image")
    assert equal(read, np.stack([(values >> 8).astype(np.uint8)] * 3, -1))
    colours = RNG.integers(0, 2**16, (4, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    assert equal(read_image(png(6, 4, 16, 2, rows), "image"), (colours >> 8).astype(np.uint8))


def test_cmyk_becomes_rgb() -> None:
    data = file(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = np.asarray(read_image(data, "image"))[10, 10]
    assert red > 240
    assert max(green, blue) < 20


def test_what_is_transparent_is_laid_on_white() -> None:
    alpha = RNG.integers(0, 256, (40, 60, 1), dtype=np.uint8)
    alpha[:, :20], alpha[:, 40:] = 0, 255
    read = np.asarray(read_image(file(Image.fromarray(np.concatenate([PIXELS, alpha], -1))), "image")).astype(float)
    share = alpha / 255
    assert np.abs(read - (PIXELS * share + 255 * (1 - share))).max() <= 1
    assert (read[:, :20] == 255).all()
    assert (read[:, 40:] == PIXELS[:, 40:]).all()


def test_transparent_colours_of_a_palette_and_of_grey_are_laid_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert equal(read_image(file(palette, kind, transparency=1), "image"), np.array([[[255, 0, 0], [255] * 3]]))
    for values in (np.array([[1, 9]], np.uint8), np.array([[256, 2304]], np.uint16)):
        data = file(Image.fromarray(values), transparency=int(values[0, 1]))
        assert equal(read_image(data, "image"), np.array([[[1] * 3, [255] * 3]]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_image_is_put_upright(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (64, 32), "blue")
    upright.paste("red", (0, 0, 32, 16))  # the corner at the top left
    back = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    lying = upright
    for method in back:
        lying = lying.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for read in (read_image(file(lying, kind, exif=exif), "image"), read_mask(file(lying, kind, exif=exif))):
        assert read.size == (64, 32)
    seen = np.asarray(read_image(file(lying, kind, exif=exif), "image"))
    assert seen[4, 8, 0] > 200
    assert all(seen[at][2] > 200 for at in ((4, 60), (28, 8), (28, 60)))


def test_colours_are_those_of_the_profile() -> None:
    """By a profile that has red and blue exchanged, made of sRGB's by exchanging two of its tags."""
    srgb = PROFILES["sRGB"].tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    assert swapped != srgb
    image = Image.new("RGB", (20, 20), (200, 60, 10))
    exchanged = read_image(file(image, icc_profile=swapped), "image").getpixel((5, 5))
    assert np.abs(np.array(exchanged) - (10, 60, 200)).max() <= 3
    assert equal(read_image(file(image, icc_profile=srgb), "image"), np.asarray(image))


@pytest.mark.parametrize("profile", [b"no profile", PROFILES["LAB"].tobytes(), PROFILES["sRGB"].tobytes()[:200]])
def test_a_profile_that_cannot_be_used_is_passed_over(profile: bytes) -> None:
    assert equal(read_image(file(RGB, icc_profile=profile), "image"), PIXELS)
    assert read_image(file(RGB.convert("L"), icc_profile=profile), "image").mode == "RGB"


# Masks


def test_a_mask_is_white_from_128_up() -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    expected = np.where(values >= 128, 255, 0)
    for image in (Image.fromarray(values), Image.fromarray(np.stack([values] * 3, -1))):
        mask = read_mask(file(image))
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), expected)
    deep = read_mask(file(Image.fromarray(np.array([[127 << 8 | 255, 128 << 8]], np.uint16))))
    assert np.asarray(deep).tolist() == [[0, 255]]


def test_a_mask_is_taken_as_it_is_stored_whatever_its_profile() -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    mask = read_mask(file(Image.fromarray(np.stack([values] * 3, -1)), icc_profile=PROFILES["sRGB"].tobytes()))
    assert (np.asarray(mask) == 255).sum() == 128


def test_what_is_transparent_in_a_mask_is_white() -> None:
    mask = Image.new("LA", (2, 1), (0, 255))
    mask.putpixel((1, 0), (0, 0))
    assert np.asarray(read_mask(file(mask))).tolist() == [[0, 255]]


# What is refused


JPEG = file(RGB.resize((600, 400)), "JPEG", quality=90)
BAD = {
    "empty": (b"", "is empty"),
    "a PDF": (b"%PDF-1.7\n1 0 obj", "is a PDF"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG"),
    "an SVG with a head": (b'\xef\xbb\xbf<?xml version="1.0"?><svg/>', "is an SVG or another XML file"),
    "a web page": (b"\n <!DOCTYPE html><html>not found</html>", "is a web page"),
    "a web page without a type": (b"<HTML><body>", "is a web page"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC file"),
    "a TIFF": (file(RGB, "TIFF"), "is a TIFF"),
    "a BMP": (file(RGB, "BMP"), "is a BMP"),
    "an icon": (file(RGB, "ICO"), "is an icon"),
    "a ZIP": (b"PK\x03\x04rest", "is a ZIP archive"),
    "a film": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "is a video"),
    "text": (b"hello", "is not a picture that is read here, or is damaged"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not a picture"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "is a damaged JPEG file"),
    "a JPEG without its end": (JPEG[:-500], "is a damaged JPEG file"),
    "half a PNG": (file(RGB)[:3000], "is a damaged PNG file"),
    "half a GIF": (file(RGB.quantize(64), "GIF")[:-900], "is a damaged GIF file"),
    "half a WebP": (file(RGB, "WEBP", lossless=True)[:-900], "damaged"),
    "a PNG of 100 megapixels": (png(10_000, 10_000, 8, 0), "has too many pixels (10000×10000): at most 50 megapixels"),
    "a PNG of 4 gigapixels": (png(65_535, 65_535, 1, 0), "has too many pixels"),
    "a PNG just above": (png(50_001, 1_000, 1, 0), "has too many pixels (50001×1000)"),
    "a PNG without pixels": (png(0, 5, 8, 0), "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_file_is_refused_in_words_of_its_own(case: str) -> None:
    data, said = BAD[case]
    for read, name in ((read_image, "image"), (read_mask, "mask")):
        with pytest.raises(RequestError) as caught:
            read(data, name)
        message = str(caught.value)
        assert message.startswith(f"{name} ")
        assert said in message
        assert message.endswith(".")
        assert len(message) < 200


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bombs = [file(Image.new("L", (10_000, 5_001)), kind) for kind in ("PNG", "JPEG", "GIF")]
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(RequestError, match="too many pixels"):
            read_image(bomb, "image")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    choose = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        start = choose.randrange(len(data))
        match choose.randrange(3):
            case 0:
                del changed[start:]
            case 1:
                del changed[start : start + choose.randrange(1, 40)]
            case _:
                for _ in range(5):
                    changed[choose.randrange(len(data))] = choose.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_is_damaged_is_read_or_refused(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    image = RGB.quantize(16) if kind == "GIF" else RGB
    options = {} if kind == "GIF" else {"exif": exif, "icc_profile": PROFILES["sRGB"].tobytes()}
    for data in mutations(file(image, kind, **options), 150, seed=7):
        with suppress(RequestError):
            assert read_image(data, "image").mode == "RGB"


# Sizes


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((1024, 1024), (1024, 1024)),
        ((700, 500), (704, 496)),
        ((1440, 1440), (1440, 1440)),
        ((4000, 3000), (1440, 1088)),
        ((100, 100), (256, 256)),
        ((1, 1), (256, 256)),
        ((300, 200), (384, 256)),
        ((1440, 256), (1440, 256)),
        ((1080, 1920), (816, 1440)),
        ((264, 263), (272, 256)),
    ],
)
def test_a_picture_has_the_size_of_its_image(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert fitted_size(size, quarter=False) == drawn
    assert fitted_size(size[::-1], quarter=False) == drawn[::-1]


@given(st.integers(1, 9000), st.integers(1, 9000), st.booleans())
def test_every_size_is_drawable_and_about_as_long_as_the_image(width: int, height: int, quarter: bool) -> None:
    if max(width, height) > 5.625 * min(width, height):
        with pytest.raises(RequestError, match=rf"image has {width}×{height} pixels, which is longer than 5\.6 to 1"):
            fitted_size((width, height), quarter=quarter)
        return
    drawn = fitted_size((width, height), quarter=quarter)
    assert all(256 <= side <= 1440 and side % 16 == 0 for side in drawn)
    assert drawn[0] / drawn[1] == pytest.approx(width / height, rel=0.065)
    if quarter and min(drawn) > 256:
        assert drawn[0] * drawn[1] == pytest.approx(512 * 512, rel=0.07)


@pytest.mark.parametrize(
    ("size", "drawn"), [((1024, 1024), (512, 512)), ((300, 300), (512, 512)), ((4000, 3000), (592, 448))]
)
def test_a_quarter_of_a_megapixel_is_that_whatever_the_image(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert fitted_size(size, quarter=True) == drawn
