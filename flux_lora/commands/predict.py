"""``scripts/predict``: one prediction by the generator that Cog serves, called as ``cog predict`` is."""

import argparse
import base64
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from flux_lora import rules
from flux_lora.commands import drawing_settings
from flux_lora.errors import FluxLoraError, OutputError, RequestError
from flux_lora.files import provenance, redraw
from flux_lora.inputs import DOCUMENTED, EXTENDED, Interface, schemas
from flux_lora.request import MODELS, Request
from flux_lora.settings import Settings
from flux_lora.sources import Sources
from flux_lora.wording import complain, printable

OUTPUTS = Path("outputs")

FILES = ("image", "mask", "replicate_weights", "extra_lora")
"""Inputs whose value may be a file of the caller's: ``-i image=@photo.jpg``."""

EXAMPLES = """\
examples:
  scripts/predict -i prompt="a tomato on a blue background"
  scripts/predict -i prompt="a tomato" -i seed=7 -i lora_scale=0.5 -i num_outputs=4 -o tomato.webp
  echo '{"prompt": "a tomato", "seed": 7}' | scripts/predict --json -
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
    inputs = _inputs(options)
    source = None
    if options.source:
        source = provenance.read(options.source)
        original = options.source.read_bytes()
        inputs = redraw.inputs_of(source, options.interface) | inputs
    request = Request.parse(
        options.interface, **inputs
    )  # bad input, and no place for the output, are refused before anything is loaded
    _require_place(options.output or OUTPUTS / "picture")
    settings = drawing_settings()
    if "request_tokens" not in settings.model_fields_set:  # who asks is who the tokens belong to
        settings = settings.model_copy(update={"request_tokens": True})
    rules.check(request, settings)
    fine_tune = settings.cog_weights
    if source:
        from flux_lora.pictures import Pictures  # as late as assembly, below

        redraw.check_files(source, Pictures(Sources.from_settings(settings)).files(request))
    if source and "replicate_weights" not in inputs:
        loras = [redraw.find_lora(lora.digest, _loras(lora.digest, settings)) for lora in source.loras]
        fine_tune = str(loras[0]) if loras else None
        if loras[1:] and not request.extra_lora:
            request = request.model_copy(update={"extra_lora": _data_uri("extra_lora", loras[1])})
    metrics: dict[str, Any] = {}

    from flux_lora.assembly import assemble  # not before what can be refused without it: it imports PyTorch

    with redirect_stdout(sys.stderr):
        files = assemble(settings, fine_tune).draw(request, metrics.__setitem__)
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
    return 0


def _loras(digest: str, settings: Settings) -> Iterator[Path]:
    """Where the LoRA with this digest may be: the operator's, in the cache of downloads, in the weights directory."""
    sources = Sources.from_settings(settings)
    if settings.cog_weights:
        yield sources.fetch(settings.cog_weights, root=None)
    if cached := sources.cached(digest):
        yield cached
    base = [settings.weights / name for name in (*MODELS, "safety_checker")]
    for path in sorted(settings.weights.rglob("*.safetensors")):
        if not any(path.is_relative_to(folder) for folder in base):
            yield path


def _parser(interface: Interface) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Draw pictures with the model in the weights directory (FLUX_WEIGHTS, default: weights).",
        epilog=f"inputs:\n{''.join(_input_help(interface))}\n{EXAMPLES}",
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
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="where to write (default: outputs/)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="draw a picture of ours once more")
    return parser


def _input_help(interface: Interface) -> Iterator[str]:
    for name, schema in schemas(interface).items():
        choices = (
            "|".join(schema["enum"]) if "enum" in schema else "@FILE|address" if "format" in schema else schema["type"]
        )
        bounds = f" {schema['minimum']}…{schema['maximum']}" if "minimum" in schema else ""
        default = f", default {schema['default']}" if "default" in schema else ""
        yield f"  {name:24}{choices}{bounds}{default}\n"


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    if options.json is not None:
        return _json_inputs(options.json)
    return dict(flag(text) for text in options.input)


def flag(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE as the type of the input, which is the same in all interfaces.

    What cannot be read is left for the request model to refuse.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"-i {text} is not of the form name=value.")
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    kind = EXTENDED[name].type if name in EXTENDED else None
    if name in FILES and value.startswith("@"):
        return name, _data_uri(name, Path(value[1:]))
    if kind == "boolean":
        return name, {"true": True, "false": False}.get(value.lower(), value)
    if kind in ("integer", "number"):
        for convert in (int, float):
            try:
                return name, convert(value)
            except ValueError:
                continue
    return name, value


def _json_inputs(text: str) -> dict[str, Any]:
    try:
        if text in ("-", "@-"):
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text()
        inputs = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--json: {error}.") from None
    if not isinstance(inputs, dict):
        raise RequestError("--json takes an object of inputs.")
    return inputs


def _data_uri(name: str, path: Path) -> str:
    try:
        return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise RequestError(f"{name}: {error}.") from None


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
