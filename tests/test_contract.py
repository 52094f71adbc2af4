"""predict.py, the request model, openapi.json and cog.yaml against the documented interface and Cog's own rules."""

import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import cog
import jsonschema
import pytest
import yaml

from flux_lora.errors import RequestError
from flux_lora.ledger import Record
from flux_lora.request import Request, documented_inputs
from predict import Predictor

ROOT = pathlib.Path(__file__).parent.parent
CONTRACT = ROOT / "tests" / "contract"


def load(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def documented() -> dict[str, dict[str, Any]]:
    """The thirteen inputs of the contract and ``replicate_weights``, in the order of their slots."""
    extra = re.findall(r"```json\n(.*?)\n```", (CONTRACT / "README.md").read_text(), re.DOTALL)[0]
    inputs = load(CONTRACT / "input_schema.json")["properties"] | json.loads(f"{{{extra}}}")
    return dict(sorted(inputs.items(), key=lambda item: item[1]["x-order"]))


def canonical(schema: dict[str, Any]) -> list[tuple[str, str]]:
    """JSON text in which 1 and 1.0 are equal, false and 0 are not, and only the order of the inputs counts."""
    numbers_alike = json.loads(json.dumps(schema), parse_int=float)
    return [(name, json.dumps(value, sort_keys=True)) for name, value in numbers_alike.items()]


OPENAPI = load(ROOT / "openapi.json")
PREDICT = (ROOT / "predict.py").read_text()
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())


def test_the_request_model_is_the_contract() -> None:
    assert canonical(documented_inputs()) == canonical(documented())
    required = [name for name, field in Request.model_fields.items() if field.is_required()]
    assert required == load(CONTRACT / "input_schema.json")["required"]


def test_openapi_holds_the_contract() -> None:
    schemas = OPENAPI["components"]["schemas"]

    def resolved(schema: dict[str, Any]) -> dict[str, Any]:
        parts = [schemas[part["$ref"].rpartition("/")[2]] for part in schema.get("allOf", [])]
        own = {key: value for key, value in schema.items() if key != "allOf"}
        return {key: value for part in [*parts, own] for key, value in part.items()}

    inputs = {name: resolved(schema) for name, schema in schemas["Input"]["properties"].items()}
    assert canonical(inputs) == canonical(documented())
    assert schemas["Input"] | {"properties": {}} == load(CONTRACT / "input_schema.json") | {"properties": {}}
    assert schemas["Output"] == load(CONTRACT / "output_schema.json")


def test_openapi_is_complete() -> None:
    text = (ROOT / "openapi.json").read_text()
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    assert references <= OPENAPI["components"]["schemas"].keys()
    assert OPENAPI["info"]["version"] == importlib.metadata.version("cog")
    assert {(path, method) for path, operations in OPENAPI["paths"].items() for method in operations} == {
        ("/", "get"),
        ("/health-check", "get"),
        ("/predictions", "post"),
        ("/predictions/{prediction_id}", "put"),
        ("/predictions/{prediction_id}/cancel", "post"),
    }


# Cog's reader of predict.py, as strict as its rules: what it would drop or misread in silence fails here.

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
KEYWORDS = {"description": "description", "ge": "minimum", "le": "maximum", "choices": "enum", "default": "default"}


