"""How much memory there is, measured, and how much the models take, from their files' headers."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flux_lora.checkpoint.assembling import Network
from flux_lora.device import devices
from flux_lora.inputs import LARGEST_SIDE
from flux_lora.memory.plans import Room, Sizes, Weights
from flux_lora.request import MAX_TEXT_TOKENS

CPU = torch.device("cpu")

CONTEXT_BYTES = 640 * 2**20
"""What the driver counts for a process beside its tensors: context, kernels, libraries' handles.

An estimate: on a GPU it has not been measured yet.
"""

HOST_RESERVE = 3 * 2**29
"""Host memory that no plan takes: readers' buffers, parsed LoRAs, pictures."""

BLOCKS = {
    "text_encoder_2": ("encoder.block",),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
}
"""Where a network has the blocks that it can be streamed by, in the order in which they compute."""

DENOISE_TENSORS = 18
"""Values that live at once for each token and each of the transformer's channels, beside its weights.

Counted in a dry run of diffusers' FluxTransformer2DModel with fused attention: 17.3, at 4,096 and at 8,100 tokens.
"""

DECODE_TENSORS, STRIPS_TENSORS = 3.05, 1.7
"""The same of the decoder, for each pixel and channel of its last block's input; counted: 3.0 whole, 1.64 in strips."""

ENCODE_TENSORS, ENCODE_STRIPS_TENSORS = 5.05, 2.25
"""The same of the encoder, for each pixel and channel of its first block; counted: 5.0 whole, 2.18 in strips."""

MERGE_COPIES, TABLE_COPIES = 8, 3
"""Copies in float32 of the largest layer that one update covers, and of a table, that live at once while it is merged.

Counted: a LoRA 1, LoKr 2, LoHa 3, DoRA 2 to 5, OFT 4, BOFT 6; and one more for another adapter that is merged with it.
"""

COVERED_AT_ONCE = ("to_q.weight", "to_k.weight", "to_v.weight", "proj_mlp.weight")
"""How the weights of a block end that its first authors, and so many fine-tunes, have as one."""


def available_room(device: torch.device, asked: int | None, own: Mapping[str, int] | None = None) -> Room:
    """Measure what may be taken: the least of free memory, the allocator's cap, and ``FLUX_MEMORY_BUDGET``.

    On a GPU a budget becomes the allocator's cap, with room for the context, so that the process keeps to it.

    Args:
        device: computes.
        asked: the budget; None: there is none.
        own: what this process would give back, in bytes by the type of the device (``cpu``, ``cuda``).
    """
    own = own or {}
    host = devices.free_memory(CPU) - HOST_RESERVE + own.get("cpu", 0)
    if device.type == "cpu":
        allowed = host if asked is None else min(host, asked)
        return Room(allowed, host, shared=True, limited_by=_limit(host, allowed))
    measured = devices.free_memory(device)
    if asked is not None:
        devices.cap(device, max(0, asked - CONTEXT_BYTES))
    allowed = devices.free_memory(device)
    return Room(allowed + own.get(device.type, 0), host, limited_by=_limit(measured, allowed))


def remeasured(device: torch.device, asked: int | None) -> Callable[[], Room]:
    """From now on, measure what may be taken if this process gives back what it has taken since.

    Args:
        device: as for `available_room`.
        asked: likewise.
    """
    before = {each.type: devices.held_memory(each) for each in {device, CPU}}

    def measure() -> Room:
        own = {each.type: devices.held_memory(each) - before[each.type] for each in {device, CPU}}
        return available_room(device, asked, own)

    return measure


def needed_sizes(networks: Mapping[str, Mapping[str, Network]], dtype: torch.dtype) -> Sizes:
    """What the networks of each model take, in ``dtype``."""
    shared = next(iter(networks.values()))
    transformers = {model: weights("transformer", of_model["transformer"]) for model, of_model in networks.items()}
    transformer: Any = shared["transformer"].module
    vae: Any = shared["vae"].module
    denoise, decode, decode_strips, encode, encode_strips = working_bytes(
        transformer.config, vae.config, dtype.itemsize
    )
    return Sizes(
        small=weights("text_encoder", shared["text_encoder"]).total + weights("vae", shared["vae"]).total,
        t5=weights("text_encoder_2", shared["text_encoder_2"]),
        transformers=transformers,
        denoise=denoise,
        decode=decode,
        decode_strips=decode_strips,
        encode=encode,
        encode_strips=encode_strips,
        merge=merging_bytes(networks),
    )


def working_bytes(transformer: Mapping[str, Any], vae: Mapping[str, Any], bytes_each: int = 2) -> tuple[int, ...]:
    """What the largest image takes beside the weights.

    Returns:
        Bytes while it is denoised; decoded whole, and in strips; and while a source image of its size is encoded whole,
        and in strips.
    """
    channels = vae["block_out_channels"]
    tokens = (LARGEST_SIDE // 2 ** len(channels)) ** 2 + max(MAX_TEXT_TOKENS.values())
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    decoding = LARGEST_SIDE**2 * channels[min(1, len(channels) - 1)] * bytes_each
    encoding = LARGEST_SIDE**2 * channels[0] * bytes_each
    return (
        DENOISE_TENSORS * tokens * width * bytes_each,
        *(int(each * decoding) for each in (DECODE_TENSORS, STRIPS_TENSORS)),
        *(int(each * encoding) for each in (ENCODE_TENSORS, ENCODE_STRIPS_TENSORS)),
    )


def merging_bytes(networks: Mapping[str, Mapping[str, Network]]) -> int:
    """What merging adapters takes beside the weights and what they keep of them, whatever their algorithms."""
    most = 0
    for component in ("transformer", "text_encoder", "text_encoder_2"):
        for network in {id(each): each for each in (of_model[component] for of_model in networks.values())}.values():
            blocks = block_names(component, network).values()
            fused = [
                sum(network.parameters[n].numel() for n in names if n.endswith(COVERED_AT_ONCE)) for names in blocks
            ]
            largest = max(parameter.numel() for parameter in network.parameters.values())
            most = max(most, MERGE_COPIES * max(fused, default=0), TABLE_COPIES * largest)
    return most * torch.float32.itemsize


def weights(component: str, network: Network) -> Weights:
    """The bytes of a network's blocks, and of the rest."""
    blocks = block_names(component, network)
    sizes = [sum(network.parameters[name].nbytes for name in names) for names in blocks.values()]
    return Weights(sum(parameter.nbytes for parameter in network.parameters.values()) - sum(sizes), tuple(sizes))


def block_names(component: str, network: Network) -> dict[str, list[str]]:
    """The parameters of each block that a network can be streamed by, in the order in which the blocks compute."""
    found: dict[str, list[str]] = {}
    for lists in BLOCKS.get(component, ()):
        for name in network.parameters:
            if match := re.match(rf"{re.escape(lists)}\.\d+(?=\.)", name):
                found.setdefault(match[0], []).append(name)
    return found


def _limit(measured: int, allowed: int) -> str:
    return "FLUX_MEMORY_BUDGET" if allowed < measured else "measured"
