"""What the text of a source means. Nothing is opened or asked here."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

import httpx2

from flux_lora.errors import SourceError
from flux_lora.sources.guard import HOST_NAME, check_url, host_of, parse_url
from flux_lora.sources.wording import quoted

SUFFIXES = (".safetensors", ".tar")
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
REPLICATE = re.compile(rf"(?P<owner>[A-Za-z0-9][A-Za-z0-9_-]*)/(?P<name>{NAME})(?:[/:](?P<version>[A-Za-z0-9]+))?")
HUB_REVISION = r"refs/(?:pr|convert)/[A-Za-z0-9._-]+|[A-Za-z0-9][A-Za-z0-9._-]*"
HUB = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>{HUB_REVISION}))?(?:/(?P<file>.+))?")
HUB_PAGE = re.compile(
    rf"(?P<repo>{NAME}/{NAME})(?:/(?:resolve|blob|raw|tree)/(?P<revision>{HUB_REVISION}))?(?:/(?P<file>.+))?"
)
HUB_OTHERS = ("datasets", "spaces", "api", "collections", "models", "papers")
CIVITAI = ("civitai.com", "civitai.red", "civitai.green")
"""One service with one API: .red has the pages of all models, the others those of what is safe for work."""

AIR = re.compile(
    r"(?:urn:)?air:(?P<ecosystem>\w+):(?P<type>\w+):civitai:(?P<model>[0-9]{1,18})"
    r"(?:@(?P<version>[0-9]{1,18}))?(?:\+(?P<file>[0-9]{1,18}))?(?:\.safetensors?)?"
)
AIR_TYPES = ("lora", "locon", "dora", "lycoris")
CIVITAI_CHOICES = ("type", "format", "size", "fp")
CIVITAI_PAGE = re.compile(r"(?:models/(?P<model>[0-9]{1,18})(?:/[^/]*)?|api/download/models/(?P<version>[0-9]{1,18}))")
REPLICATE_PAGE = re.compile(
    rf"(?P<owner>{NAME})/(?P<name>{NAME})(?:/versions/(?P<version>[A-Za-z0-9]+)|/(?P<short>[0-9a-f]{{64}}))?"
    r"(?:/(?:_weights|versions|api|examples|readme|playground))?"
)

ACCEPTED = (
    "a local path (a request's, under the weights directory), https://….safetensors, https://….tar, a data: URI, "
    "owner/name of Replicate, hf://owner/name, or a page of huggingface.co, civitai.com or replicate.com"
)


@dataclass(frozen=True)
class Link:
    """A file at an address; ``fixed`` if what is there can never change."""

    url: str
    fixed: bool = False

    @property
    def key(self) -> str:
        """What the cache keeps it by."""
        return self.url


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository on the Hugging Face Hub; without a name: its only ``.safetensors`` file."""

    repo: str
    revision: str = "main"
    file: str | None = None

    @property
    def key(self) -> str:
        """What the cache keeps it by."""
        return f"hf:{self.repo}@{self.revision}/{self.file or ''}"

    @property
    def fixed(self) -> bool:
        """Whether it always means the same file."""
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None


@dataclass(frozen=True)
class CivitaiFile:
    """A file of a version of a model on Civitai; without a version: of the newest one.

    ``wanted`` tells it from others of its version, by their ``id`` or by what a download address asks for. ``token`` is
    the caller's own, from the address.
    """

    model: int | None = None
    version: int | None = None
    wanted: tuple[tuple[str, str], ...] = ()
    token: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """What the cache keeps it by."""
        return f"civitai:{'' if self.fixed else self.model}@{self.version}{self.wanted}"

    @property
    def fixed(self) -> bool:
        """Whether it always means the same file."""
        return self.version is not None


@dataclass(frozen=True)
class Inline:
    """A ``data:`` URI."""

    uri: str


Spelled = Link | HubFile | CivitaiFile | Inline


def parse(source: str) -> Spelled:
    """What a source means that is not a local path.

    Raises:
        SourceError: it is none of the accepted spellings, or one of something that is not accepted.
    """
    if is_inline(source):
        return Inline(source)
    if source.startswith(("urn:air:", "air:")):
        return _air(source)
    if source.startswith("hf://"):
        return _hub(HUB.fullmatch(unquote(source.removeprefix("hf://").rstrip("/"))))
    if "://" in source:
        return _address(parse_url(source))
    if source.split("/")[0].lower().removeprefix("www.") in (*SITES, "replicate.delivery"):
        return _address(parse_url(f"https://{source}"))
    if source.startswith("file:"):
        raise SourceError("file: addresses are refused; give the path by itself")
    address = "/" in source and HOST_NAME.fullmatch(source.lstrip("/").split("/")[0].lower())
    hint = f"; if it is an address, begin with https://{address[0]}/" if address else ""
    if is_path(source):
        _refuse_pickle(source)
        raise SourceError(f"there is no such file{hint}")
    if match := REPLICATE.fullmatch(source):
        return _replicate(match["owner"], match["name"], match["version"])
    raise SourceError(f"it is none of what is accepted{hint or f': {ACCEPTED}'}")


