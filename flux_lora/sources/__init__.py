"""Where a LoRA comes from: any accepted spelling of a source becomes a verified local ``.safetensors`` file."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from pydantic import SecretStr

from flux_lora.checkpoint.header import TensorFileError, read_header
from flux_lora.errors import FormatError, SettingsError, SourceError
from flux_lora.settings import Settings
from flux_lora.sources import archive, civitai
from flux_lora.sources.address import CivitaiFile, HubFile, Inline, Link, is_inline, label, parse
from flux_lora.sources.cache import DISK_FULL, SETTING, Cache, Validator
from flux_lora.sources.client import Client
from flux_lora.sources.guard import Network, Patience, check_time
from flux_lora.sources.inline import decode
from flux_lora.sources.local import local_file
from flux_lora.sources.resource import Resource
from flux_lora.sources.tokens import Tokens
from flux_lora.sources.transport import too_large
from flux_lora.storage import sha256_of

__all__ = ["PUBLIC", "Network", "Patience", "Sources", "Tokens"]

PUBLIC = Network()
"""The internet."""

MAX_SOURCE_LENGTH = 8192
"""Of any source but a ``data:`` URI."""

REQUEST_GRACE = 30.0
"""Seconds of waiting after which a request's server has to keep up with the least rate."""


class Sources:
    """Fetches LoRAs, with a cache on disk that any number of processes may share.

    What cannot change (a commit of the Hub, a version on Civitai or Replicate) is fetched once. For anything else the
    server is asked each time whether its file is still the cached one. If it cannot be asked, the fetch fails: an old
    file served in silence would be a picture that the source no longer stands for.

    Nobody gets a file for knowing its digest, and what was fetched with tokens only those get who have them.

    Args:
        cache: directory of the cache.
        cache_bytes: its budget; the least recently used files leave first.
        max_bytes: largest file or archive that is fetched.
        tokens: the operator's, sent to the hosts that they belong to, and only there.
        request_tokens: whether requests are sent with them, too.
        request_seconds: how long one fetch for a request may take, all in all.
        request_rate: bytes per second below which it is given up.
        network: the way to the world; tests pass their own.
    """

    def __init__(
        self,
        *,
        cache: Path,
        cache_bytes: int,
        max_bytes: int,
        tokens: Tokens,
        request_tokens: bool = False,
        request_seconds: float = 300.0,
        request_rate: float = 64 * 1024,
        network: Network = PUBLIC,
    ) -> None:
        """Take limits and the way to the internet; `from_settings` gives the operator's."""
        self._cache = Cache(cache, cache_bytes)
        self._max_bytes = max_bytes
        self._tokens = tokens
        self._request_tokens = tokens if request_tokens else Tokens(withheld=True)
        patience = network.patience
        hurry = replace(
            patience,
            total=min(patience.total, request_seconds),
            grace=min(patience.grace, REQUEST_GRACE),
            slowest=max(patience.slowest, request_rate),
        )
        self._network, self._request_network = network, replace(network, patience=hurry)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make them as the operator's settings say."""
        return cls(
            cache=settings.adapter_cache,
            cache_bytes=settings.adapter_cache_bytes,
            max_bytes=settings.adapter_max_bytes,
            tokens=Tokens.from_settings(settings),
            request_tokens=settings.request_tokens,
            request_seconds=settings.source_deadline,
            request_rate=settings.source_rate,
        )

    def fetch(self, source: str, *, root: Path | None) -> Path:
        """The file that a source names, with its header checked; it stays there until the next fetch.

        Args:
            source: a path, an address, a ``data:`` URI, or an id of Replicate, the Hugging Face Hub or Civitai.
            root: the directory that a request's local paths may not leave; None for the operator's own sources.

        Raises:
            SourceError: the source is refused, or cannot be fetched.
            FormatError: what it names is not a safetensors file.
            SettingsError: the cache's directory cannot be trusted.
        """
        source = source.strip()
        with self._plain_errors(source):
            self._cache.release()
            network = self._network if root is None else self._request_network
            deadline = time.monotonic() + network.patience.total
            try:
                return self._fetch(source, root, network, deadline)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
            self._cache.clear()
            return self._fetch(source, root, network, deadline)

    def check(self, source: str, *, root: Path | None) -> None:
        """Find the faults of a source that can be found at once: nothing is fetched.

        Args:
            source: as for `fetch`.
            root: likewise.

        Raises:
            SourceError: it is refused, or names a file that is not there.
            FormatError: the file that it names is not a safetensors file.
        """
        source = source.strip()
        with self._plain_errors(source):
            _check_text(source)
            if path := _local_path(source, root):
                _is_packed(path)
            else:
                parse(source)

    def read(self, source: str, max_bytes: int) -> bytes:
        """The bytes of a small file that a request brings along; they are kept nowhere.

        Args:
            source: a ``data:`` URI or an https address.
            max_bytes: the largest file that is read; of a ``data:`` URI, known before it is decoded.

        Raises:
            SourceError: it is neither, is refused, or cannot be fetched. The message is the end of a sentence.
        """
        source = source.strip()
        if is_inline(source):
            source = "".join(source.split())  # many tools write base64 in lines
        _check_text(source)
        deadline = time.monotonic() + self._request_network.patience.total
        if is_inline(source):
            return b"".join(decode(source, max_bytes))
        if "://" not in source:
            raise SourceError("it must be a data: URI or an https:// address; commands take @FILE, too")
        return Client(self._request_network, self._request_tokens, max_bytes, deadline).read(source)

    def cached(self, digest: str) -> Path | None:
        """A file of the cache by its SHA-256, if it is there: for the owner of the cache, never for a request."""
        return self._cache.content(digest)

    def _fetch(self, source: str, root: Path | None, network: Network, deadline: float) -> Path:
        _check_text(source)
        if path := _local_path(source, root):
            return self._local(path, deadline)
        spelled = parse(source)
        if isinstance(spelled, Inline):
            return self._inline(spelled, deadline)
        tokens = self._tokens if root is None else self._request_tokens
        if isinstance(spelled, CivitaiFile) and spelled.token:
            tokens = Tokens(civitai_token=SecretStr(spelled.token))
        client = Client(network, tokens, self._max_bytes, deadline)
        known_as = f"{tokens.reach}{spelled.key}"
        if spelled.fixed and (entry := self._cache.find(known_as)):
            return entry.path
        resource = self._locate(spelled, client, own=root is None)
        # What the caller called fixed is found under that name without asking next time.
        key = known_as if spelled.fixed else f"{tokens.reach}{resource.key}"
        return self._download(replace(resource, key=key), client, label(source))

    def _locate(self, spelled: Link | HubFile | CivitaiFile, client: Client, *, own: bool) -> Resource:
        match spelled:
            case Link(url, fixed):
                return Resource(spelled.key, url, fixed)
            case CivitaiFile():
                return civitai.locate(spelled, client)
            case HubFile():
                from flux_lora.sources import hub  # huggingface_hub takes a while to import

                return hub.locate(spelled, client.api, client.tokens, may_list=own)

    def _download(self, resource: Resource, client: Client, name: str) -> Path:
        if resource.size and resource.size > self._max_bytes:
            raise SourceError(too_large(self._max_bytes))
        with self._cache.lock(resource.key, client.deadline):
            entry = self._cache.find(resource.key)
            if entry and resource.fixed:
                return entry.path
            part = self._cache.part(resource.key)
            validator = client.download(resource.url, part, name=name, known=entry.validator if entry else None)
            if validator is None:
                if entry := self._cache.find(resource.key):
                    return entry.path
                raise SourceError("it was removed from the cache while its server was asked; try again")
            try:
                path = self._admit(part.path, client.deadline, resource.key, validator, resource.sha256)
            except Exception:  # of the file itself; what a cancelled fetch leaves here is continued by the next
                part.discard()
                raise
            part.discard()
            return path

    def _local(self, path: Path, deadline: float) -> Path:
        if not _is_packed(path):
            return path
        state = path.stat()
        key = f"file:{path}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}"
        with self._cache.lock(key, deadline):
            entry = self._cache.find(key)
            return entry.path if entry else self._unpack(path, deadline, key)

    def _inline(self, inline: Inline, deadline: float) -> Path:
        with self._cache.scratch() as part:
            left = self._max_bytes
            with part.appending(0) as file:
                for piece in decode(inline.uri, self._max_bytes):
                    check_time(deadline)
                    left -= len(piece)
                    if left < 0:
                        raise SourceError(too_large(self._max_bytes))
                    file.write(piece)
            return self._admit(part.path, deadline)

    def _admit(
        self,
        path: Path,
        deadline: float,
        key: str | None = None,
        validator: Validator | None = None,
        sha256: str | None = None,
    ) -> Path:
        """Verify a file of the cache's own, unpack it if it is a tar, and move it to the others."""
        digest = sha256_of(path)
        if sha256 not in (None, digest):
            raise SourceError("what arrived is not what was published: its SHA-256 differs")
        if _is_packed(path):
            return self._unpack(path, deadline, key, validator)
        return self._keep(path, digest, key, validator)

    def _unpack(self, path: Path, deadline: float, key: str | None, validator: Validator | None = None) -> Path:
        """Verify what is in a tar, wherever that is, and put it into the cache."""
        with self._cache.scratch() as unpacked:
            with unpacked.appending(0) as file:
                archive.extract(path, file.write, deadline)
            read_header(unpacked.path)
            return self._keep(unpacked.path, sha256_of(unpacked.path), key, validator)

    def _keep(self, path: Path, digest: str, key: str | None, validator: Validator | None) -> Path:
        admitted = self._cache.admit(path, digest)
        if key:
            self._cache.remember(key, digest, validator)
        return admitted

    @contextmanager
    def _plain_errors(self, source: str) -> Iterator[None]:
        """Name the source, or the cache where that is at fault."""
        name = label(source)
        try:
            yield
        except TensorFileError as error:
            raise FormatError(f"The LoRA {name} cannot be used: {error}.") from None
        except SourceError as error:
            raise SourceError(f"The LoRA {name} cannot be fetched: {error}.") from None
        except OSError as error:
            where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else None
            if where and where.is_relative_to(self._cache.root):
                raise SettingsError(
                    f"The cache of LoRAs in {self._cache.root} cannot be used: {error.strerror}. Set {SETTING} to a "
                    "directory that can be written to."
                ) from None
            raise SourceError(f"The LoRA {name} cannot be read or stored: {error.strerror}.") from None


def _local_path(source: str, root: Path | None) -> Path | None:
    """The local file that a source names, if it names one."""
    return None if is_inline(source) or "://" in source else local_file(source, root)


def _is_packed(path: Path) -> bool:
    """Whether a file is a tar instead of a safetensors file.

    Raises:
        TensorFileError: it is neither.
        SourceError: it is compressed.
    """
    try:
        read_header(path)
    except TensorFileError:
        if not archive.is_tar(path):
            raise
        return True
    return False


def _check_text(source: str) -> None:
    if not source:
        raise SourceError("it is empty")
    if not source.isprintable():
        raise SourceError("it holds characters that cannot be printed")
    if len(source) > MAX_SOURCE_LENGTH and not is_inline(source):
        raise SourceError(f"it is longer than {MAX_SOURCE_LENGTH} characters")
