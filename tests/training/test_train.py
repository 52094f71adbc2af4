from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from tests.conftest import MINI
from training import train
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
