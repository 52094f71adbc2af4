"""Safetensors files -> tensors where they are to live: many reads at once, each byte copied once on its way.

What is to live in host memory is read into its place; what is to live on a GPU, or in another type, passes through
small buffers (pinned for a GPU) that are filled while others are sent.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flux_lora.checkpoint.header import read_header
from flux_lora.device import transfers
from flux_lora.errors import WeightsError

CHUNK_BYTES = 16 * 2**20
"""What is read at a time; a multiple of every element's size."""

READERS = 8
"""Reads at a time: what it takes to keep a fast disk busy, and a few cores that copy from the page cache."""

BUFFERS = 2
"""Of each reader: one is filled while the other is sent."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types of base weights, by their names in the format."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    file: Path
    offset: int
    dtype: torch.dtype
    target: Tensor
    """One-dimensional."""

    @property
    def bytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize


def stored_tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file with the names that it gives them.

    Raises:
        WeightsError: one has a type that no base weights have.
    """
    header = read_header(file)
    for name, info in header.tensors.items():
        if info.dtype not in DTYPES:
            if info.dtype.startswith(("I", "U", "BOOL")):
                continue  # a buffer of older files
            raise WeightsError(f"{file}: {name} is of type {info.dtype}; base weights are {', '.join(DTYPES)}.")
        yield name, StoredTensor(file, name, header.data_start + info.start, DTYPES[info.dtype], info.shape)


def fill(tensors: Iterable[tuple[StoredTensor, Tensor]], title: str = "loading weights") -> None:
    """Fill tensors of any type on any device from their files, with a progress bar of bytes and rate.

    Raises:
        WeightsError: a file cannot be read, or has become shorter.
    """
    chunks = list(_chunks(tensors))
    waiting: SimpleQueue[_Chunk] = SimpleQueue()
    for chunk in _interleaved(chunks):
        waiting.put(chunk)
    total = sum(chunk.bytes for chunk in chunks)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False) as bar,
        ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers,
    ):
        try:
            for future in [readers.submit(_read_all, waiting, bar) for _ in range(min(READERS, len(chunks)))]:
                future.result()
        finally:
            with suppress(Empty):  # after an error, what was not begun
                while True:
                    waiting.get_nowait()


def _chunks(tensors: Iterable[tuple[StoredTensor, Tensor]]) -> Iterator[_Chunk]:
    for stored, target in tensors:
        flat, step = target.view(-1), CHUNK_BYTES // stored.dtype.itemsize
        for start in range(0, len(flat), step):
            offset = stored.offset + start * stored.dtype.itemsize
            yield _Chunk(stored.file, offset, stored.dtype, flat[start : start + step])


def _interleaved(chunks: list[_Chunk]) -> Iterator[_Chunk]:
    """One chunk of each file in turn, in the order in which they lie in it."""
    files: dict[Path, list[_Chunk]] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        files.setdefault(chunk.file, []).append(chunk)
    turns = [iter(of_file) for of_file in files.values()]
    remaining = len(chunks)
    for turn in cycle(turns):
        if not remaining:
            return
        if (chunk := next(turn, None)) is not None:  # type: ignore[assignment]
            remaining -= 1
            yield chunk


def _read_all(waiting: "SimpleQueue[_Chunk]", bar: Any) -> None:
    """On a reader's thread: chunks until none waits."""
    with ExitStack() as stack, suppress(Empty):
        files: dict[Path, FileIO] = {}
        rings: dict[torch.device, Iterator[_Buffer]] = {}
        while True:
            chunk = waiting.get_nowait()
            target = chunk.target
            try:
                if chunk.file not in files:
                    files[chunk.file] = stack.enter_context(FileIO(chunk.file))
                if target.device.type == "cpu" and target.dtype == chunk.dtype:
                    _read(files[chunk.file], chunk.offset, target.view(torch.uint8))
                else:
                    if target.device not in rings:
                        rings[target.device] = cycle(
                            [stack.enter_context(_Buffer(target.device)) for _ in range(BUFFERS)]
                        )
                    buffer = next(rings[target.device])
                    content = buffer.memory()[: chunk.bytes]
                    _read(files[chunk.file], chunk.offset, content)
                    buffer.send(content.view(chunk.dtype), target)
            except OSError as error:
                raise WeightsError(f"{chunk.file} cannot be read: {error.strerror or error}.") from error
            bar.update(chunk.bytes)


def _read(file: FileIO, offset: int, target: Tensor) -> None:
    view = memoryview(target.numpy())  # type: ignore[arg-type]  # an array is a buffer
    file.seek(offset)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("it has become shorter while it was read")
        view = view[count:]


class _Buffer:
    """Memory that is filled from a file and sent on; it is not filled again, or freed, before that is done."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent = transfers.event() if device.type == "cuda" else None

    def __enter__(self) -> "_Buffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.memory()

    def memory(self) -> Tensor:
        if self._sent is not None:
            self._sent.synchronize()
        return self._memory

    def send(self, content: Tensor, target: Tensor) -> None:
        target.copy_(content, non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(target.device))
