"""Cog's folder: three directories for each prediction, in a place that cannot be chosen, which stay for ever.

When it cannot make them, the prediction fails and the server's only slot is lost (``docs/operating.md``).
"""

import contextlib
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from flux_lora.errors import SettingsError
from flux_lora.service.checks import is_id

PREDICTIONS = Path("/tmp/coglet/predictions")  # noqa: S108 - Cog's own choice


def require() -> None:
    """Check that Cog can keep predictions, and that no other user of the machine can read or change them.

    Raises:
        SettingsError: it cannot; the message says why, and what to do.
    """
    for folder in (PREDICTIONS.parent, PREDICTIONS):
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077 and stat.S_ISDIR(found.st_mode):
                folder.chmod(0o700)  # callers' LoRAs and pictures pass through it
        except OSError as error:
            raise _unusable(folder, error.strerror or str(error)) from None
        if not stat.S_ISDIR(found.st_mode):
            raise _unusable(folder, "it is not a folder")
        if found.st_uid not in (0, os.geteuid()):
            raise _unusable(folder, f"it belongs to {_user(found.st_uid)}, who could read and replace what is in it")
    try:
        with tempfile.TemporaryDirectory(prefix="check-", dir=PREDICTIONS) as made:
            (Path(made) / "outputs").mkdir()
    except OSError as error:
        raise _unusable(PREDICTIONS, error.strerror or str(error)) from None


def clear(prediction: str) -> None:
    """Remove what Cog left of a prediction that has ended.

    One whose id is a path, with which Cog made folders anywhere, is not touched.
    """
    if is_id(prediction):
        shutil.rmtree(PREDICTIONS / prediction, ignore_errors=True)


def _unusable(folder: Path, reason: str) -> SettingsError:
    return SettingsError(
        f"Cog's server keeps each prediction in {folder}, which cannot be used: {reason}. Every picture would fail: "
        "remove that folder, or make room there."
    )


def _user(number: int) -> str:
    with contextlib.suppress(KeyError):
        return f"the user {pwd.getpwuid(number).pw_name}"
    return f"the user with number {number}"
