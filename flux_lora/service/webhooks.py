"""Telling an address of the caller's what happens to a prediction, through the guard of `sources`."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from flux_lora.errors import SourceError
from flux_lora.service.jobs import End, Finished, Line, Started, Step
from flux_lora.service.predictions import Prediction
from flux_lora.sources.guard import Network
from flux_lora.sources.tokens import Tokens
from flux_lora.sources.transport import GuardedTransport, TransferError

PAUSE = 0.5
"""Least seconds between two posts of ``output`` or ``logs``, as Cog keeps them."""

TRIES = (0.0, 1.0, 4.0)
"""Seconds before each try to post the end of a prediction; what is on the way to it is posted once."""

MAX_ANSWER = 64 * 1024
SECONDS = 30.0
"""That one post may take."""

Describe = Callable[[], dict[str, Any]]

_tasks: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class Webhook:
    """An address, checked, and the events that it wants."""

    address: str
    events: Sequence[str]
    network: Network

    def follow(self, prediction: Prediction, describe: Describe) -> None:
        """Post what happens from now on, beside; ``describe`` gives the prediction as it stands."""
        task = asyncio.get_running_loop().create_task(self._follow(prediction, describe))
        _tasks.add(task)  # a loop holds tasks weakly
        task.add_done_callback(_tasks.discard)

    async def _follow(self, prediction: Prediction, describe: Describe) -> None:
        posted = 0.0
        async for event in prediction.follow():
            if isinstance(event, End):
                if isinstance(event, Finished) and "output" in self.events:
                    await self._post(describe() | {"status": "processing", "completed_at": None})
                if "completed" in self.events:
                    for pause in TRIES:
                        await asyncio.sleep(pause)
                        if await self._post(describe()):
                            break
            elif isinstance(event, Started) and "start" in self.events:
                await self._post(describe())
            elif isinstance(event, Line | Step) and "logs" in self.events and time.monotonic() - posted >= PAUSE:
                posted = time.monotonic()
                await self._post(describe())

    async def _post(self, content: dict[str, Any]) -> bool:
        return await asyncio.to_thread(self._send, json.dumps(content).encode())

    def _send(self, body: bytes) -> bool:
        request = httpx2.Request(
            "POST", self.address, headers={"Content-Type": "application/json", "User-Agent": "flux-lora"}, content=body
        )
        transport = GuardedTransport(self.network, Tokens(), MAX_ANSWER, time.monotonic() + SECONDS)
        try:
            response = transport.handle_request(request)
            response.close()
        except (SourceError, TransferError):
            return False
        return response.status_code < 500
