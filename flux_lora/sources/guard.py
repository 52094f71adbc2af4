"""Which addresses may be connected to: https at port 443 of a named host, all of whose addresses are public.

The check and the connection are one act: the socket goes to the very address that was checked, while certificate and
SNI stay those of the name. So a name that resolves to something else a moment later (DNS rebinding) changes nothing.
Every request passes here, after a redirect too, and proxies do not exist here: behind one, nothing could be checked.
"""

import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from typing import Any

import certifi
import httpcore2
import httpx2

from flux_lora.errors import SourceError
from flux_lora.sources.wording import quoted

HTTPS_PORT = 443
MAX_ADDRESSES = 4
"""Of one host that are tried."""

TURN = 1.0
"""Seconds that one call may wait; in between, a cancelled request ends."""

HOST_NAME = re.compile(r"(?=.{4,253}$)(?:[a-z0-9_-]{1,63}\.)+(?:[a-z]{2,63}|xn--[a-z0-9-]{1,59})")
"""At least two labels, the last of them letters: no IPv4 in any spelling, no IPv6, no %-escapes, no trailing dot."""

IPV6_UNICAST = ip_network("2000::/3")
"""The only IPv6 in public use. Outside are loopback, private, link-local, multicast, and IPv4 as mapped or NAT64."""

NOT_PUBLIC = tuple(
    ip_network(text)
    for text in (
        # https://www.iana.org/assignments/iana-ipv4-special-registry
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # Azure's host agent, which hands out metadata at a public address
        # https://www.iana.org/assignments/iana-ipv6-special-registry: Teredo and other protocols, examples, 6to4
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Patience:
    """How long to wait: seconds to connect, and for each piece of an answer.

    After ``grace`` seconds of waiting, an answer slower than ``slowest`` bytes per second is given up, so that a server
    which drips one byte at a time cannot hold a request for ever. After ``total`` seconds no answer is read on and no
    download is tried again, however fast it is; the next fetch of the same file continues it.
    """

    connect: float = 10.0
    read: float = 30.0
    grace: float = 60.0
    slowest: float = 32 * 1024
    total: float = 3600.0
    pauses: tuple[float, ...] = (0.5, 2.0)
    """Seconds before the second and the third try of a download; each MiB that arrives earns new tries."""


def _resolve(host: str) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, HTTPS_PORT, type=socket.SOCK_STREAM)]


def _public_authorities() -> ssl.SSLContext:
    # Not create_default_context(): OpenSSL's defaults obey SSL_CERT_FILE, and Python's write keys to SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    return context


@dataclass(frozen=True)
class Network:
    """The way to the world: host name -> addresses, checked address -> connection, and whose certificates count.

    Tests pass their own; nothing in the environment can.
    """

    resolve: Callable[[str], Sequence[str]] = _resolve
    connect: Callable[[str, int, float | None], httpcore2.NetworkStream] = httpcore2.SyncBackend().connect_tcp
    tls: ssl.SSLContext = field(default_factory=_public_authorities)
    patience: Patience = Patience()


