"""The line for the log, and what it tells about the file's origin."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_lora.lora.formats import Adapter, read
from tests.lora.formats.helpers import shapes, tiny_flux

LAYER = "transformer.transformer_blocks.0.attn.to_q"
SHAPES = {"transformer": shapes(tiny_flux().state_dict())}


def summary(path: Path, metadata: dict[str, str]) -> str:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, path / "x.safetensors", metadata)
    return read(path / "x.safetensors", SHAPES).summary


def test_one_line_says_it_all(tmp_path: Path) -> None:
    line = summary(tmp_path, {"modelspec.trigger_phrase": "TOK\nstyle", "ss_base_model_version": "flux1_kontext"})
    digest = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert line == (
        "diffusers/PEFT LoRA, rank 2, no alpha (scale 1), 1 of 30 transformer weights, trained on FLUX.1 Kontext, "
        f"trigger word 'TOK style', sha256 {digest}"
    )


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ss_tag_frequency": json.dumps({"1_TOK": {"TOK": 1}})}, "trigger word 'TOK'"),  # as ai-toolkit writes it
        ({"modelspec.architecture": "Flux.1-fill-dev/lora"}, "trained on FLUX.1 Fill"),  # as OneTrainer writes it
        ({"ss_sd_model_name": "flux1-krea-dev.safetensors"}, "trained on FLUX.1 Krea"),  # as sd-scripts writes it
        ({"ss_sd_model_name": "fluxFill_v1.safetensors"}, "trained on FLUX.1 Fill"),
        ({"modelspec.architecture": "flux-1-schnell/lora"}, "trained on FLUX.1 schnell"),
    ],
)
def test_origin(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in summary(tmp_path, metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_tag_frequency": json.dumps({"10_cat": {"cat": 3, "sofa": 1}})},  # captions of sd-scripts are no trigger
        *({"ss_tag_frequency": text} for text in ("not JSON", '{"a": 1}', '{"a": null}', '{"a": "TOK"}')),
        {"ss_sd_model_name": "flux_2024_chromatic.safetensors"},  # a file's name proves nothing
        {"ss_sd_model_name": "fulfillment_v2.safetensors"},
        {"ss_sd_model_name": "krea-2.safetensors"},
    ],
)
def test_silence_where_the_metadata_says_nothing(metadata: dict[str, str], tmp_path: Path) -> None:
    line = summary(tmp_path, metadata)
    assert "trigger" not in line
    assert "trained on" not in line


def adapter(path: Path, metadata: dict[str, str]) -> Adapter:
    summary(path, metadata)
    return read(path / "x.safetensors", SHAPES)


def test_the_tensors_have_a_hash_of_their_own(tmp_path: Path) -> None:
    """kohya's: all bytes behind the header, so that new metadata make no other LoRA of it."""
    one = adapter(tmp_path, {"ss_output_name": "one"})
    content = (tmp_path / "x.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    other = adapter(tmp_path, {"ss_output_name": "another"})
    assert one.data_digest == other.data_digest == hashlib.sha256(tensors).hexdigest()
    assert one.digest == hashlib.sha256(content).hexdigest() != other.digest


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({}, ""),
        ({"ss_output_name": "my_style"}, "my_style"),
        ({"modelspec.title": " My\nstyle ", "ss_output_name": "my_style"}, "My style"),
        ({"modelspec.title": "x" * 1000}, "x" * 80),
    ],
)
def test_a_file_is_called_what_it_calls_itself(tmp_path: Path, metadata: dict[str, str], name: str) -> None:
    assert adapter(tmp_path, metadata).name == name
