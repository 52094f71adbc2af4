"""Compiled code: the transformer's repeated blocks and the VAE's decoder, compiled once for all sizes.

Blocks of a class share their code, since weights are inputs to it: what is merged or quantized in place is seen, and
nothing is compiled again. Sizes are symbols in it. What compiling has made is kept in a file, which the next process,
or a container that it is copied into, loads before it compiles.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CalledProcessError
from threading import Thread
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from flux_lora.errors import SettingsError
from flux_lora.storage import private_directory, trusted_bytes, write_whole

OPTIONS: dict[str, Any] = {"deterministic": True}
"""Inductor's: nothing that changes a result is chosen by measuring, or another process might choose differently."""

ARTIFACTS = "compiled"
SETTING = "FLUX_CACHE"


def compile_pipelines(pipelines: Iterable[Any], *, blocks: bool = True) -> None:
    """Make VAEs, and transformers' repeated ``blocks``, compile on their first call."""
    pipelines = list(pipelines)
    for pipeline in pipelines if blocks else ():
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, options=OPTIONS)
    for vae in {id(pipeline.vae): pipeline.vae for pipeline in pipelines}.values():
        if vae.device.type == "cuda":  # what its tensor cores want; with symbolic sizes Inductor does not choose it
            vae.to(memory_format=torch.channels_last)
        # No full graph: where sizes make PyTorch compile the decoder too often, it goes on uncompiled.
        if hasattr(vae, "decoder"):
            vae.decoder.compile(dynamic=True, options=OPTIONS)
        else:
            vae.decode = torch.compile(vae.decode, dynamic=True, options=OPTIONS)


def graphs() -> int:
    """How many graphs this process has compiled so far."""
    return _counter("stats", "unique_graphs")


def loaded_graphs() -> int:
    """How many of them were taken from what another process had compiled."""
    return _counter("inductor", "fxgraph_cache_hit")


@contextmanager
def cached(folder: Path, key: str, log: Callable[[str], None] = print) -> Iterator[None]:
    """Load what was compiled before, and keep what is compiled within.

    Args:
        folder: a cache directory of the operator's own, since what is loaded from it is run.
        key: the device, software and model that the code is for.
        log: told where what was compiled cannot be kept.

    Raises:
        SettingsError: the directory, or PyTorch's own for compiled code, is not this user's alone.
    """
    file = folder / f"{ARTIFACTS}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    _check_inductors_directory()
    known = None
    with suppress(OSError):
        known = trusted_bytes(file, SETTING)
    if known:
        torch.compiler.load_cache_artifacts(known)
    before = _counter("inductor", "fxgraph_cache_miss")
    yield
    if (known and _counter("inductor", "fxgraph_cache_miss") == before) or graphs() == 0:
        return
    if saved := torch.compiler.save_cache_artifacts():
        try:
            write_whole(file, saved[0])
        except OSError as error:
            log(f"compiled code cannot be kept in {folder} ({SETTING}), so each start compiles: {error.strerror}")


def _check_inductors_directory() -> None:
    """PyTorch runs what it finds there, and by default the directory has a name in /tmp that anybody can guess."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    try:
        private_directory(Path(cache_dir()), variable)
    except OSError as error:
        raise SettingsError(
            f"PyTorch has no place for compiled code: {error}. Set {variable} to a directory that can be written to, "
            "or take FLUX_PROFILE=eager."
        ) from None


def warm_up(profile: str, work: Callable[[], object]) -> None:
    """Run what compiles, on a thread of its own: predictions run on others than set-up, and threads have settings.

    Raises:
        SettingsError: the code cannot be compiled here.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, where it is seen
            failures.append(error)

    thread = Thread(target=run, name="warm-up")
    thread.start()
    thread.join()
    for failure in failures:
        by_triton = isinstance(failure, CalledProcessError) or "C compiler" in str(failure)
        if not by_triton and not isinstance(failure, torch._dynamo.exc.TorchDynamoException):
            raise failure
        reason = next(filter(None, str(failure).splitlines()), type(failure).__name__)
        raise SettingsError(
            f"FLUX_PROFILE={profile} cannot be compiled here: {reason}. Install a C++ compiler if there is none, or "
            "take FLUX_PROFILE=eager."
        ) from failure


def _counter(group: str, name: str) -> int:
    return int(torch._dynamo.utils.counters[group][name])
