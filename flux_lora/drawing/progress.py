"""How far a picture is, in the form that clients look for in a log: ``  50%|█████     | 14/28 image 1/4``."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[int, int, str], None]
"""Called with the number of finished steps, that of all steps, and what is drawn."""

SECONDS = 1.0
"""Between two lines in a log."""

WIDTH = 10


def line(step: int, steps: int, title: str) -> str:
    """One line of progress. Official clients take percentage and counts of a log's last line of this form."""
    full = round(WIDTH * step / steps)
    return f"{100 * step // steps:4}%|{'█' * full}{' ' * (WIDTH - full)}| {step}/{steps} {title}".rstrip()


def printer(stream: TextIO | None = None) -> Progress:
    """What shows the progress of one picture: a bar on a terminal; elsewhere lines, at most one a second and the last.

    Args:
        stream: where to; None: standard output, whatever it is at each step.
    """
    shown = -SECONDS

    def show(step: int, steps: int, title: str) -> None:
        nonlocal shown
        out = stream or sys.stdout
        if out.isatty():
            print(f"\r{line(step, steps, title)}\x1b[K", end="\r\x1b[K" if step == steps else "", file=out, flush=True)
        elif step == steps or time.monotonic() - shown >= SECONDS:
            shown = time.monotonic()
            print(line(step, steps, title), file=out, flush=True)

    return show
