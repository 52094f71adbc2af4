"""A weights directory -> loaded pipelines; dev and schnell share text encoders, tokenizers and VAE.

``dev/`` is a diffusers FLUX.1 pipeline; ``schnell/`` needs only what differs, transformer and scheduler. Everything
that can be checked without reading a tensor is checked first, so that damage is named before minutes of loading.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from flux_lora import devices
from flux_lora.errors import DeviceMemoryError, WeightsError
from flux_lora.quiet import diffusers, transformers
from flux_lora.tensor_files import TensorFileError, read_header

MODELS = ("dev", "schnell")
OWN = ("transformer", "scheduler")
SHARED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
ADAPTABLE = ("text_encoder", "text_encoder_2", "transformer")
NETWORKS = ("text_encoder", "text_encoder_2", "vae", "transformer")

CLASSES = {
    "transformer": diffusers.FluxTransformer2DModel,
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.T5EncoderModel,
    "tokenizer": transformers.CLIPTokenizer,
    "tokenizer_2": transformers.T5TokenizerFast,
}
"""What FLUX.1 is made of; the VAE's class is what ``model_index.json`` names."""

OLDER_CLIP_PREFIX = "text_model."
"""Files of CLIP that transformers 4 wrote, FLUX.1's own among them, have it; the module's parameters do not."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")

WORKING_BYTES = {"cuda": 5 * 2**30, "cpu": 2**30}
"""Room beyond the weights for activations, the largest being those of a decode at 1440×1440."""

SAMPLES, SAMPLE_BYTES = 64, 4096

LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
"""What diffusers and transformers raise on damaged files."""


@dataclass(frozen=True)
class Part:
    """One component's folder on disk, and for a network its checked weight files."""

    name: str
    folder: Path
    cls: Any
    files: tuple[Path, ...] = ()
    elements: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Checkpoints:
    """What a weights directory holds, by model."""

    pipelines: Mapping[str, Any]
    """A FluxPipeline each; the shared components are the same objects."""
    fingerprints: Mapping[str, str]
    """Of the base weights that each draws with."""
    stored: Mapping[str, Mapping[str, Mapping[str, Callable[[], Tensor]]]]
    """Of each component, how to read a parameter's base weights once more from its file."""


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
        {model: _fingerprint(components.values()) for model, components in layout.items()},
        {model: {name: dict(_stored(components[name])) for name in ADAPTABLE} for model, components in layout.items()},
    )


def inspect(directory: Path) -> dict[str, dict[str, Part]]:
    """Find and check the components of each model that a weights directory holds; no tensor is read.

    Returns:
        model -> component -> part; shared components are the same parts in both.

    Raises:
        WeightsError: as for `load`.
    """
    present = [model for model in MODELS if (directory / model).is_dir()]
    if not present:
        raise WeightsError(
            f"There are no base weights: {directory} holds neither dev/ nor schnell/. Fetch them with "
            "`scripts/download_weights dev schnell`, or set FLUX_WEIGHTS to a directory that has them."
        )
    complete = [model for model in present if (directory / model / "model_index.json").is_file()]
    if not complete:
        raise WeightsError(
            f"{directory / present[0]} is not a complete pipeline: model_index.json is missing. "
            f"Fetch the rest with `scripts/download_weights {present[0]}`."
        )
    base = directory / complete[0]
    shared = {name: _part(base, name, _shared_class(base, name)) for name in SHARED}
    layout = {
        model: {**{name: _part(directory / model, name, CLASSES[name]) for name in OWN}, **shared} for model in present
    }
    for model, components in layout.items():
        _check_widths(directory / model, components)
    return layout


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


