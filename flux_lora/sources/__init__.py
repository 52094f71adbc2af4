"""Where a LoRA comes from: any accepted spelling of a source becomes a verified local ``.safetensors`` file."""

import base64
import binascii
from dataclasses import replace
from pathlib import Path
from typing import Self
from urllib.parse import unquote_to_bytes

from flux_lora.checkpoint.header import TensorFileError, read_header
from flux_lora.errors import FormatError, SourceError
from flux_lora.settings import Settings
from flux_lora.sources import archive, civitai
from flux_lora.sources.address import CivitaiFile, HubFile, Inline, Link, is_inline, label, parse
from flux_lora.sources.cache import Cache, Validator, sha256_of
from flux_lora.sources.client import Client
from flux_lora.sources.guard import Network, Patience
from flux_lora.sources.local import local_file
from flux_lora.sources.resource import Resource
from flux_lora.sources.tokens import Tokens
from flux_lora.sources.transport import too_large

__all__ = ["PUBLIC", "Network", "Patience", "Sources", "Tokens"]

PUBLIC = Network()
"""The internet."""

MAX_SOURCE_LENGTH = 8192
"""Of any source but a ``data:`` URI."""


class Sources:
    """Fetches LoRAs, with a cache on disk that any number of processes may share.

    What cannot change (a commit of the Hub, a version on Civitai or Replicate) is fetched once. For anything else the
    server is asked each time whether its file is still the cached one. If it cannot be asked, the fetch fails: an old
    file served in silence would be a picture that the source no longer stands for.

    Args:
        cache: directory of the cache.
        cache_bytes: its budget; the least recently used files leave first.
        max_bytes: largest file or archive that is fetched.
        tokens: sent to the hosts that they belong to, and only there.
        network: the way to the world; tests pass their own.
    """

    def __init__(
        self, *, cache: Path, cache_bytes: int, max_bytes: int, tokens: Tokens, network: Network = PUBLIC
    ) -> None:
        self._cache = Cache(cache, cache_bytes)
        self._max_bytes = max_bytes
        self._tokens = tokens
        self._client = Client(network, tokens, max_bytes)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            cache=settings.adapter_cache,
            cache_bytes=settings.adapter_cache_bytes,
            max_bytes=settings.adapter_max_bytes,
            tokens=Tokens.from_settings(settings),
        )

    def fetch(self, source: str, *, root: Path | None) -> Path:
        """The file that a source names, with its header checked.

        Args:
            source: a path, an address, a ``data:`` URI, or an id of Replicate, the Hugging Face Hub or Civitai.
            root: the directory that local paths may not leave; None for the operator's own sources.

        Raises:
            SourceError: the source is refused, or cannot be fetched.
            FormatError: what it names is not a safetensors file.
        """
        source = source.strip()
        try:
            return self._fetch(source, root)
        except TensorFileError as error:
            raise FormatError(f"The LoRA {label(source)} cannot be used: {error}.") from None
        except SourceError as error:
            raise SourceError(f"The LoRA {label(source)} cannot be fetched: {error}.") from None
        except OSError as error:
            raise SourceError(f"The LoRA {label(source)} cannot be read or stored: {error.strerror}.") from None

    def cached(self, digest: str) -> Path | None:
        """A file of the cache by its SHA-256, if it is there."""
        return self._cache.content(digest)

    def _fetch(self, source: str, root: Path | None) -> Path:
        _check_text(source)
        if not is_inline(source) and "://" not in source and (path := local_file(source, root)):
            return self._local(path)
        spelled = parse(source)
        if isinstance(spelled, Inline):
            return self._inline(spelled)
        if spelled.fixed and (entry := self._cache.find(spelled.key)):
            return entry.path
        resource = self._locate(spelled)
        # What the caller called fixed is found under that name without asking next time.
        return self._download(replace(resource, key=spelled.key) if spelled.fixed else resource, label(source))

    def _locate(self, spelled: Link | HubFile | CivitaiFile) -> Resource:
        match spelled:
            case Link(url, fixed):
                return Resource(spelled.key, url, fixed)
            case CivitaiFile():
                return civitai.locate(spelled, self._client)
            case HubFile():
                from flux_lora.sources import hub  # huggingface_hub takes a while to import

                return hub.locate(spelled, self._client.api, self._tokens)

    def _download(self, resource: Resource, name: str) -> Path:
        if resource.size and resource.size > self._max_bytes:
            raise SourceError(too_large(self._max_bytes))
        with self._cache.lock(resource.key):
            entry = self._cache.find(resource.key)
            if entry and resource.fixed:
                return entry.path
            if resource.sha256 and (path := self._cache.content(resource.sha256)):
                self._cache.remember(resource.key, resource.sha256, None)
                return path
            part = self._cache.part(resource.key)
            known = entry.validator if entry else None
            validator = self._client.download(
                resource.url, part, name=name, known=known, make_room=self._cache.make_room
            )
            if validator is None:
                if entry := self._cache.find(resource.key):
                    return entry.path
                raise SourceError("it was removed from the cache while its server was asked; try again")
            try:
                path = self._admit(part.path, resource.key, validator, resource.sha256)
            except Exception:  # of the file itself; what a cancelled fetch leaves here is continued by the next
                part.discard()
                raise
            part.discard()
            return path

    def _local(self, path: Path) -> Path:
        try:
            read_header(path)
        except TensorFileError:
            if not archive.is_tar(path):
                raise
        else:
            return path
        state = path.stat()
        key = f"file:{path}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}"
        with self._cache.lock(key):
            entry = self._cache.find(key)
            return entry.path if entry else self._unpack(path, key)

    def _inline(self, inline: Inline) -> Path:
        head, comma, payload = inline.uri.partition(",")
        try:
            data = unquote_to_bytes(payload)
            if head.lower().endswith(";base64"):
                data = _base64(data)
        except binascii.Error:
            raise SourceError("its base64 is damaged") from None
        if not comma:
            raise SourceError("it has no comma before its data")
        if len(data) > self._max_bytes:
            raise SourceError(too_large(self._max_bytes))
        with self._cache.scratch() as path:
            path.write_bytes(data)
            return self._admit(path)

    def _admit(
        self, path: Path, key: str | None = None, validator: Validator | None = None, sha256: str | None = None
    ) -> Path:
        """Verify a file of the cache's own, unpack it if it is a tar, and move it to the others."""
        digest = sha256_of(path)
        if sha256 not in (None, digest):
            raise SourceError("what arrived is not what was published: its SHA-256 differs")
        try:
            read_header(path)
        except TensorFileError:
            if not archive.is_tar(path):
                raise
            return self._unpack(path, key, validator)
        return self._keep(path, digest, key, validator)

    def _unpack(self, path: Path, key: str | None, validator: Validator | None = None) -> Path:
        """Verify what is in a tar, wherever that is, and put it into the cache."""
        with self._cache.scratch() as unpacked:
            archive.extract(path, unpacked)
            read_header(unpacked)
            return self._keep(unpacked, sha256_of(unpacked), key, validator)

    def _keep(self, path: Path, digest: str, key: str | None, validator: Validator | None) -> Path:
        admitted = self._cache.admit(path, digest)
        if key:
            self._cache.remember(key, digest, validator)
        return admitted


def _base64(text: bytes) -> bytes:
    """Either alphabet of RFC 4648; the padding may be missing, as it usually is with the one for addresses."""
    text = text.translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _check_text(source: str) -> None:
    if not source:
        raise SourceError("it is empty")
    if not source.isprintable():
        raise SourceError("it holds characters that cannot be printed")
    if len(source) > MAX_SOURCE_LENGTH and not is_inline(source):
        raise SourceError(f"it is longer than {MAX_SOURCE_LENGTH} characters")
