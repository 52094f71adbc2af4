"""Pictures shown on the desktop, where there is one."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flux_lora.settings import Settings

PATIENCE = 2.0
"""Seconds in which what opens a file has failed, or is taken to work: some of them last as long as the window."""


def show(pictures: Sequence[Path], settings: Settings) -> str | None:
    """Have the desktop's own viewer show pictures; returns why it cannot, if so."""
    if sys.platform == "darwin":
        commands = [["open", *map(str, pictures)]]
    elif not settings.display:
        return "there is no desktop here (neither WAYLAND_DISPLAY nor DISPLAY is set)"
    else:
        commands = [["xdg-open", str(picture)] for picture in pictures]
    if not shutil.which(commands[0][0]):
        return f"{commands[0][0]}, which opens files on the desktop, is not installed"
    for viewer in [_start(command) for command in commands]:
        try:
            if viewer.wait(PATIENCE):
                return f"{commands[0][0]} could not (exit status {viewer.returncode})"
        except subprocess.TimeoutExpired:
            continue
    return None


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
