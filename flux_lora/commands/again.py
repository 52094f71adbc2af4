"""The LoRAs of a picture that is drawn again, found by their digests among the files at hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_lora.errors import RequestError
from flux_lora.files import redraw
from flux_lora.files.record import Lora
from flux_lora.request import MODELS
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from flux_lora.sources.address import label
from flux_lora.sources.local import operator_source
from flux_lora.storage import sha256_of


def find(
    loras: Sequence[Lora], named: Sequence[str], sources: Sources, settings: Settings
) -> list[tuple[Path, float]] | None:
    """File and scale of each LoRA of a picture; None where other ones are to take their place.

    Args:
        loras: as the picture's record has them.
        named: the operator's sources, which may be some of them.
        sources: fetch those.
        settings: the operator's, with their fine-tune and weights directory.

    Raises:
        RequestError: one of ``named`` is none of them, and another one is.
        SourceError: one of ``named`` cannot be fetched, or LoRAs are nowhere; the message has their digests.
    """
    given: dict[str, tuple[str, Path]] = {}
    for source in named:
        path = sources.fetch(source, root=None)
        given[sha256_of(path)] = source, path
    strangers = given.keys() - {lora.digest for lora in loras}
    if given and strangers == given.keys():
        return None
    if strangers:
        digest = min(strangers)
        raise RequestError(f"{label(given[digest][0])} is none of the picture's LoRAs: its SHA-256 is {digest}.")
    missing = [lora for lora in loras if lora.digest not in given]
    found = {digest: path for digest, (_, path) in given.items()}
    found |= redraw.find_loras(missing, _at_hand([lora.digest for lora in missing], sources, settings))
    return [(found[lora.digest], lora.scale) for lora in loras]


def _at_hand(digests: Sequence[str], sources: Sources, settings: Settings) -> Iterator[Path]:
    """Files that may be one of these: in the cache of downloads, the operator's fine-tune, in the weights directory."""
    for digest in digests:
        if cached := sources.cached(digest):
            yield cached
    if settings.cog_weights:
        yield sources.fetch(operator_source(settings.cog_weights, settings.weights), root=None)
    base = [settings.weights / name for name in (*MODELS, "safety_checker")]
    for path in sorted(settings.weights.rglob("*.safetensors")):
        if not any(path.is_relative_to(folder) for folder in base):
            yield path
