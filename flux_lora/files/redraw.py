"""A picture of ours -> the inputs and the LoRAs that draw it again, and how the new one compares with it."""

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from flux_lora.errors import OutputError, SourceError
from flux_lora.files import provenance
from flux_lora.files.record import OWN, Lora, Parameters
from flux_lora.files.signing import unsigned
from flux_lora.request import SIZES
from flux_lora.storage import sha256_of


def inputs_of(parameters: Parameters) -> dict[str, object]:
    """The inputs that ask for one picture with these parameters; of its LoRAs only the scale of the first."""
    size = (parameters.width, parameters.height)
    ratio = next((ratio for ratio, known in SIZES.items() if known == size), None)
    shape = {"aspect_ratio": ratio} if ratio else {"aspect_ratio": "custom", "width": size[0], "height": size[1]}
    inputs = {
        "prompt": parameters.prompt,
        **shape,
        "num_outputs": 1,
        "lora_scale": parameters.loras[0].scale if parameters.loras else 0,
        "num_inference_steps": parameters.num_inference_steps,
        "model": parameters.model,
        "guidance_scale": parameters.guidance_scale,
        "seed": parameters.seed,
        "output_format": parameters.output_format,
        "output_quality": parameters.output_quality,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def find_loras(loras: Sequence[Lora], candidates: Iterable[Path]) -> dict[str, Path]:
    """Find the LoRAs of a picture among files.

    Args:
        loras: as the picture's record has them.
        candidates: files that may be one of them, the most likely ones first; what cannot be read is passed over.

    Returns:
        The file of each digest.

    Raises:
        SourceError: some are not there; the message says which.
    """
    wanted, found = {lora.digest: lora for lora in loras}, dict[str, Path]()
    files = filter(Path.is_file, candidates)
    while wanted and (path := next(files, None)):
        with suppress(OSError):
            if wanted.pop(digest := sha256_of(path), None):
                found[digest] = path.absolute()
    if wanted:
        missing = " and ".join(
            f"SHA-256 {digest}" + (f" ({lora.name!r})" if lora.name else "") for digest, lora in wanted.items()
        )
        which = f"the LoRA of {missing}, which" if len(loras) == 1 else f"{len(loras)} LoRAs, of which {missing}"
        raise SourceError(
            f"The picture was drawn with {which} {'is' if len(wanted) == 1 else 'are'} not at hand. Put its file into "
            "the weights directory, or name it with --lora."
        )
    return found


def compare(new: Path, original: bytes, parameters: Parameters) -> str:
    """Say how a picture that was drawn again compares with the one that it was drawn from.

    Args:
        new: the file that was drawn.
        original: the file that it was drawn from.
        parameters: what the original's record says.

    Returns:
        Words that follow a file's name and a colon. Signatures differ each time and are not compared.
    """
    content = new.read_bytes()
    if content == original:
        return "byte for byte"
    if unsigned(content) == unsigned(original):
        return "byte for byte, but for the signature, which differs each time"
    same = _pixels(content) == _pixels(original)
    try:
        now = provenance.read(new)
    except OutputError:
        lacking = "it was drawn with FLUX_EMBED_PARAMETERS=0"
        return f"the same pixels; {lacking}" if same else f"not the same; why cannot be told, since {lacking}"
    reasons = now.environment.differences(parameters.environment) + _changed(now, parameters)
    why = ", ".join(reasons)
    if not same:
        return f"not the same: {why or 'although all parameters are equal'}"
    if not reasons:
        return "the same pixels, with other metadata"
    if all(reason.startswith(OWN) for reason in reasons):
        return f"the same pixels, by other code: {why}"
    return f"the same pixels, although {why}"


def _pixels(file: bytes) -> tuple[tuple[int, int], bytes]:
    with Image.open(io.BytesIO(file)) as image:
        return image.size, image.convert("RGB").tobytes()


def _changed(now: Parameters, then: Parameters) -> list[str]:
    """The names of the fields that differ, but for the environment."""
    names = [name for name in Parameters.model_fields if name not in ("environment", "loras")]
    changed = [name for name in names if getattr(now, name) != getattr(then, name)]
    # Records of version 1 know no names of LoRAs.
    loras = [[(lora.digest, lora.scale) for lora in each.loras] for each in (now, then)]
    return changed if loras[0] == loras[1] else [*changed, "loras"]
