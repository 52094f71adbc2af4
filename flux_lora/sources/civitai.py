"""Civitai, through its public REST API (https://developer.civitai.com/site/reference/model-versions)."""

from typing import Any

from flux_lora.errors import SourceError
from flux_lora.sources.address import CivitaiFile
from flux_lora.sources.client import Client
from flux_lora.sources.resource import Resource
from flux_lora.sources.wording import listing, quoted

API = "https://civitai.com/api/v1"
LORA_TYPES = ("LORA", "LoCon", "DoRA")
UNCLASSIFIED = ("", "Other")


def locate(wanted: CivitaiFile, client: Client) -> Resource:
    """The file of the version, or of the newest version of the model.

    Raises:
        SourceError: there is none, it is not a LoRA for FLUX.1, or it is not there as one .safetensors file.
    """
    try:
        if wanted.version is None:
            model = client.json(f"{API}/models/{wanted.model}")
            version = model["modelVersions"][0]  # the newest one comes first
        else:
            version = client.json(f"{API}/model-versions/{wanted.version}")
            model = version["model"]
        _check_kind(str(model["type"]), str(version.get("baseModel") or ""))
        file = _choose(wanted, version["files"])
        sha256 = file.get("hashes", {}).get("SHA256")
        key = CivitaiFile(version=int(version["id"]), wanted=wanted.wanted).key
        return Resource(key, str(file["downloadUrl"]), fixed=True, sha256=sha256.lower() if sha256 else None)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise SourceError("civitai.com does not answer as expected about it") from None


def _check_kind(kind: str, base: str) -> None:
    if kind not in LORA_TYPES:
        raise SourceError(f"on Civitai it is a {quoted(kind)}, not a LoRA")
    if base not in UNCLASSIFIED and not base.startswith("Flux.1"):
        raise SourceError(f"on Civitai it is a LoRA for {quoted(base)}, not for FLUX.1")


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
