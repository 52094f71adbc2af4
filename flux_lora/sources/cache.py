"""Downloaded LoRAs on disk, by the SHA-256 of their bytes, within a budget, shared by any number of processes.

::

    files/<sha256>.safetensors    verified files
    index/<key>.json              which of them a source was, and how to ask the server whether it still is
    partial/<key>, <key>.json     unfinished downloads, and what identifies the file they belong to
    locks/                        one download of a source at a time; one change to the set of files at a time

Files appear under their final names complete, by renaming. Whatever an exception or a power cut leaves behind is
either complete or in ``partial/``, where it is continued or in time evicted.
"""

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

IN_USE_SECONDS = 60.0
"""A file used so recently is not evicted: somebody may be about to open it, or still be writing it."""

DISTINCTIVE_ETAG = 16
"""Characters of an ETag that is a digest or the like, rather than a number."""


class Identity(NamedTuple):
    """What an address names: digests of its host and path, and of all of it."""

    path: str
    whole: str


@dataclass(frozen=True)
class Validator:
    """How a server recognises one state of a file (RFC 9110, section 8.8)."""

    resource: Identity
    etag: str = ""
    modified: str = ""

    def etag_at(self, resource: Identity) -> str:
        """The ETag if it can be sent there, or nothing.

        With another query it may be the same file, signed anew, or another file. A short ETag may be that of many, and
        a weak one of many states; but no two files by accident have a long strong one.
        """
        distinctive = len(self.etag.strip('"')) >= DISTINCTIVE_ETAG and not self.etag.startswith("W/")
        same = resource == self.resource or (resource.path == self.resource.path and distinctive)
        return self.etag if same else ""

    def condition(self, resource: Identity) -> dict[str, str]:
        """The header that asks for what is there only if it has changed; none if that cannot be asked."""
        if etag := self.etag_at(resource):
            return {"If-None-Match": etag}
        return {"If-Modified-Since": self.modified} if self.modified and resource == self.resource else {}


@dataclass(frozen=True)
class Entry:
    """A cached file, and how to ask whether it is still what its source names."""

    path: Path
    validator: Validator | None


class Part:
    """An unfinished download."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = path.with_suffix(".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> Validator | None:
        """What the bytes so far belong to, if that was a strong ETag: only then may they be continued."""
        validator = _read_validator(self._identity)
        return validator if validator and validator.etag and not validator.etag.startswith("W/") else None

    def begin(self, validator: Validator) -> None:
        """Start anew, with a file that is recognised by this."""
        self.discard()
        _write_json(self._identity, asdict(validator))

    def discard(self) -> None:
        # The identity goes first: bytes without it are never continued.
        self._identity.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Cache:
    """The cache below one directory, kept within ``budget`` bytes as far as files in use allow."""

    def __init__(self, root: Path, budget: int) -> None:
        self._root = root
        self._budget = budget

    def lock(self, key: str) -> AbstractContextManager[None]:
        """One at a time for each source; others wait. Sources share a few lock files, so these do not pile up."""
        return _locked(self._directory("locks") / f"{_digest(key)[:2]}.lock")

    def find(self, key: str) -> Entry | None:
        """The file of a source, marked as used now; its server is not asked."""
        index = self._index(key)
        try:
            stored = json.loads(index.read_bytes())
            path = self.content(stored["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Entry(path, _read_validator(index)) if path else None

    def content(self, sha256: str) -> Path | None:
        """The file with these bytes, marked as used now."""
        path = self._directory("files") / f"{sha256}.safetensors"
        with self._gate():
            try:
                os.utime(path)
            except FileNotFoundError:
                return None
        return path

    def part(self, key: str) -> Part:
        """The unfinished download of a source; hold its lock."""
        return Part(self._directory("partial") / _digest(key))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A name for a temporary file, which is removed at the end unless it was admitted."""
        path = self._directory("partial") / f"{uuid.uuid4().hex}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def admit(self, path: Path, sha256: str) -> Path:
        """Move a verified file in."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        final = self._directory("files") / f"{sha256}.safetensors"
        with self._gate():
            os.utime(path)
            path.replace(final)
        self.make_room(0)
        return final

    def remember(self, key: str, sha256: str, validator: Validator | None) -> None:
        """Note which file a source is."""
        _write_json(self._index(key), {"sha256": sha256, **(asdict(validator) if validator else {})})

    def make_room(self, size: int) -> None:
        """Evict the least recently used files until ``size`` more bytes fit into the budget."""
        with self._gate():
            files = sorted((*self._files("files"), *self._files("partial")))
            total = size + sum(bytes_ for _, bytes_, _ in files)
            evicted = False
            for used, bytes_, path in files:
                if total <= self._budget or used > time.time() - IN_USE_SECONDS:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_
                evicted = True
        if evicted:
            self._forget_evicted()

    def _forget_evicted(self) -> None:
        for _, _, index in self._files("index"):
            try:
                sha256 = json.loads(index.read_bytes())["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if not (self._directory("files") / f"{sha256}.safetensors").exists():
                index.unlink(missing_ok=True)

    def _gate(self) -> AbstractContextManager[None]:
        return _locked(self._directory("locks") / "files.lock")

    def _index(self, key: str) -> Path:
        return self._directory("index") / f"{_digest(key)}.json"

    def _files(self, name: str) -> Iterator[tuple[float, int, Path]]:
        """When each file was last used, its size, and its path."""
        for path in self._directory(name).iterdir():
            with suppress(FileNotFoundError):  # another process renamed it meanwhile
                status = path.stat()
                yield status.st_mtime, status.st_size, path

    def _directory(self, name: str) -> Path:
        directory = self._root / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude all other processes and threads.

    Not filelock's: that keeps a register of who holds what, which is wrong after an exception between two of its
    steps, as cancelling raises them. Here the lock lives and dies with the open file.
    """
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def _digest(key: str) -> str:
    # A key may be a signed address: only its digest reaches the disk.
    return hashlib.sha256(key.encode()).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_validator(path: Path) -> Validator | None:
    try:
        stored = json.loads(path.read_bytes())
        return Validator(Identity(*map(str, stored["resource"])), str(stored["etag"]), str(stored["modified"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
