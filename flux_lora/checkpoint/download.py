"""Base weights from the Hugging Face Hub into a weights directory: only the files that are used, and resumable.

huggingface_hub lists the files and transfers them. Its own snapshot download throws away what an interrupted transfer
has fetched, so unfinished files are kept here, named after what they will be and the digest of their content.
"""

import errno
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from tqdm import tqdm

from flux_lora.checkpoint.components import ENCODERS, OWN, SHARED
from flux_lora.errors import WeightsError
from flux_lora.request import MODELS
from flux_lora.settings import Settings
from flux_lora.storage import free_bytes, sha256_of

INDEX = "model_index.json"
LICENCE = "LICENSE*"
OWN_FILES = tuple(f"{folder}/*{kind}" for folder in OWN for kind in (".json", ".safetensors"))
SHARED_FILES = tuple(f"{folder}/*{kind}" for folder in SHARED for kind in (".json", ".safetensors", ".txt"))
PIPELINE = (INDEX, LICENCE, *OWN_FILES, *SHARED_FILES)
CHECKER = ("config.json", "preprocessor_config.json", "model.safetensors")

REPOSITORIES = {
    "dev": ("black-forest-labs/FLUX.1-dev", "dev"),
    "schnell": ("black-forest-labs/FLUX.1-schnell", "schnell"),
    "safety": ("Falconsai/nsfw_image_detection", "safety_checker"),
}
"""What can be fetched: its repository on the Hub, and its folder in a weights directory."""

CONNECTIONS = 4

Log = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch and where it goes; ``digest`` tells versions apart, ``sha256`` is known of large files only."""

    url: str
    target: Path
    size: int
    digest: str
    sha256: str | None

    @property
    def part(self) -> Path:
        """The unfinished file."""
        return self.target.with_name(f"{self.target.name}.{self.digest[:12]}.part")

    @property
    def present(self) -> bool:
        """Bytes of it that are on the disk already."""
        return _size(self.target) == self.size

    @property
    def fetched(self) -> int:
        """Bytes of the unfinished file."""
        return max(0, min(_size(self.part), self.size))


def fetch_base(settings: Settings, models: Sequence[str] = MODELS, log: Log = print) -> None:
    """Fetch the models that the weights directory lacks; where it lacks none, no connection is opened.

    Raises:
        WeightsError: as for `fetch`.
    """
    if missing := [model for model in models if not _holds(settings.weights, model)]:
        fetch(settings, missing, log=log)


def fetch(settings: Settings, names: Sequence[str], log: Log = print, endpoint: str | None = None) -> None:
    """Bring parts of the weights directory up to the Hub's current state, going on where an earlier call stopped.

    Args:
        settings: the weights directory, and the token; without one, that of a login on this machine is used.
        names: among ``dev``, ``schnell`` and ``safety``.
        log: receives a line for each.
        endpoint: address of the Hub; None: the public one, or what HF_ENDPOINT names.

    Raises:
        WeightsError: no access, no network, a full disk, or a file that arrived damaged.
    """
    api = HfApi(endpoint=endpoint, token=settings.hf_token.get_secret_value() if settings.hf_token else None)
    with _only_one(settings.weights, log):
        files = {name: _list(api, settings.weights, name, names) for name in REPOSITORIES if name in names}
        missing = {name: [file for file in files[name] if not file.present] for name in files}
        _require_disk(settings.weights, sum(file.size - file.fetched for todo in missing.values() for file in todo))
        for name, todo in missing.items():
            folder, total = settings.weights / REPOSITORIES[name][1], sum(file.size for file in files[name])
            if todo:
                with _plain_errors(api, REPOSITORIES[name][0]):
                    _transfer(api, todo, name)
            log(f"{name}: {len(files[name])} files, {_gb(total)}, in {folder}{'' if todo else ' (already complete)'}")


def _list(api: HfApi, weights: Path, name: str, names: Sequence[str]) -> list[RemoteFile]:
    """Find the files of a model or the checker that are used, in the order in which they are fetched."""
    repository, folder = REPOSITORIES[name]
    patterns = CHECKER if name == "safety" else PIPELINE
    if name == "schnell" and ("dev" in names or _holds(weights, "dev")):
        patterns = (LICENCE, *OWN_FILES)
    with _plain_errors(api, repository):
        info = api.model_info(repository, files_metadata=True)
    files = [
        RemoteFile(
            url=hf_hub_url(repository, file.rfilename, revision=info.sha, endpoint=api.endpoint),
            target=weights / folder / file.rfilename,
            size=file.size or 0,
            digest=file.lfs.sha256 if file.lfs else str(file.blob_id),
            sha256=file.lfs.sha256 if file.lfs else None,
        )
        for file in info.siblings or []
        if any(
            fnmatch(file.rfilename, pattern) and file.rfilename.count("/") == pattern.count("/") for pattern in patterns
        )
    ]
    if not files:
        raise WeightsError(f"{api.endpoint}/{repository} has none of the files that are used.")
    return sorted(files, key=lambda file: file.size)


def _holds(weights: Path, model: str) -> bool:
    """Whether a model can be served from a weights directory, as far as the presence of its files tells."""
    folder = weights / model
    networks = ["transformer"]
    if model == "dev" or not _holds(weights, "dev"):
        networks += [*ENCODERS, "vae"]
        if not (folder / INDEX).is_file():
            return False
    return all(_has_network(folder / network) for network in networks)


def _has_network(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError):
            return False
        return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors"))


@contextmanager
def _only_one(weights: Path, log: Log) -> Iterator[None]:
    """Make the weights directory and keep other downloads out of it."""
    lock = FileLock(weights / ".download.lock")
    try:
        weights.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        log(f"waiting for another download into {weights} …")
        lock.acquire()
    except OSError as error:
        raise WeightsError(f"{weights} cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()


def _require_disk(weights: Path, needed: int) -> None:
    spare = max(0, free_bytes(weights))
    if needed > spare:
        raise WeightsError(
            f"{_gb(needed)} are still to fetch and the disk of {weights} has {_gb(spare)} to spare: make room, or set "
            "FLUX_WEIGHTS to a directory on a larger disk."
        )


class _Progress:
    """The bar of a whole download, in the form that `http_get` reports a file's progress to; `stop` ends them all."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._stopped = False

    def update(self, amount: float = 1) -> None:
        with self._lock:
            if self._stopped:
                raise _StoppedError
            self._bar.update(amount)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


