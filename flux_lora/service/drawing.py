"""A generator on a thread of its own, its requests as streams of events: what a replica is inside."""

import asyncio
import contextlib
import ctypes
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import torch

from flux_lora.errors import AdapterError, FluxLoraError, RequestError, SafetyError
from flux_lora.generator import Generator, Step
from flux_lora.ledger import Log, Metric
from flux_lora.service import jobs
from flux_lora.service.jobs import MEDIA_TYPES, Event, Failed, Finished, Job, Kind, Line, Picture, Usage

Preview = Callable[[Generator, Job, Step], bytes | None]
"""Makes a small WebP file of a step's latents, where it can."""

Told = Event | Usage | BaseException
"""What comes from the thread; an exception is the end, too."""

STEP_SECONDS = 0.2
"""Least time between two steps that are told; an image's last one always is."""

STEP_PATIENCE = 1.0
"""Seconds after which a drawing that is to end is interrupted, wherever it is; most end at their next step."""

KINDS: tuple[tuple[type[FluxLoraError], Kind], ...] = (
    (RequestError, "request"),
    (AdapterError, "adapter"),
    (SafetyError, "withheld"),
    (FluxLoraError, "server"),
)


class StoppedError(BaseException):
    """Ends a drawing from within. No `Exception`, so that nothing on the way takes it for a request's error."""


class Studio:
    """Draws one job after the other.

    All of it runs on one thread, set-up included, as in Cog's worker: libraries keep things by thread.
    """

    def __init__(
        self, assemble: Callable[[Log], Generator], log: Callable[[str, str], None], preview: Preview | None = None
    ) -> None:
        """Set up.

        Args:
            assemble: makes the generator, which logs to what it is given.
            log: receives its lines, each with the id of the job that it is about, or nothing.
            preview: makes the small pictures of jobs that ask for them.

        Raises:
            FluxLoraError: set-up is impossible.
        """
        self._log = log
        self._preview = preview
        self._tell: Callable[[Told], object] = _nobody
        self._job = ""  # the id of what is being drawn
        self._stop = threading.Event()
        self._interruptible = threading.Lock()
        self._running = 0  # the thread, while an exception may be raised in it from outside
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "draw")
        self.generator = self._thread.submit(assemble, self._line).result()

    async def draw(self, job: Job) -> AsyncGenerator[Event | Usage, None]:
        """Draw a job; the last event is its end. When the iterator is closed, so is the drawing, at its next step.

        Raises:
            Exception: a bug of ours, or a device that has failed.
        """
        async with aclosing(self.batches(job, 0)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, job: Job, seconds: float) -> AsyncGenerator[list[Event | Usage], None]:
        """The events of `draw`, several at a time where each transfer costs something.

        Args:
            job: to draw.
            seconds: that an event may wait for others; the end waits for nothing.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Told]()
        async with self._turn:
            self._stop.clear()
            self._job = job.id
            self._tell = lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
            drawing = asyncio.wrap_future(self._thread.submit(self._draw, job))
            try:
                ended = False
                while not ended:
                    batch = [_event(await events.get())]
                    send = loop.time() + seconds
                    while not (ended := isinstance(batch[-1], jobs.End)):
                        try:
                            async with asyncio.timeout_at(send):
                                batch.append(_event(await events.get()))
                        except TimeoutError:
                            break
                    yield batch
            finally:
                self._stop.set()
                while not drawing.done():  # the next job must not begin before, however often this is cancelled
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([drawing], timeout=STEP_PATIENCE)
                        self._interrupt()
                self._tell, self._job = _nobody, ""

    def close(self) -> None:
        """End the thread, after what it draws."""
        self._thread.shutdown()

    def _draw(self, job: Job) -> None:
        try:
            with self._interruptible:
                self._running = threading.get_ident()
            told: Told = self._outcome(job)
            with self._interruptible:
                self._running = 0
        except BaseException as error:  # noqa: BLE001 - it is raised again where events are read
            self._running, told = 0, error
        self._tell(told)

    def _interrupt(self) -> None:
        """Raise `StoppedError` in what takes no steps, as a LoRA's download; Cog cancels by the same means."""
        with self._interruptible:
            if self._running:
                raising = ctypes.py_object(StoppedError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._running), raising)

    def _outcome(self, job: Job) -> Finished | Failed:
        metrics: dict[str, Metric] = {}
        request, transformer = job.request, self.generator.parts.transformers.get(job.request.model)
        before = transformer and transformer.state
        try:
            paths = self.generator.draw(request, metrics.__setitem__, self._observer(job))
            pictures = tuple(
                Picture(
                    name=path.name,
                    media_type=MEDIA_TYPES[request.output_format],
                    content=path.read_bytes(),
                    seed=request.seeds[int(path.name.split("-")[0])],
                )
                for path in paths
            )
            self.generator.parts.outputs.discard()
            return Finished(pictures, metrics)
        except FluxLoraError as error:
            return Failed(str(error), next(kind for base, kind in KINDS if isinstance(error, base)), metrics)
        finally:
            device = self.generator.parts.device
            reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
            self._tell(Usage(merges=int((transformer and transformer.state) != before), gpu_bytes=reserved))

    def _observer(self, job: Job) -> Callable[[Step], None]:
        told = 0.0

        def observe(step: Step) -> None:
            nonlocal told
            if self._stop.is_set():
                raise StoppedError
            now = time.monotonic()
            if step.step < step.steps and now - told < STEP_SECONDS:
                return
            told = now
            preview = self._preview(self.generator, job, step) if job.previews and self._preview else None
            self._tell(jobs.Step(step.image, step.images, step.step, step.steps, preview))

        return observe

    def _line(self, text: str) -> None:
        self._log(text, self._job)
        self._tell(Line(text))


def _event(told: Told) -> Event | Usage:
    """An event; an exception is raised."""
    if isinstance(told, BaseException):
        raise told
    return told


def _nobody(_: object) -> None:
    pass
