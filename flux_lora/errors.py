"""Every error that a caller can meet.

Each message is one or two sentences that say what is wrong and what to do; none of them needs a traceback.
"""


class FluxLoraError(Exception):
    """Base of all errors that flux_lora raises on purpose."""


class RequestError(FluxLoraError, ValueError):
    """A request that cannot be drawn; the message names the field, its value and the bound."""


class SettingsError(FluxLoraError, ValueError):
    """An operator's setting that cannot be used; the message names the variable."""


class WeightsError(FluxLoraError):
    """Base weights that are missing, damaged or of another architecture."""


class DeviceMemoryError(FluxLoraError):
    """A device without room for the models, or for a request; the message holds the numbers."""


class AdapterError(FluxLoraError):
    """A fine-tune that cannot be used."""


class SourceError(AdapterError):
    """A fine-tune that could not be fetched, or whose source was refused."""


class FormatError(AdapterError):
    """A fine-tune file that cannot be applied to FLUX.1: damaged, of another model, or with unknown keys."""


class DrawingError(FluxLoraError):
    """An image that could not be drawn, although the request was valid."""


class SafetyError(FluxLoraError):
    """A request whose images were all withheld by the safety checker; the message names their seeds."""


class OutputError(FluxLoraError):
    """An image file that could not be written, or read back."""
