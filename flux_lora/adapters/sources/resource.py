"""A source, found: where its bytes are and what is known about them before they are fetched."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """A file to download; ``fixed`` if what ``key`` stands for can never change."""

    key: str
    url: str
    fixed: bool
    sha256: str | None = None
    size: int | None = None


def listing(names: list[str]) -> str:
    """File names for a message; a repository can have thousands."""
    shown = ", ".join(names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
