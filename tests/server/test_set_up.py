"""What set-up makes of the operator's choices, in a real Cog server."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flux_lora.errors import FluxLoraError
from predict import Predictor
from tests.conftest import MINI, ROOT
from tests.server.conftest import SMALL, Server, free_port, health, open_image, serving, wait_for

WITNESS = {"prompt": "a witness", "seed": 7, "output_format": "png", **SMALL}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def serve(weights: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``scripts/serve``, which is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "flux_lora.commands.serve", "--port", str(free_port())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FLUX_WEIGHTS": str(weights), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


DAMAGE: dict[str, tuple[Callable[[Path], None], str | None, list[str]]] = {
    "VAE": (
        lambda w: truncate(w / "dev/vae/diffusion_pytorch_model.safetensors"),
        None,
        ["dev/vae", "truncated", "download"],
    ),
    "LoRA": (lambda w: truncate(w / "lora.safetensors"), None, ["lora.safetensors", "truncated"]),
    "fine-tune": (lambda _: None, "/no/such/lora.safetensors", ["/no/such/lora.safetensors"]),
}
"""What is done to the weights directory, the fine-tune, and the words that say what is wrong."""


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_said_with_file_and_reason(weights: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    damage, fine_tune, named = DAMAGE[case]
    damage(weights)
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    with pytest.raises(FluxLoraError) as raised:
        Predictor().setup(fine_tune)
    assert all(word in str(raised.value) for word in named), raised.value


@pytest.mark.parametrize(
    "case", [case if case == "VAE" else pytest.param(case, marks=pytest.mark.slow) for case in DAMAGE]
)
def test_damage_ends_the_server_with_file_and_reason(weights: Path, case: str) -> None:
    damage, fine_tune, named = DAMAGE[case]
    damage(weights)
    done = serve(weights, **({"COG_WEIGHTS": fine_tune} if fine_tune else {}))
    assert done.returncode != 0
    assert all(word in done.stderr for word in named), done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of another fine-tune, whose device fails once a file says so: the worker's Python patches it in."""
    folder = tmp_path_factory.mktemp("twice")
    path = folder / "twice.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(MINI / "lora.safetensors").items()}, path)
    (folder / "server").mkdir()
    patch = (
        "from flux_lora.device import devices; devices.computes = lambda _: not os.path.exists(os.environ['BROKEN'])\n"
    )
    broken = str(folder / "server" / "broken")
    with serving(folder / "server", prelude=patch, COG_WEIGHTS=str(path), BROKEN=broken) as running:
        yield running


def test_cog_weights_are_the_fine_tune(twice: Server, server: Server) -> None:
    pixels = [open_image(twice.draw(**WITNESS, lora_scale=scale)[0]).tobytes() for scale in (0.5, 0)]
    # Both factors are doubled, so half of the update is twice that of the miniature's own LoRA.
    expected = [open_image(server.draw(**WITNESS, lora_scale=scale)[0]).tobytes() for scale in (2, 0)]
    assert pixels == expected


def test_a_device_that_fails_makes_the_server_unhealthy(twice: Server) -> None:
    """The last test here: the server stays so."""
    wait_for(lambda: health(twice) == "READY", 10)
    (twice.folder / "broken").touch()
    wait_for(lambda: health(twice) == "UNHEALTHY", 20)
