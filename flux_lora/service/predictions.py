"""The predictions of one front: what was asked, how far each is, what came of it; for its owner, and some time."""

import asyncio
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from flux_lora.drawing import progress
from flux_lora.errors import FluxLoraError
from flux_lora.ledger import Metric
from flux_lora.request import Request
from flux_lora.service.jobs import (
    Backend,
    Cancelled,
    End,
    Event,
    Failed,
    Finished,
    Job,
    Kind,
    Line,
    Picture,
    Started,
    Step,
)

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
"""Cog's words."""


class TakenError(FluxLoraError):
    """An id that another prediction has."""


@dataclass
class Prediction:
    """One request, from its acceptance on. Read it freely; `Predictions` alone changes it."""

    id: str
    """What its owner calls it."""
    job: Job
    inputs: Mapping[str, object]
    """As they were given."""
    created: datetime
    started: datetime | None = None
    completed: datetime | None = None
    status: Status = "starting"
    lines: list[str] = field(default_factory=list)
    pictures: tuple[Picture, ...] = ()
    metrics: dict[str, Metric] = field(default_factory=dict)
    error: str | None = None
    kind: Kind | None = None
    """Whose fault a failure is."""
    events: list[Event] = field(default_factory=list)
    """All so far; of a prediction that has ended, without previews."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.job.request

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.completed is not None

    async def follow(self) -> AsyncIterator[Event]:
        """Its events from the first on, each as soon as it happens; the last one is its `End`."""
        told = 0
        while True:
            changed = self._changed
            for event in self.events[told:]:
                yield event
            told = max(told, len(self.events))
            if self.ended and told == len(self.events):
                return
            if told == len(self.events):
                await changed.wait()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, for some seconds or however long it takes; returns whether it has ended."""
        try:
            async with asyncio.timeout(seconds):
                while not self.ended:
                    await self._changed.wait()  # the event of this moment: each change brings a new one
        except TimeoutError:
            pass
        return self.ended

    def take(self, event: Event) -> None:
        """Note what has happened."""
        moment = now()
        match event:
            case Started():
                self.started, self.status = self.started or moment, "processing"
            case Line(text):
                self.lines.append(text)
            case Step():
                self.lines.append(progress.line(event.step, event.steps, f"image {event.image}/{event.images}"))
            case Finished(pictures, metrics):
                self.status, self.pictures, self.metrics = "succeeded", pictures, dict(metrics)
            case Failed(message, kind, metrics):
                self.status, self.error, self.kind, self.metrics = "failed", message, kind, dict(metrics)
            case Cancelled():
                self.status = "canceled"
        self.events.append(event)
        if isinstance(event, End):
            self.completed = moment
            if self.started:
                self.metrics["predict_time"] = (moment - self.started).total_seconds()
            self.events = [_without_preview(event) for event in self.events]
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def nbytes(self) -> int:
        """Bytes of its pictures."""
        return sum(len(picture.content) for picture in self.pictures)


class Predictions:
    """All of them, until they are old or take too much memory."""

    def __init__(
        self,
        backend: Backend,
        *,
        deadline: float,
        keep_seconds: float,
        keep_bytes: int,
    ) -> None:
        """Take where they are drawn, and the bounds.

        Args:
            backend: queues and draws.
            deadline: seconds that a request may take, waiting included.
            keep_seconds: how long one is kept after its end.
            keep_bytes: of pictures that are kept; the oldest go first.
        """
        self._backend = backend
        self._deadline = deadline
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes
        self._all: OrderedDict[tuple[str, str], Prediction] = OrderedDict()  # by owner and id
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        request: Request,
        owner: str,
        *,
        prediction_id: str | None = None,
        inputs: Mapping[str, object] | None = None,
        seconds: float | None = None,
        previews: bool = False,
        notes: Sequence[str] = (),
        request_id: str | None = None,
    ) -> Prediction:
        """Begin to draw a request.

        Args:
            request: what is asked.
            owner: whose it is.
            prediction_id: the owner's own name for it; None: one that cannot be guessed.
            inputs: as they were given, to be shown again; None: those of the request.
            seconds: that it may take, waiting included; None, or more than this server allows: as many as it allows.
            previews: whether its steps carry small pictures.
            notes: lines that its log begins with.
            request_id: what the server's log calls it; unique.

        Raises:
            BusyError: too many wait.
            TakenError: the owner has another of that id.
        """
        self._forget()
        prediction_id = prediction_id or secrets.token_hex(13)
        if (owner, prediction_id) in self._all:
            raise TakenError(f"There is a prediction {prediction_id} already.")
        deadline = time.time() + min(seconds or self._deadline, self._deadline)
        job = Job(request_id or uuid.uuid4().hex, request, owner, deadline, previews)
        given = request.model_dump(exclude_unset=True) if inputs is None else inputs
        prediction = Prediction(prediction_id, job, given, now(), lines=list(notes))
        events = self._backend.submit(job)
        self._all[owner, prediction_id] = prediction
        task = asyncio.get_running_loop().create_task(self._take_all(prediction, events))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return prediction

    def get(self, prediction_id: str, owner: str) -> Prediction | None:
        """The prediction that an owner calls so, while it is kept."""
        self._forget()
        return self._all.get((owner, prediction_id))

    def all_of(self, owner: str) -> list[Prediction]:
        """An owner's predictions, the newest first."""
        self._forget()
        return [prediction for (whose, _), prediction in reversed(self._all.items()) if whose == owner]

    def cancel(self, prediction: Prediction) -> None:
        """End it; nothing happens when it has ended."""
        self._backend.cancel(prediction.job.id)

    async def _take_all(self, prediction: Prediction, events: AsyncIterator[Event]) -> None:
        async for event in events:
            prediction.take(event)

    def _forget(self) -> None:
        """Let go of what is old or too much; what has not ended stays."""
        oldest = now() - timedelta(seconds=self._keep_seconds)
        size = sum(prediction.nbytes for prediction in self._all.values())
        for key, prediction in list(self._all.items()):
            if prediction.completed and (prediction.completed < oldest or size > self._keep_bytes):
                size -= prediction.nbytes
                del self._all[key]


def now() -> datetime:
    """This moment, with its time zone."""
    return datetime.now(UTC)


def _without_preview(event: Event) -> Event:
    return replace(event, preview=None) if isinstance(event, Step) and event.preview else event