def is_inline(source: str) -> bool:
    """Whether a source is the file itself, as a ``data:`` URI."""
    return source[:5].lower() == "data:"


def is_path(source: str) -> bool:
    """Whether a source without a scheme can only be meant as a local path."""
    return source.startswith(("/", ".", "~")) or source.lower().endswith((*SUFFIXES, *PICKLES)) or "\\" in source


def label(source: str) -> str:
    """The source as messages may show it: without the query, password or token that it may hold, and not too long."""
    if is_inline(source):
        return "a data: URI"
    if not source.startswith(("urn:", "air:")):
        source = re.split(r"[?#]", source, maxsplit=1)[0]
        source = re.sub(r"^([\w+.-]+:/+)?[^/]*@", r"\1", source)
    return quoted(source, 200)


def _address(url: httpx2.URL) -> Spelled:
    if url.scheme == "file":
        raise SourceError("file: addresses are refused; give the path by itself")
    check_url(url)
    if site := SITES.get(host_of(url).removeprefix("www.")):
        return site(url)
    _refuse_pickle(url.path)
    if not url.path.lower().endswith(SUFFIXES):
        raise SourceError("the address must end in .safetensors or .tar (a query may follow)")
    return Link(str(url))


def _hub_page(url: httpx2.URL) -> Spelled:
    return _hub(HUB_PAGE.fullmatch(url.path.strip("/")))


def _hub(match: re.Match[str] | None) -> Spelled:
    if match is None or match["repo"].split("/")[0] in HUB_OTHERS:
        raise SourceError("of the Hugging Face Hub, it must be hf://owner/name[@revision][/file.safetensors]")
    if (file := match["file"]) is not None:
        _refuse_pickle(file)
        if not file.endswith(".safetensors") or {"", ".", ".."} & set(file.split("/")):
            raise SourceError("the file in a repository must be a .safetensors file")
    return HubFile(match["repo"], match["revision"] or "main", file)


def _civitai_page(url: httpx2.URL) -> Spelled:
    match = CIVITAI_PAGE.fullmatch(url.path.strip("/"))
    version = match and (match["version"] or url.params.get("modelVersionId", ""))
    if match is None or not re.fullmatch(r"[0-9]{0,18}", version or ""):
        raise SourceError("of Civitai, it must be civitai.com/models/<id>[?modelVersionId=<id>]")
    wanted = tuple((name, value) for name in CIVITAI_CHOICES if (value := url.params.get(name, "")))
    token = url.params.get("token", "")
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/=-]{1,500}", token):
        raise SourceError("the token in the address holds characters that no token has")
    return CivitaiFile(_number(match["model"]), _number(version), wanted, token)


def _air(source: str) -> Spelled:
    match = AIR.fullmatch(source)
    if match is None:
        raise SourceError("it must be urn:air:flux1:lora:civitai:<model>@<version>")
    if match["ecosystem"] != "flux1" or match["type"] not in AIR_TYPES:
        raise SourceError(f"it names a {match['type'][:50]} for {match['ecosystem'][:50]}, not a LoRA for FLUX.1")
    wanted = (("id", match["file"]),) if match["file"] else ()
    return CivitaiFile(_number(match["model"]), _number(match["version"]), wanted)


def _replicate_page(url: httpx2.URL) -> Spelled:
    match = REPLICATE_PAGE.fullmatch(url.path.strip("/"))
    if match is None:
        raise SourceError("of Replicate, it must be replicate.com/owner/name[/versions/<id>]")
    return _replicate(match["owner"], match["name"], match["version"] or match["short"])


def _replicate(owner: str, name: str, version: str | None) -> Link:
    """Where Replicate gives out the weights that a training wrote (a redirect to a tar at replicate.delivery)."""
    at_version = f"/versions/{version}" if version else ""
    fixed = version is not None and re.fullmatch("[0-9a-f]{64}", version) is not None
    return Link(f"https://replicate.com/{owner}/{name}{at_version}/_weights", fixed)


SITES = {
    "huggingface.co": _hub_page,
    "hf.co": _hub_page,
    **dict.fromkeys(CIVITAI, _civitai_page),
    "replicate.com": _replicate_page,
}
"""Hosts whose pages are understood, and which may be written without https://."""


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _refuse_pickle(path: str) -> None:
    if path.lower().endswith(PICKLES):
        raise SourceError("pickled files (.pt, .ckpt, .bin …) can run code and are refused; use .safetensors")
