"""A stranger's picture file -> pixels: known formats only, measured before it is decoded, upright, RGB, in a size.

Masks go the same way, and end as black and white.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from flux_lora.errors import RequestError
from flux_lora.inputs import LARGEST_SIDE, SMALLEST_SIDE
from flux_lora.request import SIZES

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else [])]
"""What is opened, by Pillow's names; of an animation the first frame."""

MAX_PIXELS = 50_000_000

WHITE = 128
"""The value from which a mask's pixel is white."""

QUARTER = SIZES["1:1"][0] * SIZES["1:1"][1] // 4
"""Pixels of a picture of 0.25 megapixels."""

UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error)
"""What Pillow's readers raise for a file that they cannot read; that of AVIF a RuntimeError."""

OTHERS = {
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "an SVG or another XML file",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"ftyphe": "a HEIC file",
    b"ftypmif1": "a HEIC file",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"BM": "a BMP",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0": "an icon",
    b"PK\3\4": "a ZIP archive",
    b"ftyp": "a video",
}
"""How files begin that are sent for pictures."""


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode an image: upright, RGB by its colour profile, with white behind what is transparent.

    Args:
        data: the file.
        name: of the input, for messages.

    Raises:
        RequestError: it is damaged, of another format, or too large.
    """
    with _opened(data, name) as image:
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        alpha = _alpha(image)
        pixels = _to_srgb(_colours(image), profile)
    if alpha:
        white = Image.new("RGB", pixels.size, "white")
        white.paste(pixels, mask=alpha)
        pixels = white
    return _turned(pixels, orientation)


def read_mask(data: bytes, name: str = "mask") -> Image.Image:
    """Decode a mask: upright, mode "L", 255 where it is white or transparent and 0 elsewhere.

    Its values are taken as they are stored, whatever colour profile it has.

    Args:
        data: the file.
        name: of the input, for messages.

    Raises:
        RequestError: it is damaged, of another format, or too large.
    """
    with _opened(data, name) as image:
        orientation, alpha = _orientation(image), _alpha(image)
        colours = _colours(image)
        grey = _in_mode(_in_mode(colours, "RGB") if colours.mode == "CMYK" else colours, "L")
    if alpha:
        white = Image.new("L", grey.size, 255)
        white.paste(grey, mask=alpha)
        grey = white
    return _turned(grey.point(lambda value: 255 if value >= WHITE else 0), orientation)


def fitted_size(size: tuple[int, int], *, quarter: bool) -> tuple[int, int]:
    """The size in which a picture is drawn that starts from an image: multiples of 16, each from 256 to 1440.

    Args:
        size: width and height of the image.
        quarter: draw 0.25 megapixels; otherwise the image's own size, as far as that is possible.

    Raises:
        RequestError: the image is too long for any such size.
    """
    short, long = min(size), max(size)
    if long * SMALLEST_SIDE > short * LARGEST_SIDE:
        raise RequestError(
            f"image has {size[0]}×{size[1]} pixels, which is longer than 5.6 to 1 and fits no size from "
            f"{SMALLEST_SIDE} to {LARGEST_SIDE} a side: cut it."
        )
    scale = Fraction((QUARTER / (short * long)) ** 0.5) if quarter else Fraction(1)
    scale = max(min(scale, Fraction(LARGEST_SIDE, long)), Fraction(SMALLEST_SIDE, short))
    width, height = (int((side * scale + 8) // 16) * 16 for side in size)
    return width, height


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image in a file, decoded; Pillow's warnings, of what is odd about it, are nobody's news."""
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise _too_many_pixels(name) from None
        except UNREADABLE:
            raise RequestError(f"{name} {_fault(data)}") from None
        if image.width * image.height > MAX_PIXELS:
            raise _too_many_pixels(name, image.size)
        try:
            image.load()
        except UNREADABLE:
            raise RequestError(f"{name} is a damaged {image.format} file: it cannot be decoded to its end.") from None
        yield image


def _fault(data: bytes) -> str:
    accepted = "give a PNG, JPEG, WebP, GIF" + (" or AVIF" if "AVIF" in FORMATS else "")
    if not data:
        return f"is empty: {accepted}."
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kinds = (kind for begin, kind in OTHERS.items() if start.startswith(begin.lower()) or data[4:].startswith(begin))
    if kind := next(kinds, None):
        return f"is {kind}, and not a picture that is read here: {accepted}."
    return f"is not a picture that is read here, or is damaged: {accepted}."


def _too_many_pixels(name: str, size: tuple[int, int] | None = None) -> RequestError:
    has = f" ({size[0]}×{size[1]})" if size else ""
    return RequestError(f"{name} has too many pixels{has}: at most {MAX_PIXELS // 10**6} megapixels are decoded.")


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:  # the EXIF alone
        return None


def _turned(pixels: Image.Image, orientation: object) -> Image.Image:
    """Turn upright what lies as EXIF says; nothing else of the file's metadata stays."""
    pixels.info.clear()
    pixels.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(pixels, in_place=True)
    return pixels


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image; one that is in the mode is not copied, since it may be large."""
    return image if image.mode == mode else image.convert(mode)


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is; None: all of them are."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # 16-bit grey, one value of which is transparent
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * 255)
    return _in_mode(image, "RGBA").getchannel("A")


def _colours(image: Image.Image) -> Image.Image:
    """The colours in mode "L", "RGB" or "CMYK", for which there are profiles, without what is transparent."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "L", "LA", "La"):
        return _in_mode(image, "L")
    return _in_mode(image, "CMYK" if image.mode == "CMYK" else "RGB")


def _to_srgb(pixels: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB as screens show it: by the colour profile, if there is one that can be read and fits the mode."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if not ImageCms.getProfileDescription(source).startswith("sRGB"):
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(pixels, source, srgb, outputMode="RGB")
                if converted:
                    return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return _in_mode(pixels, "RGB")
