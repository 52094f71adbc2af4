"""What a header alone tells about an adapter's tensors: wrong shapes are refused before any tensor is read."""

from collections import defaultdict
from collections.abc import Mapping

import torch

from flux_lora.checkpoint.header import Header, TensorInfo
from flux_lora.errors import FormatError
from flux_lora.lora.formats.algorithms import Given, Part, build
from flux_lora.lora.formats.contents import NUMBERS, separate
from flux_lora.lora.formats.layouts import Layer
from flux_lora.lora.formats.names import Name
from flux_lora.lora.rotations import PeftOft

MAX_SIDE = 2**40
"""Rows or columns. No tensor of FLUX.1 has a millionth of that, and torch computes sizes in 64 bits."""

MAX_NUMBERS = 4096
"""In what should be one number; one that nothing reads does no harm."""

MAX_STAGES = 16
"""Of BOFT, each of which has at most a square matrix."""

READ_TO_BE_BUILT = ("oft", "boft", "rescale")
"""How the parts begin whose numbers decide what is built."""


def check_shapes(header: Header, names: Mapping[str, Name]) -> None:
    """Build the updates of all layers from tensors that have shapes and no numbers.

    Args:
        header: of the file.
        names: what its keys say.

    Raises:
        FormatError: a part is missing, has a wrong shape, or does not go with the others.
    """
    layers: dict[tuple[str, str], Layer] = {}
    spellings: dict[tuple[str, str], dict[str, dict[str, Part]]] = defaultdict(lambda: defaultdict(dict))
    for key, name in names.items():
        _check_size(key, header.tensors[key], name)
        layer = name.component, name.layer.name
        layers[layer] = name.layer
        part = Part(key, torch.empty(header.tensors[key].shape, device="meta"))
        spellings[layer][name.stem].setdefault(name.part, part)
    given = Given(lambda _: 1.0, lambda: None, PeftOft())
    for layer, by_stem in spellings.items():
        for parts in separate(by_stem).values():
            parts.pop("alpha", None)
            if parts and not any(part.startswith(READ_TO_BE_BUILT) for part in parts):
                build(layers[layer], parts, given)


def _check_size(key: str, info: TensorInfo, name: Name) -> None:
    if max(info.shape, default=0) > MAX_SIDE:
        raise FormatError(f"{key!r} has shape {list(info.shape)}, which no layer of FLUX.1 has")
    if name.part in NUMBERS and info.elements > MAX_NUMBERS:
        raise FormatError(f"{key!r} has shape {list(info.shape)} and must be one number")
    if name.part.startswith(READ_TO_BE_BUILT) and info.elements > MAX_STAGES * max(name.layer.shape) ** 2:
        raise FormatError(
            f"{key!r} has shape {list(info.shape)}, too large for {name.layer.name} of FLUX.1 with its shape "
            f"{list(name.layer.shape)}"
        )
