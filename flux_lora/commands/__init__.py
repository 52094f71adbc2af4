"""What ``scripts/`` runs: one module for each command.

The commands, and only they, know the project's folder: its ``weights`` are the default from wherever a command is
called, and its miniature draws while nothing has been put there yet.
"""

import os
import sys
from pathlib import Path

from flux_lora.commands import paths
from flux_lora.errors import WeightsError
from flux_lora.request import MODELS
from flux_lora.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]
MINIATURE = "mini"

SHIPPED = (MINIATURE, "README.md")
"""What the project itself has in ``weights``."""


def operator_settings() -> Settings:
    """Read the operator's settings as a command means them: with the project's ``weights``, and absolute paths.

    Raises:
        SettingsError: the environment holds a setting that cannot be used.
    """
    return _absolute(Settings.from_environment())


def _absolute(settings: Settings) -> Settings:
    changes: dict[str, object] = {"weights": PROJECT / "weights"}
    for name in ("weights", "adapter_cache", "cache", "c2pa_certificate", "c2pa_key"):
        if name in settings.model_fields_set:
            changes[name] = getattr(settings, name).absolute()
    if settings.cog_weights:
        changes["cog_weights"] = paths.of_operator(settings.cog_weights)
    return settings.model_copy(update=changes)


def drawing_settings() -> Settings:
    """Read the operator's settings for drawing: with the miniature, while ``weights`` is as the project came.

    A weights directory that is named, or that set-up will fill (``FLUX_DOWNLOAD``), is used as it is.

    Raises:
        SettingsError: the environment holds a setting that cannot be used.
        WeightsError: something was put into ``weights``, and no base model.
    """
    asked = Settings.from_environment()
    settings = _absolute(asked)
    weights = settings.weights
    if "weights" in asked.model_fields_set or asked.download or not (weights / MINIATURE).is_dir():
        return settings
    if any(os.path.lexists(weights / model) for model in MODELS):
        return settings
    added = sorted(path.name for path in weights.iterdir() if path.name not in SHIPPED and path.name[0] != ".")
    if added:
        raise WeightsError(
            f"{weights} holds {', '.join(added[:3])} and no base model. Fetch one with `scripts/download_weights dev` "
            f"(34 GB), or try the miniature with FLUX_WEIGHTS={weights / MINIATURE}, to which LoRAs for FLUX.1 do not "
            "fit."
        )
    print(
        "No base weights yet: drawing with weights/mini, a tiny model that knows a hundred things on plain "
        "backgrounds. `scripts/download_weights` fetches FLUX.1.",
        file=sys.stderr,
    )
    return settings.model_copy(update={"weights": weights / MINIATURE})


def environment_for(settings: Settings) -> dict[str, str]:
    """The environment in which another process reads the paths of these settings."""
    names = ("weights", "adapter_cache", "cache", "c2pa_certificate", "c2pa_key")
    environment = {f"FLUX_{name.upper()}": str(path) for name in names if (path := getattr(settings, name))}
    return environment | ({"COG_WEIGHTS": settings.cog_weights} if settings.cog_weights else {})
