"""``scripts/read_picture``: what a picture tells of its origin, wherever it has been."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flux_lora.errors import FluxLoraError, SettingsError
from flux_lora.files import provenance, signing, xmp
from flux_lora.files.provenance import Traces
from flux_lora.files.record import Environment, Lora, Parameters
from flux_lora.wording import complain, printable

SOURCE_TYPES = {
    xmp.AI_GENERATED: "made by a model",
    xmp.AI_EDITED: "made by a model of another picture",
}
"""The marks of IPTC's vocabulary that our own pictures carry."""

LABEL_WIDTH = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what pictures hold; 1 when one of them holds no parameters, or cannot be read."""
    options = _parser().parse_args(arguments)
    whole = True
    for number, path in enumerate(options.files):
        if number and not options.json:
            print()
        try:
            whole &= _show_json(path) if options.json else _show(path)
        except FluxLoraError as error:
            complain(f"error: {error}")
            whole = False
    return 0 if whole else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/read_picture",
        description="Show how a picture of ours was drawn, as far as its file still tells.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a WebP, JPEG or PNG file")
    parser.add_argument("--json", action="store_true", help="print the record alone, as JSON on one line")
    return parser


def _show_json(path: Path) -> bool:
    print(provenance.read(path).model_dump_json(ensure_ascii=True))
    return True


def _show(path: Path) -> bool:
    found = provenance.traces(path)
    signature = _signature(path.read_bytes())
    print(f"{printable(str(path))}: {found.format}, {found.size[0]}×{found.size[1]}")
    lines = list(_facts(found.parameters) if found.parameters else _remains(found, signed=bool(signature)))
    lines.append(("mark", SOURCE_TYPES.get(found.source_type or "", found.source_type or "none")))
    lines.append(("signature", signature or "none"))
    for label, text in lines:
        indented = printable(text, lines=True).replace("\n", "\n" + " " * (LABEL_WIDTH + 2))
        print(f"  {label:{LABEL_WIDTH}}{indented}")
    return found.parameters is not None


def _facts(parameters: Parameters) -> Iterator[tuple[str, str]]:
    yield "prompt", parameters.prompt
    guidance = "" if parameters.guidance_scale is None else f", guidance {parameters.guidance_scale:g}"
    reused = f", {parameters.reused_steps} of them reused" if parameters.reused_steps else ""
    yield "model", f"FLUX.1 {parameters.model}, {parameters.num_inference_steps} steps{reused}{guidance}"
    if source := parameters.source:
        mask = f", within the mask of SHA-256 {source.mask}" if source.mask else ""
        yield "source", f"image of SHA-256 {source.image}{mask}, prompt_strength {source.prompt_strength:g}"
    yield "seed", str(parameters.seed)
    for lora in parameters.loras:
        yield "LoRA", _lora(lora)
    quality = "" if parameters.output_quality is None else f", quality {parameters.output_quality}"
    yield "file", f"{parameters.width}×{parameters.height}, {parameters.output_format}{quality}"
    yield "drawn by", _environment(parameters.environment)


def _lora(lora: Lora) -> str:
    return f"{lora.name or 'without a name'}, scale {lora.scale:g}, SHA-256 {lora.digest}"


def _environment(environment: Environment) -> str:
    software = environment.software.model_dump()
    libraries = ", ".join(f"{name} {version}" for name, version in software.items() if name != "flux_lora")
    return (
        f"flux-lora {software['flux_lora']} on {environment.device} in {environment.dtype}, profile "
        f"{environment.profile}, attention {environment.attention}, memory plan {environment.memory}\n"
        f"base weights {environment.base}\n{libraries}"
    )


def _remains(found: Traces, *, signed: bool) -> Iterator[tuple[str, str]]:
    """What is left where the record is not."""
    left = [
        *(["the text for other programs"] if found.line else []),
        *(["the mark"] if found.source_type else []),
        *(["the signature"] if signed else []),
    ]
    yield "record", f"{found.problem} Nothing is left but {' and '.join(left) or 'the pixels'}."
    if found.line:
        yield "text", found.line


def _signature(content: bytes) -> str:
    """What becomes of content credentials; empty where there are none."""
    if not signing.is_signed(content):
        return ""
    try:
        report = signing.manifest_of(content)
    except SettingsError as error:
        return f"there is one, unchecked. {error}"
    if report is None:
        return "broken: it cannot be read"
    manifest = report["manifests"].get(report.get("active_manifest"), {})
    signer = manifest.get("signature_info", {})
    by = ", ".join(filter(None, (signer.get("common_name"), signer.get("issuer"))))
    if report["validation_state"] == "Invalid":
        return f"broken: the file is not what was signed by {by}"
    return f"intact, by {by}; whether to trust that certificate is not checked"


if __name__ == "__main__":
    sys.exit(main())
