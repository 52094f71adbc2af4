"""A thread that works beside the one that draws, one task after the other."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as StillRunning
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Done = TypeVar("Done")

TURN_SECONDS = 0.1


class Beside:
    """One thread, and the tasks that it was given."""

    def __init__(self, name: str) -> None:
        """Start no thread yet; the first task does."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._tasks: list[Future[object]] = []

    def submit(self, work: Callable[Given, Done], *args: Given.args, **kwargs: Given.kwargs) -> Future[Done]:
        """Have some work done after what was submitted before."""
        future = self._executor.submit(work, *args, **kwargs)
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(future)  # type: ignore[arg-type]  # a Future is invariant; nothing is put into it here
        return future

    @property
    def idle(self) -> bool:
        """Whether all that was submitted is done."""
        return all(task.done() for task in self._tasks)

    def clear(self) -> None:
        """Take back what has not begun, and wait for what has; errors stay in their futures."""
        for task in self._tasks:
            task.cancel()
        while wait(self._tasks, timeout=TURN_SECONDS).not_done:
            continue
        self._tasks.clear()


def result(future: Future[Done]) -> Done:
    """Wait for a result in short turns.

    A prediction is cancelled by an exception, which a blocking wait would hold back.
    """
    while True:
        try:
            return future.result(timeout=TURN_SECONDS)
        except StillRunning:
            if future.done():
                raise


def succeeded(future: Future[Done]) -> bool:
    """Whether the work is done, without an error."""
    return future.done() and not future.cancelled() and future.exception() is None
