"""Downloaded LoRAs on disk, by the SHA-256 of their bytes, within a budget, shared by any number of processes.

::

    files/<sha256>.safetensors    verified files
    index/<key>.json              which of them a source was, and how to ask the server whether it still is
    partial/<key>, <key>.json     unfinished downloads, and what identifies the file they belong to
    locks/<key>.lock              one download of a source at a time
    locks/files.lock              one change to the set of files at a time, and the sum of what they take

Files appear under their final names complete, by renaming. Whatever an exception or a power cut leaves behind is
either complete or in ``partial/``, where it is continued or in time evicted.

Everything counts as what it takes on the disk, names too. What is about to be written is counted first, and nothing is
ever subtracted: when the sum reaches the budget, the directories are looked through and the sum is right again.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flux_lora.errors import SourceError
from flux_lora.storage import free_bytes, private_directory, write_whole

SETTING = "FLUX_ADAPTER_CACHE"

IN_USE_SECONDS = 60.0
"""For so long the file that a living process fetched last is not evicted: it may be about to be opened."""

GATE_SECONDS = 60.0
"""The set of files is changed in milliseconds; looking through a hundred thousand takes a second."""

COUNT_SECONDS = 3600.0
"""How long the sum is believed before it is counted again: others may have removed or added files."""

MANY_FILES = 100
"""From so many on, eviction makes more room than was asked for, so that they are not looked through each time."""

BLOCK = 4096
STEP = 2**20
"""Bytes that are counted at a time while a file of known length is written."""

DISTINCTIVE_ETAG = 16
"""Characters of an ETag that is a digest or the like, rather than a number."""

FOLDERS = ("files", "index", "partial", "locks")
GATE = "files.lock"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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


class Writer:
    """Appends to a file of the cache; what is written is counted before."""

    def __init__(self, cache: "Cache", file: BinaryIO, expected: int) -> None:
        """Write to ``file``, of which ``expected`` bytes are announced."""
        self._cache = cache
        self._file = file
        self._expected = expected
        self._written = self._counted = 0

    def write(self, data: bytes) -> None:
        """Append some bytes.

        Raises:
            SourceError: they do not fit into the cache.
        """
        self._written += len(data)
        if self._written > self._counted:
            ahead = min(STEP, self._expected - self._counted)
            size = _in_blocks(max(self._written - self._counted, ahead))
            self._cache.count(size)
            self._counted += size
        self._file.write(data)


class Part:
    """An unfinished file; hold the lock of its source."""

    def __init__(self, cache: "Cache", path: Path) -> None:
        """Take the place of an unfinished file."""
        self.path = path
        self._cache = cache
        self._identity = path.with_suffix(".json")

    @property
    def size(self) -> int:
        """Bytes that it has."""
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> Validator | None:
        """What the bytes so far belong to, if that was a strong ETag: only then may they be continued."""
        validator = _read_validator(self._identity)
        return validator if validator and validator.etag and not validator.etag.startswith("W/") else None

    def begin(self, validator: Validator) -> None:
        """Start anew, with a file that is recognised by this."""
        self.discard()
        self._cache.write_json(self._identity, asdict(validator))

    @contextmanager
    def appending(self, expected: int) -> Iterator[Writer]:
        """Go on writing; room for ``expected`` more bytes, if that many are known to come, is made at once.

        Raises:
            SourceError: there is no room for them.
        """
        self._cache.make_room(expected)
        with self.path.open("ab") as file:
            yield Writer(self._cache, file, expected)

    def discard(self) -> None:
        # The identity goes first: bytes without it are never continued.
        """Remove it."""
        self._identity.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Cache:
    """The cache below one directory, kept within ``budget`` bytes and within what its disk has to spare."""

    def __init__(self, root: Path, budget: int) -> None:
        """Keep files below ``root``, at most ``budget`` bytes of them."""
        self.root = root
        self._budget = budget
        self._in_use: BinaryIO | None = None

    def lock(self, key: str, deadline: float) -> AbstractContextManager[None]:
        """One at a time for each source; others wait until ``time.monotonic()`` says ``deadline``.

        Raises:
            SourceError: it is still fetched by another.
        """
        return self._lock(_digest(key), deadline)

    def find(self, key: str) -> Entry | None:
        """The file of a source, marked as used now; its server is not asked."""
        index = self._index(key)
        try:
            stored = json.loads(index.read_bytes())
            path = self.content(stored["sha256"])
            os.utime(index)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Entry(path, _read_validator(index)) if path else None

    def content(self, sha256: str) -> Path | None:
        """The file with these bytes, marked as used now; it stays until another one is asked for."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            return None
        path = self._directory("files") / f"{sha256}.safetensors"
        with self._gate():
            try:
                os.utime(path)
                self._use(path)
            except FileNotFoundError:
                return None
        return path

    def part(self, key: str) -> Part:
        """The unfinished download of a source; hold its lock."""
        return Part(self, self._directory("partial") / _digest(key))

    @contextmanager
    def scratch(self) -> Iterator[Part]:
        """A temporary file, which is removed at the end unless it was admitted."""
        name = uuid.uuid4().hex
        part = Part(self, self._directory("partial") / name)
        with self._lock(name, time.monotonic()):
            try:
                yield part
            finally:
                part.path.unlink(missing_ok=True)

    def admit(self, path: Path, sha256: str) -> Path:
        """Move a verified file in."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        final = self._directory("files") / f"{sha256}.safetensors"
        with self._gate():
            os.utime(path)
            path.replace(final)
            self._use(final)
        return final

    def remember(self, key: str, sha256: str, validator: Validator | None) -> None:
        """Note which file a source is."""
        self.write_json(self._index(key), {"sha256": sha256, **(asdict(validator) if validator else {})})

    def write_json(self, path: Path, value: dict[str, Any]) -> None:
        """Write a small file of what is known of a source."""
        self.count(BLOCK)
        write_whole(path, json.dumps(value).encode())

    def make_room(self, size: int) -> None:
        """Evict the least recently used files until ``size`` more bytes fit.

        Raises:
            SourceError: they do not fit.
        """
        with self._gate() as gate:
            _write_count(gate, *self._with_room_for(size, gate))

    def count(self, size: int) -> None:
        """Make room for ``size`` bytes that are about to be written, and count them.

        Raises:
            SourceError: they do not fit.
        """
        with self._gate() as gate:
            taken, counted_at = self._with_room_for(size, gate)
            _write_count(gate, taken + size, counted_at)

    def release(self) -> None:
        """Let go of the file that was fetched last: it may be evicted."""
        if self._in_use:
            self._in_use.close()
        self._in_use = None

    def clear(self) -> None:
        """Evict all that is not in use: the disk is full, although the cache keeps away from that."""
        with self._gate() as gate:
            _write_count(gate, self._evict(None), time.time())

    def _with_room_for(self, size: int, gate: int) -> tuple[int, float]:
        """What everything takes, once there is room for ``size`` more bytes, and when that was counted."""
        taken, counted_at = _read_count(gate)
        if taken + size <= self._may_take(taken) and 0 <= time.time() - counted_at < COUNT_SECONDS:
            return taken, counted_at
        taken = self._evict(size) if size <= self._budget else self._budget
        if taken + size > self._budget:
            raise SourceError(
                "it does not fit beside what is in use now into the cache of LoRAs, which may take "
                f"{self._budget:,} bytes (FLUX_ADAPTER_CACHE_BYTES)"
            )
        if taken + size > self._may_take(taken):
            raise SourceError("the server's disk has no room for it")
        return taken, time.time()

    def _may_take(self, taken: int) -> int:
        """What everything may take: the budget, or what it takes now and what the disk has to spare."""
        return min(self._budget, taken + free_bytes(self.root))

    def _evict(self, size: int | None) -> int:
        """Remove the least recently used until ``size`` more bytes fit, with None all; tell what the rest takes."""
        for path in self._directory("locks").iterdir():  # of processes that were killed
            if path.name != GATE:
                with _if_free(path) as free:
                    if free:
                        path.unlink(missing_ok=True)
        entries = sorted(entry for name in ("files", "index", "partial") for entry in self._entries(name))
        folders = (self.root, *map(self._directory, FOLDERS))
        taken = sum(size for _, size, _ in entries) + sum(_on_disk(folder.stat()) for folder in folders) + BLOCK
        allowed = self._may_take(taken)
        if size is not None and taken + size <= allowed:
            return taken
        spare = allowed // 16 if len(entries) > MANY_FILES else 0
        for used, bytes_, path in entries:
            if size is not None and taken + size + spare <= allowed:
                break
            if self._remove(path, used):
                taken -= bytes_
        return taken

    def _remove(self, path: Path, used: float) -> bool:
        """Remove a file unless it is in use."""
        recent, holder = time.time() - used < IN_USE_SECONDS, None
        if path.suffix == ".part" and recent:  # about to take the place of another one
            return False
        if path.parent.name == "partial":
            holder = self._directory("locks") / f"{path.stem}.lock"
        elif path.parent.name == "files" and recent:
            holder = path
        if holder is None:
            path.unlink(missing_ok=True)
            return True
        with _if_free(holder) as free:
            if free:
                path.unlink(missing_ok=True)
        return free

    def _entries(self, name: str) -> Iterator[tuple[float, int, Path]]:
        """When each file was last used, what it takes, and its path."""
        folder = self._directory(name)
        with os.scandir(folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):  # another process renamed it meanwhile
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime, _on_disk(status), folder / entry.name

    def _use(self, path: Path) -> None:
        self.release()
        self._in_use = path.open("rb")
        fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def _index(self, key: str) -> Path:
        return self._directory("index") / f"{_digest(key)}.json"

    def _directory(self, name: str) -> Path:
        directory = private_directory(self.root, SETTING) / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    @contextmanager
    def _gate(self) -> Iterator[int]:
        """Whoever changes the set of files, alone; the descriptor of the file with the count."""
        path = self._directory("locks") / GATE
        with _locked(path, time.monotonic() + GATE_SECONDS, "the cache of LoRAs is busy; try again later") as gate:
            yield gate

    @contextmanager
    def _lock(self, name: str, deadline: float) -> Iterator[None]:
        path = self._directory("locks") / f"{name}.lock"
        with _locked(path, deadline, "another request is still fetching it; try again later"):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # whoever waits for it notices, and makes another one


@contextmanager
def _locked(path: Path, deadline: float, late: str) -> Iterator[int]:
    """Exclude all other processes and threads.

    Not filelock's: that keeps a register of who holds what, which is wrong after an exception between two of its
    steps, as cancelling raises them. Here the lock lives and dies with the open file.

    Raises:
        SourceError: the deadline is over; ``late`` is its message.
    """
    while True:
        with open(path, "ab", opener=_open_both_ways) as file:
            while not _taken(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise SourceError(late)
                time.sleep(0.05)
            try:
                current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield file.fileno()
                return


def _open_both_ways(path: str, _: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextmanager
def _if_free(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lock on a file; and nobody does meanwhile."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            yield True
        else:
            yield _taken(file, fcntl.LOCK_EX)


def _taken(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_count(gate: int) -> tuple[int, float]:
    """What everything takes and when that was counted; (0, 0) if nobody has counted."""
    try:
        taken, counted_at = map(int, os.pread(gate, 100, 0).split())
    except ValueError:
        return 0, 0.0
    return taken, float(counted_at)


def _write_count(gate: int, taken: int, counted_at: float) -> None:
    os.pwrite(gate, b"%020d %020d" % (max(taken, 0), int(counted_at)), 0)


def _on_disk(status: os.stat_result) -> int:
    return status.st_blocks * 512


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _digest(key: str) -> str:
    # A key may be a signed address: only its digest reaches the disk.
    return hashlib.sha256(key.encode()).hexdigest()


def _read_validator(path: Path) -> Validator | None:
    try:
        stored = json.loads(path.read_bytes())
        return Validator(Identity(*map(str, stored["resource"])), str(stored["etag"]), str(stored["modified"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
