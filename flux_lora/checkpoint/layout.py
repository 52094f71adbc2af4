"""What a weights directory holds, found and checked without reading a tensor.

``dev/`` is a diffusers FLUX.1 pipeline; ``schnell/`` needs only what differs, transformer and scheduler. What is wrong
is named here, before minutes of loading.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flux_lora.checkpoint.components import NETWORKS, OWN, SHARED
from flux_lora.checkpoint.header import TensorFileError, read_header
from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.device.libraries import diffusers, transformers
from flux_lora.errors import WeightsError
from flux_lora.request import MODELS

CLASSES = {
    "transformer": diffusers.FluxTransformer2DModel,
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.T5EncoderModel,
    "tokenizer": transformers.CLIPTokenizer,
    "tokenizer_2": transformers.T5TokenizerFast,
}
"""What FLUX.1 is made of; the VAE's class is what ``model_index.json`` names."""

AUTOENCODERS = {
    "diffusers.AutoencoderKL": diffusers.AutoencoderKL,
    "flux_lora.checkpoint.patch_autoencoder.PatchAutoencoder": PatchAutoencoder,
    "flux_lora.patch_autoencoder.PatchAutoencoder": PatchAutoencoder,  # as version 0.1 wrote it
}
"""The VAEs that ``model_index.json`` may name: FLUX.1's, and the miniature's."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")

SAMPLES, SAMPLE_BYTES = 64, 4096
"""How many pieces of a weight file, and of which size, its fingerprint is made of."""


class _Described(BaseModel):
    """What is read of a JSON file; the rest of it is for the library that it belongs to."""

    model_config = ConfigDict(extra="ignore", strict=True)


class PipelineIndex(_Described):
    """A pipeline's ``model_index.json``."""

    class_name: str = Field(alias="_class_name")
    vae: list[str]
    """The library and the class of the VAE."""
    known_words: str | None = Field(default=None, alias="_known_words")
    """All words that the model knows, in small letters, with blanks between; FLUX.1's own index lists none."""


class SchedulerConfig(_Described):
    """A scheduler's ``scheduler_config.json``."""

    class_name: str = Field(alias="_class_name")


class NetworkConfig(_Described):
    """A network's ``config.json``; each kind of network has some of these."""

    class_name: str | None = Field(default=None, alias="_class_name")
    architectures: list[str] | None = None
    joint_attention_dim: int | None = None
    pooled_projection_dim: int | None = None
    in_channels: int | None = None
    d_model: int | None = None
    hidden_size: int | None = None
    latent_channels: int = 0


class WeightIndex(_Described):
    """The index of weights that lie in several files."""

    weight_map: dict[str, str]
    """The file of each tensor."""


Described = TypeVar("Described", bound=_Described)


@dataclass(frozen=True)
class Part:
    """One component's folder on disk, and for a network its checked weight files."""

    name: str
    folder: Path
    cls: Any
    files: tuple[Path, ...] = ()
    elements: int = 0
    bytes: int = 0


def inspect(directory: Path) -> dict[str, dict[str, Part]]:
    """Find and check the components of each model that a weights directory holds; no tensor is read.

    Returns:
        model -> component -> part; shared components are the same parts in both.

    Raises:
        WeightsError: no base weights, or weights that are damaged or of another architecture.
    """
    present = [model for model in MODELS if os.path.lexists(directory / model)]
    for model in present:
        if not (directory / model).is_dir():
            raise WeightsError(f"{directory / model} is not a directory, or a link that leads to none.")
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
    layout: dict[str, dict[str, Part]] = {
        model: {**{name: _part(directory / model, name, CLASSES[name]) for name in OWN}, **shared} for model in present
    }
    for name, components in layout.items():
        _check_widths(directory / name, components)
    return layout


def known_words(layout: Mapping[str, Mapping[str, Part]]) -> frozenset[str] | None:
    """All words that the models know, if their index lists them: that of a model with a vocabulary of its own does."""
    pipeline = next(iter(layout.values()))["tokenizer_2"].folder.parent
    words = _read(pipeline / "model_index.json", PipelineIndex).known_words
    return None if words is None else frozenset(words.split())


