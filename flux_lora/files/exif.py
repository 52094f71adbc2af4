"""An EXIF block of three tags.

Pillow gives UserComment the type BYTE, which exiv2 prints as numbers and piexif cannot read; the standard (CIPA DC-008,
Exif 2.32) wants UNDEFINED. So the few bytes are laid out here: TIFF 6.0, big-endian, as piexif and Civitai expect.
"""

from collections.abc import Sequence
from typing import NamedTuple

ASCII, LONG, UNDEFINED = 2, 4, 7

IMAGE_DESCRIPTION, SOFTWARE, EXIF_IFD = 0x010E, 0x0131, 0x8769
EXIF_VERSION, USER_COMMENT = 0x9000, 0x9286

UNICODE = b"UNICODE\0"
"""How a UserComment begins whose text is UTF-16."""


class _Tag(NamedTuple):
    number: int
    type: int
    length: int
    value: bytes


def block(description: str, software: str, comment: str) -> bytes:
    """Lay out ImageDescription, Software and UserComment, with the six bytes before them that JPEG wants.

    Args:
        description: written as UTF-8, as everyone does, though the standard calls the type ASCII.
        software: likewise.
        comment: written as UTF-16 in the block's byte order.
    """
    user_comment = UNICODE + comment.encode("utf-16-be")
    exif = [_undefined(EXIF_VERSION, b"0232"), _undefined(USER_COMMENT, user_comment)]
    texts = [_text(IMAGE_DESCRIPTION, description), _text(SOFTWARE, software)]
    # The first directory has a constant size whatever the pointer in it says.
    start = 8 + len(_directory([*texts, _pointer(0)], 8))
    return b"Exif\0\0MM\0\x2a\0\0\0\x08" + _directory([*texts, _pointer(start)], 8) + _directory(exif, start)


def _text(number: int, text: str) -> _Tag:
    value = text.replace("\0", " ").encode() + b"\0"
    return _Tag(number, ASCII, len(value), value)


def _undefined(number: int, value: bytes) -> _Tag:
    return _Tag(number, UNDEFINED, len(value), value)


def _pointer(offset: int) -> _Tag:
    return _Tag(EXIF_IFD, LONG, 1, offset.to_bytes(4))


def _directory(tags: Sequence[_Tag], start: int) -> bytes:
    """Lay out a directory that begins ``start`` bytes into the block, and behind it the values over four bytes."""
    entries, values = len(tags).to_bytes(2), b""
    after = start + 2 + 12 * len(tags) + 4
    for tag in tags:
        entries += tag.number.to_bytes(2) + tag.type.to_bytes(2) + tag.length.to_bytes(4)
        if len(tag.value) <= 4:
            entries += tag.value.ljust(4, b"\0")
        else:
            entries += (after + len(values)).to_bytes(4)
            values += tag.value + b"\0" * (len(tag.value) % 2)
    return entries + bytes(4) + values
