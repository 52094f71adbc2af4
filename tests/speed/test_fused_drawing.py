"""A whole server by the fused blocks, in a process of its own: there the kernels' references compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_lora.request import SIZES
from tests.conftest import ROOT

WITNESS = {"prompt": "a witness", "seed": 7, "num_inference_steps": 4, "output_format": "png"}
SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256}
CHANGES: list[dict[str, Any]] = [
    {"lora_scale": 0.3},
    {"model": "schnell"},
    {"num_outputs": 2},
    {"guidance_scale": 1.5},
    *({"aspect_ratio": ratio, "num_inference_steps": 1} for ratio in SIZES),
]

DRAW = """
import json, shutil, sys
from pathlib import Path
from flux_lora.assembly import assemble
from flux_lora.request import Request
from flux_lora.settings import Settings

names, requests, folder = sys.argv[1:]
said = {}
for name in names.split():
    said[name] = {"lines": [], "metrics": []}
    (Path(folder) / name).mkdir()
    profile, whose = name.split("-")[:2]
    settings = Settings(profile=profile, cache=Path(folder) / "cache", device="cpu", weights=Path("weights/mini"))
    generator = assemble(settings, log=said[name]["lines"].append, fused_blocks=whose == "ours")
    for index, request in enumerate(json.loads(requests)):
        metrics = {}
        (file, *_) = generator.draw(Request.parse(**request), metrics.__setitem__)
        shutil.copy(file, Path(folder) / name / f"{index}.png")
        said[name]["metrics"].append(metrics)
    environments = generator.parts.environments.values()
    said[name]["attention"] = [environment.attention for environment in environments]
print(json.dumps(said))
"""


def draw(folder: Path, names: str, requests: list[dict[str, Any]], *, compiled: bool) -> dict[str, Any]:
    """What servers, PROFILE-ours or PROFILE-diffusers, say in a new process; their files lie in folders so called."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, names, json.dumps(requests), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment | ({} if compiled else {"TORCHDYNAMO_DISABLE": "1"}),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(float)


def test_pictures_differ_from_those_of_diffusers_blocks_by_rounding_alone(tmp_path: Path) -> None:
    """In eight bits a last bit of float32 now and then decides between two numbers; `exact` is 7 levels away."""
    requests = [WITNESS | SMALL, WITNESS | SMALL | {"model": "schnell", "lora_scale": 0.5}]
    said = draw(tmp_path, "exact-ours exact-diffusers balanced-ours balanced-diffusers", requests, compiled=False)
    for profile, largest, mean in (("exact", 1, 0.001), ("balanced", 24, 2)):
        assert said[f"{profile}-ours"]["attention"] == ["native, fused blocks"] * 2
        assert said[f"{profile}-diffusers"]["attention"] == ["native"] * 2
        assert said[f"{profile}-ours"]["metrics"][0]["attention"] == "native, fused blocks"
        for name in ("0.png", "1.png"):
            ours, theirs = (pixels(tmp_path / f"{profile}-{whose}" / name) for whose in ("ours", "diffusers"))
            assert 0 < np.abs(ours - theirs).max() <= largest
            assert np.abs(ours - theirs).mean() < mean


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["exact", "balanced"])
def test_nothing_is_compiled_again_and_a_restart_draws_the_same_bytes(tmp_path: Path, profile: str) -> None:
    requests = [WITNESS, *(WITNESS | change for change in CHANGES), WITNESS]
    first = draw(tmp_path, f"{profile}-ours", requests, compiled=True)[f"{profile}-ours"]
    files = [(tmp_path / f"{profile}-ours" / f"{index}.png").read_bytes() for index in range(len(requests))]
    assert {said["recompilations"] for said in first["metrics"]} == {0}
    assert files[0] == files[-1] == files[CHANGES.index({"num_outputs": 2}) + 1]
    assert len(set(files)) == len(files) - 2
    again = draw(tmp_path, f"{profile}-ours-again", [WITNESS], compiled=True)[f"{profile}-ours-again"]
    assert (tmp_path / f"{profile}-ours-again/0.png").read_bytes() == files[0]
    compiled = next(line for line in again["lines"] if line.startswith("compiled in"))
    assert "3 graphs, 3 of them known before" in compiled
