import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from flux_lora.checkpoint import layout
from flux_lora.checkpoint.assembling import open_directory
from flux_lora.checkpoint.components import NETWORKS, SHARED
from flux_lora.errors import WeightsError
from tests.conftest import MINI
from tests.loaded import load
from training import random_weights


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated transformer": (
        lambda w: truncate(w / "dev/transformer" / WEIGHTS),
        r"dev/transformer/diffusion_pytorch_model.safetensors cannot be used: it is truncated.*download_weights dev",
    ),
    "truncated encoder": (lambda w: truncate(w / "dev/text_encoder_2/model.safetensors"), "text_encoder_2.*truncated"),
    "a pickle": (
        lambda w: (w / "dev/vae" / WEIGHTS).write_bytes(b"\x80\x04" + bytes(2000)),
        "vae.*a Python pickle, not safetensors",
    ),
    "no weights file": (
        lambda w: (w / "schnell/transformer" / WEIGHTS).unlink(),
        "schnell is incomplete: transformer/.* is missing.*scripts/download_weights schnell",
    ),
    "no component": (lambda w: shutil.rmtree(w / "dev/tokenizer_2"), "dev is incomplete: tokenizer_2/ is missing"),
    "no vocabulary": (
        lambda w: (w / "dev/tokenizer/tokenizer.json").unlink(),
        "dev is incomplete: tokenizer/tokenizer.json is missing",
    ),
    "a broken vocabulary": (
        lambda w: truncate(w / "dev/tokenizer_2/tokenizer.json"),
        "dev/tokenizer_2 cannot be loaded as T5Tokenizer",
    ),
    "fewer layers than the file has": (
        lambda w: edit_json(w / "dev/text_encoder_2/config.json", num_layers=1),
        "dev/text_encoder_2 does not hold.*not part of it",
    ),
    "a scheduler of no class": (
        lambda w: (w / "schnell/scheduler/scheduler_config.json").write_text("{}"),
        "does not hold what it should.*_class_name",
    ),
    "an index without files": (
        lambda w: (w / "dev/transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "does not hold what it should.*weight_map",
    ),
    "no VAE named": (
        lambda w: edit_json(w / "dev/model_index.json", vae=None),
        "model_index.json does not hold what it should.*vae",
    ),
    "no index": (lambda w: (w / "dev/model_index.json").unlink(), "dev is not a complete pipeline.*model_index.json"),
    "broken JSON": (
        lambda w: (w / "dev/vae/config.json").write_text("{"),
        "vae/config.json does not hold what it should.*Invalid JSON",
    ),
    "another pipeline": (
        lambda w: edit_json(w / "dev/model_index.json", _class_name="StableDiffusion3Pipeline"),
        "is a StableDiffusion3Pipeline, not a FluxPipeline",
    ),
    "another transformer": (
        lambda w: edit_json(w / "dev/transformer/config.json", _class_name="SD3Transformer2DModel"),
        "holds a SD3Transformer2DModel, where FLUX.1 has a FluxTransformer2DModel",
    ),
    "another encoder": (
        lambda w: edit_json(w / "dev/text_encoder/config.json", architectures=["CLIPTextModelWithProjection"]),
        "holds a CLIPTextModelWithProjection",
    ),
    "another VAE": (
        lambda w: edit_json(w / "dev/model_index.json", vae=["os", "system"]),
        "names os.system as the VAE, and known are diffusers.AutoencoderKL",
    ),
    "an unknown VAE": (
        lambda w: edit_json(w / "dev/model_index.json", vae=["diffusers", "NoSuchVAE"]),
        "names diffusers.NoSuchVAE as the VAE, and known are",
    ),
    "other widths": (
        lambda w: edit_json(w / "dev/text_encoder_2/config.json", d_model=64),
        "joint_attention_dim 96 and the components beside it need 64",
    ),
    "other shapes": (
        lambda w: edit_json(w / "dev/transformer/config.json", num_attention_heads=4),
        "dev/transformer does not hold what its config.json describes: of another shape",
    ),
    "missing tensors": (
        lambda w: edit_tensors(w / "dev/transformer" / WEIGHTS, lambda t: t.pop("x_embedder.weight")),
        "dev/transformer does not hold.*missing: x_embedder.weight",
    ),
    "missing encoder tensors": (
        lambda w: edit_tensors(w / "dev/text_encoder_2/model.safetensors", lambda t: t.popitem()),
        "dev/text_encoder_2 does not hold.*missing",
    ),
    "surplus tensors": (
        lambda w: edit_tensors(w / "dev/vae" / WEIGHTS, lambda t: t.update(extra=torch.zeros(1))),
        "dev/vae does not hold.*not part of it: extra",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_with_file_and_reason(weights: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(weights)
    with pytest.raises(WeightsError, match=message):
        open_directory(weights, torch.float32)


@pytest.mark.parametrize("odd", ["file", "link"])
def test_a_model_that_is_no_directory_is_damage_and_not_absence(weights: Path, odd: str) -> None:
    shutil.rmtree(weights / "schnell")
    (weights / "schnell").touch() if odd == "file" else (weights / "schnell").symlink_to("unmounted")
    with pytest.raises(WeightsError, match="schnell is not a directory"):
        open_directory(weights, torch.float32)


def test_another_version_of_a_shared_network_is_named(weights: Path) -> None:
    shutil.copytree(weights / "dev/text_encoder_2", weights / "schnell/text_encoder_2")
    shutil.copytree(weights / "dev/vae", weights / "schnell/vae")
    edit_tensors(weights / "schnell/text_encoder_2/model.safetensors", lambda t: t["shared.weight"].add_(1))
    (note,) = open_directory(weights, torch.float32).notes
    assert "schnell/text_encoder_2 is not the same as" in note


def test_no_base_weights_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither dev/ nor schnell/.*scripts/download_weights dev schnell"):
        open_directory(tmp_path, torch.float32)


@pytest.mark.parametrize("absent", ["dev", "schnell"])
def test_one_model_may_be_absent(weights: Path, absent: str) -> None:
    if absent == "dev":
        for name in (*SHARED, "model_index.json"):
            shutil.move(weights / "dev" / name, weights / "schnell" / name)
    shutil.rmtree(weights / absent)
    (present,) = {"dev", "schnell"} - {absent}
    assert list(open_directory(weights, torch.float32).pipelines) == [present]


def test_schnell_alone_needs_the_shared_components(weights: Path) -> None:
    shutil.rmtree(weights / "dev")
    with pytest.raises(WeightsError, match="schnell is not a complete pipeline"):
        layout.inspect(weights)


def test_both_models_share_one_copy() -> None:
    pipelines = load(torch.float32, MINI).checkpoints.pipelines
    for name in SHARED:
        assert getattr(pipelines["dev"], name) is getattr(pipelines["schnell"], name)
    assert pipelines["dev"].transformer is not pipelines["schnell"].transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_diffusers_loads(dtype: torch.dtype) -> None:
    ours = load(dtype, MINI).checkpoints.pipelines["dev"]
    theirs = FluxPipeline.from_pretrained(MINI / "dev", dtype=dtype)
    for name in NETWORKS:
        expected = getattr(theirs, name).state_dict()
        actual = getattr(ours, name).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) and actual[key].dtype == dtype for key in expected)


def test_networks_wait_without_memory_but_with_their_buffers() -> None:
    networks = open_directory(MINI, torch.float32).networks["dev"]
    for network in networks.values():
        assert {parameter.untyped_storage().nbytes() for parameter in network.parameters.values()} == {4}
    positions = networks["text_encoder"].module.get_buffer("embeddings.position_ids")
    assert positions.tolist() == [list(range(77))]


def test_clip_files_of_older_layout_load(weights: Path) -> None:
    """FLUX.1's own CLIP file names its tensors ``text_model.…`` and may hold a buffer that is gone today."""
    path = weights / "dev/text_encoder/model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path, metadata={"format": "pt"})
    old = load(torch.float32, weights).checkpoints.pipelines["dev"].text_encoder.state_dict()
    new = load(torch.float32, MINI).checkpoints.pipelines["dev"].text_encoder.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in new)