class _StoppedError(Exception):
    """Ends a transfer because another one failed or the user interrupted."""


def _transfer(api: HfApi, files: Sequence[RemoteFile], name: str) -> None:
    total, fetched = sum(file.size for file in files), sum(file.fetched for file in files)
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs no moving bar
    with (
        tqdm(total=total, initial=fetched, desc=name, unit="B", unit_scale=True, mininterval=interval) as bar,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        progress = _Progress(bar)
        # The index marks a pipeline as complete, so it comes last.
        *others, last = sorted(files, key=lambda file: file.target.name == INDEX)
        try:
            for future in as_completed([pool.submit(_fetch, api, file, progress) for file in others]):
                future.result()
            _fetch(api, last, progress)
        except BaseException:
            progress.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(api: HfApi, file: RemoteFile, progress: _Progress) -> None:
    file.target.parent.mkdir(parents=True, exist_ok=True)
    for stale in file.target.parent.glob(f"{file.target.name}.*.part"):
        if stale != file.part:
            stale.unlink()
    with file.part.open("ab") as stream:
        http_get(
            file.url,
            stream,
            resume_size=file.fetched,
            # Compressed transfers cannot be resumed.
            headers={**build_hf_headers(token=api.token), "Accept-Encoding": "identity"},
            expected_size=file.size,
            _tqdm_bar=progress,
        )
    if not _is_intact(file):
        file.part.unlink()
        raise WeightsError(f"{file.target} arrived damaged. Fetch it again with the same command.")
    file.part.replace(file.target)


def _is_intact(file: RemoteFile) -> bool:
    if _size(file.part) != file.size:
        return False
    if file.sha256 is None:
        return True
    return sha256_of(file.part) == file.sha256


@contextmanager
def _plain_errors(api: HfApi, repository: str) -> Iterator[None]:
    """Turn what goes wrong with a repository into one sentence."""
    page, kept = (
        f"{api.endpoint}/{repository}",
        "what has been fetched is kept, and the same command goes on from there",
    )
    try:
        yield
    except GatedRepoError:
        wrong = "your account has not accepted it" if api.token or get_token() else "HF_TOKEN is not set"
        raise WeightsError(
            f"{repository} asks you to accept its licence first, and {wrong}: accept it at {page}, then set HF_TOKEN "
            f"to a token of that account that may read gated repositories ({api.endpoint}/settings/tokens)."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise WeightsError(f"{page} refuses access ({status}): set HF_TOKEN to a valid token.") from None
        raise WeightsError(f"{page} answered with status {status}. Try again later: {kept}.") from None
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise WeightsError(f"{api.endpoint} cannot be reached ({error}). Check the network: {kept}.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WeightsError(f"The disk is full. Make room and try again: {kept}.") from None
        raise WeightsError(f"{repository} could not be fetched ({error}). Try again: {kept}.") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