def _shared_class(pipeline: Path, name: str) -> Any:
    index = _read_json(pipeline / "model_index.json")
    if index.get("_class_name") != "FluxPipeline":
        raise WeightsError(
            f"{pipeline} is a {index.get('_class_name')}, not a FluxPipeline: put a FLUX.1 text-to-image model there."
        )
    if name != "vae":
        return CLASSES[name]
    library, cls = index.get("vae", (None, None))
    if library not in ("diffusers", "flux_lora") and not str(library).startswith("flux_lora."):
        raise WeightsError(
            f"{pipeline / 'model_index.json'} names a VAE of {library!r}, which is not loaded from there."
        )
    try:
        return getattr(importlib.import_module(library), cls)
    except (ImportError, AttributeError):
        raise WeightsError(
            f"{pipeline / 'model_index.json'} names {library}.{cls} as the VAE, which does not exist."
        ) from None


def _part(pipeline: Path, name: str, cls: Any) -> Part:
    folder = pipeline / name
    if not folder.is_dir():
        raise _missing(pipeline, f"{name}/")
    if name.startswith("tokenizer") and not any((folder / file).is_file() for file in VOCABULARIES):
        raise _missing(pipeline, f"{name}/tokenizer.json")  # without one, transformers makes up a vocabulary
    if name == "scheduler":
        _check_class(folder, _read_json(folder / "scheduler_config.json").get("_class_name"), cls)
    if name not in NETWORKS:
        return Part(name, folder, cls)
    config = _read_json(folder / "config.json")
    _check_class(folder, config.get("_class_name") or next(iter(config.get("architectures") or []), None), cls)
    files = tuple(_weight_files(folder))
    elements = 0
    for file in files:
        try:
            elements += sum(tensor.elements for tensor in read_header(file).tensors.values())
        except (TensorFileError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be used: {error}. Fetch it again with `scripts/download_weights {pipeline.name}`."
            ) from None
    return Part(name, folder, cls, files, elements, sum(file.stat().st_size for file in files))


def _weight_files(folder: Path) -> Iterator[Path]:
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise _missing(folder.parent, f"{folder.name}/{name}")
        yield folder / name


def _missing(pipeline: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{pipeline} is incomplete: {name} is missing. Fetch it with `scripts/download_weights {pipeline.name}`."
    )


def _check_class(folder: Path, found: str | None, expected: Any) -> None:
    if found not in (None, expected.__name__):
        raise WeightsError(f"{folder} holds a {found}, where FLUX.1 has a {expected.__name__}.")


def _check_widths(pipeline: Path, components: Mapping[str, Part]) -> None:
    config = {name: _read_json(components[name].folder / "config.json") for name in NETWORKS}
    transformer = config["transformer"]
    pairs = {
        "joint_attention_dim": config["text_encoder_2"].get("d_model"),
        "pooled_projection_dim": config["text_encoder"].get("hidden_size"),
        "in_channels": 4 * config["vae"].get("latent_channels", 0),
    }
    for key, width in pairs.items():
        if transformer.get(key) != width:
            raise WeightsError(
                f"{pipeline / 'transformer'} has {key} {transformer.get(key)} and the components beside it need "
                f"{width}: they are not of one model."
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
    # Surplus tensors are no error here: files of text encoders may carry buffers of older versions.
    _refuse(part, "missing", report["missing_keys"])
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
            network = part.cls.from_config(_read_json(part.folder / "config.json"))
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


def _fingerprint(parts: Iterable[Part]) -> str:
    """SHA-256 of configurations, and of sizes, headers and sampled bytes of the weight files: cheap at any size."""
    digest = sha256()
    for part in sorted(parts, key=lambda part: part.name):
        for file in sorted(part.folder.iterdir()):
            if file in part.files:
                content = _sample(file)
            elif file.suffix in (".json", ".txt", ".model"):
                content = file.read_bytes()
            else:
                continue
            digest.update(f"{part.name}/{file.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _sample(file: Path) -> bytes:
    size, start = file.stat().st_size, read_header(file).data_start
    with file.open("rb") as stream:
        pieces = [str(size).encode(), stream.read(start)]
        step = max((size - start) // SAMPLES, SAMPLE_BYTES)
        for offset in range(start, size, step):
            stream.seek(offset)
            pieces.append(stream.read(SAMPLE_BYTES))
    return b"".join(pieces)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _missing(path.parent.parent, f"{path.parent.name}/{path.name}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}. Fetch it again with `scripts/download_weights`.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object.")
    return content
