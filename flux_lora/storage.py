"""Files on disk: digests, writing whole or not at all, and directories that are this user's alone."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flux_lora.errors import SettingsError

RESERVE_BYTES, RESERVE_SHARE = 512 * 2**20, 20
"""Room that downloads leave on a disk for pictures and everything else: so much, or a twentieth of a small disk."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file under, which takes the place of ``path`` at the end.

    After an exception ``path`` is what it was, and the unfinished file is gone.
    """
    unfinished = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def free_bytes(path: Path) -> int:
    """What may still be written to the disk of a directory, beyond the reserve; negative where that is touched."""
    disk = os.statvfs(path)
    reserve = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // RESERVE_SHARE)
    return disk.f_bavail * disk.f_frsize - reserve


def private_directory(path: Path, setting: str) -> Path:
    """A directory whose files can be trusted: made with mode 0700, or checked to be this user's alone.

    One that others could read is closed to them. One of root's that nobody else writes to, as in a container's image,
    is trusted too.

    Args:
        path: the directory.
        setting: which variable names it, for messages.

    Raises:
        SettingsError: it belongs to another user, or others can put files into it.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status, user = path.stat(), os.geteuid()
    if not {status.st_uid, path.lstat().st_uid} <= {user, 0}:
        raise SettingsError(
            f"{setting}: {path} belongs to another user, whose files would be trusted. Name a directory of this user's "
            "own; it may lie below."
        )
    by_group = status.st_mode & 0o020 and status.st_gid != status.st_uid  # a user's own group has the user's number
    if by_group or status.st_mode & 0o002:
        raise SettingsError(
            f"{setting}: others may write to {path}, and what they put there would be trusted. Remove it, or make it "
            f"this user's alone with `chmod 700 {path}` if all in it is known; or name another directory."
        )
    if status.st_uid == user and status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def trusted_bytes(path: Path, setting: str) -> bytes:
    """What a file in a private directory holds; the directory is made if it is not there yet.

    Raises:
        SettingsError: the directory is not this user's alone, or the file is another user's.
        OSError: there is no such file, or it cannot be read.
    """
    private_directory(path.parent, setting)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
            raise SettingsError(f"{setting}: {path} belongs to another user. Remove it.")
        return file.read()
