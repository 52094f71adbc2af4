"""A weights directory -> loaded pipelines; dev and schnell share text encoders, tokenizers and VAE."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from flux_lora import devices
from flux_lora.errors import DeviceMemoryError, WeightsError
from flux_lora.layout import Part, differing, fingerprint, inspect, read_config
from flux_lora.quiet import diffusers
from flux_lora.tensor_files import read_header

ADAPTABLE = ("text_encoder", "text_encoder_2", "transformer")
"""The components that adapters change."""

OLDER_CLIP_PREFIX = "text_model."
"""Files of CLIP that transformers 4 wrote, FLUX.1's own among them, have it; the module's parameters do not."""

WORKING_BYTES = {"cuda": 5 * 2**30, "cpu": 2**30}
"""Room beyond the weights for activations. An estimate: it has not been measured on a GPU yet."""

LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
"""What diffusers and transformers raise on damaged files."""


@dataclass(frozen=True)
class Checkpoints:
    """What a weights directory holds, by model."""

    pipelines: Mapping[str, Any]
    """A FluxPipeline each; the shared components are the same objects."""
    fingerprints: Mapping[str, str]
    """Of the base weights that each draws with."""
    stored: Mapping[str, Mapping[str, Mapping[str, Callable[[], Tensor]]]]
    """Of each component, how to read a parameter's base weights once more from its file."""
    notes: list[str]
    """What the operator should know, for the log."""


def load(directory: Path, device: torch.device, dtype: torch.dtype) -> Checkpoints:
    """Load what a weights directory holds to ``device``, each shared component once.

    Raises:
        WeightsError: no base weights, or weights that are damaged or of another architecture.
        DeviceMemoryError: the device has too little free memory for them.
    """
    layout = inspect(directory)
    parts = {part.folder: part for components in layout.values() for part in components.values()}
    require_memory(sum(part.elements for part in parts.values()) * dtype.itemsize, device)
    loaded = dict(_load_parts(parts.values(), device, dtype))
    pipelines = {
        model: diffusers.FluxPipeline(**{name: loaded[part.folder] for name, part in components.items()})
        for model, components in layout.items()
    }
    return Checkpoints(
        pipelines,
        {model: fingerprint(components.values()) for model, components in layout.items()},
        {model: {name: dict(_stored(components[name])) for name in ADAPTABLE} for model, components in layout.items()},
        differing(directory, layout),
    )


def require_memory(weights: int, device: torch.device) -> None:
    """Refuse a device without room for ``weights`` bytes and the work on them.

    Raises:
        DeviceMemoryError: with the numbers.
    """
    needed, free = weights + WORKING_BYTES[device.type], devices.free_memory(device)
    if free < needed:
        raise DeviceMemoryError(
            f"The models need {needed / 2**30:.1f} GiB of memory on {device} ({weights / 2**30:.1f} GiB of weights) "
            f"and {free / 2**30:.1f} GiB are free: use a larger device, or leave one of dev/ and schnell/ out of the "
            "weights directory."
        )


def _load_parts(parts: Iterable[Part], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Path, Any]]:
    parts = list(parts)
    total = sum(part.bytes for part in parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", leave=False) as bar:
        for part in parts:
            bar.set_postfix_str(f"{part.folder.parent.name}/{part.name}", refresh=True)
            yield part.folder, _load_network(part, device, dtype) if part.files else _from_pretrained(part)
            bar.update(part.bytes)


def _load_network(part: Part, device: torch.device, dtype: torch.dtype) -> Any:
    """Each tensor goes from the mapped file to its device and type by itself: no second full copy in host memory."""
    if issubclass(part.cls, diffusers.ModelMixin):
        _check_architecture(part)
    network, report = _from_pretrained(
        part, dtype=dtype, device_map={"": str(device)}, use_safetensors=True, output_loading_info=True
    )
    _refuse(part, "missing", report["missing_keys"])
    _refuse(part, "not part of it", report["unexpected_keys"])
    _refuse(part, "of another shape", report["mismatched_keys"])
    return network.eval().requires_grad_(False)


def _from_pretrained(part: Part, **options: Any) -> Any:
    try:
        return part.cls.from_pretrained(part.folder, local_files_only=True, **options)
    except LIBRARY_ERRORS as error:
        raise WeightsError(f"{part.folder} cannot be loaded as {part.cls.__name__}: {error}") from error


def _check_architecture(part: Part) -> None:
    """Compare a diffusers model's files with what its config.json describes, tensor by tensor, before loading."""
    try:
        with torch.device("meta"):
            network = part.cls.from_config(read_config(part.folder))
    except LIBRARY_ERRORS as error:
        raise WeightsError(f"{part.folder / 'config.json'} does not describe a {part.cls.__name__}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: info.shape for file in part.files for name, info in read_header(file).tensors.items()}
    _refuse(part, "missing", expected.keys() - found.keys())
    _refuse(part, "not part of it", found.keys() - expected.keys())
    _refuse(part, "of another shape", (name for name in expected if expected[name] != found[name]))


def _refuse(part: Part, problem: str, keys: Iterable[object]) -> None:
    if names := sorted(map(str, keys)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WeightsError(
            f"{part.folder} does not hold what its config.json describes: {problem}: {', '.join(names[:3])}{more}."
        )


def _stored(part: Part) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each tensor of a part's files by the name of its parameter, mapped when it is read, and not before."""

    def read(file: Path, key: str) -> Tensor:
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
            return tensor

    for file in part.files:
        for key in read_header(file).tensors:
            yield key.removeprefix(OLDER_CLIP_PREFIX), partial(read, file, key)
