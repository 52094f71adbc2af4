"""Where an image comes from, written into its file as metadata that viewers show, and read back.

| what | WebP | JPEG | PNG |
|---|---|---|---|
| XMP: the AI mark; prompt, model and the complete record as JSON | chunk | APP1, extended | iTXt |
| prompt and parameters as text, the prompt shortened | EXIF | EXIF | text chunks |

The record is read from the XMP property ``fluxlora:Parameters`` alone, in all three formats.

XMP: ISO 16684-1 and Adobe's XMP Specification Part 3 (2016), §1.1.3 for JPEG. The AI mark: IPTC Photo Metadata Standard
2025.1, Digital Source Type. The text line follows the habit of AUTOMATIC1111's web UI, which many viewers read.
"""

import hashlib
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from defusedxml import DefusedXmlException
from defusedxml import ElementTree as Xml
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo

from flux_lora.errors import OutputError
from flux_lora.files.record import Parameters

AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "fluxlora": "urn:flux-lora:1.0/",
}

SHOWN_CHARACTERS = 4000
"""How much of the prompt the EXIF and PNG texts show; an EXIF block cannot exceed 64 KiB."""

_STANDARD_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_STANDARD_BYTES = 65_502
_EXTENDED_BYTES = 65_400
"""The specification's bounds for a packet, or a part of an extended one, in one JPEG segment of 64 KiB."""

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


def webp_options(parameters: Parameters | None) -> dict[str, Any]:
    """Pillow's options for saving a WebP with its provenance; without parameters with the AI mark alone."""
    return {"xmp": _packet(_marks(parameters) + _facts(parameters)), "exif": _exif(parameters)}


def jpeg_options(parameters: Parameters | None) -> dict[str, Any]:
    """Pillow's options for saving a JPEG with its provenance; without parameters with the AI mark alone."""
    # Pillow's option "xmp" takes what fits into one segment; "extra" takes finished segments.
    return {"extra": _jpeg_segments(_marks(parameters), _facts(parameters)), "exif": _exif(parameters)}


def png_options(parameters: Parameters | None) -> dict[str, Any]:
    """Pillow's options for saving a PNG with its provenance; without parameters with the AI mark alone."""
    chunks = PngInfo()
    if parameters:
        chunks.add_text("Description", _shown_prompt(parameters))
        chunks.add_text("Software", _software(parameters))
        chunks.add_text("parameters", _summary(parameters))
    chunks.add_itxt("XML:com.adobe.xmp", _packet(_marks(parameters) + _facts(parameters)).decode())
    return {"pnginfo": chunks}


def read(path: Path) -> Parameters:
    """Read what drew the image in a WebP, JPEG or PNG file.

    Raises:
        OutputError: the file is no such image, or holds no parameters that can be used.
    """
    try:
        with Image.open(path, formats=("WEBP", "JPEG", "PNG")) as image:
            image.load()  # a PNG may hold its metadata after its pixels
            record = _record(image)
    except UnidentifiedImageError:
        raise OutputError(f"{path} is not a WebP, JPEG or PNG image.") from None
    except OutputError as error:
        raise OutputError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OutputError(f"{path} cannot be read: {error}.") from None
    return record


def _record(image: Image.Image) -> Parameters:
    packet = image.info.get("xmp")
    record = _property(packet, "fluxlora:Parameters") if packet else None
    if packet and not record and isinstance(image, JpegImageFile):
        extension = _extension(image, _property(packet, "xmpNote:HasExtendedXMP"))
        record = _property(extension, "fluxlora:Parameters") if extension else None
    if not record:
        raise OutputError(
            "It holds no parameters of flux-lora. It was drawn elsewhere, or with FLUX_EMBED_PARAMETERS=0, or a "
            "program on its way removed its metadata."
        )
    return Parameters.from_json(record)


# XMP


def _marks(parameters: Parameters | None) -> str:
    """The properties that stay in the first packet: few and short."""
    marks = _element("Iptc4xmpExt:DigitalSourceType", AI_GENERATED)
    if parameters:
        marks += _element("Iptc4xmpExt:AISystemUsed", _system(parameters))
        marks += _element("xmp:CreatorTool", _software(parameters))
    return marks


def _facts(parameters: Parameters | None) -> str:
    """The properties that hold the prompt, which may be long."""
    if not parameters:
        return ""
    description = f'<rdf:Alt><rdf:li xml:lang="x-default">{_xml_text(parameters.prompt)}</rdf:li></rdf:Alt>'
    # ExifTool 12 can rewrite an element as an attribute in ' quotes, and then forgets to escape those within.
    record = parameters.to_json().replace("'", r"\u0027")
    return f"<dc:description>{description}</dc:description>\n" + _element("fluxlora:Parameters", record)


