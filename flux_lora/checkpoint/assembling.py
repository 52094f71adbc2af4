"""A weights directory -> pipelines whose networks wait for weights; dev and schnell share all but transformers."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flux_lora.checkpoint.components import NETWORKS
from flux_lora.checkpoint.layout import Part, differing, fingerprint, inspect, known_words
from flux_lora.checkpoint.reading import StoredTensor, fill, stored_tensors
from flux_lora.device.libraries import diffusers
from flux_lora.errors import WeightsError

OLDER_CLIP_PREFIX = "text_model."
"""Files of CLIP that transformers 4 wrote, FLUX.1's own among them, have it; the module's parameters do not."""

LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
"""What diffusers and transformers raise on damaged files."""


Fill = Callable[[Iterable[tuple[StoredTensor, Tensor]]], None]
"""Fills tensors, of any type on any device, with the base weights that are stored for them."""


@dataclass(frozen=True)
class Network:
    """A network without its weights, and where they are stored."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    """By the names that ``named_parameters`` gives them: a tied one has one name."""
    stored: Mapping[str, StoredTensor]
    """Where the base weights of each parameter are."""
    readers: Mapping[str, Callable[[], Tensor]]
    """How to read the base weights of each parameter once more; nothing is read before the call."""

    def unload(self, names: Iterable[str]) -> None:
        """Free the weights of some parameters; what computes with them from now on gives NaN."""
        for name in names:
            parameter = self.parameters[name]
            parameter.data = _nothing(parameter.shape, parameter.dtype)


@dataclass(frozen=True)
class Checkpoints:
    """What a weights directory holds, by model."""

    pipelines: Mapping[str, Any]
    """A FluxPipeline for each model; shared components are the same objects."""
    networks: Mapping[str, Mapping[str, Network]]
    """The networks of each pipeline by component; shared ones are the same objects."""
    fingerprints: Mapping[str, str]
    """A digest of the base weights that each model draws with."""
    notes: list[str]
    """What the operator should know, for the log."""
    fill: Fill = fill
    """Loads base weights."""
    known_words: frozenset[str] | None = None
    """All words that the models know, where they are few and listed."""


def open_directory(directory: Path, dtype: torch.dtype) -> Checkpoints:
    """Make the pipelines of a weights directory, and check its files; no weights are read.

    Raises:
        WeightsError: no base weights, or weights that are damaged or of another architecture.
    """
    layout = inspect(directory)
    parts = {part.folder: part for components in layout.values() for part in components.values()}
    networks = {folder: _network(part, dtype) for folder, part in parts.items() if part.files}
    made = {folder: networks[folder].module if part.files else _from_pretrained(part) for folder, part in parts.items()}
    return Checkpoints(
        {
            model: diffusers.FluxPipeline(**{name: made[part.folder] for name, part in components.items()})
            for model, components in layout.items()
        },
        {model: {name: networks[components[name].folder] for name in NETWORKS} for model, components in layout.items()},
        {model: fingerprint(components.values()) for model, components in layout.items()},
        differing(directory, layout),
        known_words=known_words(layout),
    )


def _network(part: Part, dtype: torch.dtype) -> Network:
    """Make a network of weights that take no memory, and compare its files with it, tensor by tensor."""
    try:
        with register_module_parameter_registration_hook(_without_memory):
            if issubclass(part.cls, diffusers.ModelMixin):
                module = part.cls.from_config(part.cls.load_config(part.folder, local_files_only=True))
            else:
                module = part.cls(part.cls.config_class.from_pretrained(part.folder, local_files_only=True))
        getattr(module, "tie_weights", lambda: None)()
    except _errors_of(part.cls) as error:
        raise WeightsError(f"{part.folder / 'config.json'} does not describe a {part.cls.__name__}: {error}") from error
    module = module.eval()
    parameters = empty_parameters(module, dtype)
    names = {id(parameter): name for name, parameter in parameters.items()}
    aliases = {name: names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
    found = {key.removeprefix(OLDER_CLIP_PREFIX): tensor for file in part.files for key, tensor in stored_tensors(file)}
    ignored = [*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()), "position_ids"]
    surplus = (name for name in found.keys() - aliases.keys() if not any(re.search(key, name) for key in ignored))
    stored = {aliases[name]: tensor for name, tensor in found.items() if name in aliases}
    _refuse(part, "missing", parameters.keys() - stored.keys())
    _refuse(part, "not part of it", surplus)
    _refuse(part, "of another shape", (name for name in stored if stored[name].shape != tuple(parameters[name].shape)))
    readers = {name: partial(_read, tensor) for name, tensor in stored.items()}
    return Network(module, parameters, stored, readers)


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:  # PyTorch's stub says None
    """Move a parameter to the meta device as soon as its module has it; buffers are computed then, and stay real."""
    return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)


def empty_parameters(module: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Give a module parameters of a type that take no memory, tied where they were: those by name."""
    made: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_nothing(parameter.shape, dtype), requires_grad=False)
            setattr(owner, name, made[id(parameter)])
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.to(dtype)
    return dict(module.named_parameters())


def _nothing(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One NaN, in any shape."""
    return torch.full((), torch.nan, dtype=dtype).expand(shape)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Bring what is neither weight nor streamed, and small, to a device."""
    for buffer in module.buffers():
        buffer.data = buffer.to(device)


def _from_pretrained(part: Part) -> Any:
    try:
        return part.cls.from_pretrained(part.folder, local_files_only=True)
    except _errors_of(part.cls) as error:
        raise WeightsError(f"{part.folder} cannot be loaded as {part.cls.__name__}: {error}") from error


def _errors_of(cls: type) -> tuple[type[Exception], ...]:
    """What making a class of a library raises on damaged files; a bug in a class of ours comes out as itself."""
    return () if cls.__module__.startswith("flux_lora.") else LIBRARY_ERRORS


def _refuse(part: Part, problem: str, keys: Iterable[object]) -> None:
    if names := sorted(map(str, keys)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WeightsError(
            f"{part.folder} does not hold what its config.json describes: {problem}: {', '.join(names[:3])}{more}."
        )


def _read(stored: StoredTensor) -> Tensor:
    with safe_open(stored.file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(stored.name)
        return tensor
