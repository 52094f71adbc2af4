"""Downloads: redirects, resuming, revalidation, limits, and what an answer means in plain words.

It works on the transport itself: an ``httpx2.Client`` would log whole addresses, and the queries of signed ones are
secrets; it would also keep cookies and read proxies and passwords from the environment.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from tqdm import tqdm

from flux_lora.errors import SourceError
from flux_lora.sources.cache import Identity, Part, Validator
from flux_lora.sources.guard import Network, host_of, parse_url
from flux_lora.sources.tokens import Tokens
from flux_lora.sources.transport import GuardedTransport, TransferError, too_large

MAX_REDIRECTS = 10
MAX_API_BYTES = 16 * 1024**2
WEB_PAGES = ("text/html", "application/xhtml+xml")


class Client:
    """Fetches JSON and one file through the guarded transport, and all of it before the deadline.

    Args:
        network: the way there.
        tokens: of the hosts.
        max_bytes: largest file.
        deadline: when ``time.monotonic()`` says this, nothing more is waited for.
    """

    def __init__(self, network: Network, tokens: Tokens, max_bytes: int, deadline: float) -> None:
        """Take the way to the internet, tokens and limits."""
        self.tokens = tokens
        self.deadline = deadline
        self._max_bytes = max_bytes
        self._pauses = network.patience.pauses
        self._files = GuardedTransport(network, tokens, max_bytes, self.deadline)
        self.api = GuardedTransport(network, tokens, MAX_API_BYTES, self.deadline)

    def json(self, url: str) -> Any:
        """The JSON that a service answers with.

        Raises:
            SourceError: it refuses, cannot be reached, or answers with something else.
        """
        try:
            with self._get(self.api, url, lambda _: {}) as (response, target):
                if response.status_code != 200:
                    raise SourceError(refusal(host_of(target), response.status_code, self.tokens, response.headers))
                return json.loads(response.read())
        except TransferError as error:
            raise SourceError(str(error)) from None
        except (ValueError, RecursionError):
            raise SourceError("the service did not answer with JSON") from None

    def download(self, url: str, part: Part, *, name: str, known: Validator | None) -> Validator | None:
        """Complete a partial file, or find that what is known of it is still valid.

        After an error the partial file is gone, unless it was the connection's and the next fetch can go on from there.

        Args:
            url: where the file is; redirects are followed, each with the same care.
            part: where the bytes go; what it holds already is continued if the server can prove it is the same file.
            name: what the progress bar calls it.
            known: what identified the file when it was last fetched.

        Returns:
            What identifies this state of the file, or None if it is still the known one (and nothing was fetched).

        Raises:
            SourceError: the server refuses, cannot be reached after some tries, or sends what is not a file.
            OSError: it cannot be stored.
        """
        pauses = iter(self._pauses)
        while True:
            before = part.size
            try:
                return self._attempt(url, part, name, known)
            except TransferError as error:
                if part.size - before >= 1024**2:
                    pauses = iter(self._pauses)
                if (pause := next(pauses, None)) is None or time.monotonic() + pause > self.deadline:
                    if not part.validator():
                        part.discard()  # nobody could continue it
                    raise SourceError(str(error)) from None
                time.sleep(pause)
            except (SourceError, OSError):
                part.discard()
                raise

    def _attempt(self, url: str, part: Part, name: str, known: Validator | None) -> Validator | None:
        saved = part.validator() if part.size else None

        def conditions(resource: Identity) -> dict[str, str]:
            headers = known.condition(resource) if known else {}
            if saved and (etag := saved.etag_at(resource)):
                headers |= {"Range": f"bytes={part.size}-", "If-Range": etag}
            return headers

        with self._get(self._files, url, conditions) as (response, target):
            status, headers = response.status_code, response.headers
            host, resource = host_of(target), identity(target)
            if status == 304 and known and known.condition(resource):
                return None
            if status == 416:
                if saved and headers.get("content-range") == f"bytes */{part.size}":
                    return saved  # all of it had arrived already
                part.discard()
                raise TransferError(f"{host} no longer has the rest of the file")
            if status in (500, 502, 503, 504):
                raise TransferError(refusal(host, status, self.tokens, headers))
            if status not in (200, 206):
                raise SourceError(refusal(host, status, self.tokens, headers))
            if _is_web_page(headers):
                hint = self.tokens.hint(host)
                login = f"; it may want a login: {hint}" if hint else ""
                raise SourceError(f"{host} sent a web page in place of the file{login}")
            if status == 200:
                validator = validator_of(resource, headers)
                part.begin(validator)
            elif saved and _continues(headers, part.size, saved):
                validator = saved
            else:
                part.discard()
                raise TransferError(f"{host} sent another part or another state of the file than asked for")
            self._write(response, part, name)
            return validator

    def _write(self, response: httpx2.Response, part: Part, name: str) -> None:
        """Append the answer to the partial file, unless the whole is or becomes too large."""
        length, size = int(response.headers.get("content-length", 0)), part.size
        if size + length > self._max_bytes:
            raise SourceError(too_large(self._max_bytes))
        progress = tqdm(
            desc=name,
            total=size + length if length else None,
            initial=size,
            unit="B",
            unit_scale=True,
            mininterval=1.0,
            file=sys.stderr,
        )
        with part.appending(length) as file, progress:
            for chunk in response.iter_raw():
                size += len(chunk)
                if size > self._max_bytes:
                    raise SourceError(too_large(self._max_bytes))
                file.write(chunk)
                progress.update(len(chunk))

    @contextmanager
    def _get(
        self,
        transport: GuardedTransport,
        url: str,
        headers: Callable[[Identity], Mapping[str, str]],
    ) -> Iterator[tuple[httpx2.Response, httpx2.URL]]:
        """The answer after all redirects, and who gave it; ``headers`` says what to send to which resource."""
        target, stranger = parse_url(url), False
        for _ in range(MAX_REDIRECTS + 1):
            request = httpx2.Request(
                "GET",
                target,
                headers={"User-Agent": "flux-lora", **headers(identity(target))},
                extensions={"stranger": stranger},
            )
            response = transport.handle_request(request)
            try:
                if not response.has_redirect_location:
                    yield response, target
                    return
                if not (location := response.headers["location"]):
                    raise SourceError(f"{host_of(target)} redirects without saying where to")
                former, target = target, parse_url(location, target)
                stranger = stranger or host_of(former) != host_of(target)
            finally:
                response.close()
        raise SourceError(f"it redirects more than {MAX_REDIRECTS} times")


def identity(url: httpx2.URL) -> Identity:
    """What an address names, as digests: its query may be a secret that must not reach the disk."""
    path = url.raw_path.split(b"?")[0]
    return Identity(*(hashlib.sha256(url.raw_host + target).hexdigest() for target in (path, url.raw_path)))


def refusal(host: str, status: int, tokens: Tokens, headers: Mapping[str, str]) -> str:
    """What an HTTP status means for the caller, in one sentence."""
    hint = tokens.hint(host)
    if status in (403, 429, 503) and ("cf-mitigated" in headers or ("cf-ray" in headers and _is_web_page(headers))):
        way = "download the file with one, and give its path or a data: URI"
        return f"Cloudflare, in front of {host}, lets only browsers in ({status}); {way}"
    if status in (401, 403):
        return f"{host} refuses access ({status}); {hint or 'a signed address may have expired'}"
    if status in (404, 410):
        return f"{host} has no such file ({status}){f', or it is private: {hint}' if hint else ''}"
    if status == 429:
        retry_after = headers.get("retry-after", "")
        wait = f" in {retry_after} seconds" if re.fullmatch("[0-9]{1,6}", retry_after) else " later"
        return f"{host} gets too many requests (429); try again{wait}"
    if 500 <= status < 600:
        return f"{host} has a problem of its own ({status}); try again later"
    return f"{host} gave the unexpected answer {status}"


def _is_web_page(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").split(";")[0].strip().lower() in WEB_PAGES


def _continues(headers: httpx2.Headers, offset: int, saved: Validator) -> bool:
    start = headers.get("content-range", "").removeprefix("bytes ").split("-")[0]
    return start == str(offset) and headers.get("etag", saved.etag) == saved.etag


def validator_of(resource: Identity, headers: httpx2.Headers) -> Validator:
    """What the server says to recognise this state of the file by, as far as it can be sent back.

    A modification time counts only if it was a minute old: a file could change twice within its one-second steps.
    """
    etag, modified = (
        value if value.isascii() else "" for value in map(headers.get, ("etag", "last-modified"), ("", ""))
    )
    try:
        if parsedate_to_datetime(headers["date"]) - parsedate_to_datetime(modified) < timedelta(minutes=1):
            modified = ""
    except (LookupError, ValueError, TypeError, OverflowError):
        modified = ""
    return Validator(resource, etag, modified)
