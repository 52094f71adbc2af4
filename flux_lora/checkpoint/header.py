"""Safetensors headers, checked before any tensor is read.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian header length N, N bytes
of JSON, and the tensors' bytes, without holes.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""What the reference implementation takes: sd-scripts writes every caption of a training into a file's metadata."""

MAX_ENTRIES = 100_000
"""Tensors of a file, and texts in its metadata. FLUX.1 has 780 tensors, adapters of every layer some thousands."""

MAX_ENTRY_BYTES = 4_000_000
"""Of what a header says about one tensor, which in truth takes a hundred."""

MAX_TEXT_BYTES = 4_000_000
"""Longer texts of the metadata, which are lists of captions, are left out."""

MAX_NAME_LENGTH, MAX_DIMENSIONS = 512, 8
"""Real names have up to 100 characters, and convolutions of videos 5 dimensions; products of more take for ever."""

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

LFS_POINTER = b"version "
"""How one begins; as the length of a header that would be beyond all files."""

_repr = reprlib.Repr()
_repr.maxstring = 120
shown = _repr.repr
"""``repr`` for messages: short, whatever a file holds."""


class TensorFileError(ValueError):
    """A file that is not a whole, well-formed safetensors file; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its type's name in the format, shape, and byte range within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors by name, and the file's free-form metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        TensorFileError: the file is truncated, is not safetensors, or its header contradicts itself.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TensorFileError(f"it has only {size} bytes, too few for a safetensors file")
        length = int.from_bytes(prefix, "little")
        text = file.read(length if length <= MAX_HEADER_BYTES else 1)
    if not text.startswith(b"{") and (text or not length or length > MAX_HEADER_BYTES):
        raise TensorFileError(_other_format(prefix) or "it is not a safetensors file: its header is not a JSON object")
    if length > MAX_HEADER_BYTES:
        too_large = f"its header has {length:,} bytes, and the format allows {MAX_HEADER_BYTES:,}"
        raise TensorFileError(too_large if 8 + length <= size else "it is not a safetensors file")
    if 8 + length > size:
        raise TensorFileError(f"it is truncated: the header should have {length} bytes, the file has {size}")
    try:
        tensors, metadata = _parse(text)
    except TensorFileError:
        raise
    except (ValueError, RecursionError):  # a whole number of thousands of digits is a ValueError too
        raise TensorFileError("its header is not JSON in UTF-8") from None
    _check_layout(tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHER_VALUE = re.compile(rb"[^,{}]++")


def _parse(header: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read a header entry by entry: as a whole, a hostile one could be millions of Python's objects.

    Raises:
        TensorFileError: it contradicts itself.
        ValueError: it is not JSON in UTF-8.
    """
    entries: dict[str, slice] = {}
    metadata: dict[str, str] = {}

    def text(name: str, start: int) -> int:
        if header[start : start + 1] != b'"':
            raise TensorFileError("the metadata in its header is not a map of strings")
        stop = _end(_STRING, header, start)
        if stop - start <= MAX_TEXT_BYTES:
            metadata[name] = _string(header, start, stop)
        return stop

    def entry(name: str, start: int) -> int:
        if name != "__metadata__":
            stop = header.find(b"}", start) + 1 if header[start : start + 1] == b"{" else 0
            stop = stop or _end(_OTHER_VALUE, header, start)
            entries[name] = slice(start, stop)
            return stop
        if header.startswith(b"null", start):  # as the reference implementation reads it
            return start + 4
        if header[start : start + 1] != b"{":
            raise TensorFileError("the metadata in its header is not a map of strings")
        return _members(header, start, text)

    if _SPACE.fullmatch(header, _members(header, 0, entry)) is None:
        raise ValueError
    return {name: _tensor_info(name, _entry(name, header[place])) for name, place in entries.items()}, metadata


def _members(header: bytes, start: int, read: Callable[[str, int], int]) -> int:
    """Hand each member of a JSON object to ``read``, which says where its value ends; where the object ends."""
    names: set[str] = set()
    at = _past(b"{", header, start)
    if header[at : at + 1] == b"}":
        return at + 1
    while True:
        stop = _end(_STRING, header, at)
        if stop - at > MAX_ENTRY_BYTES:
            raise TensorFileError(f"a name in its header has more than {MAX_NAME_LENGTH} characters")
        name = _string(header, at, stop)
        if name in names:
            raise TensorFileError("its header names a tensor twice")
        names.add(name)
        if len(names) > MAX_ENTRIES:
            raise TensorFileError(f"its header has more than {MAX_ENTRIES:,} entries")
        at = _end(_SPACE, header, read(name, _past(b":", header, stop)))
        if header[at : at + 1] == b"}":
            return at + 1
        at = _past(b",", header, at)


def _past(mark: bytes, header: bytes, at: int) -> int:
    """Behind a mark and the white space on both sides of it."""
    at = _end(_SPACE, header, at)
    if header[at : at + 1] != mark:
        raise ValueError
    return _end(_SPACE, header, at + 1)


def _end(pattern: re.Pattern[bytes], header: bytes, at: int) -> int:
    if (match := pattern.match(header, at)) is None:
        raise ValueError
    return match.end()


def _string(header: bytes, start: int, stop: int) -> str:
    text = str(json.loads(header[start:stop].decode()))
    if not _encodable(text):
        raise TensorFileError("its header holds half of a surrogate pair")
    return text


def _entry(name: str, text: bytes) -> Any:
    if len(text) > MAX_ENTRY_BYTES:
        raise TensorFileError(f"the header entry of {shown(name)} has more than {MAX_ENTRY_BYTES:,} bytes")
    return json.loads(text.decode(), object_pairs_hook=_without_duplicates)


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH:
        raise TensorFileError(f"the name {shown(name)} in its header has more than {MAX_NAME_LENGTH} characters")
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise TensorFileError(f"the header entry of {shown(name)} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise TensorFileError(f"{shown(name)} has the unknown type {shown(dtype)}")
    if len(shape) > MAX_DIMENSIONS:
        raise TensorFileError(f"{shown(name)} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are taken")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise TensorFileError(f"{shown(name)} has a shape or offset that is not a whole number from 0")
    info = TensorInfo(dtype, shape, start, stop)
    if (stop - start) * 8 != info.elements * BITS[dtype]:
        raise TensorFileError(f"{shown(name)} has {stop - start} bytes, which is not {dtype} of shape {list(shape)}")
    return info


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise TensorFileError(f"{shown(name)} overlaps another tensor or leaves a hole before it")
        end = info.stop
    if end > data_bytes:
        raise TensorFileError(f"it is truncated: its tensors need {end} bytes and {data_bytes} are there")
    if end < data_bytes:
        raise TensorFileError(f"{data_bytes - end} bytes follow its last tensor")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise TensorFileError("its header names a tensor twice")
    return entries


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _other_format(prefix: bytes) -> str | None:
    """What the first bytes of a file that is not safetensors are known for."""
    if prefix.startswith(b"PK"):
        return "it is a zip or PyTorch pickle, not safetensors"
    if prefix.startswith(b"\x80"):
        return "it is a Python pickle, not safetensors"
    if prefix == LFS_POINTER:
        return (
            "it is a git-lfs pointer in place of the file: get the file with `git lfs pull`, or take the address that "
            "downloads it"
        )
    if prefix.startswith(b"GGUF"):
        return "it is a GGUF file, not safetensors"
    if prefix.lstrip().startswith((b"<", b"{")):
        return "it is a text file (perhaps an error page that was saved), not safetensors"
    return None
