"""Civitai, through its public REST API (https://developer.civitai.com/site/reference/model-versions)."""

import sys
from typing import Any

from flux_lora.errors import SourceError
from flux_lora.sources.address import CivitaiFile
from flux_lora.sources.client import Client
from flux_lora.sources.resource import Resource
from flux_lora.sources.wording import listing, quoted

API = "https://civitai.com/api/v1"
LORA_TYPES = ("LORA", "LoCon", "DoRA")
FLUX, UNCLASSIFIED = "Flux.1", ("", "Other")


def locate(wanted: CivitaiFile, client: Client) -> Resource:
    """The file of the version, or of the model's newest version for FLUX.1.

    Raises:
        SourceError: there is none, it is not a LoRA for FLUX.1, or it is not there as one .safetensors file.
    """
    try:
        if wanted.version is None:
            model = client.json(f"{API}/models/{wanted.model}")
            _check_kind(str(model["type"]))
            version = _newest(model["modelVersions"])
        else:
            version = client.json(f"{API}/model-versions/{wanted.version}")
            _check_kind(str(version["model"]["type"]))
            if not _may_be_flux(version):
                raise SourceError(f"on Civitai it is a LoRA for {quoted(_base(version))}, not for FLUX.1")
        file = _choose(wanted, version["files"])
        sha256 = file.get("hashes", {}).get("SHA256")
        key = CivitaiFile(version=int(version["id"]), wanted=wanted.wanted).key
        return Resource(key, str(file["downloadUrl"]), fixed=True, sha256=sha256.lower() if sha256 else None)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise SourceError("civitai.com does not answer as expected about it") from None


def _check_kind(kind: str) -> None:
    if kind not in LORA_TYPES:
        raise SourceError(f"on Civitai it is a {quoted(kind)}, not a LoRA")


def _newest(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest version for FLUX.1, of a page that may have versions for several base models; the log names it.

    The newest comes first. Behind one for another model, what nobody classified counts only if nothing else is there.
    """
    maybe = [version for version in versions if _may_be_flux(version)]
    surely = [version for version in maybe if _base(version).startswith(FLUX)]
    flux = maybe if maybe[:1] == versions[:1] else surely or maybe
    if not flux:
        named = listing([_named(version) for version in versions])
        raise SourceError(
            f"on Civitai none of its versions is for FLUX.1, but: {named}; if one is, name it with ?modelVersionId=<id>"
        )
    print(f"Civitai: of {len(versions)} versions, {quoted(_named(flux[0]))} is taken", file=sys.stderr)
    return flux[0]


def _named(version: dict[str, Any]) -> str:
    return f"modelVersionId={int(version['id'])}: {' for '.join(filter(None, (version.get('name'), _base(version))))}"


def _base(version: dict[str, Any]) -> str:
    return str(version.get("baseModel") or "")


def _may_be_flux(version: dict[str, Any]) -> bool:
    return _base(version) in UNCLASSIFIED or _base(version).startswith(FLUX)


def _choose(wanted: CivitaiFile, files: list[dict[str, Any]]) -> dict[str, Any]:
    candidates = [file for file in files if file["name"].lower().endswith(".safetensors") and _is(file, wanted)]
    if not candidates:
        raise SourceError(f"on Civitai it has no such .safetensors file, but: {listing([f['name'] for f in files])}")
    if len(candidates) > 1:
        candidates = [file for file in candidates if file.get("primary")] or candidates
    if len(candidates) > 1:
        raise SourceError(f"on Civitai it has several files: {listing([file['name'] for file in candidates])}")
    return candidates[0]


def _is(file: dict[str, Any], wanted: CivitaiFile) -> bool:
    facts = {**file.get("metadata", {}), "type": file.get("type"), "id": file.get("id")}
    return all(str(facts.get(name)).lower() == value.lower() for name, value in wanted.wanted)
