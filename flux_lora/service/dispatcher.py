"""A backend: the backlog, and the replicas that draw what waits there."""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Protocol

from flux_lora.service import jobs
from flux_lora.service.backlog import Backlog, Entry, FullError
from flux_lora.service.jobs import BusyError, Cancelled, Event, Failed, Job, Started, State, Usage, Waiting
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics

ATTEMPTS = 2
"""A job whose replica died is tried once more elsewhere."""

RETRY_SECONDS = (1, 600)
"""Least and most that a caller is told to wait."""


class LostError(Exception):
    """The replica that drew, or was to draw, has died."""


class Replica(Protocol):
    """One that is free, and kept free for us."""

    name: str

    def draw(self, job: Job) -> AsyncGenerator[Event | Usage, None]:
        """Draw a job; the last event is its end. Closing the iterator ends it.

        Raises:
            LostError: the replica died.
        """


class Fleet(Protocol):
    """All replicas."""

    def free(self, group: str) -> AbstractAsyncContextManager[Replica]:
        """Wait until one is free, and keep it so; one that holds a group's weights if there is a choice.

        Raises:
            LostError: it died before it got a job.
        """

    def size(self) -> int:
        """How many are ready to draw, or draw."""


@dataclass
class _Ticket:
    """A job that was accepted and has not ended."""

    job: Job
    entry: Entry
    accepted: float
    """By ``time.monotonic``, as what follows."""
    started: float | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    attempts: int = 0
    drawing: asyncio.Task[None] | None = None
    ending: Failed | Cancelled | None = None
    """What is to end its drawing."""
    position: int = 0
    """As last told."""
    timer: asyncio.TimerHandle | None = None


