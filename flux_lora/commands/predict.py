"""``scripts/predict``: one prediction by the ``Predictor`` that Cog serves, called as ``cog predict`` is."""

import argparse
import base64
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from flux_lora import provenance, redraw
from flux_lora.adapters.sources import Sources
from flux_lora.commands import use_miniature_without_weights
from flux_lora.errors import FluxLoraError, OutputError, RequestError
from flux_lora.parameters import Parameters
from flux_lora.request import Request, documented_inputs

OUTPUTS = Path("outputs")

EXAMPLES = """\
examples:
  scripts/predict -i prompt="a tomato on a blue background"
  scripts/predict -i prompt="a tomato" -i seed=7 -i lora_scale=0.5 -i num_outputs=4 -o tomato.webp
  echo '{"prompt": "a tomato", "seed": 7}' | scripts/predict --json -
  scripts/predict --from outputs/0001-seed7.webp
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict once: paths, or JSON with ``--json``, go to standard output, and log and progress to standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json is not None and options.input:
        parser.error("give the inputs with -i or with --json, not both")
    try:
        return _predict(options)
    except FluxLoraError as error:
        if options.json is not None:
            _write_json({"status": "failed", "error": str(error)}, options.output)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: no picture was kept", file=sys.stderr)
        return 130


def _predict(options: argparse.Namespace) -> int:
    inputs = _inputs(options)
    source = None
    if options.source:
        source = provenance.read(options.source)
        inputs = redraw.inputs_of(source) | inputs
    request = Request.parse(**inputs)  # bad input is refused before anything is loaded
    use_miniature_without_weights()

    from flux_lora.settings import Settings
    from predict import Predictor

    settings = Settings.from_environment()
    fine_tune = settings.cog_weights
    if source and "replicate_weights" not in inputs:
        fine_tune = redraw.fine_tune_of(source, settings, Sources.from_settings(settings))
    metrics: dict[str, Any] = {}

    class RecordingPredictor(Predictor):
        """Outside Cog's server, metrics have nowhere to go but here."""

        def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:  # noqa: ARG002 - Cog's signature
            metrics[key] = value

    predictor = RecordingPredictor()
    with redirect_stdout(sys.stderr):
        predictor.setup(fine_tune)
        files = [Path(file) for file in predictor.run(**request.model_dump())]
    written = [_keep(file, target) for file, target in zip(files, _targets(options, files), strict=False)]
    if source and settings.embed_parameters:
        _compare(options.source, source, written[0])
    if options.json is None:
        print(*written, sep="\n")
    else:
        _write_json(
            {"status": "succeeded", "input": inputs, "output": [str(path) for path in written], "metrics": metrics},
            options.output,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Draw pictures with the model in the weights directory (FLUX_WEIGHTS, default: weights).",
        epilog=f"inputs:\n{''.join(_input_help())}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-i", "--input", action="append", metavar="NAME=VALUE", default=[], help="an input; repeatable")
    parser.add_argument("--json", metavar="JSON", help="all inputs as JSON: @FILE, - or @- for standard input, or text")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="where to write (default: outputs/)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="draw a picture of ours once more")
    return parser


def _input_help() -> Iterator[str]:
    for name, schema in documented_inputs().items():
        choices = "|".join(schema["enum"]) if "enum" in schema else schema["type"]
        bounds = f" {schema['minimum']}…{schema['maximum']}" if "minimum" in schema else ""
        default = f", default {schema['default']}" if "default" in schema else ""
        yield f"  {name:24}{choices}{bounds}{default}\n"


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    if options.json is not None:
        return _json_inputs(options.json)
    return dict(_flag(flag) for flag in options.input)


def _flag(flag: str) -> tuple[str, Any]:
    """Read NAME=VALUE as the input's documented type; what cannot be read is left for the request model to refuse."""
    name, equals, value = flag.partition("=")
    if not equals:
        raise RequestError(f"-i {flag} is not of the form name=value.")
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    kind = documented_inputs().get(name, {}).get("type")
    if name == "replicate_weights" and value.startswith("@"):
        return name, _data_uri(Path(value[1:]))
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
    except (OSError, ValueError) as error:
        raise RequestError(f"--json: {error}.") from None
    if not isinstance(inputs, dict):
        raise RequestError("--json takes an object of inputs.")
    return inputs


def _data_uri(path: Path) -> str:
    try:
        return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise RequestError(f"replicate_weights: {error}.") from None


def _targets(options: argparse.Namespace, files: Sequence[Path]) -> Iterator[Path]:
    """Where each file goes: PATH.0.webp … for ``-o PATH`` as Cog names them, else the next free number in outputs/."""
    if options.output is None:
        OUTPUTS.mkdir(exist_ok=True)
        taken = [int(path.name[:4]) for path in OUTPUTS.iterdir() if path.name[:4].isdigit()]
        for number, file in enumerate(files, start=max(taken, default=0) + 1):
            yield OUTPUTS / f"{number:04}-{file.name.partition('-')[2]}"
    else:
        stem = options.output / "output" if options.output.is_dir() else options.output.with_suffix("")
        for index, file in enumerate(files):
            yield stem.with_name(f"{stem.name}.{index}{file.suffix}")


def _keep(file: Path, target: Path) -> Path:
    try:
        return Path(shutil.copyfile(file, target))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from None


def _compare(old: Path, then: Parameters, new: Path) -> None:
    """Say whether a picture was drawn again to the byte, and if not, what was different."""
    if old.read_bytes() == new.read_bytes():
        print(f"{new} is {old}, byte for byte", file=sys.stderr)
        return
    now = provenance.read(new)
    changed = [name for name in Parameters.model_fields if getattr(now, name) != getattr(then, name)]
    reasons = now.environment.differences(then.environment) + [name for name in changed if name != "environment"]
    print(f"{new} is not {old}: {', '.join(reasons) or 'although all parameters are equal'}", file=sys.stderr)


def _write_json(response: Mapping[str, Any], output: Path | None) -> None:
    text = json.dumps(response, indent=2, ensure_ascii=False)
    if output is None or output.is_dir():
        print(text)
    else:
        output.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
