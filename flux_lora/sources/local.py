"""Local files, and the directory that requests may not leave."""

import stat
from pathlib import Path

from flux_lora.errors import SourceError


def local_file(source: str, root: Path | None) -> Path | None:
    """The regular file that a source names, or None if it names no file.

    Args:
        source: a path; one that is not absolute is relative to ``root``, or to the working directory without one.
        root: the directory that it must not leave, also through links; None for the operator's own paths.

    Raises:
        SourceError: it leads out of the directory, or to a directory or something else that is not a regular file.
    """
    if root is None:
        return _regular(Path(source))
    if ".." in Path(source).parts:
        raise SourceError("a path with '..' is refused")
    bases = root.absolute(), root.resolve()
    if Path(source).is_absolute() and not any(Path(source).is_relative_to(base) for base in bases):
        raise SourceError("it is not under the weights directory")
    return _regular(root / source, within=root.resolve())


def _regular(path: Path, within: Path | None = None) -> Path | None:
    try:
        path = path.resolve()
        if within is not None and not path.is_relative_to(within):  # before anything there could be told to exist
            raise SourceError("the path leads out of the weights directory through a link")
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError):  # a loop of links (an OSError since Python 3.13), a name too long, no permission
        raise SourceError("the path cannot be followed") from None
    if stat.S_ISDIR(mode):
        raise SourceError("it is a directory; name a file in it")
    if not stat.S_ISREG(mode):  # a device, pipe or socket: reading it may never end
        raise SourceError("it is not a regular file")
    return path
