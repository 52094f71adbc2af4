"""Which plan is chosen for which memory: FLUX.1's real sizes against cards and machines that are only numbers."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest

from flux_lora.errors import DeviceMemoryError, SettingsError
from flux_lora.memory import plans
from flux_lora.memory.plans import PLANS, Choice, Room, Weights, choose_plan, fits
from flux_lora.settings import PlanName
from tests.memory.helpers import BLOCKS, CONTEXT, DEV, DEV_ALONE, FLUX, GB, cpu, gpu

BOTH = {
    80: "resident",
    48: "alternating",
    40: "alternating",
    32: "offload-text",
    24: "streamed",
    16: "streamed",
    12: "streamed",
    8: "streamed",
    6: "streamed, decoded in strips",
}
ALONE = BOTH | {48: "resident", 40: "resident"}
LOSSY = {24: "quantized", 16: "quantized, decoded in strips"}
"""What is chosen otherwise when the speed profile allows lossy weights."""


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("budget", BOTH)
def test_the_plan_for_a_card(budget: int, lossy: bool) -> None:
    other = LOSSY if lossy else {}
    assert choose_plan(FLUX, gpu(budget), lossy=lossy).label == other.get(budget, BOTH[budget])
    assert choose_plan(DEV_ALONE, gpu(budget), lossy=lossy).label == other.get(budget, ALONE[budget])


@pytest.mark.parametrize(("memory", "label"), [(128, "resident"), (64, "resident"), (48, "alternating")])
def test_the_plan_without_a_gpu(memory: int, label: str) -> None:
    choice = choose_plan(FLUX, cpu(memory))
    assert choice.label == label
    assert choice.kept == (label == "resident")  # there is no host memory beside the device's to keep another copy in


def test_a_cpu_is_not_given_what_its_memory_cannot_hold_twice() -> None:
    for memory in range(20, 130, 2):
        try:
            choice = choose_plan(FLUX, cpu(memory))
        except DeviceMemoryError:
            assert memory < 40
        else:
            assert choice.device + choice.host <= memory * GB


@pytest.mark.parametrize("sizes", [FLUX, DEV_ALONE])
@pytest.mark.parametrize("lossy", [False, True])
def test_what_is_chosen_fits_the_device_and_the_host(sizes: plans.Sizes, lossy: bool) -> None:
    for card, host in itertools.product(range(5, 100), (16, 32, 64, 128)):
        try:
            choice = choose_plan(sizes, gpu(card, host), lossy=lossy)
        except DeviceMemoryError:
            continue
        assert choice.device <= card * GB - CONTEXT
        assert choice.host <= host * GB


def test_more_memory_never_means_a_slower_plan() -> None:
    order = [plan.name for plan in PLANS]
    chosen = [order.index(choose_plan(FLUX, gpu(card)).plan.name) for card in range(6, 100)]
    assert chosen == sorted(chosen, reverse=True)


def test_what_streams_leaves_the_rest_of_the_device_to_blocks_that_stay() -> None:
    stays = [choose_plan(FLUX, gpu(card)).stay for card in (8, 12, 16, 24)]
    assert stays == sorted(stays)
    assert stays[3] - stays[1] == 12 * GB
    assert choose_plan(FLUX, gpu(12)).device <= 12 * GB - CONTEXT


def test_a_container_without_room_for_both_reads_them_from_their_files() -> None:
    assert choose_plan(FLUX, gpu(48, host=64)).kept
    small = choose_plan(FLUX, gpu(48, host=16))
    assert (small.label, small.kept, small.host) == ("alternating", False, 0)
    assert choose_plan(FLUX, gpu(12, host=30)).host == choose_plan(DEV_ALONE, gpu(12, host=30)).host


def test_a_plan_that_the_host_cannot_hold_is_not_chosen() -> None:
    with pytest.raises(DeviceMemoryError, match=r"24\.6 GiB of the host .*streamed.* 14\.9 GiB of the host"):
        choose_plan(FLUX, gpu(12, host=16))
    assert choose_plan(FLUX, gpu(80, host=4)).label == "resident"


def test_too_small_a_device_is_refused_with_the_numbers() -> None:
    with pytest.raises(DeviceMemoryError, match=r"need 4\.5 GiB of the device .*there are 2\.2 GiB of the device"):
        choose_plan(FLUX, gpu(3))


@pytest.mark.parametrize("named", get_args(PlanName))
def test_a_named_plan_is_taken_whatever_the_numbers_say(named: PlanName) -> None:
    assert choose_plan(FLUX, gpu(80), named=named, lossy=True).plan.name == named
    choice = choose_plan(FLUX, gpu(1), named=named, lossy=True)
    assert choice.plan.name == named
    assert not fits(choice, gpu(1))


def test_a_lossy_plan_needs_a_profile_that_allows_it() -> None:
    with pytest.raises(SettingsError, match="FLUX_MEMORY_PLAN=quantized cannot be used"):
        choose_plan(FLUX, gpu(80), named="quantized")


def falls(sizes: plans.Sizes, room: Room, start: Choice) -> list[Choice]:
    chain = [start]
    while True:
        try:
            chain.append(choose_plan(sizes, room, after=chain[-1]))
        except DeviceMemoryError:
            return chain


@pytest.mark.parametrize("sizes", [FLUX, DEV_ALONE])
def test_each_fall_needs_less_and_keeps_the_precision(sizes: plans.Sizes) -> None:
    chain = falls(sizes, gpu(80), choose_plan(sizes, gpu(80)))
    assert [choice.device for choice in chain] == sorted({choice.device for choice in chain}, reverse=True)
    assert not any(choice.plan.lossy for choice in chain)
    names = list(dict.fromkeys(choice.plan.name for choice in chain))
    assert names == [name for name in ("resident", "alternating", "offload-text", "streamed") if name in names]
    assert ("alternating" in names) == (len(sizes.transformers) == 2)  # one model has nobody to take turns with
    assert chain[-1].label == "streamed, decoded in strips"
    assert chain[-1].stay == 0


def test_a_lossy_plan_falls_to_lossy_ones_only() -> None:
    start = choose_plan(FLUX, gpu(24), lossy=True)
    assert [choice.label for choice in falls(FLUX, gpu(24), start)] == ["quantized", "quantized, decoded in strips"]


def test_a_fall_is_not_into_host_memory_that_is_not_there() -> None:
    room = gpu(80, host=4)
    assert [(choice.plan.name, choice.kept) for choice in falls(FLUX, room, choose_plan(FLUX, room))] == [
        ("resident", True),
        ("alternating", False),
    ]


def test_blocks_that_stay_are_spread_evenly() -> None:
    assert plans.staying([10] * 10, 50) == {1, 3, 5, 7, 9}
    assert plans.staying([10] * 4, 40) == {0, 1, 2, 3}
    assert plans.staying([10] * 4, 39) != {0, 1, 2, 3}
    assert plans.staying([10] * 4, 0) == plans.staying([], 5) == frozenset()
    for room in range(0, sum(BLOCKS) + GB, GB):
        chosen = plans.staying(BLOCKS, room)
        assert sum(BLOCKS[index] for index in chosen) <= room
        assert room - sum(BLOCKS[index] for index in chosen) < 2 * max(BLOCKS) or len(chosen) == len(BLOCKS)


def test_needs_are_those_of_the_table() -> None:
    """The bytes of the plans for both models, added up by hand."""
    work = 1.25 * FLUX.decode
    both = 1.25 * (FLUX.denoise + FLUX.decode)
    on_it = FLUX.small + FLUX.t5.trunk
    expected: dict[PlanName, tuple[float, int]] = {
        "resident": (FLUX.small + FLUX.t5.total + 2 * DEV.total + both, 0),
        "alternating": (FLUX.small + FLUX.t5.total + DEV.total + both, 2 * DEV.total),
        "offload-text": (on_it + DEV.total + work, 2 * DEV.total + sum(FLUX.t5.blocks)),
        "quantized": (on_it + DEV.total / 2 + work, 2 * DEV.total + sum(FLUX.t5.blocks)),
        "streamed": (on_it + DEV.trunk + 2 * max(BLOCKS) + work, 2 * DEV.total + sum(FLUX.t5.blocks)),
    }
    exact = replace(FLUX, transformers={"dev": DEV, "schnell": Weights(DEV.trunk, DEV.blocks)})
    for name, (device, host) in expected.items():
        choice = choose_plan(exact, Room(int(device), 200 * GB), named=name, lossy=True)  # just enough: no block stays
        assert (choice.plan.name, choice.device, choice.host, choice.strips) == (name, int(device), host, False)
