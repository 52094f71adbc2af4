"""The benchmarks of a GPU, as far as they can be tried without one."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import full_size, gpu_check, results
from benchmarks.contenders import PEERS
from benchmarks.gpu import OURS, class_of
from flux_lora.request import MODELS
from tests.conftest import ROOT


def test_a_step_of_the_full_size_costs_what_flux_costs() -> None:
    """By hand: 2·tokens·weights of the blocks' linear layers, 4·tokens²·width an attention, modulations once."""
    tokens, width, text = 4608, 3072, 512
    double = 19 * 2 * (4 * width**2 + 8 * width**2) * tokens
    single = 38 * 2 * (3 * width**2 + 4 * width**2 + 5 * width**2) * tokens
    attention = (19 + 38) * 4 * tokens**2 * width
    modulations = 2 * width**2 * (19 * 12 + 38 * 3 + 2)
    ends = 2 * (4096 * 64 * 2 + text * 4096) * width + 2 * width * (2 * 256 + 768 + 3 * width)
    counted = full_size.operations("dev", 4096, text, small=False)
    assert counted == pytest.approx(double + single + attention + modulations + ends, rel=1e-4)
    assert counted / 1e12 == pytest.approx(74.4, abs=0.05)


def test_random_weights_are_the_same_wherever_and_whenever_they_are_made() -> None:
    checkpoints = full_size.source(*MODELS, small=True)(Path(), torch.bfloat16)
    again = full_size.source("dev", small=True)(Path(), torch.float32)
    seen = set()
    for name, network in again.networks["dev"].items():
        for key, parameter in network.parameters.items():
            target = torch.empty(parameter.shape)
            again.fill([(network.stored[key], target)])
            assert torch.equal(target, checkpoints.networks["dev"][name].readers[key]().float())
            assert target.isfinite().all()
            if target.ndim > 1:
                seen.add(float(target.sum()))
                assert 0.01 < target.std() < 0.04
    assert len(seen) > 50  # each has its own
    dev, schnell = (checkpoints.networks[model]["transformer"] for model in MODELS)
    assert not torch.equal(dev.readers["x_embedder.weight"](), schnell.readers["x_embedder.weight"]())
    shared = [checkpoints.networks[model]["vae"] for model in MODELS]
    assert shared[0] is shared[1]


def test_the_full_size_takes_no_memory_before_it_is_filled() -> None:
    """And is that of FLUX.1: 11.9 billion weights of a transformer, 4.8 of T5."""
    networks = full_size.source("dev")(Path(), torch.bfloat16).networks["dev"]
    counted = {name: sum(p.numel() for p in network.parameters.values()) for name, network in networks.items()}
    assert counted["transformer"] == pytest.approx(11.9e9, rel=0.01)
    assert counted["text_encoder_2"] == pytest.approx(4.76e9, rel=0.01)
    assert all(p.untyped_storage().nbytes() == 2 for n in networks.values() for p in n.parameters.values())


def row(folder: Path, name: str, seconds: float, day: str = "a card, today") -> None:
    """Keep a row in which everything takes ``seconds``."""
    switch = {"switch_seconds": 0.1, "scale_seconds": 0.05}
    dev = {"seconds": seconds, "step_seconds": 0.1, "computed_steps": 28, "tflops": 700, "peak_bytes": 2**35}
    given = {"row": name, "machine": "a GPU; Python", "session": day, "images": 3}
    results.keep(folder, given, {"dev": {**dev, "switch": switch}}, small=False)
    results.keep(folder, given, {"schnell": {"seconds": 0.4}}, small=False)


def test_what_nobody_measured_is_said_and_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.show(tmp_path, small=False) == 0
    shown = capsys.readouterr().out
    assert shown.count("not yet measured") == len(results.ROWS) + shown.count("target")
    assert "met" not in shown.replace("not yet measured", "")


