from pathlib import Path

import pytest
import torch
from PIL import Image

from flux_lora.assembly import assemble
from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.request import Request
from flux_lora.settings import Settings
from training.export import export
from training.networks import AUTOENCODER
from training.stages import LORA_RANK, Teacher, add_lora, new_dev, new_schnell


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights directory that the recipe writes, with the networks as they are before the first step."""
    torch.manual_seed(0)
    directory, teacher = tmp_path_factory.mktemp("weights"), Teacher()
    dev = new_dev(teacher)
    styled = new_dev(teacher)
    add_lora(styled)
    style = {name: torch.randn_like(p) * 0.05 for name, p in styled.named_parameters() if "lora_" in name}
    export(directory, teacher.text, dev, new_schnell(dev), PatchAutoencoder(**AUTOENCODER), style)
    return directory


def test_what_is_exported_is_an_ordinary_weights_directory(untrained: Path) -> None:
    assert sum(file.stat().st_size for file in untrained.rglob("*") if file.is_file()) < 20e6
    lines: list[str] = []
    generator = assemble(Settings(weights=untrained, device="cpu"), log=lines.append)
    (summary,) = [line for line in lines if f"rank {LORA_RANK}" in line]
    assert "LoRA" in summary
    assert "trigger" not in summary
    pictures = []
    for scale in (0.0, 1.0):
        asked = {"aspect_ratio": "16:9", "num_inference_steps": 1, "lora_scale": scale, "output_format": "png"}
        request = Request.parse(prompt="a tomato", seed=1, disable_safety_checker=True, **asked)
        (file,) = generator.draw(request, lambda *_: None)
        with Image.open(file) as picture:
            assert picture.size == (1344, 768)
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]
