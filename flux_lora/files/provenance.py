"""Where an image comes from, written into its file as metadata that viewers show, and read back.

| what | WebP | JPEG | PNG |
|---|---|---|---|
| XMP (``xmp.py``): the AI mark; model, prompt and the complete record as JSON | chunk | APP1, extended | iTXt |
| prompt and parameters as text (``text.py``), a long prompt shortened | EXIF | EXIF | text chunks |
| a signature, where the operator has a certificate (``signing.py``) | C2PA chunk | APP11 | caBX |

The record is read from the XMP property ``fluxlora:Parameters`` alone, in all three formats.
"""

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flux_lora.errors import OutputError
from flux_lora.files import exif, text, xmp
from flux_lora.files.record import Parameters


def webp_options(parameters: Parameters, *, embed: bool = True) -> dict[str, Any]:
    """Pillow's options for saving a WebP with its provenance; unless it is embedded with the AI mark alone."""
    return {"xmp": xmp.packet(parameters, embed=embed), "exif": _exif(parameters) if embed else b""}


def jpeg_options(parameters: Parameters, *, embed: bool = True) -> dict[str, Any]:
    """Pillow's options for saving a JPEG with its provenance; unless it is embedded with the AI mark alone."""
    # Pillow's option "xmp" takes what fits into one segment; "extra" takes finished segments.
    return {"extra": xmp.jpeg_segments(parameters, embed=embed), "exif": _exif(parameters) if embed else b""}


def png_options(parameters: Parameters, *, embed: bool = True) -> dict[str, Any]:
    """Pillow's options for saving a PNG with its provenance; unless it is embedded with the AI mark alone."""
    chunks = PngInfo()
    if embed:
        _add(chunks, "Description", text.shown_prompt(parameters))
        _add(chunks, "Software", text.software(parameters))
        _add(chunks, "parameters", text.line(parameters))
        _add(chunks, "invokeai_metadata", text.invoke(parameters))
    chunks.add_itxt("XML:com.adobe.xmp", xmp.packet(parameters, embed=embed).decode())
    return {"pnginfo": chunks}


def _add(chunks: PngInfo, keyword: str, value: str) -> None:
    """Write anything but ASCII as UTF-8: ComfyUI takes Latin-1, which PNG's plain text is, for UTF-8 too."""
    (chunks.add_text if value.isascii() else chunks.add_itxt)(keyword, value)


def read(path: Path) -> Parameters:
    """Read what drew the image in a WebP, JPEG or PNG file.

    Raises:
        OutputError: the file is no such image, or holds no parameters that can be used.
    """
    image = _loaded(path)
    try:
        return _parameters(image)
    except OutputError as error:
        raise OutputError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Traces:
    """What an image file tells of its origin.

    Args:
        format: WEBP, JPEG or PNG.
        size: width and height in pixels.
        parameters: what drew it, when the record is there and can be used.
        problem: why there are none.
        line: the text for other programs, when it is there.
        source_type: IPTC's Digital Source Type, when it is there.
    """

    format: str
    size: tuple[int, int]
    parameters: Parameters | None
    problem: str
    line: str | None
    source_type: str | None


def traces(path: Path) -> Traces:
    """Find whatever is left in a WebP, JPEG or PNG file, wherever it has been.

    Raises:
        OutputError: the file is no such image, or cannot be read.
    """
    image = _loaded(path)
    parameters, problem, source_type = None, "", None
    try:
        source_type = xmp.source_type(image)
        parameters = _parameters(image)
    except OutputError as error:
        problem = str(error)
    return Traces(str(image.format), image.size, parameters, problem, _line(image), source_type)


def _loaded(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("WEBP", "JPEG", "PNG")) as image:
            image.load()  # a PNG may hold its metadata after its pixels
    except UnidentifiedImageError:
        raise OutputError(f"{path} is not a WebP, JPEG or PNG image.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OutputError(f"{path} cannot be read: {error}.") from None
    return image


def _parameters(image: Image.Image) -> Parameters:
    record = xmp.record(image)
    if not record:
        raise OutputError(
            "It holds no parameters of flux-lora. It was drawn elsewhere, or with FLUX_EMBED_PARAMETERS=0, or a "
            "program on its way removed its metadata."
        )
    return Parameters.from_json(record)


def _exif(parameters: Parameters) -> bytes:
    return exif.block(text.shown_prompt(parameters), text.software(parameters), text.line(parameters))


def _line(image: Image.Image) -> str | None:
    if line := image.info.get("parameters"):
        return str(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of whatever is odd in an EXIF block
        try:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        except (OSError, SyntaxError, ValueError, struct.error):  # what Pillow raises for a damaged one
            return None
    if isinstance(comment, bytes) and comment.startswith(exif.UNICODE):
        return comment.removeprefix(exif.UNICODE).decode("utf-16-be", errors="replace")
    return None
