"""The memory plans, and which of them fits: a table, and a pure function of sizes and room.

Always on the device are the VAE and CLIP, which are small. What a plan says of the others:

| where | on the device | in the host |
|---|---|---|
| device | always | nothing |
| turns | the one of dev and schnell that draws | both, as their files have them; or nothing, and they are read again |
| quantized | the same in one byte a weight | the same |
| streamed | as many blocks as there is room for, and two slots that the others pass through | those others, merged |
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flux_lora.errors import DeviceMemoryError, SettingsError
from flux_lora.settings import PlanName

Where = Literal["device", "turns", "quantized", "streamed"]

SLOTS = 2
"""Blocks of a streamed network on the device at a time: one computes, the next arrives."""

MARGIN = 1.25
"""What working memory may take beyond the tensors that live at once: cuDNN's workspaces, the allocator's gaps.

An estimate: on a GPU it has not been measured yet.
"""

SHRINK = 0.85
"""After running out of memory, blocks stay on the device up to this part of what was to be taken before."""


@dataclass(frozen=True)
class Plan:
    """Where the large networks live, and how the VAE decodes."""

    name: PlanName
    transformers: Where
    t5: Where
    overlap: bool
    """Whether one image is decoded while the next is denoised, which takes the memory of both."""
    strips: tuple[bool, ...] = (False,)
    """Whether the VAE decodes and encodes an image whole, or in strips, in the order of preference."""
    lossy: bool = False


PLANS = (
    Plan("resident", transformers="device", t5="device", overlap=True),
    Plan("alternating", transformers="turns", t5="device", overlap=True),
    Plan("offload-text", transformers="turns", t5="streamed", overlap=False),
    Plan("quantized", transformers="quantized", t5="streamed", overlap=False, strips=(False, True), lossy=True),
    Plan("streamed", transformers="streamed", t5="streamed", overlap=False, strips=(False, True)),
)
"""In the order of preference: each needs less of the device than the one before, and more time."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a network: of its blocks in the order in which they compute, and of what is outside of them."""

    trunk: int
    blocks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.trunk + sum(self.blocks)

    @property
    def slots(self) -> int:
        """Of the device memory that its blocks pass through."""
        return SLOTS * max(self.blocks, default=0)


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything that takes memory, in the type that is served."""

    small: int
    """VAE and CLIP."""
    t5: Weights
    transformers: Mapping[str, Weights]
    denoise: int
    """Tensors that live at once beside the weights while the largest image is denoised …"""
    decode: int
    """… while it is decoded whole …"""
    decode_strips: int
    """… and in strips."""
    encode: int
    """The same while a source image of that size is encoded whole, before anything is denoised …"""
    encode_strips: int
    """… and in strips."""
    merge: int = 0
    """Tensors that live at once while adapters are merged, when nothing is drawn."""


@dataclass(frozen=True)
class Room:
    """Bytes that may be taken."""

    device: int
    host: int
    shared: bool = False
    """Whether the device is the host, so that both take from the smaller of the two."""
    limited_by: str = ""
    """What decided ``device``, for the log."""

    @property
    def described(self) -> str:
        """The bytes in words, for messages."""
        limited = f" ({self.limited_by})" if self.limited_by else ""
        if self.shared:
            return f"{readable(min(self.device, self.host))} of memory{limited}"
        return f"{readable(self.device)} of the device{limited} and {readable(self.host)} of the host"


@dataclass(frozen=True)
class Choice:
    """A plan for given sizes, and what it takes."""

    plan: Plan
    strips: bool
    kept: bool
    """Whether transformers that leave the device stay in host memory; else they are read from their files again."""
    stay: int
    """Bytes of a streamed transformer's blocks that stay on the device."""
    device: int
    host: int

    @property
    def label(self) -> str:
        """What of it may change a picture's last bits, for metrics and metadata."""
        return f"{self.plan.name}, decoded in strips" if self.strips else self.plan.name