def parse_url(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """An address, relative to another one if given.

    Raises:
        SourceError: it is malformed. The message does not repeat it, since it may hold a secret.
    """
    try:
        url = base.join(text) if base else httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        raise SourceError(
            "the server redirects to a malformed address" if base else "the address is malformed"
        ) from None
    return url.copy_with(fragment=None)


def check_url(url: httpx2.URL) -> None:
    """Refuse an address that must not be asked.

    Raises:
        SourceError: it is not https, not at port 443, holds credentials, or does not name a public host.
    """
    host = host_of(url)
    if url.scheme != "https":
        raise SourceError(f"only https:// addresses are fetched, and this is {url.scheme[:20]}://")
    if url.userinfo:
        raise SourceError("an address with a user name or password in it is refused")
    if not HOST_NAME.fullmatch(host):
        raise SourceError(f"{quoted(host)} is not the name of a public host")
    if url.port not in (None, HTTPS_PORT):
        raise SourceError(f"port {url.port} is refused; only port {HTTPS_PORT} is fetched from")


def host_of(url: httpx2.URL) -> str:
    """The host as it is asked for; ``url.host`` would decode international names, and fail on malformed ones."""
    return url.raw_host.decode("ascii")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether anybody on the internet may connect there."""
    if address.version == 6 and address not in IPV6_UNICAST:
        return False
    return not any(address in network for network in NOT_PUBLIC)


def require_public(host: str, addresses: Sequence[str]) -> None:
    """Check all addresses of a host.

    Raises:
        SourceError: there are none, or any one of them is not public.
    """
    if not addresses:
        raise SourceError(f"the host {host} cannot be found")
    for address in addresses:
        if not is_public(ip_address(address)):  # which one it is may be news to whoever asks
            raise SourceError(f"{host} leads to an address that is not public")


def check_time(deadline: float) -> None:
    """Give up once ``time.monotonic()`` says ``deadline``.

    Raises:
        SourceError: it does.
    """
    if time.monotonic() > deadline:
        raise SourceError("it takes longer than a fetch may take")


class GuardedBackend(httpcore2.NetworkBackend):
    """Opens connections to public addresses only.

    Args:
        network: the way there.
        max_bytes: how large an answer may be; a connection that carries far more, framing and all, is given up.
        deadline: when ``time.monotonic()`` says this, nothing more is read.
    """

    def __init__(self, network: Network, max_bytes: int, deadline: float) -> None:
        """Take the way there, and its limits."""
        self._network = network
        self._max_bytes = max_bytes
        self._deadline = deadline

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *_: Any, **__: Any
    ) -> httpcore2.NetworkStream:
        """Connect to one of a host's addresses, all of which must be public."""
        addresses = self._resolve(host)
        require_public(host, addresses)
        *first, last = addresses[:MAX_ADDRESSES]
        for address in first:
            with suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return self._connect(address, port, timeout)
        return self._connect(last, port, timeout)

    def _resolve(self, host: str) -> list[str]:
        """All addresses of a host, asked for on another thread: the system's resolver has no deadline of ours."""
        addresses: dict[str, None] = {}

        def ask() -> None:
            with suppress(OSError, UnicodeError):
                addresses.update(dict.fromkeys(self._network.resolve(host)))

        asking = Thread(target=ask, daemon=True)
        asking.start()
        give_up = min(self._deadline, time.monotonic() + self._network.patience.read)
        while asking.is_alive():
            _time_left(give_up, None, httpcore2.ConnectTimeout)
            asking.join(TURN / 10)
        return list(addresses)

    def _connect(self, address: str, port: int, timeout: float | None) -> httpcore2.NetworkStream:
        stream = self._network.connect(address, port, _time_left(self._deadline, timeout, httpcore2.ConnectTimeout))
        return _Paced(stream, self._network.patience, self._max_bytes, self._deadline)


class _Paced(httpcore2.NetworkStream):
    """A connection that gives up on an answer which comes too slowly, lasts too long, or never ends."""

    def __init__(self, stream: httpcore2.NetworkStream, patience: Patience, max_bytes: int, deadline: float) -> None:
        self._stream = stream
        self._patience = patience
        self._max_bytes = max_bytes
        self._deadline = deadline
        self._received = 0
        self._waited = 0.0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        start = time.monotonic()
        data = self._read(max_bytes, min(self._deadline, start + (timeout or math.inf)))
        self._waited += time.monotonic() - start
        self._received += len(data)
        if self._received > 2 * self._max_bytes + 1024**2:
            raise SourceError(f"its server sends far more than the limit of {self._max_bytes:,} bytes")
        if time.monotonic() > self._deadline:
            raise httpcore2.ReadTimeout
        if self._waited > self._patience.grace and self._received < self._patience.slowest * self._waited:
            raise httpcore2.ReadTimeout
        return data

    def _read(self, max_bytes: int, give_up: float) -> bytes:
        """Wait in short turns: cancelling is an exception, which a blocking call would hold back."""
        while True:
            left = _time_left(give_up, None, httpcore2.ReadTimeout)
            with suppress(httpcore2.ReadTimeout):
                return self._stream.read(max_bytes, min(TURN, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _time_left(self._deadline, timeout, httpcore2.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        timeout = _time_left(self._deadline, timeout, httpcore2.ConnectTimeout)
        stream = self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _Paced(stream, self._patience, self._max_bytes, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _time_left(deadline: float, timeout: float | None, late: type[httpcore2.TimeoutException]) -> float:
    """Seconds until the deadline, at most ``timeout``.

    Raises:
        httpcore2.TimeoutException: of the kind ``late``: none are left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise late
    return left if timeout is None else min(left, timeout)
