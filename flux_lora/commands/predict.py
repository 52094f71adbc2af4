"""``scripts/predict``: one prediction by the generator that Cog serves, called as ``cog predict`` is."""

import argparse
import errno
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from flux_lora import rules
from flux_lora.commands import again, desktop, drawing_settings, flags, paths
from flux_lora.errors import FluxLoraError, OutputError, RequestError
from flux_lora.files import provenance, redraw
from flux_lora.inputs import DOCUMENTED, EXTENDED, Interface
from flux_lora.request import Request, Wanted
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from flux_lora.wording import complain, printable

OUTPUTS = Path("outputs")

EXAMPLES = """\
examples:
  scripts/predict -i prompt="a tomato on a blue background"
  scripts/predict -i prompt="a tomato" -i seed=7 -i lora_scale=0.5 -i num_outputs=4 -o tomato.webp
  echo '{"prompt": "a tomato", "seed": 7}' | scripts/predict --json -
  scripts/predict -i prompt="a photo of TOK" --lora ~/training/my-lora
  scripts/predict -i prompt="a photo of TOK" --lora ~/training/my-lora 0.8 --lora loras/ink.safetensors 0.5
  scripts/predict --from outputs/0001-seed7.webp
  scripts/predict --extended -i prompt="a pear" -i image=@tomato.webp -i prompt_strength=0.6
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict once: paths, or JSON with ``--json``, go to standard output, and log and progress to standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser(EXTENDED if "--extended" in words else DOCUMENTED)
    options = parser.parse_args(arguments)
    if options.json is not None and options.input:
        parser.error("give the inputs with -i or with --json, not both")
    try:
        return _predict(options)
    except FluxLoraError as error:
        complain(f"error: {error}")
        if options.json is not None and not isinstance(error, OutputError):
            _write_json({"status": "failed", "error": str(error)}, options.output)
        return 1
    except KeyboardInterrupt:
        print("stopped: no picture was kept", file=sys.stderr)
        return 130


def _predict(options: argparse.Namespace) -> int:
    inputs = flags.read(options.input) if options.json is None else flags.read_json(options.json)
    scales = [_scale(options.interface, *scale) for _, *scale in options.lora]
    if options.source and any(scale for _, *scale in options.lora):
        raise RequestError("--lora takes no scale with --from: the picture has it.")
    if options.lora and options.lora[0][1:]:
        if "lora_scale" in inputs:
            raise RequestError("Give the scale of the first LoRA behind --lora or as lora_scale, not both.")
        inputs["lora_scale"] = scales[0]
    given = inputs.keys()
    source = None
    if options.source:
        source = provenance.read(options.source)
        original = options.source.read_bytes()
        inputs = redraw.inputs_of(source, options.interface) | inputs
    # Bad input, and no place for the output, are refused before anything is loaded.
    request = Request.parse(options.interface, **inputs)
    _require_place(options.output or OUTPUTS / "picture")
    settings = drawing_settings()
    if "request_tokens" not in settings.model_fields_set:  # who asks is who the tokens belong to
        settings = settings.model_copy(update={"request_tokens": True})
    if source and source.webp_method is not None:
        settings = settings.model_copy(update={"webp_method": source.webp_method})
    rules.check(request, settings)
    sources = Sources.from_settings(settings)
    loras = [_operators_lora(lora, request, sources, settings) for lora, *_ in options.lora]
    for name in ("replicate_weights", "extra_lora"):
        if lora := getattr(request, name):
            named = paths.of_request(lora, settings.weights, name)
            sources.check(named, root=settings.weights)
            request = request.model_copy(update={name: named})
    fine_tune = loras[0] if loras else settings.cog_weights
    more: list[Wanted] = [(_own(lora), scale) for lora, scale in zip(loras[1:], scales[1:], strict=True)]
    if source:
        from flux_lora.pictures import Pictures  # as late as assembly, below

        redraw.check_files(source, Pictures(sources).files(request))
    if source and not request.replicate_weights and not request.extra_lora:
        found = again.find(source.loras, loras, sources, settings)
        if found is not None:
            if len(found) > 1 and "lora_scale" in given:
                raise RequestError(
                    f"lora_scale cannot be given: the picture has {len(found)} LoRAs, each with its own."
                )
            fine_tune, more = str(found[0][0]) if found else None, list(found[1:])
    metrics: dict[str, Any] = {}

    from flux_lora.assembly import assemble  # not before what can be refused without it: it imports PyTorch

    with redirect_stdout(sys.stderr):
        files = assemble(settings, fine_tune).draw(request.with_more(*more), metrics.__setitem__)
    written = _keep_numbered(files) if options.output is None else _keep_as(files, options.output)
    if source:
        complain(f"{written[0]}: {redraw.compare(written[0], original, source)}")
    if options.json is None:
        print(*written, sep="\n")
    else:
        _write_json(
            {"status": "succeeded", "input": inputs, "output": [str(path) for path in written], "metrics": metrics},
            options.output,
        )
    if options.open and (reason := desktop.show(written, settings)):
        complain(f"not opened: {reason}")
    return 0


def _operators_lora(named: str, request: Request, sources: Sources, settings: Settings) -> str:
    """What ``--lora`` names, checked as far as that is quick."""
    if not named.strip():
        raise RequestError("--lora is empty: name a file, a folder, an address or an id, or leave it out.")
    if request.replicate_weights:
        raise RequestError("Give a LoRA with --lora or as the input replicate_weights, not both.")
    lora = paths.of_operator(named, settings.weights)
    sources.check(lora, root=None)
    return lora


def _own(lora: str) -> str | Path:
    """A LoRA that ``--lora`` names, as a path where it is one: whoever calls may have it anywhere."""
    return Path(lora) if os.path.exists(lora) else lora  # noqa: PTH110 - a data: URI is too long for a Path


def _scale(interface: Interface, *words: str) -> float:
    """The scale behind ``--lora SOURCE``."""
    least, most = interface["lora_scale"].bounds or (-math.inf, math.inf)
    try:
        (scale,) = map(float, words or ("1",))
        if not least <= scale <= most:
            raise ValueError
    except ValueError:
        raise RequestError(f"--lora takes a scale from {least} to {most}, not {' '.join(words)!r}.") from None
    return scale


def _parser(interface: Interface) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Draw pictures with the model in the weights directory (FLUX_WEIGHTS, default: weights).",
        epilog=f"inputs:\n{''.join(flags.described(interface))}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-i", "--input", action="append", metavar="NAME=VALUE", default=[], help="an input; repeatable")
    parser.add_argument(
        "--extended",
        dest="interface",
        action="store_const",
        const=EXTENDED,
        default=DOCUMENTED,
        help="take the extended inputs; with --help: say which",
    )
    parser.add_argument("--json", metavar="JSON", help="all inputs as JSON: @FILE, - or @- for standard input, or text")
    parser.add_argument(
        "--lora",
        action="append",
        nargs="+",
        metavar=("FILE_OR_SOURCE", "SCALE"),
        default=[],
        help="draw with this LoRA: a file, a folder that holds one, an address, or an id; more are added, "
        "each with its scale. With --from, where the picture's are",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="where to write (default: outputs/)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="draw a picture of ours once more")
    parser.add_argument("--open", action="store_true", help="show the pictures, where there is a desktop")
    return parser


def _require_place(path: Path) -> None:
    folder = path if path.is_dir() else path.parent
    try:
        if folder == OUTPUTS:
            folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise PermissionError(errno.EACCES, "it is not a folder that can be written to")
    except OSError as error:
        raise OutputError(f"No picture can be put into {folder}: {error.strerror}.") from None


def _keep_numbered(files: Sequence[Path]) -> list[Path]:
    """Copy files into outputs/ under the next free numbers, never over another file."""
    numbers = (re.match(r"([0-9]+)-", path.name) for path in OUTPUTS.iterdir())
    number = max((int(found[1]) for found in numbers if found), default=0)
    written = []
    for file in files:
        while True:
            number += 1
            target = OUTPUTS / f"{number:04}-{file.name.partition('-')[2]}"
            if not any(OUTPUTS.glob(f"{number:04}-*")) and _copied(file, target, "xb"):
                break
        written.append(target)
    return written


def _keep_as(files: Sequence[Path], output: Path) -> list[Path]:
    """Copy files to where ``-o`` says, named as Cog names them: PATH.0.webp and so on."""
    stem = output / "output" if output.is_dir() else output.with_suffix("")
    targets = [stem.with_name(f"{stem.name}.{index}{file.suffix}") for index, file in enumerate(files)]
    for file, target in zip(files, targets, strict=True):
        _copied(file, target, "wb")
    return targets


def _copied(file: Path, target: Path, mode: Literal["xb", "wb"]) -> bool:
    """Copy a file; False when ``target`` is there and ``mode`` spares it."""
    try:
        with target.open(mode) as copy:
            copy.write(file.read_bytes())
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from None
    return True


def _write_json(response: Mapping[str, Any], output: Path | None) -> None:
    text = json.dumps(response, indent=2, ensure_ascii=False)
    text = re.sub(r"[^\n -~]", _escape_unprintable, text)
    if output is None or output.is_dir():
        print(text)
        return
    try:
        output.with_suffix(".json").write_text(text + "\n")
    except OSError as error:
        raise OutputError(f"{output.with_suffix('.json')} cannot be written: {error.strerror}.") from None


def _escape_unprintable(found: re.Match[str]) -> str:
    """As JSON does with those control characters that it knows."""
    return found[0] if printable(found[0]) == found[0] else json.dumps(found[0])[1:-1]


if __name__ == "__main__":
    sys.exit(main())