def _packet(properties: str) -> bytes:
    return f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{_xmp(properties)}<?xpacket end="r"?>'.encode()


def _xmp(properties: str) -> str:
    prefixes = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items() if f"<{prefix}:" in properties)
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{NAMESPACES["rdf"]}">\n'
        f'<rdf:Description rdf:about="" {prefixes}>\n{properties}</rdf:Description>\n</rdf:RDF></x:xmpmeta>\n'
    )


def _element(name: str, text: str) -> str:
    return f"<{name}>{_xml_text(text)}</{name}>\n"


def _xml_text(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))


def _property(packet: bytes, name: str) -> str | None:
    """The text of a simple property; other programs may have rewritten our elements as attributes."""
    prefix, local = name.split(":")
    qualified = f"{{{NAMESPACES[prefix]}}}{local}"
    try:
        root = Xml.fromstring(packet.rstrip(b"\0"))
    except (Xml.ParseError, DefusedXmlException):
        raise OutputError("Its XMP metadata is damaged.") from None
    for description in root.iter(f"{{{NAMESPACES['rdf']}}}Description"):
        if text := description.get(qualified) or description.findtext(qualified):
            return str(text)
    return None


# JPEG


def _jpeg_segments(marks: str, facts: str) -> bytes:
    """The XMP packet as one APP1 segment; or, when it is too long, its facts as an extended packet in several more."""
    whole = _packet(marks + facts)
    if len(whole) <= _STANDARD_BYTES:
        return _segment(_STANDARD_XMP + whole)
    extended = _xmp(facts).encode()
    digest = _digest(extended)
    parts = [
        digest + len(extended).to_bytes(4) + start.to_bytes(4) + extended[start : start + _EXTENDED_BYTES]
        for start in range(0, len(extended), _EXTENDED_BYTES)
    ]
    standard = _packet(marks + _element("xmpNote:HasExtendedXMP", digest.decode()))
    return _segment(_STANDARD_XMP + standard) + b"".join(_segment(_EXTENDED_XMP + part) for part in parts)


def _segment(payload: bytes) -> bytes:
    return b"\xff\xe1" + (len(payload) + 2).to_bytes(2) + payload


def _extension(image: JpegImageFile, digest: str | None) -> bytes | None:
    """Put the extended packet together again."""
    if digest is None:
        return None
    start = len(_EXTENDED_XMP)
    found = [content[start:] for marker, content in image.applist if content.startswith(_EXTENDED_XMP)]
    parts = {int.from_bytes(part[36:40]): part[40:] for part in found if part[:32] == digest.encode()}
    extended = b"".join(parts[offset] for offset in sorted(parts))
    if _digest(extended) != digest.encode():
        raise OutputError("A part of its XMP metadata is missing or damaged.")
    return extended


def _digest(packet: bytes) -> bytes:
    """The identifier that the specification asks for: MD5 in 32 upper-case digits."""
    return hashlib.md5(packet, usedforsecurity=False).hexdigest().upper().encode()


# EXIF and PNG texts


def _exif(parameters: Parameters | None) -> Image.Exif:
    exif = Image.Exif()
    if parameters:
        exif[ExifTags.Base.ImageDescription] = _shown_prompt(parameters).encode()
        exif[ExifTags.Base.Software] = _software(parameters)
        comment = b"UNICODE\0" + _summary(parameters).encode("utf-16-be")  # in Pillow's byte order of EXIF
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def _summary(parameters: Parameters) -> str:
    settings: dict[str, object] = {"Steps": parameters.num_inference_steps}
    if parameters.guidance_scale is not None:
        settings["Distilled CFG Scale"] = parameters.guidance_scale
    settings["Seed"] = parameters.seed
    settings["Size"] = f"{parameters.width}x{parameters.height}"
    settings["Model"] = _system(parameters)
    if parameters.lora:
        settings["LoRA"] = f"{parameters.lora.digest[:12]} at {parameters.lora.scale:g}"
    settings["Version"] = _software(parameters)
    return f"{_shown_prompt(parameters)}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def _shown_prompt(parameters: Parameters) -> str:
    prompt = parameters.prompt
    return prompt if len(prompt) <= SHOWN_CHARACTERS else prompt[: SHOWN_CHARACTERS - 1] + "…"


def _system(parameters: Parameters) -> str:
    return f"FLUX.1 {parameters.model}"


def _software(parameters: Parameters) -> str:
    return f"flux-lora {parameters.environment.software.flux_lora}"
