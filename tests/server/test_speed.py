"""Compiled profiles in a real Cog server, whose predictions run on other threads than its set-up."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flux_lora.files import provenance
from flux_lora.request import SIZES
from tests.conftest import ROOT
from tests.server.conftest import content, serving

SIZE = {"aspect_ratio": "custom", "width": 512, "height": 512}
WITNESS: dict[str, Any] = {"prompt": "a witness", "seed": 7, "num_inference_steps": 8, "output_format": "png", **SIZE}

CHANGES: list[dict[str, Any]] = [
    {"lora_scale": 0},
    {"lora_scale": 0.3},
    {"replicate_weights": "other.safetensors"},
    {"seed": 8},
    {"num_inference_steps": 3},
    {"num_inference_steps": 13},
    {"guidance_scale": 0},
    {"guidance_scale": 7.5},
    {"num_outputs": 2},
    {"prompt": "a longer prompt, of other words"},
    {"model": "schnell"},
    *({"aspect_ratio": ratio, "num_inference_steps": 1} for ratio in SIZES),
    *({"aspect_ratio": ratio, "num_inference_steps": 1, "model": "schnell"} for ratio in ("1:1", "21:9")),
    {},
]


@pytest.mark.timeout(600)  # a busy machine compiles slowly
@pytest.mark.parametrize(
    ("profile", "reused"),
    [
        ("fast", 2),
        pytest.param("exact", 0, marks=pytest.mark.slow),
        pytest.param("balanced", 0, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_compiled_again_and_a_restart_draws_the_same_bytes(
    tmp_path: Path, weights: Path, profile: str, reused: int
) -> None:
    other = {name: tensor * 2 for name, tensor in load_file(weights / "lora.safetensors").items()}
    save_file(other, weights / "other.safetensors")
    cache = tmp_path / "compiled"
    (tmp_path / "server").mkdir()
    compiling = serving(
        tmp_path / "server",
        FLUX_PROFILE=profile,
        FLUX_CACHE=str(cache),
        FLUX_WEIGHTS=str(weights),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        TMPDIR=tempfile.gettempdir(),  # where PyTorch keeps C++ headers that it has compiled, which all may share
    )
    with compiling as server:
        first = server.predict(**WITNESS)
        answers = [server.predict(**WITNESS | change) for change in CHANGES]
    assert {(answer["status"], answer["metrics"]["recompilations"]) for answer in [first, *answers]} == {
        ("succeeded", 0)
    }
    assert first["metrics"]["profile"] == profile
    assert first["metrics"]["attention"] == "native"
    assert first["metrics"]["reused_steps"] == reused
    assert answers[-1]["output"] == first["output"]
    pictures = [answer["output"][0] for answer in answers]
    assert len(set(pictures[:8])) == 8
    assert answers[8]["output"] == [first["output"][0], pictures[3]]  # a batch from seed 7 on

    again = _restarted(tmp_path, weights, profile, cache)
    assert any("4 graphs, 4 of them known before" in line for line in again["lines"]), again
    assert again["graph_breaks"] == {}
    file = Path(again["file"])
    assert file.read_bytes() == content(first["output"][0])
    written = provenance.read(file).environment
    assert (written.profile, written.attention) == (profile, "native")


RESTART = """
import json, shutil, sys, threading
from pathlib import Path
import torch
from flux_lora.assembly import assemble
from flux_lora.request import Request
from flux_lora.settings import Settings

weights, profile, cache, request, out = sys.argv[1:]
lines, files = [], []
settings = Settings(weights=Path(weights), profile=profile, cache=Path(cache), device="cpu")
generator = assemble(settings, log=lines.append)
asked = Request.parse(**json.loads(request))
thread = threading.Thread(target=lambda: files.extend(generator.draw(asked, lambda *_: None)))
thread.start()
thread.join()
shutil.copy(files[0], out)
breaks = dict(torch._dynamo.utils.counters["graph_break"])
print(json.dumps({"lines": lines, "file": out, "graph_breaks": breaks}))
"""


def _restarted(folder: Path, weights: Path, profile: str, cache: Path) -> dict[str, Any]:
    """What a new process says and draws, which finds no graphs but those that the server has kept.

    It finds the C++ that belongs to them, which PyTorch does not keep with them: or all of that is compiled anew.
    """
    arguments = [str(weights), profile, str(cache), json.dumps(WITNESS), str(folder / "again.webp")]
    kernels = folder / "kernels"
    shutil.copytree(folder / "inductor", kernels, ignore=shutil.ignore_patterns("fxgraph", "aotautograd"))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    done = subprocess.run(
        [sys.executable, "-c", RESTART, *arguments], cwd=ROOT, capture_output=True, check=True, env=environment
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