def _shared_class(pipeline: Path, name: str) -> Any:
    index = _read(pipeline / "model_index.json", PipelineIndex)
    if index.class_name != "FluxPipeline":
        raise WeightsError(
            f"{pipeline} is a {index.class_name}, not a FluxPipeline: put a FLUX.1 text-to-image model there."
        )
    if name != "vae":
        return CLASSES[name]
    named = ".".join(index.vae)
    if named not in AUTOENCODERS:
        raise WeightsError(
            f"{pipeline / 'model_index.json'} names {named} as the VAE, and known are {', '.join(AUTOENCODERS)}."
        )
    return AUTOENCODERS[named]


def _part(pipeline: Path, name: str, cls: Any) -> Part:
    folder = pipeline / name
    if not folder.is_dir():
        raise _missing(pipeline, f"{name}/")
    if name.startswith("tokenizer") and not any((folder / file).is_file() for file in VOCABULARIES):
        raise _missing(pipeline, f"{name}/tokenizer.json")  # without one, transformers makes up a vocabulary
    if name == "scheduler":
        _check_class(folder, _read(folder / "scheduler_config.json", SchedulerConfig).class_name, cls)
    if name not in NETWORKS:
        return Part(name, folder, cls)
    config = _read(folder / "config.json", NetworkConfig)
    _check_class(folder, ", ".join(dict.fromkeys(config.architectures or [str(config.class_name)])), cls)
    files = tuple(_weight_files(folder))
    elements = 0
    for file in files:
        try:
            elements += sum(tensor.elements for tensor in read_header(file).tensors.values())
        except (TensorFileError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be used: {error}. Delete it and fetch it again with "
                f"`scripts/download_weights {pipeline.name}`."
            ) from None
    return Part(name, folder, cls, files, elements, sum(file.stat().st_size for file in files))


def _weight_files(folder: Path) -> Iterator[Path]:
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        names = sorted(set(_read(index, WeightIndex).weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise _missing(folder.parent, f"{folder.name}/{name}")
        yield folder / name


def _missing(pipeline: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{pipeline} is incomplete: {name} is missing. Fetch it with `scripts/download_weights {pipeline.name}`."
    )


def _check_class(folder: Path, found: str, expected: Any) -> None:
    if found != expected.__name__:
        raise WeightsError(f"{folder} holds a {found}, where FLUX.1 has a {expected.__name__}.")


def _check_widths(pipeline: Path, components: Mapping[str, Part]) -> None:
    config = {name: _read(components[name].folder / "config.json", NetworkConfig) for name in NETWORKS}
    transformer = config["transformer"]
    pairs = {
        "joint_attention_dim": config["text_encoder_2"].d_model,
        "pooled_projection_dim": config["text_encoder"].hidden_size,
        "in_channels": 4 * config["vae"].latent_channels,
    }
    for key, width in pairs.items():
        if getattr(transformer, key) != width:
            raise WeightsError(
                f"{pipeline / 'transformer'} has {key} {getattr(transformer, key)} and the components beside it need "
                f"{width}: they are not of one model."
            )


def differing(directory: Path, layout: Mapping[str, Mapping[str, Part]]) -> list[str]:
    """Name the shared networks that a model brings along in another version than the one that is used."""
    notes = []
    for model in layout:
        for name in set(SHARED) & set(NETWORKS):
            used, own = layout[model][name], directory / model / name
            if own != used.folder and own.is_dir():
                files = [own / file.name for file in used.files]
                if any(not file.is_file() or _sample(file) != _sample(used.files[i]) for i, file in enumerate(files)):
                    notes.append(f"{own} is not the same as {used.folder}; both models use the latter")
    return notes


def fingerprint(parts: Iterable[Part]) -> str:
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


def _read(path: Path, kind: type[Described]) -> Described:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise _missing(path.parent.parent, f"{path.parent.name}/{path.name}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}. Delete it and fetch it again.") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"]))
        raise WeightsError(
            f"{path} does not hold what it should ({': '.join(filter(None, (field, problem['msg'])))}). Delete it and "
            "fetch it again with `scripts/download_weights`."
        ) from None
