"""Replicas in this process: generators of the miniature in place of Ray's. All that is before them is real."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

import uvicorn

from flux_lora.assembly import assemble
from flux_lora.inputs import DOCUMENTED, Interface
from flux_lora.service.app import make_app
from flux_lora.service.backlog import Backlog
from flux_lora.service.dispatcher import Dispatcher
from flux_lora.service.drawing import Preview, Studio
from flux_lora.service.front import Front
from flux_lora.service.jobs import Event, Job, Started, Usage
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics
from flux_lora.service.predictions import Predictions
from flux_lora.settings import Settings
from flux_lora.sources.guard import Network
from tests.conftest import MINI
from tests.server.conftest import free_port, wait_for


class LocalReplica:
    """A studio of this process."""

    def __init__(self, name: str, settings: Settings, preview: Preview | None = None) -> None:
        self.name = name
        self.studio = Studio(lambda log: assemble(settings, log=log), log=lambda *_: None, preview=preview)
        self.drawn: list[Job] = []

    async def draw(self, job: Job) -> AsyncGenerator[Event | Usage, None]:
        self.drawn.append(job)
        async for event in self.studio.draw(job):
            yield event


class LocalFleet:
    """Some studios; as with Ray, whoever wants one waits for it."""

    def __init__(self, replicas: Sequence[LocalReplica]) -> None:
        self.replicas = replicas
        self._free = list(replicas)
        self._changed = asyncio.Condition()

    async def draw(self, job: Job, **_: bool) -> AsyncGenerator[Event | Usage, None]:  # without a preference
        async with self._changed:
            await self._changed.wait_for(lambda: self._free)
            replica = self._free.pop()
        try:
            yield Started(replica.name)
            async with aclosing(replica.draw(job)) as events:
                async for event in events:
                    yield event
        finally:
            self._free.append(replica)
            async with self._changed:
                self._changed.notify()

    def size(self) -> int:
        return len(self.replicas)


def local_front(
    replicas: Sequence[LocalReplica],
    *,
    limit: int = 64,
    limit_per_owner: int = 16,
    deadline: float = 120,
    keep_seconds: float = 3600,
    keep_bytes: int = 2**28,
    network: Network | None = None,
    interface: Interface = DOCUMENTED,
    log: Log | None = None,
) -> Front:
    """A front as the service makes it, before replicas of this process."""
    metrics, log = Metrics(), log or Log()
    backend = Dispatcher(LocalFleet(replicas), Backlog(limit, limit_per_owner, 8), metrics, log)
    predictions = Predictions(backend, deadline=deadline, keep_seconds=keep_seconds, keep_bytes=keep_bytes)
    return Front(predictions, backend, metrics, network or Network(), ("dev", "schnell"), MINI, log, interface)


@contextmanager
def serving(front: Front, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """A real server on loopback before a front, on a thread of this process; gives its address."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(make_app(front, keys, local=True), host="127.0.0.1", port=port, log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
