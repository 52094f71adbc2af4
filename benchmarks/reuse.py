"""How near pictures stay when the transformer's outputs are reused, by the number of steps that are computed.

    scripts/bench reuse                       # the miniature
    FLUX_WEIGHTS=weights scripts/bench reuse  # the full weights, on a GPU

Beside our schedule: TaylorSeer and first-block caching as diffusers has them, and cache-dit where it is installed
(first block, with a Taylor series of the first order). All draw in the profile ``eager`` from the same prompts and
seeds; PSNR in dB against pictures whose every step is computed.
"""

import argparse
import importlib.util
import io
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

from benchmarks.measure import machine
from flux_lora.assembly import assemble
from flux_lora.drawing.image import decode, denoise
from flux_lora.request import SIZES
from flux_lora.settings import Settings
from flux_lora.speed import step_cache

PROMPTS = ("a tomato on a blue background", "an owl on a purple background", "a violin on a green background", "")
SIZE = SIZES["1:1"]
Way = Callable[[Any, int], AbstractContextManager[object]]
"""Makes a pipeline reuse, for an image of so many steps."""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench reuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="of each prompt")
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    settings = Settings.from_environment().model_copy(update={"profile": "eager"})
    parts = assemble(settings, log=lambda _: None).parts
    pipeline = parts.pipelines["dev"]
    embeddings = {prompt: parts.prompts.encode(pipeline, prompt, 512, ()) for prompt in PROMPTS}

    def draw(way: Way) -> tuple[list[np.ndarray], float]:
        pictures, computed = [], []
        for prompt in PROMPTS:
            for seed in range(options.seeds):
                quiet = redirect_stdout(io.StringIO())
                with quiet, way(pipeline, options.steps), _computed(pipeline.transformer) as count:
                    latents = denoise(
                        pipeline, embeddings[prompt], seed, SIZE, steps=options.steps, guidance=3.5, title=prompt
                    )
                pictures.append(np.asarray(decode(pipeline, latents, SIZE)))
                computed.append(len(count))
        return pictures, statistics.mean(computed)

    whole, _ = draw(lambda *_: nullcontext())
    print(machine())
    print(f"weights {settings.weights}, dev, {len(whole)} pictures, {options.steps} steps\n")
    print(f"{'':44}{'computed':>9}{'PSNR':>10}{'median':>9}")
    for name, way in _ways():
        pictures, computed = draw(way)
        errors = [
            float(np.square(one.astype(float) - other).mean()) for one, other in zip(pictures, whole, strict=True)
        ]
        psnr, median = (_psnr(average(errors)) for average in (statistics.mean, statistics.median))
        print(f"{name:44}{computed:9.1f}{psnr:7.1f} dB{median:6.1f} dB", flush=True)
    return 0


def _ways() -> Iterator[tuple[str, Way]]:
    yield "ours", lambda pipeline, steps: step_cache.counting(pipeline.transformer, steps, step_cache.Schedule())
    yield "TaylorSeer, every second step", lambda pipeline, steps: _cached(pipeline, _every_second(steps))
    for threshold in (0.08, 0.12, 0.16):
        yield f"first block, {threshold}", partial(_first_block, threshold=threshold)
    if importlib.util.find_spec("cache_dit"):
        for threshold in (0.08, 0.12, 0.2):
            yield f"cache-dit, first block and Taylor, {threshold}", partial(_cache_dit, threshold=threshold)


def _first_block(pipeline: Any, _: int, threshold: float) -> AbstractContextManager[object]:
    return _cached(pipeline, FirstBlockCacheConfig(threshold=threshold))


def _every_second(steps: int) -> Any:
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=4,
        disable_cache_after_step=steps - 1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[""],  # the transformer itself, whose name among its own modules is empty
    )


@contextmanager
def _cached(pipeline: Any, configuration: Any) -> Iterator[None]:
    pipeline.transformer.enable_cache(configuration)
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


@contextmanager
def _cache_dit(pipeline: Any, steps: int, threshold: float) -> Iterator[None]:
    import cache_dit

    cache = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=4,
        num_inference_steps=steps,
    )
    series = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(pipeline, cache_config=cache, calibrator_config=series)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipeline)


@contextmanager
def _computed(transformer: Any) -> Iterator[list[None]]:
    """Gets an item whenever the last block is computed, by which all others are."""
    count: list[None] = []
    layer = transformer.single_transformer_blocks[-1].attn.to_q
    hook = layer.register_forward_pre_hook(lambda *_: count.append(None))
    try:
        yield count
    finally:
        hook.remove()


def _psnr(error: float) -> float:
    return 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    sys.exit(main())
