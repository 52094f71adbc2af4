"""Merging in place, judged by hand in float64 and by bit comparison with modules that never saw another state."""

import copy
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_lora.device import devices
from flux_lora.errors import FormatError
from flux_lora.lora import deltas
from flux_lora.lora.formats import Adapter, read
from flux_lora.lora.merge import MergedModule
from tests import loaded
from tests.memory.helpers import tiny
from training.random_weights import random_lora

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def load(dtype: torch.dtype) -> torch.nn.Module:
    """A small transformer as it is served."""
    transformer: torch.nn.Module = loaded.load(dtype, tiny()).pipeline().transformer
    return transformer


def merged(module: torch.nn.Module) -> MergedModule:
    return MergedModule("transformer", module, {})


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    integer = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(t.view(integer[t.element_size()]), expected[name].view(integer[t.element_size()]))
        for name, t in module.state_dict().items()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs of different ranks; the last one touches single blocks only."""
    module, folder = load(torch.float32), tmp_path_factory.mktemp("loras")
    paths = []
    for seed, rank in enumerate((4, 2, 8)):
        torch.manual_seed(seed)
        tensors = random_lora(module, rank=rank)
        if seed == 2:
            tensors = {name: tensor for name, tensor in tensors.items() if ".single_transformer_blocks." in name}
        paths.append(folder / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.fixture(scope="module")
def adapters(files: list[Path]) -> list[Adapter]:
    shapes = {"transformer": merged(load(torch.float32)).shapes}
    return [read(path, shapes) for path in files]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-1, 0, 0.3, 1, 2])
def test_merged_weights_are_the_formula_in_float64(
    files: list[Path], adapters: list[Adapter], dtype: torch.dtype, scale: float
) -> None:
    module = load(dtype)
    pristine = bits(module)
    merged(module).bring([(adapters[0], scale)])
    lora = load_file(files[0])
    touched = 0
    for name, weight in module.state_dict().items():
        key = f"transformer.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{key}.lora_A.weight" in lora:
            touched += 1
            up, down, base = (
                t.double() for t in (lora[f"{key}.lora_B.weight"], lora[f"{key}.lora_A.weight"], pristine[name])
            )
            exact = base + scale * up @ down
            largest = torch.maximum(base.abs(), abs(scale) * (up.abs() @ down.abs()))
            ulp = torch.finfo(dtype).eps * 2.0 ** largest.clamp_min(1e-30).log2().floor()
            roundings = len(down) + 2 if dtype == torch.float32 else 1.001  # in bfloat16 those of the sum decide ties
            assert ((weight.double() - exact).abs() <= roundings * ulp).all()
        else:
            assert torch.equal(weight, pristine[name])
    assert touched == len(lora) // 2
    assert same_bits(module, pristine) == (scale == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_changes_end_where_they_began(adapters: list[Adapter], dtype: torch.dtype) -> None:
    module = load(dtype)
    state = merged(module)
    pristine = bits(module)
    state.bring([(adapters[0], 0.8)])
    start = bits(module)
    chance = random.Random(0)
    for _ in range(200):
        chosen = chance.sample(adapters, chance.randrange(3))
        state.bring([(adapter, chance.choice([-1, 0, 0.25, 1, chance.uniform(-1, 2)])) for adapter in chosen])
    assert not same_bits(module, start)
    state.bring([(adapters[0], 0.8)])
    assert same_bits(module, start)
    state.bring([])
    assert same_bits(module, pristine)


def test_the_order_of_arrival_does_not_matter(adapters: list[Adapter]) -> None:
    wanted = [(adapters[0], 0.5), (adapters[1], 1.5), (adapters[2], -1.0)]
    forward, backward = load(torch.bfloat16), load(torch.bfloat16)
    merged(forward).bring(wanted)
    merged(backward).bring(wanted[::-1])
    assert same_bits(forward, bits(backward))


def test_scale_zero_and_foreign_components_are_the_base_state(adapters: list[Adapter]) -> None:
    state = merged(load(torch.float32))
    assert not state.bring([(adapters[0], 0.0)])
    assert not MergedModule("text_encoder", load(torch.float32), {}).bring([(adapters[0], 1.0)])


class Interrupted(BaseException):
    pass


@pytest.fixture
def interruptible(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Raises when the number in the list has been counted down to zero by merged blocks."""
    countdown = [-1]
    original = deltas.LowRank.delta

    def delta(self: deltas.LowRank, *arguments: Any) -> deltas.Delta:
        if countdown[0] == 0:
            raise Interrupted
        countdown[0] -= 1
        return original(self, *arguments)

    monkeypatch.setattr(deltas.LowRank, "delta", delta)
    return countdown


