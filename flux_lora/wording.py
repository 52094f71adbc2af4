"""Text that others wrote, as it may be shown: nothing in it steers a terminal, or passes for a line of the log."""

import sys
import unicodedata

JOINERS = "\u200d\ufe0f"
"""They make one emoji of several and move no other character."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Escape what a terminal would obey, and what turns the direction of writing, as ``\x1b`` or ``\u202e``.

    Args:
        text: of anybody.
        lines: whether it may have several; otherwise their ends are escaped, too.
    """
    return "".join(c if _is_harmless(c) or (lines and c == "\n") else repr(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def say(line: str) -> None:
    """Print one line to standard output."""
    print(printable(line), flush=True)


def complain(line: str) -> None:
    """Print one line to standard error."""
    print(printable(line), file=sys.stderr, flush=True)
