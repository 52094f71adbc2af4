import io
import re
import time

import pytest

from flux_lora.drawing import progress

CLIENTS = re.compile(r"^\s*(?P<percentage>\d+)%\s*\|.+?\|\s*(?P<current>\d+)\/(?P<total>\d+)")
"""As the official clients for Python and JavaScript match each line, from the last one upward."""


@pytest.mark.parametrize(
    ("step", "steps", "percent"), [(0, 28, 0), (1, 28, 3), (14, 28, 50), (27, 28, 96), (1, 1, 100)]
)
def test_clients_read_a_line(step: int, steps: int, percent: int) -> None:
    found = CLIENTS.match(progress.line(step, steps, "image 1/4"))
    assert found
    assert found.groups() == (str(percent), str(step), str(steps))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_whole_lines_at_most_one_a_second_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = io.StringIO()
    show = progress.printer(log)
    for step in range(1, 29):
        now += 0.3
        show(step, 28, "image 1/1")
    lines = log.getvalue().splitlines(keepends=True)
    assert all(line.endswith("image 1/1\n") and "\r" not in line for line in lines)
    counts = [int(CLIENTS.match(line)["current"]) for line in lines]  # type: ignore[index]
    assert counts == [1, 5, 9, 13, 17, 21, 25, 28]


def test_a_terminal_has_a_bar_that_goes_away() -> None:
    terminal = Terminal()
    show = progress.printer(terminal)
    for step in (1, 2):
        show(step, 2, "image 1/1")
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
