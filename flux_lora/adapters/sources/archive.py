"""A tar with one ``.safetensors`` file in it, as trainers pack their result.

Only plain tars: nothing in them can unpack to more than their own size. Nothing is ever extracted under a name that
the archive chose, and a doubtful member refuses the whole.
"""

import io
import tarfile
from pathlib import Path, PurePosixPath

from flux_lora.errors import SourceError

MAX_MEMBERS = 10_000
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


def extract(archive: Path, destination: Path) -> None:
    """Write the one ``.safetensors`` member of a tar to a file; other regular members are left alone.

    Raises:
        SourceError: there is none or more than one; a member has an absolute name or one with ``..``, or is a link, a
            device or sparse; or the archive is damaged.
    """
    try:
        with _Bounded(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            member = _only_safetensors(tar, archive.stat().st_size)
            file.seek(member.offset_data)
            left = member.size
            with destination.open("wb") as target:
                while chunk := file.read(min(left, CHUNK_BYTES)):
                    target.write(chunk)
                    left -= len(chunk)
            if left:
                raise SourceError("the archive is damaged or truncated")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError):
        raise SourceError("the archive is damaged or truncated") from None


def _only_safetensors(tar: tarfile.TarFile, archive_bytes: int) -> tarfile.TarInfo:
    found: list[tarfile.TarInfo] = []
    for number, member in enumerate(tar, start=1):
        if number > MAX_MEMBERS:
            raise SourceError(f"the archive has more than {MAX_MEMBERS:,} members")
        _check(member, archive_bytes)
        # macOS packs a "._name" with attributes beside each file.
        name = PurePosixPath(member.name).name
        if member.isreg() and name.lower().endswith(".safetensors") and not name.startswith("._"):
            found.append(member)
    if len(found) != 1:
        names = ", ".join(repr(member.name[:100]) for member in found[:10])
        raise SourceError(
            f"the archive holds {len(found)} .safetensors files ({names}) and must hold one"
            if found
            else "the archive holds no .safetensors file"
        )
    return found[0]


def _check(member: tarfile.TarInfo, archive_bytes: int) -> None:
    name = repr(member.name[:100])
    if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
        raise SourceError(f"the archive has a member that would leave its directory: {name}")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise SourceError(f"the archive has a member that is neither a plain file nor a directory: {name}")
    if not 0 <= member.size <= archive_bytes:
        raise SourceError("the archive is damaged or truncated")


class _Bounded(io.FileIO):
    """A file that refuses to be read in large pieces: the length of tar's extended headers is up to the archive."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= CHUNK_BYTES:
            raise tarfile.ReadError
        return super().read(size) or b""
