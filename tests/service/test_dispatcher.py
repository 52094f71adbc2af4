"""What the dispatcher does when a replica dies: replicas of a few lines, whose deaths can be ordered."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

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
        self.chosen: list[bool] = []
        self._free = asyncio.Queue[Replica]()
        for replica in self.replicas:
            replica.drew = self.drew
            self._free.put_nowait(replica)

    async def draw(self, job: Job, *, choose: bool) -> AsyncGenerator[Event | Usage, None]:
        self.chosen.append(choose)
        replica = await self._free.get()
        try:
            yield Started(replica.name)
            async with aclosing(replica.draw(job)) as events:
                async for event in events:
                    yield event
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


def dispatcher(fleet: Fleet, *, look_ahead: bool = False) -> Dispatcher:
    return Dispatcher(fleet, Backlog(10, 10, 8), Metrics(), Log(), look_ahead=look_ahead)


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


def test_a_job_that_is_cancelled_at_once_is_not_drawn() -> None:
    async def run() -> None:
        fleet = Fleet(draws)
        backend = dispatcher(fleet)
        events = backend.submit(job("a"))
        backend.cancel("a")
        assert [event async for event in events] == [Waiting(1), Cancelled()]
        assert (await events_of(backend, job("b")))[-1] == DONE
        assert fleet.drew == [("0", "b")]

    asyncio.run(run())


def test_the_end_is_told_when_it_is_there_and_the_next_job_waits_for_the_replica() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def lingers(_: Job) -> AsyncGenerator[Event | Usage, None]:
            yield DONE
            await ended.wait()

        fleet = Fleet(lingers)
        backend = dispatcher(fleet)
        assert (await events_of(backend, job("a")))[-1] == DONE
        assert (backend.state().waiting, backend.state().running) == (0, 0)
        second = backend.submit(job("b"))
        assert await anext(second) == Waiting(1)
        await asyncio.sleep(0.05)
        assert fleet.drew == [("0", "a")]
        ended.set()
        assert [event async for event in second] == [Started("0"), DONE]

    asyncio.run(run())


def test_a_replica_that_dies_after_the_end_takes_nothing_back() -> None:
    async def dies_late(_: Job) -> AsyncGenerator[Event | Usage, None]:
        yield DONE
        raise LostError

    async def run() -> None:
        fleet = Fleet(dies_late, draws)
        backend = dispatcher(fleet)
        assert (await events_of(backend, job("a")))[-1] == DONE
        assert (await events_of(backend, job("b")))[-1] == DONE
        assert fleet.drew == [("0", "a"), ("1", "b")]

    asyncio.run(run())


def test_a_replica_with_the_weights_is_asked_for_where_several_are_free_and_it_is_none_that_draws() -> None:
    async def run() -> None:
        drawn = asyncio.Event()

        async def waits(_: Job) -> AsyncGenerator[Event | Usage, None]:
            await drawn.wait()
            yield DONE

        fleet = Fleet(waits, draws, draws)
        backend = dispatcher(fleet)
        first = backend.submit(job("a", replicate_weights="x"))
        assert [await anext(first), await anext(first)] == [Waiting(1), Started("0")]
        await events_of(backend, job("b", replicate_weights="x"))  # only a replica that draws holds x
        await events_of(backend, job("c", replicate_weights="x"))  # another one does
        assert fleet.chosen == [True, False, True]
        last = backend.submit(job("d", replicate_weights="y"))
        await events_of(backend, job("e", replicate_weights="y"))  # one is left
        assert fleet.chosen == [True, False, True, True, False]
        drawn.set()
        assert [event async for event in last][-1] == [event async for event in first][-1] == DONE

    asyncio.run(run())


def test_a_fleet_that_may_grow_gets_one_job_more_than_it_has_replicas() -> None:
    async def run() -> None:
        for look_ahead, given in ((False, 1), (True, 2)):
            fleet = Fleet(never)
            backend = dispatcher(fleet, look_ahead=look_ahead)
            for name in "abc":
                backend.submit(job(name))
            await asyncio.sleep(0.05)
            assert len(fleet.chosen) == given
            assert (backend.state().waiting, backend.state().running) == (2, 1)

    asyncio.run(run())


def test_positions_are_told_as_they_change() -> None:
    async def run() -> None:
        backend = dispatcher(Fleet(never))
        streams = [backend.submit(job(name)) for name in "abc"]
        assert await anext(streams[0]) == Waiting(1)
        assert await anext(streams[0]) == Started("0")
        backend.cancel("a")
        assert [await anext(streams[2]) for _ in range(2)] == [Waiting(2), Waiting(1)]

    asyncio.run(run())


def test_a_group_is_a_set_of_weights() -> None:
    base = job("a").group
    assert job("b", lora_scale=0.5, seed=3).group == base
    assert job("b", lora_scale=0).group != base
    assert job("b", model="schnell").group != base
    assert job("b", replicate_weights="x").group != base
    two = [Job("c", Request.parse(prompt="p", replicate_weights=a).with_more((b, 1.0))).group for a, b in ("xy", "yx")]
    assert two[0] == two[1]
