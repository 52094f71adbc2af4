"""Server-sent events: their form, and the connection that they go over."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Nothing on the way may hold events back."""

PING_SECONDS = 15.0
"""Of silence, after which a comment is sent, so that nothing on the way takes the connection for dead."""


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event as it is sent."""
    return format_sse_event(event=name, data_str=json.dumps(data))


async def kept_alive(events: AsyncIterator[bytes], seconds: float = PING_SECONDS) -> AsyncIterator[bytes]:
    """The same events, with comments between them while there are none."""
    waiting = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=seconds)
            if not done:
                yield KEEPALIVE_COMMENT
                continue
            if (sent := waiting.result()) is None:
                return
            yield sent
            waiting = asyncio.ensure_future(anext(events, None))
    finally:
        waiting.cancel()
