"""Programs are compiled for a GPU that need not be there: what Triton refuses shows here, and so does a slow load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is there for Linux only")

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flux_lora.lora import fused, programs as merging
from flux_lora.speed import kernels, programs

FLOAT32 = ("scales", "up", "down", "cosine", "sine")
INTEGERS = ("tokens", "texts", "images", "height", "width", "rank")
HOPPER = GPUTarget("cuda", 90, 32)


def compiled(program, warps, stages=3, **constants):
    names = program.arg_names
    eight_bits = constants.get("QUANTIZED") or "eight_bits" in program.__name__
    merges = program in (merging.merge, merging.merge_eight_bits)

    def kind(name):
        if name in constants:
            return "constexpr"
        if name == "eps" or name == "scale" and merges:
            return "fp32"
        if name in INTEGERS or name.endswith(("_batch", "_token", "_head", "_kind")):
            return "i32"
        if name == "values" and eight_bits:
            return "*fp8e4nv"
        return "*fp32" if name in FLOAT32 else "*bf16"

    signature = {name: kind(name) for name in names}
    sixteen = [index for index, name in enumerate(names) if signature[name] not in ("fp32", "constexpr")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in sixteen}
    source = ASTSource(program, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, HOPPER, {"num_warps": warps, "num_stages": stages}).asm["ptx"]


found = {}
width, mlp = 3072, 12288
for quantized in (False, True):
    row = {"WIDTH": width, "PART": kernels.part(width), "QUANTIZED": quantized}
    join = {"HEAD": 128, "MLP": mlp, "MLP_PART": kernels.part(mlp)}
    rotate = {"HEADS": 8, "HEAD": 128, "VALUE": quantized}
    for name, constants in (("join", row | join), ("modulate", row | {"ADDED": True}), ("rotate", rotate)):
        found[f"{name} {quantized}"] = compiled(getattr(programs, name), kernels.WARPS[name], **constants)
for name, tile in fused.TILES.items():
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANK": fused.RANK}
    found[name] = compiled(getattr(merging, name), tile.warps, tile.stages, **constants)
print(json.dumps(found))
"""


def test_every_program_compiles_for_a_gpu_and_moves_sixteen_bytes_at_once(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    for name, code in found.items():
        assert "ld.global.v4.b32" in code or "cp.async.cg.shared.global" in code, name
