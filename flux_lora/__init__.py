"""Serve a fine-tuned FLUX.1 model exactly: documented inputs in, image files out.

Example:
    ``FLUX_WEIGHTS`` names the weights directory. The files stay until the next request, or the end of the process::

        from shutil import copy
        from flux_lora import Request, Settings, assemble

        generator = assemble(Settings.from_environment())
        for picture in generator.draw(Request.parse(prompt="a tomato", seed=7), record=print):
            copy(picture, ".")

``Request.parse(EXTENDED, prompt=…, image=…)`` takes the extended inputs, an image and a mask among them.

What is in ``__all__`` is for everybody. It is imported when it is first asked for, since drawing takes PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_lora.assembly import assemble
    from flux_lora.errors import (
        AdapterError,
        DeviceMemoryError,
        DrawingError,
        FluxLoraError,
        FormatError,
        OutputError,
        RequestError,
        SafetyError,
        SettingsError,
        SourceError,
        WeightsError,
    )
    from flux_lora.generator import Generator
    from flux_lora.inputs import EXTENDED
    from flux_lora.request import Request
    from flux_lora.settings import Settings

__version__ = "0.2.0.dev0"

__all__ = [
    "EXTENDED",
    "AdapterError",
    "DeviceMemoryError",
    "DrawingError",
    "FluxLoraError",
    "FormatError",
    "Generator",
    "OutputError",
    "Request",
    "RequestError",
    "SafetyError",
    "Settings",
    "SettingsError",
    "SourceError",
    "WeightsError",
    "assemble",
]

_MODULES = {
    "EXTENDED": "inputs",
    "Generator": "generator",
    "Request": "request",
    "Settings": "settings",
    "assemble": "assembly",
}
"""Where each of them is; the errors are in ``errors``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
