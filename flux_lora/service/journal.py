"""A line of the log for each HTTP request, and an id that names it in all lines and to the caller."""

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux_lora.service.logs import Log

QUIET = ("/health", "/health-check", "/metrics")
"""What programs ask all day long."""


class Journal:
    """ASGI middleware: gives a request its id, as ``scope["state"]["request_id"]`` and ``X-Request-Id``."""

    def __init__(self, app: ASGIApp, log: Log) -> None:
        """Take what is behind, and where lines go."""
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, started, status = uuid.uuid4().hex, time.monotonic(), 0
        scope.setdefault("state", {})["request_id"] = name

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            if scope["path"] not in QUIET:
                seconds = round(time.monotonic() - started, 3)
                self._log(f"{scope['method']} {scope['path']} {status or 'gone'} in {seconds} s", request=name)
