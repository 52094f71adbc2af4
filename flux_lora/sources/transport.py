"""The one way out: an httpx transport that guards addresses, tokens and sizes of every single request.

It keeps no connections and no other state, so an exception at any point leaves nothing behind.
"""

import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import httpcore2
import httpx2

from flux_lora.errors import SourceError
from flux_lora.sources.guard import GuardedBackend, Network, check_url, host_of
from flux_lora.sources.tokens import Tokens

NEVER_SENT = {b"authorization", b"proxy-authorization", b"cookie", b"accept-encoding"}
"""Headers that callers (huggingface_hub among them) do not decide."""


class TransferError(Exception):
    """A connection that failed or broke off; trying again may help. The message is a plain reason."""


class GuardedTransport(httpx2.BaseTransport):
    """Sends requests to public https hosts, each host's own token with them, and reads at most ``max_bytes`` of answer.

    A request with the extension ``stranger`` gets no token: another host has redirected to it.

    Args:
        network: the way there.
        tokens: of the hosts.
        max_bytes: largest answer.
        deadline: when ``time.monotonic()`` says this, nothing more is read; None: each request has all the patience.

    Raises:
        SourceError: the address is refused, or the answer is compressed or too large.
        TransferError: no connection, or it broke off.
    """

    def __init__(self, network: Network, tokens: Tokens, max_bytes: int, deadline: float | None = None) -> None:
        """Take the way to the internet, tokens and limits."""
        self._network = network
        self._tokens = tokens
        self._max_bytes = max_bytes
        self._deadline = deadline

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, checked, with the token of its host."""
        check_url(request.url)
        host = host_of(request.url)
        url = httpcore2.URL(
            scheme=request.url.raw_scheme, host=request.url.raw_host, port=request.url.port, target=request.url.raw_path
        )
        patience = self._network.patience
        deadline = time.monotonic() + patience.total if self._deadline is None else self._deadline
        connection = httpcore2.HTTPConnection(
            url.origin,
            ssl_context=self._network.tls,
            network_backend=GuardedBackend(self._network, self._max_bytes, deadline),
        )
        outgoing = httpcore2.Request(
            request.method,
            url,
            headers=self._headers(host, request),
            content=request.read(),
            extensions={"timeout": {"connect": patience.connect, "read": patience.read, "write": patience.read}},
        )
        try:
            with _plain_reasons(host):
                response = connection.handle_request(outgoing)
            headers = _uncompressed(response)
            body = _Body(response.iter_stream(), connection, host, self._max_bytes)
        except BaseException:
            connection.close()
            raise
        return httpx2.Response(response.status, headers=headers, stream=body)

    def _headers(self, host: str, request: httpx2.Request) -> list[tuple[bytes, bytes]]:
        headers = [(name, value) for name, value in request.headers.raw if name.lower() not in NEVER_SENT]
        headers.append((b"Accept-Encoding", b"identity"))
        token = "" if request.extensions.get("stranger") else self._tokens.for_host(host)
        if token:
            headers.append((b"Authorization", f"Bearer {token}".encode("ascii")))
        return headers


class _Body(httpx2.SyncByteStream):
    def __init__(
        self, chunks: Iterable[bytes], connection: httpcore2.HTTPConnection, host: str, max_bytes: int
    ) -> None:
        self._chunks = chunks
        self._connection = connection
        self._host = host
        self._max_bytes = max_bytes

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        with _plain_reasons(self._host):
            for chunk in self._chunks:
                received += len(chunk)
                if received > self._max_bytes:
                    raise SourceError(too_large(self._max_bytes))
                yield chunk

    def close(self) -> None:
        self._connection.close()


def too_large(max_bytes: int) -> str:
    """Say that a file is larger than it may be."""
    return f"it is larger than the limit of {max_bytes:,} bytes"


def _uncompressed(response: httpcore2.Response) -> list[tuple[bytes, bytes]]:
    """The headers, with nothing left to decompress: a few bytes could become any number."""
    encodings = [value for name, value in response.headers if name.lower() == b"content-encoding"]
    if 200 <= response.status < 300 and any(value.strip().lower() not in (b"", b"identity") for value in encodings):
        raise SourceError("the server compressed its answer although asked not to, which is refused")
    return [(name, value) for name, value in response.headers if name.lower() != b"content-encoding"]


@contextmanager
def _plain_reasons(host: str) -> Iterator[None]:
    try:
        yield
    except httpcore2.TimeoutException:
        raise TransferError(f"{host} does not answer, or too slowly") from None
    except httpcore2.ConnectError as error:
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            raise SourceError(
                f"{host} has no valid certificate: {error.__cause__.verify_message.rstrip('.')}"
            ) from None
        raise TransferError(f"{host} cannot be reached") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError):
        raise TransferError(f"{host} broke the connection off") from None
