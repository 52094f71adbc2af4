"""The files of a prediction: an image with its parameters inside, in a directory of the prediction's own."""

import fcntl
import io
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from flux_lora.errors import OutputError
from flux_lora.files import provenance
from flux_lora.files.record import Parameters
from flux_lora.files.signing import Signer
from flux_lora.inputs import OutputFormat
from flux_lora.storage import write_whole

FULL_CHROMA_QUALITY = 90
"""JPEG quality from which colour keeps its full resolution (4:4:4), as in ImageMagick."""

WEBP_METHOD, WEBP_METHOD_AT_100 = 2, 4
"""libwebp's effort. 2 takes 0.4 to 0.5 of the time of its default, 4, for files of nearly the same size; at quality 100
they would be a quarter larger (`scripts/bench save`)."""

HOME = "flux-lora-outputs-"
"""How the directory of a process begins; ``SUFFIX`` random characters follow."""

SUFFIX = 8

GONE = ".gone"
"""How the name of a prediction's directory ends that is being removed."""

REMOVAL_ATTEMPTS = 100
"""More than a worker's last files and a client's impatient cancels can spoil."""


def file_name(index: int, seed: int, output_format: OutputFormat) -> str:
    """Name the image of a batch: ``0-seed7.webp``."""
    return f"{index}-seed{seed}.{output_format}"


def webp_method(quality: int) -> int:
    """How much effort libwebp makes for a quality, where the operator has not chosen it."""
    return WEBP_METHOD if quality < 100 else WEBP_METHOD_AT_100


def write(content: bytes, path: Path) -> None:
    """Write a file, whole or not at all.

    Args:
        content: of an image, encoded.
        path: in a directory that exists; when it is removed meanwhile, it is not made again.

    Raises:
        OutputError: the file could not be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error


def encode(
    image: Image.Image,
    parameters: Parameters,
    *,
    embed: bool,
    signer: Signer | None = None,
    source: bytes | None = None,
) -> bytes:
    """Encode an RGB image as its parameters ask; but for a signature, equal arguments give equal bytes.

    Args:
        image: its size is the file's.
        parameters: give format, quality and effort, and go into the file.
        embed: False leaves all of them out; the mark that the image is AI-generated, or made of another by AI, is
            always written.
        signer: adds content credentials.
        source: the image that this one was made of, as the caller gave it; only a signer looks at it.

    Raises:
        OutputError: the image cannot be signed.
    """
    quality = parameters.output_quality
    match parameters.output_format:
        case "webp":
            options = provenance.webp_options(parameters, embed=embed)
            content = _saved(image, "WEBP", quality=quality, method=parameters.webp_method, **options)
        case "jpg":
            chroma = "4:4:4" if quality is not None and quality >= FULL_CHROMA_QUALITY else "4:2:0"
            options = provenance.jpeg_options(parameters, embed=embed) | {"quality": quality, "subsampling": chroma}
            try:
                content = _saved(image, "JPEG", optimize=True, **options)
            except OSError:  # Pillow keeps too little room for noise of high quality, and only when it optimizes
                content = _saved(image, "JPEG", **options)
        case "png":
            # Runs alone are found as well as matches are after PNG's filters, in a quarter of the time.
            options = provenance.png_options(parameters, embed=embed)
            content = _saved(image, "PNG", compress_type=zlib.Z_RLE, **options)
    return signer.sign(content, parameters, embed=embed, source=source) if signer else content


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Outputs:
    """Directories for the files of one prediction at a time, which outlive it: Cog reads them after ``run()``.

    A prediction's directory goes when the next one starts, when it is discarded, and at exit. The end of a process is
    seen by a small shell that waits for it, because Cog's worker often ends without running any Python (Ctrl-C in a
    terminal, SIGTERM to its group, SIGKILL). What stays when that shell is killed too, the next process sweeps: a lock
    on each home says whether its owner lives.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Sweep what dead processes left in ``parent`` (the system's temporary directory) and make a home there.

        Raises:
            OutputError: there is no place for files.
        """
        parent = parent or Path(tempfile.gettempdir())
        try:
            _sweep(parent)
            # It gets the name that others sweep by when it is locked, and not before.
            unlocked = Path(tempfile.mkdtemp(prefix="flux-lora-new-", dir=parent))
            self._lock = _lock(unlocked)
            self.home = unlocked.rename(parent / (HOME + unlocked.name[-SUFFIX:]))
        except OSError as error:
            raise _no_directory(parent, error) from error
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", "trap '' HUP INT TERM; cat; rm -rf -- \"$1\"", "sh", self.home],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self) -> Path:
        """Remove the files of the prediction before, and give the next one an empty directory.

        Raises:
            OutputError: there is no place for files any more.
        """
        self.discard()
        try:
            if not self.home.is_dir():  # something that cleans temporary directories took it
                self.home.mkdir(mode=0o700)
                os.close(self._lock)
                self._lock = _lock(self.home)
            return Path(tempfile.mkdtemp(dir=self.home))
        except OSError as error:
            raise _no_directory(self.home, error) from error

    def discard(self) -> None:
        """Remove all files.

        Safe while workers still write: their files fail to appear. Safe under Cog's cancellation too, an exception that
        can be raised anywhere, so here as well, and more than once: the removal is finished before it goes on.
        """
        interruption: BaseException | None = None
        for _ in range(REMOVAL_ATTEMPTS):
            try:
                leftovers = list(self.home.iterdir()) if self.home.is_dir() else []
                for leftover in leftovers:
                    # Renamed first: whoever writes faster than files are removed fails from now on.
                    gone = leftover if leftover.suffix == GONE else leftover.rename(leftover.with_suffix(GONE))
                    shutil.rmtree(gone, ignore_errors=True)
                if not leftovers:
                    break
            except FileNotFoundError:  # something else cleans up, too
                continue
            except BaseException as error:  # noqa: BLE001 - raised again below
                interruption = error
        if interruption:
            raise interruption

    def require(self, paths: Iterable[Path]) -> None:
        """Make sure that files are there: Cog leaves a missing one out of an answer that it calls a success.

        Raises:
            OutputError: one is missing or empty.
        """
        for path in paths:
            if not path.is_file() or not path.stat().st_size:
                raise OutputError(f"{path.name} was written and is gone: something empties {self.home.parent}.")

    def close(self) -> None:
        """Remove the home, as the end of the process does."""
        self._janitor.communicate()
        os.close(self._lock)


def _no_directory(parent: Path, error: OSError) -> OutputError:
    return OutputError(
        f"No directory for images can be made in {parent}: {error.strerror}. Start again with TMPDIR set to a place "
        "where files may stay."
    )


def _sweep(parent: Path) -> None:
    for home in parent.glob(HOME + "?" * SUFFIX):
        with suppress(OSError):  # its owner lives, it is another user's, or it went meanwhile
            lock = _lock(home)
            shutil.rmtree(home, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int:
    """Lock one of this user's directories until its descriptor is closed or the process ends, however it ends.

    Raises:
        OSError: another process holds it, or it is a link or another user's.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{directory} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