def choose_plan(
    sizes: Sizes, room: Room, *, lossy: bool = False, named: PlanName | None = None, after: Choice | None = None
) -> Choice:
    """Choose the first plan that fits.

    Args:
        sizes: what the models take.
        room: what may be taken.
        lossy: whether weights may be quantized; with ``after``, whether they are: what streams never is.
        named: take this plan, whether or not the numbers say that it fits.
        after: a choice under which memory ran out: take a smaller one of the same precision.

    Raises:
        DeviceMemoryError: none fits; the message holds the numbers.
        SettingsError: the named plan is lossy and that is not allowed.
    """
    if after:
        lossy = lossy or after.plan.lossy
        smaller = PLANS[PLANS.index(after.plan) :]
        plans = [plan for plan in smaller if (plan.transformers != "streamed" if lossy else not plan.lossy)]
        shrunk = replace(room, device=int(SHRINK * after.device))
        choices = [choice for plan in plans for choice in _choices(plan, sizes, shrunk) if choice.device < after.device]
    else:
        plans = [plan for plan in PLANS if named == plan.name or (not named and (lossy or not plan.lossy))]
        choices = [choice for plan in plans for choice in _choices(plan, sizes, room)]
        if plans[0].lossy and not lossy:
            raise SettingsError(
                f"FLUX_MEMORY_PLAN={named} cannot be used: it draws from quantized weights, and the speed profile of "
                "this server allows none. Choose another plan, or a profile that allows lossy weights."
            )
    for choice in choices:
        if fits(choice, room):
            return choice
    if named and not after:
        return choices[-1]
    nearest = min([*choices, after] if after else choices, key=lambda choice: _shortage(choice, room))
    raise DeviceMemoryError(
        f"The models need {readable(nearest.device)} of the device and {readable(nearest.host)} of the host (memory "
        f"plan {nearest.label}), and there are {room.described}: use a larger device, or leave one of dev/ and "
        "schnell/ out of the weights directory."
    )


def fits(choice: Choice, room: Room) -> bool:
    """Whether there is room for a choice."""
    return _shortage(choice, room) == 0


def _shortage(choice: Choice, room: Room) -> int:
    if room.shared:
        return max(0, choice.device + choice.host - min(room.device, room.host))
    return max(0, choice.device - room.device) + max(0, choice.host - room.host)


def readable(size: int) -> str:
    """Bytes in a unit that suits them."""
    return f"{size / 2**30:.1f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def staying(blocks: Sequence[int], room: int) -> frozenset[int]:
    """Which blocks stay on the device, of which ``room`` bytes hold as many as they can: spread evenly.

    The others then have the time of those that stay to arrive in.
    """
    share, owed, chosen = min(1.0, room / max(1, sum(blocks))), 0.0, []
    for index, size in enumerate(blocks):
        owed += share * size
        if owed >= size * (1 - 1e-9):  # all of them, when the share is 1
            owed -= size
            chosen.append(index)
    return frozenset(chosen)


def transformers_where(plan: Plan, models: int) -> Where:
    """Where transformers live; a single one has nobody to take turns with."""
    return "device" if plan.transformers == "turns" and models == 1 else plan.transformers


def _choices(plan: Plan, sizes: Sizes, room: Room) -> Iterator[Choice]:
    for strips in plan.strips:
        for kept in (True, False):
            choice = _needs(plan, sizes, strips, kept=kept, stay=0)
            if transformers_where(plan, len(sizes.transformers)) == "streamed":
                most = max(sum(weights.blocks) for weights in sizes.transformers.values())
                stay = 0 if room.shared else min(most, max(0, room.device - choice.device))
                choice = _needs(plan, sizes, strips, kept=kept, stay=stay)
            yield choice


def _needs(plan: Plan, sizes: Sizes, strips: bool, kept: bool, stay: int) -> Choice:
    transformers = sizes.transformers.values()
    largest = max(weights.total for weights in transformers)
    everything = sum(weights.total for weights in transformers)
    encode, decode = (sizes.encode_strips, sizes.decode_strips) if strips else (sizes.encode, sizes.decode)
    drawing = sizes.denoise + decode if plan.overlap else max(sizes.denoise, decode)
    work = MARGIN * max(encode, drawing, sizes.merge)
    device, host = sizes.small, 0
    match transformers_where(plan, len(transformers)):
        case "device":
            device += everything
        case "turns":
            device, host = device + largest, everything if kept else 0
        case "quantized":
            device, host = device + largest // 2, everything if kept else 0
        case "streamed":
            device += max(min(weights.total, weights.trunk + weights.slots + stay) for weights in transformers)
            streams = [sum(weights.blocks) - min(stay, sum(weights.blocks)) for weights in transformers]
            host += everything if kept and len(transformers) > 1 else max(streams)
    if plan.t5 == "device":
        device += sizes.t5.total
    else:
        device, host, work = device + sizes.t5.trunk, host + sum(sizes.t5.blocks), max(work, sizes.t5.slots)
    return Choice(plan, strips, kept, stay, device + int(work), host)