def read_inputs(source: str) -> dict[str, dict[str, Any]]:
    runner = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Predictor"
    )
    assert [ast.unparse(base) for base in runner.bases] == ["BaseRunner"]
    run = next(node for node in runner.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    assert run.returns
    assert ast.unparse(run.returns) == "list[Path]"
    assert not any([run.args.posonlyargs, run.args.kwonlyargs, run.args.vararg, run.args.kwarg])
    parameters = zip(run.args.args[1:], run.args.defaults, strict=True)
    return {
        parameter.arg: read_input(parameter, call, source) | {"x-order": order}
        for order, (parameter, call) in enumerate(parameters)
    }


def read_input(parameter: ast.arg, call: ast.expr, source: str) -> dict[str, Any]:
    assert isinstance(call, ast.Call)
    assert ast.unparse(call.func) == "Input"
    assert not call.args
    assert parameter.annotation
    kind = re.fullmatch(r"(Optional)?\[?(str|int|float|bool)\]?", ast.unparse(parameter.annotation))
    assert kind
    schema = {KEYWORDS[str(keyword.arg)]: literal(keyword.value, source) for keyword in call.keywords}
    if kind[1] or "default" in schema:
        assert (schema["default"] is None) == bool(kind[1]), "a None default and Optional go together"
    if kind[1]:
        del schema["default"]
    title = parameter.arg if "enum" in schema else parameter.arg.replace("_", " ").title()
    return {**schema, "type": TYPES[kind[2]], "title": title}


def literal(node: ast.expr, source: str) -> Any:
    """The value of one plain literal: no name, operator, joined or prefixed string, escape or digit separator."""
    if isinstance(node, ast.List):
        return [literal(item, source) for item in node.elts]
    value, text = ast.literal_eval(node), ast.get_source_segment(source, node)
    plain = f'"{value}"' if isinstance(value, str) else repr(value)
    assert text == plain, f"{text} is not a plain literal"
    return value


def test_predict_reads_as_the_contract() -> None:
    assert canonical(read_inputs(PREDICT)) == canonical(documented())


@pytest.mark.parametrize(
    ("plain", "unreadable"),
    [
        ("ge=256", "ge=MINIMUM"),
        ("le=1440", "le=1_440"),
        ("default=28", "default=14 * 2"),
        ("Optional[int] = Input", "int = Input"),
        ("num_outputs: int", "num_outputs: Optional[int]"),
        ('"Number of inference steps"', '"Number of " "inference steps"'),
        ('"Number of inference steps"', 'f"Number of inference steps"'),
        ('"Number of images to output."', r'"Number of images to output\x2e"'),
        ('["dev", "schnell"]', '["dev", *MORE]'),
        ("list[Path]", "Path"),
        ("default=3.5", "default_factory=float"),
    ],
)
def test_the_reader_refuses_what_cog_would_drop(plain: str, unreadable: str) -> None:
    assert plain in PREDICT
    with pytest.raises((AssertionError, ValueError, KeyError)):
        read_inputs(PREDICT.replace(plain, unreadable, 1))


def test_cog_can_import_what_the_annotations_name() -> None:
    imports = [node for node in ast.parse(PREDICT).body if isinstance(node, ast.ImportFrom)]
    names = {(node.module, alias.name) for node in imports for alias in node.names}
    assert {("cog", "BaseRunner"), ("cog", "Input"), ("cog", "Path"), ("typing", "Optional")} <= names


def test_cog_yaml_is_valid() -> None:
    schema = load(CONTRACT / "cog_yaml.schema.json")
    jsonschema.Draft7Validator(schema).validate(CONFIG)
    build = CONFIG["build"]
    assert build["gpu"] is True
    assert build["cuda"]
    assert (3, 11) <= tuple(map(int, build["python_version"].split("."))) < (3, 14)
    assert (ROOT / build["python_requirements"]).is_file()
    assert build["sdk_version"] == importlib.metadata.version("cog")
    assert CONFIG["run"] == "predict.py:Predictor"


def in_image(path: str) -> bool:
    """Docker's rule: anchored patterns, a matched directory takes its contents along, the last match decides."""
    parts = path.split("/")
    candidates = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        expression = re.escape(pattern.removeprefix("!"))
        for glob, meaning in {r"\*\*/": "(?:.*/)?", r"\*": "[^/]*", r"\?": "[^/]"}.items():
            expression = expression.replace(glob, meaning)
        if any(re.fullmatch(expression, candidate) for candidate in candidates):
            kept = pattern.startswith("!")
    return kept


@pytest.mark.parametrize(
    "path",
    [
        "predict.py",
        "cog.yaml",
        "openapi.json",
        "requirements.txt",
        "LICENSE",
        "flux_lora/request.py",
        "flux_lora/lora/merge.py",
        "weights/lora.safetensors",
        "weights/my-style.safetensors",
        "weights/dev/model_index.json",
        "weights/dev/transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "weights/schnell/scheduler/scheduler_config.json",
        "weights/safety_checker/model.safetensors",
        "weights/dev/tokenizer/merges.txt",
        "weights/dev/tokenizer/vocab.json",
        "weights/dev/tokenizer_2/spiece.model",
        "weights/loras/style.safetensors",
        "NOTICE",
        ".cog/tmp/build/requirements.txt",
        ".cog/openapi_schema.json",
    ],
)
def test_the_image_holds_code_and_weights(path: str) -> None:
    assert in_image(path)


@pytest.mark.parametrize(
    "path",
    [
        "tests/test_request.py",
        "weights/mini/dev/transformer/diffusion_pytorch_model.safetensors",
        "weights/mini/lora.safetensors",
        "weights/dev/.cache/huggingface/download/model_index.json.metadata",
        "outputs/0-seed7.webp",
        "benchmarks/results.json",
        "training/train.py",
        "docs/croissant.webp",
        ".git/config",
        ".ci/run",
        ".venv/bin/python",
        ".env",
        ".pytest_cache/CACHEDIR.TAG",
        ".mypy_cache/3.11/cache.db",
        "__pycache__/predict.cpython-311.pyc",
        "flux_lora/lora/__pycache__/merge.cpython-311.pyc",
        ".env.local",
        ".envrc",
        ".netrc",
        ".huggingface/token",
        "server.pem",
        "flux_lora/server.key",
        "flux_lora/service/.env",
        "weights/.netrc",
        "weights/token",
        "weights/token.txt",
        "weights/lora.safetensors.part",
        "weights/dev/transformer/model.safetensors.part",
        "weights/dev/.cache/huggingface/download/model.json",
        "weights/.cache/model.safetensors",
        "notes.txt",
        "id_rsa",
        "predict.py.orig",
    ],
)
def test_the_image_does_not_hold(path: str) -> None:
    assert not in_image(path)


def test_importing_predict_is_quick_and_imports_no_torch() -> None:
    code = """
import sys, time
started = time.perf_counter()
import predict
seconds = time.perf_counter() - started
import flux_lora.request
heavy = {"torch", "diffusers", "transformers"} & sys.modules.keys()
print(seconds, *heavy)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert [heavy for _, *heavy in runs] == [[], [], []]
    assert min(float(seconds) for seconds, *_ in runs) < 0.5


class Drawn:
    """Stands in for the generator, to see what ``run`` hands over."""

    def draw(self, request: Request, record: Record) -> list[pathlib.Path]:
        self.request = request
        record("seed", request.seed)
        return [pathlib.Path("0-seed7.webp"), pathlib.Path("1-seed8.webp")]


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {}


@pytest.fixture
def predictor(drawn: Drawn, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Predictor:
    predictor = Predictor()
    monkeypatch.setattr(predictor, "generator", drawn, raising=False)
    monkeypatch.setattr(predictor, "record_metric", metrics.__setitem__)
    return predictor


def test_run_hands_every_input_over_under_its_own_name(
    predictor: Predictor, drawn: Drawn, metrics: dict[str, Any]
) -> None:
    inputs: dict[str, Any] = {
        "prompt": "a croissant",
        "aspect_ratio": "custom",
        "width": 300,
        "height": 400,
        "num_outputs": 2,
        "lora_scale": 0.5,
        "num_inference_steps": 3,
        "model": "schnell",
        "guidance_scale": 4.5,
        "seed": 7,
        "output_format": "png",
        "output_quality": 60,
        "replicate_weights": "style.safetensors",
        "disable_safety_checker": True,
    }
    assert inputs.keys() == documented().keys()
    files = predictor.run(**inputs)
    assert drawn.request.model_dump() == inputs
    assert files == [cog.Path("0-seed7.webp"), cog.Path("1-seed8.webp")]
    assert all(isinstance(file, cog.Path) for file in files)
    assert metrics == {"seed": 7}


def test_run_from_python_fills_in_the_defaults(predictor: Predictor, drawn: Drawn) -> None:
    predictor.run(prompt="a croissant", seed=7)
    assert drawn.request == Request.parse(prompt="a croissant", seed=7)


def test_run_from_python_refuses_like_the_request_model(predictor: Predictor) -> None:
    with pytest.raises(RequestError, match="prompt is required"):
        predictor.run()
    with pytest.raises(RequestError, match=r"num_outputs must be a whole number from 1 to 4, not 5"):
        predictor.run(prompt="a croissant", num_outputs=5)
