"""Who may ask: keys, and on loopback the Host and Origin headers, before any route sees a request."""

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from flux_lora.errors import RequestError, SettingsError
from flux_lora.service.checks import MAX_BODY, check_size
from flux_lora.settings import Settings

OPEN_PATHS = frozenset({"/", "/health", "/health-check", "/docs", "/openapi.json"})
"""What is answered without a key: it says nothing of anybody's requests. The page asks for the key itself."""

SHORTEST_KEY = 16
"""Characters below which a key could be guessed."""


def owner_of(key: str) -> str:
    """What predictions are kept under for a key: not the key, and always the same."""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""


def is_loopback(host: str) -> bool:
    """Whether an address, or a name that stands for one, is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def keys_of(settings: Settings, host: str, *, open_to_all: bool) -> tuple[str, ...]:
    """The keys of which callers need one; none where nobody needs one.

    Args:
        settings: name them.
        host: the address that is listened on.
        open_to_all: whether the operator has said that everybody may ask.

    Raises:
        SettingsError: a key could be guessed or cannot be sent, or there is none where there must be.
    """
    text = settings.api_keys.get_secret_value() if settings.api_keys else ""
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    for key in keys:
        if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
            raise SettingsError(
                f"FLUX_API_KEYS holds a key that could be guessed or cannot be sent: take at least {SHORTEST_KEY} "
                'letters and digits, as `python -c "import secrets; print(secrets.token_urlsafe())"` makes them.'
            )
    if not keys and not open_to_all and not is_loopback(host):
        raise SettingsError(
            f"Whoever reaches {host} could use this server. Name keys for its callers in FLUX_API_KEYS, or say --open."
        )
    return keys


class Access:
    """ASGI middleware: lets a request pass, with its owner in ``scope["state"]["owner"]``, or answers it."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, local: bool, max_body: int = MAX_BODY) -> None:
        """Take what is behind, and who may pass.

        Args:
            app: what is behind.
            keys: bearer keys; empty: nobody needs one.
            local: whether it is served on loopback, where a web page of anybody's could otherwise ask through the
                browser of whoever visits it.
            max_body: bytes of a request that are read.
        """
        self._app = app
        self._keys = [(key.encode(), owner_of(key)) for key in keys]
        self._local = local
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._foreign(headers) or _too_long(headers, self._max_body)
        owner = self._owner(headers.get(b"authorization", ""))
        if not refusal and owner is None and scope["path"] not in OPEN_PATHS and not _is_static(scope["path"]):
            refusal = 401, "A key is needed: send the header Authorization: Bearer KEY."
        if refusal:
            await _answer(send, *refusal)
            return
        scope.setdefault("state", {})["owner"] = owner or ""
        await self._app(scope, receive, send)

    def _owner(self, authorization: str) -> str | None:
        """Whose request it is; None when it may not be made."""
        if not self._keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() not in ("bearer", "token"):  # the second is that of older clients of Replicate
            return None
        # All are compared, each in constant time, so that neither a key nor its place shows in how long it takes.
        matches = [owner for key, owner in self._keys if hmac.compare_digest(key, given.strip().encode("latin-1"))]
        return matches[0] if matches else None

    def _foreign(self, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """On loopback: a name that was made to lead here (DNS rebinding), or a page of another site that asks."""
        if not self._local:
            return None
        host = headers.get(b"host", "")
        if not is_loopback(_host(f"//{host}")):
            return 403, "This server listens on loopback, and is asked by another name: use 127.0.0.1 or localhost."
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Pages of other sites may not ask this server."
        return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_static(path: str) -> bool:
    return path.startswith("/static/")


def _too_long(headers: dict[bytes, str], limit: int) -> tuple[int, str] | None:
    length = headers.get(b"content-length")
    if length is None and b"transfer-encoding" not in headers:
        return None  # no body at all
    try:
        check_size(int(length) if length and length.isascii() and length.isdigit() else None, limit)
    except RequestError as error:
        return 413 if length else 411, str(error)
    return None


async def _answer(send: Send, status: int, message: str) -> None:
    code = "invalid_api_key" if status == 401 else None
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"detail": message, "error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
