"""FLUX.1 dev and schnell of the real size with random weights, made where they are to live; no download.

    assemble(settings, fine_tune, open_weights=full_size.source("dev"))

loads, places, quantizes and merges them as it would those of a weights directory. With ``small`` everything has the
same shape and a fraction of the size, so that a CPU can try what a GPU will measure.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import wait
from flux_lora.assembly import Open
from flux_lora.checkpoint.assembling import Checkpoints, Network, empty_parameters, move_buffers
from flux_lora.checkpoint.reading import StoredTensor
from flux_lora.device.libraries import diffusers, transformers

TOKENIZERS = Path(__file__).resolve().parents[1] / "weights" / "mini" / "dev"
"""The miniature's; which tokens they make costs nothing and changes nothing."""

FULL: dict[str, dict[str, Any]] = {
    "transformer": {},  # what diffusers makes unasked is FLUX.1
    "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
}
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "axes_dims_rope": (8, 12, 12),
    },
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "clip": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vae": {
        "block_out_channels": (8, 8, 8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}

STD = 0.02
"""Of every weight; norms' are one and biases zero, so that activations stay finite."""

TILE = 2**24 - 3
"""Random numbers that all weights are made of, each beginning elsewhere; a prime, so that no two rows are the same."""


class Stopwatch:
    """Seconds that filling has taken."""

    seconds = 0.0


def source(*models: str, small: bool = False, filling: Stopwatch | None = None) -> Open:
    """Random weights in a weights directory's place.

    Args:
        models: dev, schnell or both; what they share is the same in both.
        small: of a fraction of the size.
        filling: is told the seconds that it takes to make the weights.
    """

    def open_weights(_: Path, dtype: torch.dtype) -> Checkpoints:
        return _open(models, dtype, small, filling or Stopwatch())

    return open_weights


def pipeline(model: str, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """A FluxPipeline on a device, all its weights in memory: what those start with who use diffusers alone."""
    checkpoints = source(model, small=small)(Path(), dtype)
    for network in checkpoints.networks[model].values():
        move_buffers(network.module, device)
        for parameter in network.parameters.values():
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)
        checkpoints.fill((network.stored[name], parameter.data) for name, parameter in network.parameters.items())
    return checkpoints.pipelines[model]


def transformer(model: str, *, small: bool) -> Any:
    """A transformer on the default device."""
    sizes = SMALL if small else FULL
    return diffusers.FluxTransformer2DModel(
        **sizes["transformer"],
        joint_attention_dim=sizes["t5"]["d_model"],
        pooled_projection_dim=sizes["clip"]["hidden_size"],
        guidance_embeds=model == "dev",
    )


def operations(model: str, image_tokens: int, text_tokens: int, *, small: bool) -> int:
    """Floating-point operations of one step, counted by PyTorch on the transformer without weights."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = transformer(model, small=small)
        config = network.config
        network(
            hidden_states=torch.empty(1, image_tokens, config.in_channels),
            encoder_hidden_states=torch.empty(1, text_tokens, config.joint_attention_dim),
            pooled_projections=torch.empty(1, config.pooled_projection_dim),
            timestep=torch.empty(1),
            guidance=torch.empty(1) if model == "dev" else None,
            img_ids=torch.empty(image_tokens, 3),
            txt_ids=torch.empty(text_tokens, 3),
        )
    return int(counter.get_total_flops())


def _open(models: Iterable[str], dtype: torch.dtype, small: bool, filling: Stopwatch) -> Checkpoints:
    sizes = SMALL if small else FULL
    clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    t5_tokenizer = transformers.T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2")
    special = {name: getattr(clip_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = transformers.CLIPTextConfig(**sizes["clip"], vocab_size=max(49408, len(clip_tokenizer)), **special)
    t5 = transformers.T5Config(**sizes["t5"], feed_forward_proj="gated-gelu")
    shared = {
        "text_encoder": _network("text_encoder", lambda: transformers.CLIPTextModel(clip), dtype),
        "text_encoder_2": _network("text_encoder_2", lambda: transformers.T5EncoderModel(t5), dtype),
        "vae": _network("vae", lambda: _vae(**sizes["vae"]), dtype),
    }
    networks = {
        model: shared
        | {"transformer": _network(f"{model}/transformer", partial(transformer, model, small=small), dtype)}
        for model in models
    }

    def fill(tensors: Iterable[tuple[StoredTensor, Tensor]]) -> None:
        started = time.perf_counter()
        for stored, target in tensors:
            _write(stored.name, target)
        wait()
        filling.seconds += time.perf_counter() - started

    return Checkpoints(
        {
            model: diffusers.FluxPipeline(
                **{name: network.module for name, network in of_model.items()},
                tokenizer=clip_tokenizer,
                tokenizer_2=t5_tokenizer,
                scheduler=_scheduler(model),
            )
            for model, of_model in networks.items()
        },
        networks,
        dict.fromkeys(networks, "random"),
        [],
        fill,
    )


def _network(name: str, make: Callable[[], nn.Module], dtype: torch.dtype) -> Network:
    """A network without weights, which are told by name where to come from."""
    with register_module_parameter_registration_hook(_without_memory):  # type: ignore[arg-type]  # it may return a parameter
        module = make()
    getattr(module, "tie_weights", lambda: None)()
    parameters = empty_parameters(module.eval(), dtype)
    stored = {
        key: StoredTensor(Path(name), f"{name}/{key}", 0, torch.bfloat16, tuple(parameter.shape))
        for key, parameter in parameters.items()
    }
    return Network(module, parameters, stored, _readers(stored))


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _readers(stored: Mapping[str, StoredTensor]) -> dict[str, Callable[[], Tensor]]:
    def read(tensor: StoredTensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        _write(tensor.name, target)
        return target

    return {name: partial(read, tensor) for name, tensor in stored.items()}


@torch.no_grad()
def _write(name: str, target: Tensor) -> None:
    """Fill a tensor of any type on any device with what its name stands for: the same numbers everywhere."""
    if target.ndim < 2:
        target.fill_(name.endswith("weight"))
        return
    tile, start, done = _tile(target.device), zlib.crc32(name.encode()) % TILE, 0
    flat = target.view(-1)
    while done < len(flat):
        piece = tile[start : start + len(flat) - done]
        flat[done : done + len(piece)].copy_(piece)
        done, start = done + len(piece), 0


@cache
def _tile(device: torch.device) -> Tensor:
    if device.type != "cpu":
        return _tile(torch.device("cpu")).to(device)
    return torch.empty(TILE).normal_(0, STD, generator=torch.Generator().manual_seed(0)).bfloat16()


def full_vae() -> Any:
    """FLUX.1's VAE, with the random weights that diffusers gives a new one."""
    return _vae(**FULL["vae"])


def _vae(**sizes: Any) -> Any:
    blocks = len(sizes["block_out_channels"])
    return diffusers.AutoencoderKL(
        **sizes,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _scheduler(model: str) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if model == "dev" else 1.0,
        use_dynamic_shifting=model == "dev",
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