def test_rows_of_one_card_and_day_compare_by_their_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("peer1", 8.0), ("peer2", 4.2), ("exact", 3.4)):
        row(tmp_path, name, seconds)
    assert results.show(tmp_path, small=False) == 0
    shown = capsys.readouterr().out
    assert "exact at least 1.2 times as fast as peer1, peer2, measured 1.24 (peer2): met" in shown
    assert "exact dev.seconds at most 3.5 (better 3.3), measured 3.4: met" in shown
    row(tmp_path, "peer2-blocks", 4.0)  # the fastest counts
    assert results.show(tmp_path, small=False) == 1
    assert "measured 1.18 (peer2-blocks): MISSED" in capsys.readouterr().out
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_several_cards_compare_as_ratios_to_their_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slower card measured the peers: 8.0 s there are 4.0 s here."""
    for name, seconds, day in (("peer1", 16.0, "slow"), ("peer2", 8.0, "slow"), ("exact", 3.2, "fast")):
        row(tmp_path, name, seconds, day)
    results.show(tmp_path, small=False)
    assert "exact at least 1.2 times as fast as peer1, peer2: not yet measured" in capsys.readouterr().out
    results.keep_reference(tmp_path, "slow", 12.0, small=False)
    results.keep_reference(tmp_path, "fast", 6.0, small=False)
    results.show(tmp_path, small=False)
    assert "exact at least 1.2 times as fast as peer1, peer2, measured 1.25 (peer2): met" in capsys.readouterr().out


def test_what_is_measured_on_another_day_replaces_the_row(tmp_path: Path) -> None:
    row(tmp_path, "exact", 3.4, "monday")
    given = {"row": "exact", "machine": "a GPU; Python", "session": "tuesday", "images": 3}
    results.keep(tmp_path, given, {"dev": {"seconds": 3.3}}, small=False)
    kept = results.read(tmp_path, small=False)
    assert kept["rows"]["exact"]["dev"] == {"seconds": 3.3}
    assert "schnell" not in kept["rows"]["exact"]
    (earlier,) = kept["earlier"]
    assert (earlier["session"], earlier["dev"]["seconds"], earlier["schnell"]["seconds"]) == ("monday", 3.4, 0.4)


def gpu(folder: Path, name: str, *measures: str) -> dict[str, Any]:
    """Measure a row of the small model."""
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--small", "--images", "1", "--results", str(folder)]
    command += ["--cache", str(folder / "cache"), *(["--measure", *measures] if measures else [])]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=1700)
    found: dict[str, Any] = json.loads((folder / "gpu-small.json").read_text())["rows"][name]
    return found


def test_a_row_runs_at_a_small_size(tmp_path: Path) -> None:
    found = gpu(tmp_path, "eager", "dev", "kernels", "switch")["dev"]
    assert found["computed_steps"] == 28
    assert 0 < found["step_seconds"] < found["seconds"]
    assert found["switch"]["scale_seconds"] > 0
    assert found["kernels"]["products_ms"] > 0
    assert found["kernels"]["attention_ms"] > 0
    assert 100 < found["kernels"]["launches"] < 2000
    assert set(found["stages"]) == {"source", "adapter", "text", "denoise", "decode", "safety", "save"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_every_row_runs_at_a_small_size(tmp_path: Path, name: str) -> None:
    if name.startswith("peer2-fp8"):
        pytest.importorskip("torchao", reason="not among the requirements")
    found = gpu(tmp_path, name)
    assert found["dev"]["computed_steps"] == (14 if name == "fast" else 28)
    assert found["dev"]["switch"]["switch_seconds"] > 0
    assert found["first"]["image_seconds"] > 0


@pytest.mark.slow
def test_a_blocks_kernels_are_counted_without_a_gpu() -> None:
    """By hand: q, k, v as one, MLP, output, modulation; and SiLU, modulate, rotate, join, two sums."""
    from benchmarks import launches  # it loads PyTorch's compiler

    counted = launches.count("exact", "ours", "single")
    assert [counted[what] for what in ("products", "attention", "others")] == [4, 1, 6]
    joined = [moved for name, moved in counted["kernels"] if name == "flux_lora.join.default"]
    assert joined == [2 * 4608 * 2 * 5 * 3072]  # [attention | MLP], read and written


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "attention": [
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "triton_tem_fused_flex_attention_0",
        ],
        "products": [
            "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN",
            "nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_bias_TNT",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8>",
            "triton_tem_fused_addmm_gelu_3",
            "triton_mm",
            "aten::addmm",
        ],
        "elementwise": [
            "triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention__to_copy_add_mul_neg_permute_split_stack_2",
            "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_add_cat_mul_neg_permute_split_stack_unbind_8",
            "triton_poi_fused__scaled_mm__to_copy_cat_clamp_gelu_mul_permute_reciprocal_t_unsqueeze_view_5",
            "triton_per_fused__scaled_mm__to_copy_abs_amax_cat_clamp_gelu_permute_t_unsqueeze_view_4",
            "triton_poi_fused_add_mul_slice_split_unsqueeze_view_2",
            "join",
            "rotate",
            "modulate",
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast",
        ],
        "copies": ["Memset (Device)", "Memcpy HtoD (Pinned -> Device)", "aten::copy_"],
    }.items(),
)
def test_a_kernel_is_told_by_its_name(kind: str, names: list[str]) -> None:
    """As the profiler gave them on an H100; FlashAttention 2's, templates' and a CPU's as their sources do."""
    assert {name: class_of(name) for name in names} == dict.fromkeys(names, kind)


