"""A picture of ours -> the inputs and the fine-tune that draw it again."""

from collections.abc import Iterator
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path

from flux_lora.adapters.sources import Sources
from flux_lora.errors import SourceError
from flux_lora.parameters import Parameters
from flux_lora.request import SIZES
from flux_lora.settings import Settings


def inputs_of(parameters: Parameters) -> dict[str, object]:
    """The inputs that ask for one picture with these parameters."""
    size = (parameters.width, parameters.height)
    ratio = next((ratio for ratio, known in SIZES.items() if known == size), None)
    shape = {"aspect_ratio": ratio} if ratio else {"aspect_ratio": "custom", "width": size[0], "height": size[1]}
    inputs = {
        "prompt": parameters.prompt,
        **shape,
        "num_outputs": 1,
        "lora_scale": parameters.lora.scale if parameters.lora else 0,
        "num_inference_steps": parameters.num_inference_steps,
        "model": parameters.model,
        "guidance_scale": parameters.guidance_scale,
        "seed": parameters.seed,
        "output_format": parameters.output_format,
        "output_quality": parameters.output_quality,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def fine_tune_of(parameters: Parameters, settings: Settings, sources: Sources) -> str | None:
    """Where the LoRA of these parameters is on this machine; None when the picture was drawn without one.

    Raises:
        SourceError: it is not here.
    """
    if parameters.lora is None:
        return None
    digest = parameters.lora.digest
    for path in filter(Path.is_file, _at_hand(digest, settings, sources)):
        with suppress(OSError), path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() == digest:
                return str(path.absolute())
    raise SourceError(
        f"The picture was drawn with the LoRA of SHA-256 {digest}, which is not at hand. Put its file into "
        f"{settings.weights}, or name it with COG_WEIGHTS."
    )


def _at_hand(digest: str, settings: Settings, sources: Sources) -> Iterator[Path]:
    if settings.cog_weights:
        yield sources.fetch(settings.cog_weights, root=None)
    if cached := sources.cached(digest):
        yield cached
    base = [settings.weights / name for name in ("dev", "schnell", "safety_checker")]
    for path in sorted(settings.weights.rglob("*.safetensors")):
        if not any(path.is_relative_to(folder) for folder in base):
            yield path