def test_fingerprint_is_of_the_weights_alone(weights: Path) -> None:
    before = open_directory(weights, torch.float32).fingerprints
    assert before == open_directory(MINI, torch.bfloat16).fingerprints
    edit_tensors(weights / "dev/vae" / WEIGHTS, lambda t: next(iter(t.values())).add_(1))
    after = open_directory(weights, torch.float32).fingerprints
    assert before["dev"] != after["dev"]
    assert before["schnell"] != after["schnell"]
    assert before["dev"] != before["schnell"]


def test_loading_needs_no_second_copy_in_host_memory(tmp_path: Path) -> None:
    sizes = {
        **random_weights.MINI,
        "transformer": random_weights.MINI["transformer"] | {"num_attention_heads": 32, "num_layers": 2},
        "t5": random_weights.MINI["t5"] | {"d_ff": 400_000},
    }
    random_weights.write(tmp_path, sizes)
    largest = max(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load(torch.float32, tmp_path).checkpoints
    done.set()
    watcher.join()
    modules = {id(m): m for p in loaded.pipelines.values() for m in p.components.values() if hasattr(m, "parameters")}
    resident = sum(p.nbytes for m in modules.values() for p in m.parameters())
    assert resident > 300e6
    assert peak - before <= resident + 1.2 * largest + 20e6


def _anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