def check(out: Path, *arguments: str, parts: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run the check of a GPU on the small model."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--small", "--out", str(out), *arguments]
    return subprocess.run(
        [*command, "--only", *parts], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_check_of_a_gpu_goes_on_where_an_earlier_call_ended(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    row(first, "peer1", 6.6)
    done = check(first, "--seconds", "250", parts=["card"])
    assert done.returncode == 0, done.stdout
    parts = json.loads((first / "check.json").read_text())
    assert {name: part["outcome"] for name, part in parts.items()} == {"card": "done"}
    assert json.loads((first / "card.json").read_text())["plain_tflops"]
    assert "diffusers eager, PEFT adapter" in done.stdout
    # What is done is not done again; what does not end in time is ended, and said to have been.
    done = check(second, "--resume", str(first), "--seconds", "3", parts=["card", "exact"])
    assert done.returncode == 1
    parts = json.loads((second / "check.json").read_text())
    assert parts["card"] == json.loads((first / "check.json").read_text())["card"]
    assert parts["exact"]["outcome"] == "ended after 3 s"
    assert "peer1" in results.read(second, small=False)["rows"]


def test_a_part_begins_only_when_there_is_time_for_it_and_something_to_run(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, small=False, seconds=10, empty=tmp_path)
    check.run(gpu_check.Part("long", 20, 30, ("-c", "raise SystemExit(1)")))
    check.run(gpu_check.Part("missing", 1, 5, ("-c", "raise SystemExit(1)"), needs="no_such_module"))
    check.run(gpu_check.Part("failing", 1, 5, ("-c", "print('why'); raise SystemExit(3)")))
    check.run(gpu_check.Part("short", 1, 5, ("-c", "print('well')")))
    parts = json.loads((tmp_path / "check.json").read_text())
    outcomes = {name: part["outcome"] for name, part in parts.items()}
    assert outcomes == {"long": "left out", "missing": "left out", "failing": "failed with 3", "short": "done"}
    assert parts["failing"]["tail"].strip() == "why"
    assert [check.failed(name) for name in outcomes] == [False, False, True, False]


def test_two_calls_measure_what_matters_most() -> None:
    """By what the parts are expected to take, each call of 400 seconds, none of which may last 420."""
    waiting = [part for part in gpu_check.PARTS if not part.instead_of]
    calls = []
    for _ in range(2):
        left, run = 400, []
        for part in list(waiting):
            if part.seconds <= left:
                left -= part.seconds
                run.append(part.name)
                waiting.remove(part)
        calls.append(run)
    assert calls[0][:4] == ["exact", "peer2", "balanced", "fast"]
    assert calls[1][:6] == ["peer2-fp8", "warm", "compiled", "peer1", "kernels", "encode"]


def test_what_an_image_lacks_is_found_in_either_kind_of_requirements() -> None:
    """Pinned by a line each, or locked with hashes and conditions."""
    locked = """
    # a comment
pydantic ==2.14.4 \\
    --hash=sha256:00
numpy ==2.4.6 \\
    --hash=sha256:00
colorama ==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:00
httpx2-jsfetch ==1.0 ; python_full_version >= '3.12' and sys_platform == 'emscripten' \\
    --hash=sha256:00
truststore ==0.10.6 ; sys_platform != 'emscripten' \\
    --hash=sha256:00
"""
    pinned = "pydantic==2.14.4\nnumpy==2.4.6\ntruststore==0.10.6\n"
    for text in (locked, pinned):
        wanted = gpu_check.wanted(text, "peft==0.21.2\nruff==0.17.6\n")
        assert {"pydantic==2.14.4", "truststore==0.10.6", "peft==0.21.2", "torchao==0.18.0"} <= set(wanted)
        assert not [each for each in wanted if each.startswith(("numpy", "ruff", "colorama", "httpx2-jsfetch"))]
