"""Small pictures of ours with parameters of every kind."""

import random
from pathlib import Path

from PIL import Image

from flux_lora.files import outputs
from flux_lora.files.record import Environment, Lora, Parameters, Software

SOFTWARE = Software(flux_lora="0.1.0", torch="2.13.0", diffusers="0.42.1", transformers="5.23.0", pillow="13.0.0")
ENVIRONMENT = Environment(base="5f" * 32, device="cpu", dtype="float32", software=SOFTWARE)
PARAMETERS = Parameters(
    prompt="ein Croissant <auf> \"Rot\" & 'Blau'",
    seed=2**63 - 1,
    width=48,
    height=32,
    model="dev",
    num_inference_steps=28,
    guidance_scale=3.5,
    loras=(Lora(digest="a1" * 32, scale=-0.1, name="my style, No. 1", data_digest="c3" * 32),),
    output_format="webp",
    output_quality=80,
    environment=ENVIRONMENT,
)

FORMATS = ("webp", "jpg", "png")
PROMPTS = {
    "empty": "",
    "plain": PARAMETERS.prompt,
    "not XML": "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\ufffe\uffff ]]> &#0; &amp; <!--",
    "emoji": "🥐👩🏽‍🚀🏳️‍🌈 𝒳",
    "right to left": "שלום \u202eمرحبا\u202c",
    "one segment": "'" * 4_000,
    "deflated": "& " * 50_000,
    "long": "".join(random.Random(7).choices('ab é日🥐\n\t"\\&<', k=100_000)),
}


def written(
    folder: Path, output_format: str, prompt: str = PARAMETERS.prompt, *, embed: bool = True, **changes: object
) -> Path:
    """Write a red picture whose record is ``PARAMETERS`` but for what is given."""
    quality = None if output_format == "png" else 80
    given = {"prompt": prompt, "output_format": output_format, "output_quality": quality} | changes
    path = folder / f"0.{output_format}"
    parameters = PARAMETERS.model_copy(update=given)
    outputs.write(outputs.encode(Image.new("RGB", (48, 32), "red"), parameters, embed=embed), path)
    return path


LINE = (
    f"{PARAMETERS.prompt}\nNegative prompt: \nSteps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
    "Distilled CFG Scale: 3.5, Seed: 9223372036854775807, Size: 48x32, Model: FLUX.1 dev, RNG: CPU, "
    'Lora hashes: "my_style_No._1: c3c3c3c3c3c3", Lora weights: "my_style_No._1: -0.1", Version: flux-lora 0.1.0, '
    'Hashes: {"lora:my_style_No._1": "a1a1a1a1a1"}'
)
