"""A tar with one ``.safetensors`` file in it, as trainers pack their result.

Only plain tars: nothing in them can unpack to more than their own size. Nothing is ever extracted under a name that
the archive chose, and a doubtful member refuses the whole.
"""

import io
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from flux_lora.errors import SourceError
from flux_lora.sources.guard import check_time
from flux_lora.sources.wording import listing, quoted

MAX_MEMBERS = 10_000
HEADER_BYTES = 16 * 1024
"""Of one member: its block, and the extended headers before it. In memory they can become many times as much."""
ENDLESS_NUMBER = re.compile(rb"[0-9]{100}")
"""In a header. ``tarfile`` before Python 3.11.10 and 3.12.6 takes a time that grows with its square (CVE-2024-6232)."""
CHUNK_BYTES = 1024**2
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def is_tar(path: Path) -> bool:
    """Whether a file begins like a plain tar.

    Raises:
        SourceError: it begins like a compressed file.
    """
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise SourceError(f"it is compressed with {name}; only a plain .tar is accepted")
    return head[257:262] == b"ustar"


def extract(archive: Path, write: Callable[[bytes], object], deadline: float = math.inf) -> None:
    """Read the one ``.safetensors`` member of a tar; other regular members are left alone.

    Args:
        archive: the tar.
        write: receives the member's bytes, piece by piece.
        deadline: when ``time.monotonic()`` says this, it is given up.

    Raises:
        SourceError: there is none or more than one; a member has an absolute name or one with ``..``, or is a link, a
            device or sparse; or the archive is damaged, or takes too long.
    """
    try:
        with _Bounded(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            member = _only_safetensors(tar, file, archive.stat().st_size, deadline)
            file.seek(member.offset_data)
            left = file.allowance = member.size
            file.in_headers = False
            while chunk := file.read(min(left, CHUNK_BYTES)):
                check_time(deadline)
                write(chunk)
                left -= len(chunk)
            if left:
                raise SourceError("the archive is damaged or truncated")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError):
        raise SourceError("the archive is damaged or truncated") from None


def _only_safetensors(tar: tarfile.TarFile, file: "_Bounded", archive_bytes: int, deadline: float) -> tarfile.TarInfo:
    found: tarfile.TarInfo | None = None
    names: list[str] = []
    for number, member in enumerate(iter(tar.next, None), start=1):
        if number > MAX_MEMBERS:
            raise SourceError(f"the archive has more than {MAX_MEMBERS:,} members")
        check_time(deadline)
        _check(member, archive_bytes)
        # macOS packs a "._name" with attributes beside each file.
        name = PurePosixPath(member.name).name
        if member.isreg() and name.lower().endswith(".safetensors") and not name.startswith("._"):
            found = member
            names.append(member.name[-100:])
        vars(tar).update(members=[], pax_headers={})  # the library would keep them all
        file.allowance = HEADER_BYTES
    if found is None:
        raise SourceError("the archive holds no .safetensors file")
    if len(names) > 1:
        raise SourceError(f"the archive holds {len(names)} .safetensors files ({listing(names)}) and must hold one")
    return found


def _check(member: tarfile.TarInfo, archive_bytes: int) -> None:
    name = quoted(member.name)
    if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
        raise SourceError(f"the archive has a member that would leave its directory: {name}")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise SourceError(f"the archive has a member that is neither a plain file nor a directory: {name}")
    if not 0 <= member.size <= archive_bytes:
        raise SourceError("the archive is damaged or truncated")


class _Bounded(io.FileIO):
    """A file of which no more is read than allowed: the length of tar's extended headers is up to the archive."""

    allowance = HEADER_BYTES
    in_headers = True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.allowance:
            raise tarfile.ReadError
        self.allowance -= size
        data = super().read(size) or b""
        if self.in_headers and ENDLESS_NUMBER.search(data):
            raise tarfile.ReadError
        return data
