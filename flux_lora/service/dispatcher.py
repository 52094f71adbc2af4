"""A backend: the backlog, and the replicas that draw what waits there."""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from flux_lora.service import jobs
from flux_lora.service.backlog import Backlog, Entry, FullError
from flux_lora.service.jobs import BusyError, Cancelled, Event, Failed, Finished, Job, Started, State, Usage, Waiting
from flux_lora.service.logs import Log
from flux_lora.service.metrics import Metrics

ATTEMPTS = 2
"""A job whose replica died is tried once more elsewhere."""

RETRY_SECONDS = (1, 600)
"""Least and most that a caller is told to wait."""


class LostError(Exception):
    """The replica that drew has died."""


class Fleet(Protocol):
    """All replicas."""

    def draw(self, job: Job, *, choose: bool) -> AsyncGenerator[Event | Usage, None]:
        """Wait until a replica is free, and have it draw a job. Closing the iterator ends either.

        Args:
            job: to draw.
            choose: whether one that holds the job's weights is preferred, and for a second waited for.

        Returns:
            `Started` when it begins, then what happens; the last event is its end.

        Raises:
            LostError: the replica died.
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
    """None while it waits."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    attempts: int = 0
    drawing: asyncio.Task[None] | None = None
    replica: str | None = None
    """That draws it, or that is expected to."""
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
            look_ahead: whether the fleet gets one more job when all of its replicas draw: it then knows that jobs wait,
                and may grow.
        """
        self._look_ahead = look_ahead
        self._fleet = fleet
        self._backlog = backlog
        self._metrics = metrics
        self._log = log
        self._tickets: dict[str, _Ticket] = {}
        self._held: dict[str, str] = {}  # by replica, those last that drew last: whose weights it holds
        self._sent: dict[str, _Ticket] = {}  # by job: those that the fleet has
        self._tasks: set[asyncio.Task[None]] = set()  # one for each of these
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
        running = sum(ticket.started is not None for ticket in self._tickets.values())
        return State(replicas=self._fleet.size(), waiting=len(self._tickets) - running, running=running)

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
        """Give jobs to the fleet, as long as some wait and a replica may be free."""
        while len(self._backlog) and not self._closing:
            free = max(1, self._fleet.size()) - len(self._sent)
            if free < (0 if self._look_ahead else 1):
                break
            self._send(free)
        self._tell_positions()

    def _send(self, free: int) -> None:
        """Give the fleet the job that suits a free replica best.

        Args:
            free: how many replicas are.
        """
        busy = {ticket.replica for ticket in self._sent.values()}
        idle = [(name, group) for name, group in reversed(self._held.items()) if name not in busy][: max(free, 0)]
        elsewhere = {ticket.job.group for ticket in self._sent.values()}
        first = self._backlog.first_group()
        name, held = next((one for one in idle if one[1] == first), idle[0] if idle else (None, None))
        entry = self._backlog.take(held, elsewhere)
        if entry is None:
            return
        ticket = self._sent[entry.id] = self._tickets[entry.id]
        ticket.replica, ticket.position = name, 0
        # Where only one that draws holds them, nobody waits for that.
        choose = free > 1 and (entry.group == held or entry.group not in elsewhere)
        task = asyncio.get_running_loop().create_task(self._draw(ticket, choose=choose))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _draw(self, ticket: _Ticket, *, choose: bool) -> None:
        job = ticket.job
        ticket.drawing, ticket.attempts = asyncio.current_task(), ticket.attempts + 1
        try:
            if not ticket.ending:
                async with aclosing(self._fleet.draw(job, choose=choose)) as events:
                    async for event in events:
                        self._note(ticket, event)
        except asyncio.CancelledError:
            if ticket.ending is None:  # not by us: the loop ends
                self._closing = True
                raise
            ticket.drawing.uncancel()  # type: ignore[union-attr]
        except LostError:
            name = ticket.replica or ""
            self._held.pop(name, None)
            self._metrics.lost(name)
            self._log("died", replica=name, request=job.id)
        except Exception:  # noqa: BLE001 - one job's bug must not end the others; it is logged whole
            self._log(traceback.format_exc(), replica=ticket.replica or "", request=job.id)
            ticket.ending = Failed("The server made a mistake with this request; its log says more.", "server")
        finally:
            del self._sent[job.id]
            ticket.drawing = None
        if job.id in self._tickets:
            self._settle(ticket)
        self._look()

    def _note(self, ticket: _Ticket, event: Event | Usage) -> None:
        """Take what a replica says of a job that it draws."""
        match event:
            case Usage():
                self._metrics.used(ticket.replica or "", event)
            case Finished() | Failed() | Cancelled():
                if ticket.started:
                    self._seconds.append(time.monotonic() - ticket.started)
                self._conclude(ticket, event)  # now, for the stream ends only milliseconds later
            case Started(name):
                ticket.started, ticket.replica = time.monotonic(), name
                self._held.pop(name, None)
                self._held[name] = ticket.job.group
                ticket.events.put_nowait(event)
            case _:
                ticket.events.put_nowait(event)

    def _settle(self, ticket: _Ticket) -> None:
        """Go on with a job that is drawn no more, and has not come to its end."""
        if ticket.ending:
            self._conclude(ticket, ticket.ending)
        elif ticket.attempts < ATTEMPTS:
            self._metrics.retried()
            ticket.started = None
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
