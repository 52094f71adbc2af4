"""The text that other programs read in an image: the habit of AUTOMATIC1111's web UI, and InvokeAI's JSON.

Programs read it with regular expressions of their own, and what they need differs: A1111, Forge and SD.Next take the
last line, ComfyUI wants a line ``Negative prompt:``, sd-parsers a sampler, Civitai the hashes of LoRAs. It is a
courtesy: what draws an image again is the record in its XMP alone.
"""

import json
import re
from collections.abc import Mapping

from flux_lora.files.record import LONG_PROMPT, Lora, Parameters

_LABELS = re.compile(r"(Negative prompt|^Steps)(?=:)", re.MULTILINE)
"""What programs take for the end of a prompt, when one holds it."""

_UNFIT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
"""Civitai's and A1111's patterns for a LoRA's name hold no more characters."""

LONGEST_NAME = 64


def line(parameters: Parameters) -> str:
    """Write prompt, negative prompt (FLUX.1 has none) and parameters as A1111 and Forge do."""
    prompt = _LABELS.sub(r"\1 ", shown_prompt(parameters))
    return f"{prompt}\nNegative prompt: \n{', '.join(f'{name}: {value}' for name, value in _settings(parameters))}"


def invoke(parameters: Parameters) -> str:
    """Write the JSON that InvokeAI recalls prompt and parameters from, in the PNG text ``invokeai_metadata``."""
    fields = {
        "generation_mode": _mode(parameters),
        "positive_prompt": shown_prompt(parameters),
        "negative_prompt": "",
        "width": parameters.width,
        "height": parameters.height,
        "seed": parameters.seed,
        "steps": parameters.num_inference_steps,
        "scheduler": "euler",
    }
    if parameters.guidance_scale is not None:
        fields["guidance"] = parameters.guidance_scale
    if parameters.source:
        fields["strength"] = parameters.source.prompt_strength
    return json.dumps(fields, ensure_ascii=False)


def shown_prompt(parameters: Parameters) -> str:
    """Shorten the prompt for all places but the record: an EXIF block cannot exceed 64 KiB."""
    prompt = parameters.prompt
    return prompt if len(prompt) <= LONG_PROMPT else prompt[: LONG_PROMPT - 1] + "…"


def system(parameters: Parameters) -> str:
    """Name the model."""
    return f"FLUX.1 {parameters.model}"


def software(parameters: Parameters) -> str:
    """Name the program that drew the image, with its version."""
    return f"flux-lora {parameters.environment.software.flux_lora}"


def names(loras: tuple[Lora, ...]) -> Mapping[str, Lora]:
    """Name each LoRA in characters that all programs take, and no two alike."""
    named: dict[str, Lora] = {}
    for lora in loras:
        name = _UNFIT_FOR_A_NAME.sub("_", lora.name).strip("_.-")[:LONGEST_NAME] or f"lora-{lora.autov2}"
        named[name if name not in named else f"{name}-{lora.autov2}-{len(named)}"] = lora
    return named


def _mode(parameters: Parameters) -> str:
    if not parameters.source:
        return "flux_txt2img"
    return "flux_inpaint" if parameters.source.mask else "flux_img2img"


def _settings(parameters: Parameters) -> list[tuple[str, object]]:
    settings: list[tuple[str, object]] = [
        ("Steps", parameters.num_inference_steps),
        ("Sampler", "Euler"),
        ("Schedule type", "Simple"),
        ("CFG scale", 1),  # FLUX.1 needs no second, unconditional pass; what it calls guidance is an input
    ]
    if parameters.guidance_scale is not None:
        settings.append(("Distilled CFG Scale", parameters.guidance_scale))
    settings += [
        ("Seed", parameters.seed),
        ("Size", f"{parameters.width}x{parameters.height}"),
        ("Model", system(parameters)),
    ]
    if parameters.source:
        settings.append(("Denoising strength", parameters.source.prompt_strength))
    settings.append(("RNG", "CPU"))
    loras = names(parameters.loras)
    if loras:
        hashes = ", ".join(f"{name}: {lora.autov3 or lora.autov2}" for name, lora in loras.items())
        weights = ", ".join(f"{name}: {lora.scale:g}" for name, lora in loras.items())
        settings += [("Lora hashes", f'"{hashes}"'), ("Lora weights", f'"{weights}"')]
    settings.append(("Version", software(parameters)))
    if loras:  # Civitai's own extension ends the line with it
        settings.append(("Hashes", json.dumps({f"lora:{name}": lora.autov2 for name, lora in loras.items()})))
    return settings
