"""Local files, and the directory that requests may not leave."""

import stat
from pathlib import Path

from flux_lora.errors import SourceError

SHOWN = 8
"""How many of a folder's files a message names."""


def local_file(source: str, root: Path | None) -> Path | None:
    """The regular file that a source names, or None if it names no file.

    Args:
        source: a path; one that is not absolute is relative to ``root``, or to the working directory without one.
        root: the directory that it must not leave, also through links; None for the operator's own paths.

    Raises:
        SourceError: it leads out of the directory, or to something else that is not a regular file. The operator's own
            may lead to a directory that holds one LoRA.
    """
    if root is None:
        path = Path(source)
        return _regular(only_lora(path) if path.is_dir() else path)
    if ".." in Path(source).parts:
        raise SourceError("a path with '..' is refused")
    bases = root.absolute(), root.resolve()
    if Path(source).is_absolute() and not any(Path(source).is_relative_to(base) for base in bases):
        raise SourceError("it is not under the weights directory")
    return _regular(root / source, within=root.resolve())


def only_lora(folder: Path) -> Path:
    """The one ``.safetensors`` file of a folder, such as diffusers' scripts write.

    Raises:
        SourceError: it has several, or none; the message names those that there are, also one folder deeper.
        OSError: it cannot be read.
    """
    files = _loras(folder)
    if len(files) == 1:
        return folder / files[0]
    if not files:
        deeper = [
            f"{below.name}/{name}" for below in sorted(folder.iterdir()) if below.is_dir() for name in _loras(below)
        ]
        raise SourceError(f"it is a folder without a .safetensors file{_named('; below it are', deeper)}")
    raise SourceError(f"it is a folder with {len(files)} .safetensors files{_named(', so name one of', files)}")


def _loras(folder: Path) -> list[str]:
    """Names of what may be LoRAs; hidden files are what macOS puts beside others."""
    return sorted(file.name for file in folder.glob("[!.]*") if file.suffix.lower() == ".safetensors")


def _named(how: str, names: list[str]) -> str:
    return f"{how} {', '.join(names[:SHOWN])}{' …' * (len(names) > SHOWN)}" if names else ""


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
