"""The Hugging Face Hub, through huggingface_hub with our transport below it.

The library resolves revisions and lists files. The bytes then take the same road as all others: its own download
starts anew after an interruption and knows no size limit, and hf-xet, which it prefers, opens connections of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import HfApi, hf_hub_url, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils._http import default_client_factory

from flux_lora.errors import SourceError
from flux_lora.sources.address import HubFile
from flux_lora.sources.client import refusal
from flux_lora.sources.guard import host_of
from flux_lora.sources.resource import Resource
from flux_lora.sources.tokens import Tokens
from flux_lora.sources.transport import GuardedTransport, TransferError
from flux_lora.sources.wording import listing, quoted

HOST = "huggingface.co"
ENDPOINT = f"https://{HOST}"

_FACTORY = threading.Lock()


def locate(file: HubFile, transport: GuardedTransport, tokens: Tokens, *, may_list: bool) -> Resource:
    """The file at the commit that its revision is now.

    Args:
        file: what is wanted.
        transport: the way to the Hub.
        tokens: those that it sends.
        may_list: whether messages may name the files of a private repository.

    Raises:
        SourceError: there is no such repository, revision or file, no access to it, or a choice of files.
    """
    try:
        with _library_on(transport):
            # The token is the transport's business; False keeps the one of a login on this machine out.
            info = HfApi(endpoint=ENDPOINT, token=False).model_info(
                file.repo, revision=file.revision, files_metadata=True
            )
        found = _choose(file, info.siblings or [], may_list=may_list or not info.private)
        pinned = HubFile(file.repo, info.sha or file.revision, found.rfilename)
        url = hf_hub_url(file.repo, found.rfilename, revision=pinned.revision, endpoint=ENDPOINT)
        return Resource(pinned.key, url, pinned.fixed, found.lfs.sha256 if found.lfs else None, found.size)
    except GatedRepoError:
        terms = f"accept its terms at {ENDPOINT}/{file.repo}"
        raise SourceError(f"{file.repo} is gated: {terms}; {tokens.hint(HOST)}") from None
    except RevisionNotFoundError:
        raise SourceError(f"{file.repo} has no revision {quoted(file.revision)}") from None
    except HfHubHTTPError as error:
        raise SourceError(refusal(HOST, error.response.status_code, tokens, error.response.headers)) from None
    except TransferError as error:
        raise SourceError(str(error)) from None
    except httpx2.TooManyRedirects:
        raise SourceError(f"{HOST} redirects in circles") from None
    except (httpx2.HTTPError, HFValidationError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise SourceError(f"{HOST} does not answer as expected about {quoted(file.repo)}") from None


def _choose(wanted: HubFile, files: list[RepoSibling], *, may_list: bool) -> RepoSibling:
    candidates = {file.rfilename: file for file in files if file.rfilename.endswith(".safetensors")}
    if wanted.file is None and len(candidates) == 1:
        return next(iter(candidates.values()))
    if wanted.file in candidates:
        return candidates[wanted.file]
    if not may_list:
        raise SourceError(f"{wanted.repo} is private; name a file that it has: hf://{wanted.repo}/….safetensors")
    names = sorted(candidates)
    if not names:
        raise SourceError(f"{wanted.repo} has no .safetensors file")
    if wanted.file is None:
        raise SourceError(f"{wanted.repo} has several files; add one to hf://{wanted.repo}/ : {listing(names)}")
    raise SourceError(f"{wanted.repo} has no file {quoted(wanted.file)}; it has {listing(names)}")


@contextmanager
def _library_on(transport: GuardedTransport) -> Iterator[None]:
    """Let huggingface_hub use our transport, and nothing else, for a while."""
    with _FACTORY:
        set_client_factory(
            lambda: httpx2.Client(transport=_ModelsOnly(transport), trust_env=False, follow_redirects=True)
        )
        try:
            yield
        finally:
            set_client_factory(default_client_factory)  # closes ours


class _ModelsOnly(httpx2.BaseTransport):
    """Passes on what asks the Hub about models: neither HF_ENDPOINT nor the library's own telemetry gets further."""

    def __init__(self, transport: GuardedTransport) -> None:
        self._transport = transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if host_of(request.url) != HOST or not request.url.path.startswith("/api/models/"):
            raise SourceError(f"{host_of(request.url)[:100]} is not asked about models of the Hugging Face Hub")
        return self._transport.handle_request(request)
