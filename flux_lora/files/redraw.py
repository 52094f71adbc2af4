"""A picture of ours -> the inputs and the LoRAs that draw it again, and how the new one compares with it."""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from PIL import Image

from flux_lora.errors import OutputError, RequestError, SourceError
from flux_lora.files import provenance
from flux_lora.files.record import OWN, Lora, Parameters
from flux_lora.files.signing import unsigned
from flux_lora.inputs import DOCUMENTED, SMALLEST_SIDE, Interface
from flux_lora.request import SIZES
from flux_lora.storage import sha256_of


def inputs_of(parameters: Parameters, interface: Interface = DOCUMENTED) -> dict[str, object]:
    """The inputs that ask for one picture with these parameters, but for what names LoRAs, image and mask.

    Of its LoRAs they hold only the scale of the first.

    Args:
        parameters: what the picture's record says.
        interface: whose inputs they are to be.

    Raises:
        RequestError: no inputs do, or only those of another interface.
    """
    inputs = {
        "prompt": parameters.prompt,
        **_shape(parameters),
        "num_outputs": 1,
        "lora_scale": parameters.loras[0].scale if parameters.loras else 0,
        "go_fast": parameters.go_fast or None,
        "num_inference_steps": parameters.num_inference_steps,
        "model": parameters.model,
        "guidance_scale": parameters.guidance_scale,
        "seed": parameters.seed,
        "output_format": parameters.output_format,
        "output_quality": parameters.output_quality,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if unknown := [name for name in inputs if name not in interface]:
        raise RequestError(
            f"The picture needs inputs that the documented interface does not have ({', '.join(unknown)}): draw it "
            "again by the extended one, with --extended."
        )
    return inputs


def check_files(parameters: Parameters, files: Mapping[str, bytes]) -> None:
    """Make sure that the image and the mask that a picture was drawn from are there.

    Args:
        parameters: what the picture's record says.
        files: what is given for the inputs ``image`` and ``mask``.

    Raises:
        RequestError: one is missing, or is another file.
    """
    source = parameters.source
    for name, digest in (("image", source and source.image), ("mask", source and source.mask)):
        if digest and name not in files:
            raise RequestError(
                f"The picture was drawn with the {name} of SHA-256 {digest}, which is not at hand. Give its file with "
                f"-i {name}=@FILE."
            )
        if digest and (found := sha256(files[name]).hexdigest()) != digest:
            raise RequestError(
                f"The picture was drawn with another {name}: its SHA-256 is {digest}, and that of the given file "
                f"{found}."
            )


def _shape(parameters: Parameters) -> dict[str, object]:
    """The inputs that a picture's size follows from, and what it is drawn from."""
    if source := parameters.source:
        return {"prompt_strength": source.prompt_strength, "megapixels": source.megapixels}
    width, height = parameters.width, parameters.height
    if ratio := next((ratio for ratio, known in SIZES.items() if known == (width, height)), None):
        return {"aspect_ratio": ratio}
    if min(width, height) < SMALLEST_SIDE:  # a quarter of a custom size
        return {"aspect_ratio": "custom", "width": 2 * width, "height": 2 * height, "megapixels": "0.25"}
    return {"aspect_ratio": "custom", "width": width, "height": height}


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
    if then.reused_steps is None and "reused_steps" in changed:  # older records do not say
        changed.remove("reused_steps")
    # Records of version 1 know no names of LoRAs.
    loras = [[(lora.digest, lora.scale) for lora in each.loras] for each in (now, then)]
    return changed if loras[0] == loras[1] else [*changed, "loras"]
