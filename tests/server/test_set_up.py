"""What set-up makes of the operator's choices, in a real Cog server."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda w: truncate(w / "dev/vae/diffusion_pytorch_model.safetensors"), ["dev/vae", "truncated", "download"]),
        (lambda w: truncate(w / "lora.safetensors"), ["lora.safetensors", "truncated"]),
    ],
)
def test_damage_ends_the_server_with_file_and_reason(
    weights: Path, damage: Callable[[Path], None], named: list[str]
) -> None:
    damage(weights)
    done = serve(weights)
    assert done.returncode != 0
    assert all(word in done.stderr for word in named), done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_fine_tune_ends_the_server(weights: Path) -> None:
    done = serve(weights, COG_WEIGHTS="/no/such/lora.safetensors")
    assert done.returncode != 0
    assert "/no/such/lora.safetensors" in done.stderr


def test_a_device_that_fails_makes_the_server_unhealthy(tmp_path: Path) -> None:
    """The device fails once a file says so: the worker's Python patches it in."""
    patch = (
        "from flux_lora.device import devices; devices.computes = lambda _: not os.path.exists(os.environ['BROKEN'])\n"
    )
    with serving(tmp_path, prelude=patch, BROKEN=str(tmp_path / "broken")) as server:
        assert health(server) == "READY"
        (tmp_path / "broken").touch()
        wait_for(lambda: health(server) == "UNHEALTHY", 20)


def test_cog_weights_are_the_fine_tune(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "twice.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(MINI / "lora.safetensors").items()}, path)
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server", COG_WEIGHTS=str(path)) as other:
        pixels = [open_image(other.draw(**WITNESS, lora_scale=scale)[0]).tobytes() for scale in (0.5, 0)]
    # Both factors are doubled, so half of the update is twice that of the miniature's own LoRA.
    expected = [open_image(server.draw(**WITNESS, lora_scale=scale)[0]).tobytes() for scale in (2, 0)]
    assert pixels == expected
