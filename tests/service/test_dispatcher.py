"""What the dispatcher does when a replica dies: replicas of a few lines, whose deaths can be ordered."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from flux_lora.request import Request
from flux_lora.service.backlog import Backlog
from flux_lora.service.dispatcher import Dispatcher, LostError
from flux_lora.service.jobs import Cancelled, Event, Failed, Finished, Job, Started, Usage, Waiting
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics

Draw = Callable[[Job], AsyncGenerator[Event | Usage, None]]
DONE = Finished((), {})


class Fleet:
    """Replicas that draw as they are told, the first free one first."""

    def __init__(self, *draws: Draw) -> None:
        self.replicas = [Replica(str(k), draw) for k, draw in enumerate(draws)]
        self.drew: list[tuple[str, str]] = []
        self._free = asyncio.Queue[Replica]()
        for replica in self.replicas:
            replica.drew = self.drew
            self._free.put_nowait(replica)

    @asynccontextmanager
    async def free(self, group: str) -> AsyncIterator["Replica"]:  # noqa: ARG002 - these hold nothing
        replica = await self._free.get()
        try:
            yield replica
        finally:
            self._free.put_nowait(replica)

    def size(self) -> int:
        return len(self.replicas)


class Replica:
    def __init__(self, name: str, draw: Draw) -> None:
        self.name = name
        self._draw = draw
        self.drew: list[tuple[str, str]] = []

    async def draw(self, job: Job) -> AsyncGenerator[Event | Usage, None]:
        self.drew.append((self.name, job.id))
        async for event in self._draw(job):
            yield event


async def draws(_: Job) -> AsyncGenerator[Event | Usage, None]:
    yield DONE


async def dies(_: Job) -> AsyncGenerator[Event | Usage, None]:
    yield Usage(1, 0)
    raise LostError


async def errs(_: Job) -> AsyncGenerator[Event | Usage, None]:
    yield Usage(1, 0)
    raise ZeroDivisionError


async def never(_: Job) -> AsyncGenerator[Event | Usage, None]:
    await asyncio.sleep(1000)
    yield DONE


def job(name: str, **inputs: object) -> Job:
    return Job(name, Request.parse(prompt="a tomato", **inputs))


def dispatcher(fleet: Fleet) -> Dispatcher:
    return Dispatcher(fleet, Backlog(10, 10, 8), Metrics(), Log())


async def events_of(backend: Dispatcher, asked: Job) -> list[Event]:
    async with asyncio.timeout(5):
        return [event async for event in backend.submit(asked)]


def test_a_job_whose_replica_dies_is_tried_once_more_elsewhere() -> None:
    async def run() -> None:
        fleet = Fleet(dies, draws)
        assert await events_of(dispatcher(fleet), job("a")) == [
            Waiting(1),
            Started("0"),
            Waiting(1),
            Started("1"),
            DONE,
        ]
        assert fleet.drew == [("0", "a"), ("1", "a")]

    asyncio.run(run())


def test_and_then_fails_clearly() -> None:
    async def run() -> None:
        fleet = Fleet(dies, dies, draws)
        *_, end = await events_of(dispatcher(fleet), job("a"))
        assert isinstance(end, Failed)
        assert end.kind == "server"
        assert "died, and so did what tried it again" in end.message
        assert len(fleet.drew) == 2
        assert (await events_of(dispatcher(Fleet(draws)), job("b")))[-1] == DONE

    asyncio.run(run())


def test_a_bug_fails_its_own_job_only() -> None:
    async def run() -> None:
        backend = dispatcher(Fleet(errs))
        ends = [(await events_of(backend, job(name)))[-1] for name in "ab"]
        assert all(isinstance(end, Failed) and "made a mistake" in end.message for end in ends)

    asyncio.run(run())


def test_a_job_is_cancelled_before_during_and_after() -> None:
    async def run() -> None:
        backend = dispatcher(Fleet(never))
        first, second = backend.submit(job("a")), backend.submit(job("b"))
        assert [await anext(first), await anext(first)] == [Waiting(1), Started("0")]
        backend.cancel("b")
        assert [event async for event in second][-1] == Cancelled()
        backend.cancel("a")
        backend.cancel("a")
        assert [event async for event in first] == [Cancelled()]
        backend.cancel("a")
        state = backend.state()
        assert (state.waiting, state.running) == (0, 0)

    asyncio.run(run())


def test_positions_are_told_as_they_change() -> None:
    async def run() -> None:
        backend = dispatcher(Fleet(never))
        streams = [backend.submit(job(name)) for name in "abc"]
        assert await anext(streams[0]) == Waiting(1)
        assert await anext(streams[0]) == Started("0")
        backend.cancel("a")
        third = [await anext(streams[2]) for _ in range(3)]
        assert third == [Waiting(3), Waiting(2), Waiting(1)]

    asyncio.run(run())


def test_a_group_is_a_set_of_weights() -> None:
    base = job("a").group
    assert job("b", lora_scale=0.5, seed=3).group == base
    assert job("b", lora_scale=0).group != base
    assert job("b", model="schnell").group != base
    assert job("b", replicate_weights="x").group != base
    two = [Job("c", Request.parse(prompt="p", replicate_weights=a).with_more((b, 1.0))).group for a, b in ("xy", "yx")]
    assert two[0] == two[1]
