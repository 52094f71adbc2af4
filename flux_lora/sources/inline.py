"""``data:`` URIs (RFC 2397), decoded piece by piece: the decoder of a whole one would take 80 times its size."""

import base64
import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from flux_lora.errors import SourceError
from flux_lora.sources.transport import too_large

PIECE = 2**15
"""Characters that are decoded at a time."""

ALPHABET = bytes.maketrans(b"-_", b"+/")


def decode(uri: str, max_bytes: int) -> Iterator[bytes]:
    """The bytes that a ``data:`` URI holds, in pieces.

    Base64 may be in either alphabet of RFC 4648; the padding may be missing, as it usually is with the one for
    addresses.

    Raises:
        SourceError: it is malformed, or holds more than ``max_bytes``; that is known before anything is decoded.
    """
    comma = uri.find(",")
    if comma < 0:
        raise SourceError("it has no comma before its data")
    encoded = uri[:comma].lower().endswith(";base64")
    length = len(uri) - comma - 1 - 2 * uri.count("%", comma)
    if (length * 3 // 4 - 2 if encoded else length) > max_bytes:
        raise SourceError(too_large(max_bytes))
    pieces = _unescaped(uri, comma + 1)
    return _from_base64(pieces) if encoded else pieces


def _unescaped(uri: str, start: int) -> Iterator[bytes]:
    while start < len(uri):
        stop = start + PIECE
        if (escape := uri.rfind("%", stop - 2, stop)) > start:  # which the end would cut in two
            stop = escape
        yield unquote_to_bytes(uri[start:stop])
        start = stop


def _from_base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    left = b""
    for piece in pieces:
        text = left + piece.translate(ALPHABET)
        whole = len(text) - len(text) % 4 - 4  # the last four may be its end
        yield _decoded(text[: max(whole, 0)], ended=False)
        left = text[max(whole, 0) :]
    yield _decoded(left + b"=" * (-len(left) % 4), ended=True)


def _decoded(text: bytes, *, ended: bool) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise SourceError("its base64 is damaged") from None
    if not ended and text.endswith(b"="):
        raise SourceError("its base64 is damaged")
    return data
