"""The XMP packet of an image: the mark that it is AI-generated, and the complete record as JSON, written and read.

XMP: ISO 16684-1 and Adobe's XMP Specification Part 3 (2016), §1.1.3 for JPEG. The AI mark: IPTC Photo Metadata Standard
2025.1, Digital Source Type.
"""

import hashlib
import re
from xml.sax.saxutils import escape

from defusedxml import DefusedXmlException
from defusedxml import ElementTree as Xml
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from flux_lora.errors import OutputError
from flux_lora.files.record import Parameters
from flux_lora.files.text import shown_prompt, software, system

AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

AI_EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""Of an image that a model made of another one."""

NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "fluxlora": "urn:flux-lora:1.0/",
}

_STANDARD_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_STANDARD_BYTES = 65_502
_EXTENDED_BYTES = 65_400
"""The specification's bounds for a packet, or a part of an extended one, in one JPEG segment of 64 KiB."""

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


def packet(parameters: Parameters, *, embed: bool = True) -> bytes:
    """Write the packet of an image; unless parameters are embedded it holds the AI mark alone."""
    return _packet(_mark(parameters) + (_names(parameters) + _facts(parameters) if embed else ""))


def jpeg_segments(parameters: Parameters, *, embed: bool = True) -> bytes:
    """Write the packet as one APP1 segment; when it is too long, its facts as an extended packet in several more."""
    whole = packet(parameters, embed=embed)
    if len(whole) <= _STANDARD_BYTES:
        return _segment(_STANDARD_XMP + whole)
    extended = _xmp(_facts(parameters)).encode()
    digest = _digest(extended)
    parts = [
        digest + len(extended).to_bytes(4) + start.to_bytes(4) + extended[start : start + _EXTENDED_BYTES]
        for start in range(0, len(extended), _EXTENDED_BYTES)
    ]
    pointer = _element("xmpNote:HasExtendedXMP", digest.decode())
    standard = _packet(_mark(parameters) + _names(parameters) + pointer)
    return _segment(_STANDARD_XMP + standard) + b"".join(_segment(_EXTENDED_XMP + part) for part in parts)


def record(image: Image.Image) -> str | None:
    """Find the record in an image that is open and read to its end; None when there is none.

    Raises:
        OutputError: the packet, or a part of it, is damaged.
    """
    if not (found := image.info.get("xmp")):
        return None
    text = _property(found, "fluxlora:Parameters")
    if not text and isinstance(image, JpegImageFile):
        extension = _extension(image, _property(found, "xmpNote:HasExtendedXMP"))
        text = _property(extension, "fluxlora:Parameters") if extension else None
    return text


def source_type(image: Image.Image) -> str | None:
    """Find what an image says of its origin (IPTC's Digital Source Type); None when it says nothing.

    Raises:
        OutputError: the packet is damaged.
    """
    found = image.info.get("xmp")
    return _property(found, "Iptc4xmpExt:DigitalSourceType") if found else None


def _mark(parameters: Parameters) -> str:
    """The property that says that a model has made the image, and whether of another one."""
    return _element("Iptc4xmpExt:DigitalSourceType", AI_EDITED if parameters.source else AI_GENERATED)


def _names(parameters: Parameters) -> str:
    """What else stays in the first packet: few and short."""
    system_used = _element("Iptc4xmpExt:AISystemUsed", system(parameters))
    return system_used + _element("xmp:CreatorTool", software(parameters))


def _facts(parameters: Parameters) -> str:
    """The properties that hold the prompt, which may be long."""
    description = f'<rdf:Alt><rdf:li xml:lang="x-default">{_xml_text(shown_prompt(parameters))}</rdf:li></rdf:Alt>'
    # ExifTool 12 can rewrite an element as an attribute in ' quotes, and then forgets to escape those within.
    as_json = parameters.to_json().replace("'", r"\u0027")
    return f"<dc:description>{description}</dc:description>\n" + _element("fluxlora:Parameters", as_json)


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