def test_the_current_state_costs_nothing(adapters: list[Adapter], interruptible: list[int]) -> None:
    state = merged(load(torch.float32))
    assert state.bring([(adapters[0], 1.0)])
    interruptible[0] = 0  # any work would fail
    assert not state.bring([(adapters[0], 1.0)])


def test_an_interrupted_merge_is_never_served(adapters: list[Adapter], interruptible: list[int]) -> None:
    first, second = [(adapters[0], 1.0)], [(adapters[1], 0.5), (adapters[2], 1.0)]
    fresh = load(torch.bfloat16)
    merged(fresh).bring(first)
    expected = bits(fresh)
    layers = sum(len(adapter.updates["transformer"]) for adapter, _ in second)
    module = load(torch.bfloat16)
    state = merged(module)
    for layer in range(layers):
        state.bring(first)
        interruptible[0] = layer
        with pytest.raises(Interrupted):
            state.bring(second)
        interruptible[0] = -1
        assert state.state is None
        assert state.bring(first)
        assert same_bits(module, expected), f"interrupted at layer {layer} of {layers}"


def test_interrupted_while_restoring(adapters: list[Adapter]) -> None:
    """At any read of pristine weights; the last one is after all that had to be restored is."""
    module = load(torch.float32)
    pristine, left = bits(module), [-1]

    def base(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            return pristine[name]

        return read

    state = MergedModule("transformer", module, {}, base=base)
    restored = len(adapters[0].updates["transformer"]) - len(adapters[2].updates["transformer"])
    for wanted, reads in (([], 0), ([], 1), ([], 10), ([(adapters[2], 1.0)], restored)):
        state.bring([(adapters[0], 1.0)])
        left[0] = reads
        with pytest.raises(Interrupted):
            state.bring(wanted)
        left[0] = -1
        assert state.state is None
        state.bring([])
        assert same_bits(module, pristine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_memory_pristine_weights_are_read_from_their_files(
    adapters: list[Adapter], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = loaded.load(dtype, tiny())
    module, kept = placed.pipeline().transformer, load(dtype)
    pristine = bits(module)
    state, reference = placed.merged(), merged(kept)
    monkeypatch.setattr(devices, "free_memory", lambda _: 0)
    for wanted in ([(adapters[0], 1.0)], [(adapters[1], 0.3), (adapters[2], 2.0)], [(adapters[0], -1.0)]):
        state.bring(wanted)
        reference.bring(wanted)
        assert same_bits(module, bits(kept))
    assert "in their files" in state.where()
    assert "on cpu" in reference.where()  # which has no files to read from
    state.bring([])
    assert same_bits(module, pristine)


@pytest.mark.parametrize("component", loaded.ADAPTABLE)
def test_every_parameter_can_be_read_again(component: str) -> None:
    checkpoints = loaded.load(torch.bfloat16).checkpoints
    for name, parameter in getattr(checkpoints.pipelines["dev"], component).named_parameters():
        assert torch.equal(checkpoints.networks["dev"][component].readers[name](), parameter)


def test_the_weight_files_are_not_written_to(adapters: list[Adapter]) -> None:
    """In the files' own type the weights are mapped, not read: changing them in place must not reach the disk."""
    file = tiny() / "dev/transformer/diffusion_pytorch_model.safetensors"
    before = hashlib.sha256(file.read_bytes()).digest()
    merged(load(torch.bfloat16)).bring([(adapters[0], 1.0)])
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_a_strength_beyond_float32_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    """Alpha and scale may each be a number of float32 while their product is none."""
    module = load(torch.float32)
    base, served = bits(module), merged(module)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    rows, columns = served.shapes[f"{layer.removeprefix('transformer.')}.weight"]
    tensors = {
        f"{layer}.lora_A.weight": torch.full((1, columns), 1e-30),
        f"{layer}.lora_B.weight": torch.full((rows, 1), 1e-10),
        f"{layer}.alpha": torch.tensor(3.4e38),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read(tmp_path / "x.safetensors", {"transformer": served.shapes})
    served.bring([(adapter, 1.0)])
    strong = bits(module)
    for scale in (2.0, -1.5):
        with pytest.raises(FormatError, match=f"^The LoRA cannot be applied at scale {scale:g}: its alpha makes that"):
            served.bring([(adapter, scale)])
        served.bring([])
        assert same_bits(module, base)
        served.bring([(adapter, 1.0)])
        assert same_bits(module, strong)


# Several at once, of every kind: those whose ΔW depends on the base weights take it from the pristine ones

LAYER = "transformer_blocks.0.attn.to_q"
FUSED = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Adapter, dict[str, torch.Tensor]]]:
    """One file of each algorithm that updates the same layer, and its tensors in float64."""
    torch.manual_seed(0)
    folder, width = tmp_path_factory.mktemp("kinds"), load(torch.float32).state_dict()[f"{LAYER}.weight"].shape[0]

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / 16).bfloat16()

    def low_rank(rank: int, rows: int) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": numbers(rank, width), "lora_B.weight": numbers(rows, rank)}

    parts = {
        "LoRA": low_rank(4, width),
        "fused LoRA": low_rank(2, 3 * width),
        "DoRA": low_rank(3, width) | {"dora_scale": numbers(width, 1).abs() + 1},
        "LoKr": {"lokr_w1": numbers(8, 8), "lokr_w2": numbers(width // 8, width // 8)},
        "OFT": {"oft_R.weight": numbers(width // 8, 28)},
        "whole": {"modules_to_save.weight": numbers(width, width)},
    }
    shapes = {"transformer": merged(load(torch.float32)).shapes}
    kinds = {}
    for name, tensors in parts.items():
        layer = f"diffusion_model.{FUSED}" if name == "fused LoRA" else f"transformer.{LAYER}"
        save_file({f"{layer}.{part}": tensor for part, tensor in tensors.items()}, folder / f"{name}.safetensors")
        adapter = read(folder / f"{name}.safetensors", shapes)
        kinds[name] = (adapter, {part: tensor.double() for part, tensor in tensors.items()})
    return kinds


def by_hand(kind: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """ΔW in float64."""
    match kind:
        case "LoRA":
            return tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        case "fused LoRA":
            return (tensors["lora_B.weight"] @ tensors["lora_A.weight"])[: len(weight)]
        case "DoRA":
            moved = weight + tensors["lora_B.weight"] @ tensors["lora_A.weight"]
            turned: torch.Tensor = tensors["dora_scale"] * moved / moved.norm(dim=1, keepdim=True)
            return turned - weight
        case "LoKr":
            return torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
        case "OFT":
            rows, columns = torch.triu_indices(8, 8, 1)
            skew = torch.zeros(len(tensors["oft_R.weight"]), 8, 8, dtype=torch.float64)
            skew[:, rows, columns] = tensors["oft_R.weight"]
            skew = skew - skew.transpose(1, 2)
            power = torch.linalg.matrix_power
            rotations = torch.eye(8) + 2 * skew + 2 * power(skew, 2) + 2 * power(skew, 3) + power(skew, 4)
            turned = weight @ torch.block_diag(*rotations).T
            return turned - weight
    return tensors["modules_to_save.weight"] - weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "names",
    [
        ["LoRA", "DoRA", "LoKr"],
        ["DoRA", "OFT"],
        ["LoRA", "fused LoRA"],
        ["LoRA", "fused LoRA", "DoRA", "LoKr", "OFT", "whole"],
    ],
    ids=", ".join,
)
def test_each_of_several_updates_is_taken_from_the_pristine_weight(
    names: list[str], dtype: torch.dtype, kinds: dict[str, tuple[Adapter, dict[str, torch.Tensor]]]
) -> None:
    """And their sum is rounded once."""
    module = load(dtype)
    pristine = module.state_dict()[f"{LAYER}.weight"].double()
    scales = {name: [0.5, -0.25, 0.75, 1.5, 0.3, 0.1][index] for index, name in enumerate(names)}
    merged(module).bring([(kinds[name][0], scale) for name, scale in scales.items()])
    changes = [scale * by_hand(name, kinds[name][1], pristine) for name, scale in scales.items()]
    exact = pristine + sum(changes)
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp_min(1e-30).log2().floor()
    terms = sum(change.abs().max() for change in changes) + pristine.abs().max()
    error = (module.state_dict()[f"{LAYER}.weight"].double() - exact).abs()
    assert (error <= 0.501 * unit + 1e-6 * terms).all()


def test_any_set_in_any_order_after_any_history_is_a_fresh_start(
    kinds: dict[str, tuple[Adapter, dict[str, torch.Tensor]]], adapters: list[Adapter]
) -> None:
    everything = [*(adapter for adapter, _ in kinds.values()), *adapters]
    chance = random.Random(0)
    travelled, untouched = load(torch.bfloat16), load(torch.bfloat16)
    state, pristine = merged(travelled), bits(travelled)
    for _ in range(25):
        chosen = [
            (adapter, chance.choice([-1.0, 0.0, 0.3, 1.0, 2.0]))
            for adapter in chance.sample(everything, chance.randrange(6))
        ]
        if chosen and chance.random() < 0.3:
            chosen.append((chosen[0][0], 0.25))  # one fine-tune twice
        state.bring(chosen)
        fresh = copy.deepcopy(untouched)
        chance.shuffle(chosen)
        merged(fresh).bring(chosen)
        assert same_bits(travelled, bits(fresh))
    state.bring([(adapter, 0.0) for adapter in everything])
    assert same_bits(travelled, pristine)
    assert state.state == ()
