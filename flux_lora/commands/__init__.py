"""What ``scripts/`` runs: one module for each command.

The commands, and only they, know the project's folder: its ``weights`` are the default from wherever a command is
called, and its miniature draws where there are no weights yet.
"""

import os
import sys
from pathlib import Path

from flux_lora.request import MODELS
from flux_lora.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]


def weights_directory(settings: Settings) -> Path:
    """The weights directory as an absolute path: ``FLUX_WEIGHTS`` as seen from here, else the project's ``weights``."""
    return settings.weights.absolute() if "weights" in settings.model_fields_set else PROJECT / "weights"


def prepare_environment() -> None:
    """Make paths in the environment absolute, for this process and its children elsewhere, and choose the weights.

    ``FLUX_WEIGHTS`` becomes the miniature where there are no base weights yet.

    A weights directory that is named, or that holds ``dev/`` or ``schnell/``, is used as it is, damaged or not; one
    that set-up will fill (``FLUX_DOWNLOAD``) too.

    Raises:
        SettingsError: the environment holds a setting that cannot be used.
    """
    settings = Settings.from_environment()
    weights = weights_directory(settings)
    if "weights" not in settings.model_fields_set and not settings.download:
        miniature = weights / "mini"
        if miniature.is_dir() and not any(os.path.lexists(weights / model) for model in MODELS):
            weights = miniature
            print(
                "No base weights yet: drawing with weights/mini, a tiny model that knows a hundred things on plain "
                "backgrounds. `scripts/download_weights` fetches FLUX.1.",
                file=sys.stderr,
            )
    os.environ["FLUX_WEIGHTS"] = str(weights)
    if settings.cog_weights and os.path.exists(settings.cog_weights):  # noqa: PTH110 - Path fails on a long data: URI
        os.environ["COG_WEIGHTS"] = str(Path(settings.cog_weights).absolute())
    for name in ("adapter_cache", "cache"):
        if name in settings.model_fields_set:
            os.environ[f"FLUX_{name.upper()}"] = str(getattr(settings, name).absolute())
