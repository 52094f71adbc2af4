"""The operator's LoRAs that callers can ask for by name: the files of the weights directory's ``loras/``."""

from pathlib import Path

from flux_lora.sources.address import SUFFIXES

FOLDER = "loras"


def names(weights: Path) -> dict[str, Path]:
    """The files by name: their path in ``loras/`` without its suffix, as ``ink`` or ``people/anna``; sorted."""
    root = weights / FOLDER
    files = (path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES and path.is_file())
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def source(weights: Path, name: str) -> str | None:
    """What a request asks for to have the LoRA of that name; None when there is none."""
    path = names(weights).get(name)
    return path.relative_to(weights).as_posix() if path else None


def is_source(text: str) -> bool:
    """Whether a text may say where a LoRA is: names of files, addresses and owner/name do; a bare word does not."""
    return "/" in text or ":" in text or text.endswith(SUFFIXES)
