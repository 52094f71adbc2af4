"""FLUX.1's sizes, counted by hand from its architecture, rooms to put it into, and a tiny one with its kind of VAE."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from flux_lora.memory.plans import Room, Sizes, Weights
from training import random_weights

GB = 10**9

# Two bytes a weight, width 3,072. Linear layers have biases, but for T5's.
WIDTH = 3072
ATTENTION = 4 * (WIDTH * WIDTH + WIDTH) + 2 * 128  # query, key, value, out, and the norms of query and key
FEED_FORWARD = 8 * WIDTH * WIDTH + 5 * WIDTH
DOUBLE = 2 * 2 * (ATTENTION + FEED_FORWARD + 6 * WIDTH * WIDTH + 6 * WIDTH)  # image and text
SINGLE = 2 * (3 * (WIDTH * WIDTH + WIDTH) + 2 * 128 + 3 * WIDTH * WIDTH + 3 * WIDTH + 4 * WIDTH * WIDTH + 4 * WIDTH)
SINGLE += 2 * (5 * WIDTH * WIDTH + WIDTH)
T5_BLOCK = 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096)

BLOCKS = (DOUBLE,) * 19 + (SINGLE,) * 38
DEV = Weights(128_249_984, BLOCKS)
SCHNELL = Weights(128_249_984 - 2 * (256 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH), BLOCKS)
T5 = Weights(2 * (32128 * 4096 + 4096), (T5_BLOCK + 2 * 32 * 64, *(T5_BLOCK,) * 23))  # the first has position biases

FLUX = Sizes(
    small=2 * (123_060_480 + 83_819_683),
    t5=T5,
    transformers={"dev": DEV, "schnell": SCHNELL},
    denoise=952_000_000,
    decode=3_238_000_000,
    decode_strips=1_805_000_000,
    encode=2_681_000_000,
    encode_strips=1_194_000_000,
    merge=8 * 4 * 7 * WIDTH * WIDTH,  # query, key, value and the MLP's four of a single block, as one
)
DEV_ALONE = replace(FLUX, transformers={"dev": DEV})

CONTEXT = 640 * 2**20


def gpu(gigabytes: float, host: float = 128) -> Room:
    """A card of so many GB, of which the driver has taken its part, in a machine with so many GB left."""
    return Room(device=int(gigabytes * GB) - CONTEXT, host=int(host * GB))


def cpu(gigabytes: float) -> Room:
    """A machine without a GPU."""
    return Room(device=int(gigabytes * GB), host=int(gigabytes * GB), shared=True)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    random_weights.write(Path(folder.name))
    return folder


def tiny() -> Path:
    """A weights directory of random weights whose VAE, unlike the miniature's, is of FLUX.1's class."""
    return Path(_folder().name)
