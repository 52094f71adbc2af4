"""LoRAs by the paths that somebody at a terminal knows them by."""

import os
from pathlib import Path

from flux_lora.errors import RequestError, SourceError
from flux_lora.sources.address import is_inline, is_path
from flux_lora.sources.local import only_lora


def of_operator(source: str, weights: Path | None = None) -> str:
    """The operator's own source; a path is made absolute that leads somewhere from here, or else from ``weights``."""
    for start in ("",) if weights is None else ("", str(weights)):
        path = os.path.join(start, os.path.expanduser(source))  # noqa: PTH111, PTH118 - a data: URI is no Path
        if os.path.exists(path):  # noqa: PTH110
            return os.path.abspath(path)  # noqa: PTH100
    return source


def of_request(source: str, weights: Path) -> str:
    """A request's source, which names files from the weights directory: here also from where one stands, if below it.

    Raises:
        RequestError: it is a path that leads elsewhere, or a folder that does not hold exactly one LoRA.
    """
    if "://" in source or is_inline(source):
        return source
    below = os.path.join(weights, source)  # noqa: PTH118
    if os.path.isfile(below) and ".." not in Path(source).parts:  # noqa: PTH113
        return source
    named = below if os.path.exists(below) else of_operator(source)  # noqa: PTH110
    if not os.path.exists(named):  # noqa: PTH110
        return source
    path = Path(named).resolve()
    if not path.is_relative_to(weights.resolve()):
        if not is_path(source):
            return source  # an id, by whose name there happens to be a folder
        raise RequestError(
            f"replicate_weights: {path} is not in {weights}. Name it with --lora, or put it into {weights / 'loras'}."
        )
    try:
        return str(only_lora(path) if path.is_dir() else path)
    except SourceError as error:
        raise RequestError(f"replicate_weights: {source} cannot be used: {error}.") from None