class Dispatcher:
    """Queues jobs, and has each drawn by a replica that is free, its adapters merged already where that can be.

    All of it runs on one event loop.
    """

    def __init__(self, fleet: Fleet, backlog: Backlog, metrics: Metrics, log: Log, *, look_ahead: bool = False) -> None:
        """Take the parts.

        Args:
            fleet: the replicas.
            backlog: decides who is next; empty.
            metrics: is told what happens.
            log: receives the operator's lines.
            look_ahead: whether the fleet is asked for one more replica when all of them draw: it then knows that jobs
                wait, and may grow.
        """
        self._look_ahead = look_ahead
        self._fleet = fleet
        self._backlog = backlog
        self._metrics = metrics
        self._log = log
        self._tickets: dict[str, _Ticket] = {}
        self._held: dict[str, str] = {}  # by replica: whose weights it holds
        self._busy: set[str] = set()  # the replicas that draw
        self._tasks: set[asyncio.Task[None]] = set()  # each waits for a replica, or has one draw
        self._looking = False  # one of them waits for a replica
        self._closing = False
        self._seconds: deque[float] = deque(maxlen=32)  # that drawing took

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Accept a job at once; it is drawn whether or not its events are read, until it is cancelled.

        Raises:
            BusyError: too many wait.
        """
        try:
            entry = self._backlog.add(job.id, job.group, job.owner)
        except FullError as full:
            self._metrics.refused()
            whose = "You have as many requests waiting as one caller may" if full.of_owner else "The queue is full"
            raise BusyError(
                f"{whose}: try again in some seconds.", self._retry_after(), of_owner=full.of_owner
            ) from None
        ticket = self._tickets[job.id] = _Ticket(job, entry, time.monotonic())
        if job.deadline < float("inf"):
            left = job.deadline - time.time()
            ticket.timer = asyncio.get_running_loop().call_later(left, self._end, job.id, _late())
        self._tell_positions()
        self._look()
        return _until_end(ticket.events)

    def cancel(self, job_id: str) -> None:
        """End a job, whether it waits or is being drawn; nothing happens when it has ended."""
        self._end(job_id, Cancelled())

    def state(self) -> State:
        """How it stands."""
        return State(replicas=self._fleet.size(), waiting=len(self._backlog), running=len(self._busy))

    def _end(self, job_id: str, ending: Failed | Cancelled) -> None:
        ticket = self._tickets.get(job_id)
        if ticket is None or ticket.ending:
            return
        ticket.ending = ending
        if ticket.drawing:
            ticket.drawing.cancel()
        elif self._backlog.remove(job_id):
            self._conclude(ticket, ending)
            self._tell_positions()

    def _look(self) -> None:
        """Have somebody wait for a free replica, if there is a job for it, and may be a replica."""
        idle = len(self._busy) < max(1, self._fleet.size())
        if len(self._backlog) and not (self._looking or self._closing) and (idle or self._look_ahead):
            self._looking = True
            task = asyncio.get_running_loop().create_task(self._serve())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        """Wait for a free replica, and have it draw one job."""
        looking = True
        try:
            several = self._fleet.size() - len(self._busy) > 1
            async with self._fleet.free(self._backlog.first_group() if several else "") as replica:
                self._looking = looking = False
                elsewhere = {group for name in self._busy if (group := self._held.get(name))}
                entry = self._backlog.take(self._held.get(replica.name), elsewhere)
                self._look()  # another may be free, too
                if entry:
                    self._tell_positions()
                    await self._draw(self._tickets[entry.id], replica)
        except LostError:
            pass  # it died before it got a job
        except asyncio.CancelledError:  # not by us, who end drawings within `_draw`: the loop ends
            self._closing = True
            raise
        finally:
            if looking:
                self._looking = False
            self._look()

    async def _draw(self, ticket: _Ticket, replica: Replica) -> None:
        job, name = ticket.job, replica.name
        ticket.drawing, ticket.attempts = asyncio.current_task(), ticket.attempts + 1
        ticket.started = started = time.monotonic()
        ticket.position = 0
        self._busy.add(name)
        self._held[name] = job.group
        ticket.events.put_nowait(Started(name))
        try:
            async with aclosing(replica.draw(job)) as events:
                async for event in events:
                    if isinstance(event, Usage):
                        self._metrics.used(name, event)
                    elif isinstance(event, jobs.End):
                        self._seconds.append(time.monotonic() - started)
                        self._conclude(ticket, event)  # now, since the stream ends only milliseconds later
                    else:
                        ticket.events.put_nowait(event)
        except asyncio.CancelledError:
            if ticket.ending is None:
                raise
            ticket.drawing.uncancel()  # type: ignore[union-attr]
        except LostError:
            self._held.pop(name, None)
            self._metrics.lost(name)
            self._log("died", replica=name, request=job.id)
        except Exception:  # noqa: BLE001 - one job's bug must not end the others; it is logged whole
            self._log(traceback.format_exc(), replica=name, request=job.id)
            ticket.ending = Failed("The server made a mistake with this request; its log says more.", "server")
        finally:
            self._busy.discard(name)
            ticket.drawing = None
        if self._tickets.get(job.id) is not ticket:
            return  # it has ended
        if ticket.ending:
            self._conclude(ticket, ticket.ending)
        elif ticket.attempts < ATTEMPTS:
            self._metrics.retried()
            self._backlog.put_back(ticket.entry)
            self._tell_positions()
        else:
            self._conclude(
                ticket, Failed("What drew this died, and so did what tried it again. Try another request.", "server")
            )

    def _conclude(self, ticket: _Ticket, end: jobs.End) -> None:
        if ticket.timer:
            ticket.timer.cancel()
        del self._tickets[ticket.job.id]
        now = time.monotonic()
        waited = (ticket.started or now) - ticket.accepted
        drew = now - ticket.started if ticket.started else 0.0
        self._metrics.ended(end, waited, drew)
        told = f"failed: {end.message}" if isinstance(end, Failed) else type(end).__name__.lower()
        self._log(told, request=ticket.job.id, owner=ticket.job.owner, waited=round(waited, 3), drew=round(drew, 3))
        ticket.events.put_nowait(end)

    def _tell_positions(self) -> None:
        for position, job_id in enumerate(self._backlog.ids(), start=1):
            ticket = self._tickets[job_id]
            if ticket.position != position:
                ticket.position = position
                ticket.events.put_nowait(Waiting(position))

    def _retry_after(self) -> int:
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        estimate = mean * len(self._backlog) / max(1, self._fleet.size()) / 4  # a quarter of the queue is gone by then
        least, most = RETRY_SECONDS
        return round(min(max(estimate, least), most))


def _late() -> Failed:
    return Failed("It was not drawn by the deadline: the queue is long, or the request large. Try again.", "deadline")


async def _until_end(events: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    while True:
        event = await events.get()
        yield event
        if isinstance(event, jobs.End):
            return
