"""A generator on its thread, as a replica holds it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from flux_lora.errors import OutputError
from flux_lora.generator import Generator
from flux_lora.request import Request
from flux_lora.service.drawing import Studio
from flux_lora.service.jobs import Event, Failed, Finished, Job, Line, Step, Usage
from tests.server.conftest import SMALL
from tests.service.local import LocalReplica

WITNESS = {"prompt": "a tomato", "seed": 7, **SMALL}


def job(**inputs: object) -> Job:
    return Job("id", Request.parse(**WITNESS | inputs))


async def events_of(studio: Studio, asked: Job) -> list[Event | Usage]:
    return [event async for event in studio.draw(asked)]


def with_allow(replica: LocalReplica, allow: Callable[[Request], None]) -> Studio:
    """A studio of the same generator, but for what is done first for each request."""
    parts = replica.studio.generator.parts
    return Studio(lambda log: Generator(replace(parts, allow=allow, log=log)), lambda *_: None)


def test_events_end_with_the_pictures(replica: LocalReplica) -> None:
    asked = job(num_outputs=2)
    events = asyncio.run(events_of(replica.studio, asked))
    *before, end = events
    assert isinstance(end, Finished)
    assert [(p.name, p.seed, p.media_type) for p in end.pictures] == [
        ("0-seed7.webp", 7, "image/webp"),
        ("1-seed8.webp", 8, "image/webp"),
    ]
    drawn = [path.read_bytes() for path in replica.studio.generator.draw(asked.request)]
    assert [picture.content for picture in end.pictures] == drawn
    steps = [event for event in before if isinstance(event, Step)]
    assert [(s.image, s.images, s.step, s.steps) for s in steps if s.step == s.steps] == [(1, 2, 2, 2), (2, 2, 2, 2)]
    assert Line("seed: 7") in before
    assert isinstance(before[-1], Usage)


@pytest.mark.parametrize("steps", [1, 50])
def test_when_nobody_listens_any_more_it_stops_and_the_next_is_drawn(replica: LocalReplica, steps: int) -> None:
    async def run() -> list[Event | Usage]:
        drawing = replica.studio.draw(job(num_inference_steps=steps, num_outputs=4))
        await anext(drawing)
        await drawing.aclose()
        return await events_of(replica.studio, job())

    assert isinstance(asyncio.run(run())[-1], Finished)


def test_what_takes_no_steps_is_interrupted(replica: LocalReplica) -> None:
    """As a download that drips: it waits in short turns, and nothing but an exception ends it."""
    began: list[float] = []

    def drip(_: Request) -> None:
        began.append(time.monotonic())
        while len(began) == 1:
            time.sleep(0.01)

    studio = with_allow(replica, drip)

    async def run() -> list[Event | Usage]:
        drawing = asyncio.ensure_future(anext(studio.draw(job())))
        while not began:
            await asyncio.sleep(0.01)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        assert time.monotonic() - began[0] < 10
        return await events_of(studio, job())

    assert isinstance(asyncio.run(run())[-1], Finished)
    studio.close()


def test_an_error_of_ours_is_a_failure_and_a_bug_comes_out_as_itself(replica: LocalReplica) -> None:
    def full(_: Request) -> None:
        raise OutputError("The disk is full.")

    studio = with_allow(replica, full)
    end = asyncio.run(events_of(studio, job()))[-1]
    assert isinstance(end, Failed)
    assert (end.message, end.kind) == ("The disk is full.", "server")
    studio.close()

    def bug(_: Request) -> None:
        raise ZeroDivisionError

    studio = with_allow(replica, bug)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(events_of(studio, job()))
    studio.close()
