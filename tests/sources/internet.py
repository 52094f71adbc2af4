"""A small internet on this machine: one real TLS server that plays every host, with its own name service and CA."""

import email.utils
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import trustme

from flux_lora.sources import Network, Patience

HOSTS = (
    "huggingface.co", "cdn-lfs.huggingface.co", "civitai.com", "storage.civitai.com", "replicate.com",
    "replicate.delivery", "example.com", "*.example.com",
)  # fmt: skip
PUBLIC_ADDRESS = "8.8.8.8"
QUICK = Patience(connect=5, read=5, grace=30, pauses=(0.0, 0.0))

Route = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request, and the means to answer it."""

    host: str
    path: str
    headers: dict[str, str]
    wire: BaseHTTPRequestHandler = field(repr=False)
    body: bytes = field(repr=False)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A complete answer; underscores in header names stand for hyphens."""
        self.head(status, **{"content_length": str(len(body)), **headers})
        self.wire.wfile.write(body)

    def head(self, status: int, **headers: str) -> None:
        self.wire.send_response(status)
        for name, value in headers.items():
            self.wire.send_header(name.replace("_", "-"), value)
        self.wire.end_headers()


class Internet:
    """Routes by host and path; records what was asked, and which addresses were connected to."""

    def __init__(self, authority: Path) -> None:
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(authority))
        self.authority = authority
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(*HOSTS).configure_cert(context)
        context.sni_callback = lambda _socket, name, _context: self.server_names.append(name)
        self._server = _Server(self, context)
        self.port = self._server.server_port
        self.reset()

    def reset(self) -> None:
        self.routes: dict[str, Route] = {}
        self.asked: list[Exchange] = []
        self.names: dict[str, list[str]] = {}
        self.resolve: Callable[[str], list[str]] = self._resolve
        self.ports: dict[str, int] = {}
        self.resolved: list[str] = []
        self.connected: list[str] = []
        self.server_names: list[str | None] = []

    def network(self, **patience: Any) -> Network:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.load_verify_locations(self.authority)
        return Network(lambda host: self.resolve(host), self._connect, tls, replace(QUICK, **patience))

    def serve(self, url: str, route: Route | bytes) -> str:
        """Answer at an address; bytes are a file there."""
        self.routes[url.removeprefix("https://")] = file(route) if isinstance(route, bytes) else route
        return url

    def paths(self, host: str) -> list[str]:
        return [exchange.path for exchange in self.asked if exchange.host == host]

    @contextmanager
    def running(self) -> Iterator["Internet"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield self
        self._server.shutdown()
        self._server.server_close()

    def _resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        return self.names.get(host, [PUBLIC_ADDRESS])

    def _connect(self, address: str, port: int, timeout: float | None) -> httpcore2.NetworkStream:
        assert port == 443
        self.connected.append(address)
        return httpcore2.SyncBackend().connect_tcp("127.0.0.1", self.ports.get(address, self.port), timeout)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, internet: Internet, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.internet = internet
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self._context.wrap_socket(request, server_side=True) as tls:
            super().finish_request(tls, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        internet = self.server.internet
        host = self.headers["host"]
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        exchange = Exchange(host, self.path, {k.lower(): v for k, v in self.headers.items()}, self, body)
        internet.asked.append(exchange)
        route = internet.routes.get(f"{host}{urlsplit(self.path).path}", answer(404))
        route(exchange)
        self.close_connection = True

    do_POST = do_GET  # noqa: N815 - a name of the base class

    def log_message(self, *_: object) -> None:
        pass


def file(body: bytes, etag: str | None = None, modified: float | None = None) -> Route:
    """A file as a storage host serves it: with its ETag, ranges and conditions (RFC 9110)."""
    headers = {"etag": etag} if etag else {}
    if modified:
        headers["last_modified"] = email.utils.formatdate(modified, usegmt=True)

    def route(exchange: Exchange) -> None:
        asked = exchange.headers
        if (etag and asked.get("if-none-match") == etag) or (
            modified and asked.get("if-modified-since") == headers["last_modified"]
        ):
            exchange.reply(304, b"", **headers)
        elif "range" in asked and etag and asked.get("if-range") == etag:
            start = int(asked["range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                exchange.reply(416, content_range=f"bytes */{len(body)}")
            else:
                place = f"bytes {start}-{len(body) - 1}/{len(body)}"
                exchange.reply(206, body[start:], content_range=place, **headers)
        else:
            exchange.reply(200, body, **headers)

    return route


def redirect(location: str, status: int = 302) -> Route:
    return lambda exchange: exchange.reply(status, location=location)


def answer(status: int, body: bytes = b"", **headers: str) -> Route:
    return lambda exchange: exchange.reply(status, body, **headers)


def answer_json(value: object, status: int = 200, **headers: str) -> Route:
    return answer(status, json.dumps(value).encode(), content_type="application/json", **headers)


def broken(body: bytes, after: int, **headers: str) -> Route:
    """Promises a whole body and hangs up in the middle."""

    def route(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(len(body)), **headers)
        exchange.wire.wfile.write(body[:after])

    return route


def stalling(body: bytes, after: int, pause: float = 0.05) -> Route:
    """Sends some of the body and then one byte at a time."""

    def route(exchange: Exchange) -> None:
        exchange.head(200, content_length=str(len(body)))
        exchange.wire.wfile.write(body[:after])
        for byte in body[after:]:
            time.sleep(pause)
            exchange.wire.wfile.write(bytes([byte]))

    return route


def in_turn(*routes: Route) -> Route:
    """Each request gets the next route; the last one stays."""
    left = list(routes)
    return lambda exchange: (left.pop(0) if len(left) > 1 else left[0])(exchange)
