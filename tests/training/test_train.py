from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from tests.conftest import MINI
from training import train
from training.networks import attention_bias, positions, velocity
from training.train import Workshop, begin_with_shipped


@torch.no_grad()
def test_the_shipped_miniature_is_trained_further_as_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MINI", MINI)
    monkeypatch.setattr(train, "collect", lambda _: {})
    shop = Workshop(tmp_path, {})
    begin_with_shipped(shop)
    prompt = "an owl and an axolotl on a blue background"
    text = shop.untrained().text
    ids = CLIPTokenizer.from_pretrained(MINI / "dev" / "tokenizer")([prompt], return_tensors="pt").input_ids
    clip = CLIPTextModel.from_pretrained(MINI / "dev" / "text_encoder", dtype=torch.float32)
    assert torch.allclose(text([prompt], 512).pooled, clip(input_ids=ids).pooler_output, atol=1e-5)
    read = text([prompt], 512)
    given = torch.randn(1, 16, 48), torch.tensor([0.7]), read, positions(4, 4, 16), attention_bias(read, 16, 16)
    for name, module, scale in (("dev", shop.dev(), torch.tensor([3.5])), ("schnell", shop.schnell(), None)):
        shipped = FluxTransformer2DModel.from_pretrained(MINI / name / "transformer", torch_dtype=torch.float32)
        expected = velocity(shipped, *given, scale)  # nothing was trained since
        assert torch.allclose(velocity(module, *given, scale), expected, atol=1e-4)
