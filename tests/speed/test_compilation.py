"""Compiled drawing in this process; over HTTP, and across restarts, in server/test_speed.py."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from flux_lora.errors import DrawingError, SettingsError
from flux_lora.speed import compilation
from tests.conftest import MINI


class Halves(nn.Module):
    """A stand-in for a VAE without a decoder of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.device = torch.device("cpu")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(latents)) / 2


def test_the_blocks_and_whatever_decodes_are_compiled() -> None:
    transformer = FluxTransformer2DModel.from_pretrained(MINI / "dev/transformer")
    vae, latents = Halves(), torch.randn(3, 4)
    expected = vae.decode(latents)
    compilation.compile_pipelines([SimpleNamespace(transformer=transformer, vae=vae)] * 2)
    before = compilation.graphs()
    assert torch.allclose(vae.decode(latents), expected)
    assert compilation.graphs() == before + 1
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert all(block._compiled_call_impl for block in blocks)
    assert transformer._compiled_call_impl is None


def test_what_was_compiled_is_kept_and_loaded(tmp_path: Path) -> None:
    def once(x: torch.Tensor) -> torch.Tensor:
        return (x * 3 + 1).sin()

    def compile_once() -> int:
        torch._dynamo.reset()
        before = compilation.loaded_graphs()
        with compilation.cached(tmp_path / "cache", "a key"):
            torch.compile(once, options=compilation.OPTIONS)(torch.ones(7))
        return compilation.loaded_graphs() - before

    compile_once()
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    assert compile_once() == 1
    assert file.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"what is this", None], ids=["empty", "damaged", "no place"])
def test_a_cache_that_cannot_be_used_is_none(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "cache"
    with compilation.cached(folder, "a key"):
        torch.compile(torch.cos, options=compilation.OPTIONS)(torch.ones(5))
    if content is None:
        folder = tmp_path / "file"
        folder.touch()
    else:
        next(folder.iterdir()).write_bytes(content)
    with compilation.cached(folder, "a key"):
        pass


def test_code_that_cannot_be_compiled_is_a_setting_that_is_named() -> None:
    options: Any = {"cpp.cxx": ("no-such-compiler",)}  # PyTorch documents no tuples, and takes them

    def work() -> None:
        torch.compile(lambda x: x.cosh() + 2, options=options)(torch.ones(11))

    with pytest.raises(SettingsError, match="FLUX_PROFILE=exact cannot be compiled here: .*take FLUX_PROFILE=eager"):
        compilation.warm_up("exact", work)


def test_so_is_a_machine_on_which_triton_finds_no_compiler() -> None:
    def work() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    with pytest.raises(SettingsError, match="FLUX_PROFILE=exact cannot be compiled here: Failed to find C compiler"):
        compilation.warm_up("exact", work)


def test_other_failures_of_the_warm_up_stay_what_they_are() -> None:
    def work() -> Any:
        raise DrawingError("not finite")

    with pytest.raises(DrawingError, match="not finite"):
        compilation.warm_up("exact", work)


def test_code_that_others_may_have_put_there_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)
    for variable, folder in (("FLUX_CACHE", tmp_path / "a"), ("TORCHINDUCTOR_CACHE_DIR", tmp_path / "b")):
        folder.mkdir()
        for name in ("a key", "another"):
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            (folder / f"compiled-{digest}.bin").write_bytes(b"planted")
        folder.chmod(0o777)
        if variable != "FLUX_CACHE":
            monkeypatch.setenv(variable, str(folder))
        with (
            pytest.raises(SettingsError, match=f"^{variable}: others may write to {folder}"),
            compilation.cached(folder if variable == "FLUX_CACHE" else tmp_path / "c", "a key"),
        ):
            pass
        if os.geteuid() == 0:
            folder.chmod(0o700)
            os.chown(folder, 65534, 65534)
            with (
                pytest.raises(SettingsError, match=f"^{variable}: {folder} belongs to another user"),
                compilation.cached(folder if variable == "FLUX_CACHE" else tmp_path / "c", "a key"),
            ):
                pass
    assert loaded == []


def test_a_cache_that_cannot_be_written_to_is_mentioned(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    with compilation.cached(tmp_path / "file", "a key", said.append):
        torch.compile(torch.sin, options=compilation.OPTIONS)(torch.ones(3))
    assert said == [
        f"compiled code cannot be kept in {tmp_path}/file (FLUX_CACHE), so each start compiles: Not a directory"
    ]
