"""Which code draws: a digest over the package's own sources."""

import hashlib
from pathlib import Path

SHOWN = 16
"""How many of the 64 digits name the code."""


def digest_of(package: Path) -> str:
    """Digest the sources in a folder; a package that is installed and a checkout of the same sources are equal.

    Returns:
        The first digits of a SHA-256 over every ``.py`` file in the order of their names: its path in the folder with
        ``/``, a NUL, its size in bytes as decimal digits, a NUL, its bytes.
    """
    sources = {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}
    whole = hashlib.sha256()
    for name in sorted(sources):
        whole.update(f"{name}\0{len(sources[name])}\0".encode())
        whole.update(sources[name])
    return whole.hexdigest()[:SHOWN]


DIGEST = digest_of(Path(__file__).resolve().parents[1])
"""Of this package, as it was when it was imported: a server goes on with that when its files change."""
