"""What passes between a front and what draws: plain values, which travel between processes.

A front (an API, the page) makes a `Job` of a valid request and follows its events; a `Backend` queues it and has it
drawn somewhere. Neither knows the other's libraries.
"""

import hashlib
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flux_lora.errors import FluxLoraError
from flux_lora.ledger import Metric
from flux_lora.request import Request

MEDIA_TYPES = {"webp": "image/webp", "jpg": "image/jpeg", "png": "image/png"}
"""By output format."""


@dataclass(frozen=True)
class Job:
    """A request that is to be drawn, and for whom."""

    id: str
    request: Request
    owner: str = ""
    """Whose it is, from `access.owner_of`: what waits is bounded and shared by it. Never a key itself."""
    deadline: float = math.inf
    """When ``time.time()`` says this, it is given up, waiting or half drawn."""
    previews: bool = False
    """Whether its steps carry small pictures."""

    @property
    def group(self) -> str:
        """Equal for jobs that need the same weights but for scales: they are best drawn one after the other."""
        sources = sorted({str(source or "") for source, scale in self.request.adapters if scale})
        return hashlib.sha256("\0".join((self.request.model, *sources)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Picture:
    """A finished image: a file."""

    name: str
    """As ``0-seed7.webp``."""
    media_type: str
    content: bytes = field(repr=False)
    seed: int


@dataclass(frozen=True)
class Waiting:
    """It is in the queue."""

    position: int
    """From 1."""


@dataclass(frozen=True)
class Started:
    """A replica has begun with it; again, when the first one died."""

    replica: str


@dataclass(frozen=True)
class Step:
    """A step of one image was taken; not all of them are told."""

    image: int
    """Which of the request's images, from 1."""
    images: int
    step: int
    """Which step of that image, from 1."""
    steps: int
    preview: bytes | None = field(default=None, repr=False)
    """What the image is becoming, a small WebP file; None unless the job asks for previews."""


@dataclass(frozen=True)
class Line:
    """A line of the log."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end: its pictures, in the order of their seeds, without those that were withheld."""

    pictures: tuple[Picture, ...]
    metrics: Mapping[str, Metric]


Kind = Literal["request", "adapter", "withheld", "deadline", "server"]
"""Whose fault a failure is: the request's, its LoRA's, the safety checker's verdict, too little time, or ours."""


@dataclass(frozen=True)
class Failed:
    """The end: it was not drawn."""

    message: str
    """One or two sentences for the caller."""
    kind: Kind
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Cancelled:
    """The end: the caller wanted it no more."""


End = Finished | Failed | Cancelled
Event = Waiting | Started | Step | Line | End


@dataclass(frozen=True)
class Usage:
    """What a replica did for a job, for the operator's metrics; no caller sees it."""

    merges: int
    """How many networks' weights were changed."""
    gpu_bytes: int
    """What its process holds of a GPU's memory now."""


class BusyError(FluxLoraError):
    """The queue, or the caller's share of it, is full."""

    def __init__(self, message: str, retry_after: int, *, of_owner: bool = False) -> None:
        """Take the sentence for the caller, after how many seconds there may be room, and whether its share is full."""
        super().__init__(message)
        self.retry_after = retry_after
        self.of_owner = of_owner


@dataclass(frozen=True)
class State:
    """What a backend says of itself."""

    replicas: int
    """How many are ready to draw, or draw."""
    waiting: int
    running: int


class Backend(Protocol):
    """Queues jobs and has them drawn."""

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Accept a job at once; it is drawn whether or not its events are read, until it is cancelled.

        Returns:
            Its events from now on; the last one is an `End`.

        Raises:
            BusyError: too many wait.
        """

    def cancel(self, job_id: str) -> None:
        """End a job, whether it waits or is being drawn; nothing happens when it has ended."""

    def state(self) -> State:
        """How it stands."""
