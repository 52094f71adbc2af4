"""``scripts/predict`` as a user calls it, but for the shell that sets up its environment."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_lora import storage
from flux_lora.commands import desktop
from flux_lora.commands.predict import main
from flux_lora.files import own_code, provenance, signing
from flux_lora.settings import Settings
from tests.conftest import MINI, ROOT
from tests.files.certificates import issue

SMALL = [
    *("-i", "aspect_ratio=custom", "-i", "width=256", "-i", "height=320", "-i", "num_inference_steps=1"),
    *("-i", "disable_safety_checker=true"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_pictures_go_to_outputs_and_never_over_another(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["-i", "prompt=a tomato", "-i", "seed=7", "-i", "num_outputs=2", *SMALL]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [f"outputs/000{n}-seed{seed}.webp" for n, seed in ((1, 7), (2, 8), (3, 7), (4, 8))]
    assert Path(paths[0]).read_bytes() == Path(paths[2]).read_bytes()
    assert Image.open(paths[1]).size == (256, 320)


def test_without_weights_the_miniature_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a tomato", *SMALL])
    assert capsys.readouterr().err.count("weights/mini") == 1


def test_output_names_are_those_of_cog(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for output in ("tomato.webp", "folder"):
        assert main(["-i", "prompt=a tomato", "-i", "num_outputs=2", *SMALL, "-o", output]) == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.webp"))
    assert found == ["folder/output.0.webp", "folder/output.1.webp", "tomato.0.webp", "tomato.1.webp"]


@pytest.mark.parametrize("spelling", ["text", "@file"])
def test_json_in_json_out(capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    inputs = {"prompt": "a tomato", "seed": 7, "aspect_ratio": "custom", "width": 256, "height": 256}
    text = json.dumps(inputs | {"num_inference_steps": 1})
    Path("inputs.json").write_text(text)
    assert main(["--json", text if spelling == "text" else "@inputs.json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == "succeeded"
    assert answer["metrics"]["seed"] == 7
    assert Image.open(answer["output"][0]).size == (256, 256)


def test_a_failure_in_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", '{"prompt": "a", "num_outputs": 9}']) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == "failed"
    assert "num_outputs" in answer["error"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-i", "prompt=a", "-i", "num_outputs=9"], "num_outputs must be a whole number from 1 to 4, not 9"),
        (["-i", "prompt=a", "-i", "lora_scale=strong"], "lora_scale must be a number from -1 to 2, not 'strong'"),
        (["-i", "prompt=a", "-i", "guidance_scale=nan"], "guidance_scale"),
        (["-i", "prompt=a", "-i", "disable_safety_checker=maybe"], "disable_safety_checker must be true or false"),
        (["-i", "prompt=a", "-i", "sed=7"], "Did you mean seed?"),
        (["-i", "prompt"], "name=value"),
        (["-i", "prompt=a", "-i", "prompt=a"], "prompt twice"),
        (["-i", "prompt=a", "-i", "seed=1", "-i", "seed=2"], "seed twice"),
        (["--json", '{"prompt": "a", "seed": 1, "seed": 2}'], "seed twice"),
        (["--json", "no-such.json"], "--json @no-such.json"),
        (["--json", __file__], f"--json @{__file__}"),
        (["-i", "prompt=a", "--lora", " "], "--lora is empty"),
        (["-i", "prompt=a", "--lora", "x.safetensors"], "no such file"),
        (["-i", "prompt=a", "--lora", "x.safetensors", "-i", "replicate_weights=y"], "not both"),
        (["-i", "prompt=a", "-i", "replicate_weights=y.safetensors"], "no such file"),
        (["-i", "prompt=a", "-i", "aspect_ratio=custom"], "width and height"),
        ([], "prompt is required"),
        (["--json", "{"], "--json"),
        (["--json", "@no-such-file"], "no-such-file"),
        (["--json", "[]"], "object"),
        (["-i", "prompt=a", "-i", "replicate_weights=@no-such-file"], "no-such-file"),
        (["--from", "no-such-file"], "no-such-file"),
        (["-i", "prompt=a", "-i", "image=@no-such-file"], "no-such-file"),
        (["-i", "prompt=a", "-i", "image=data:,x"], "image is not an input of the documented interface"),
        (["--extended", "-i", "prompt=a", "-i", "mask=data:,x"], "mask needs image"),
        (["--extended", "-i", "prompt=a", "-i", "lora_scale=4"], "lora_scale must be a number from -1 to 3, not 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    monkeypatch.setenv("FLUX_WEIGHTS", str(MINI))
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_a_lora_from_anywhere_draws_in_place_of_the_own_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tensors = load_file(MINI / "lora.safetensors")
    Path("my lora").mkdir()
    named = {"modelspec.trigger_phrase": "TOK\x1b[31m"}
    save_file({name: -tensor for name, tensor in tensors.items()}, "my lora/adapter.safetensors", named)
    assert main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL, "--lora", "~/my lora/"]) == 0
    assert capsys.readouterr().err.count("the prompt lacks 'TOK\\x1b[31m'") == 1
    (drawn,) = provenance.read(Path("outputs/0001-seed7.webp")).loras
    assert drawn.digest == storage.sha256_of(Path("my lora/adapter.safetensors"))


def test_pictures_are_shown_where_there_is_a_desktop(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "darwin":
        pytest.skip("it would open windows")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "no desktop" in str(desktop.show([tmp_path / "a b.webp"], Settings()))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not installed" in str(desktop.show([tmp_path / "a b.webp"], Settings()))
    viewer = tmp_path / "xdg-open"
    viewer.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/shown\n')
    viewer.chmod(0o755)
    assert main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL, "-o", "a b.webp", "--open"]) == 0
    assert "not opened" not in capsys.readouterr().err
    assert (tmp_path / "shown").read_text() == "a b.0.webp\n"
    viewer.write_text("#!/bin/sh\nexit 3\n")
    assert "exit status 3" in str(desktop.show([tmp_path / "a b.webp"], Settings()))


def test_a_seed_of_many_digits_arrives_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-i", "prompt=a tomato", "-i", f"seed={10**23}", *SMALL]) == 0
    assert f"seed{10**23 % 2**63}.webp" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["webp", "jpg", "png"])
def test_a_picture_is_drawn_again_from_its_file(capsys: pytest.CaptureFixture[str], name: str) -> None:
    inputs = ["-i", "prompt=a tomato\u0001", "-i", "seed=7", "-i", f"output_format={name}", "-i", "lora_scale=0.7"]
    assert main([*inputs, *SMALL]) == 0
    assert main(["--from", f"outputs/0001-seed7.{name}", "-i", "disable_safety_checker=true"]) == 0
    assert "byte for byte" in capsys.readouterr().err
    first, second = (Path(f"outputs/000{n}-seed7.{name}").read_bytes() for n in (1, 2))
    assert first == second


def test_a_picture_that_other_code_drew_is_compared_by_its_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    first = Path("outputs/0001-seed7.webp")
    code = provenance.read(first).environment.software.code
    assert code == own_code.DIGEST
    first.write_bytes(first.read_bytes().replace(code.encode(), b"0" * len(code)))
    assert main(["--from", str(first), "-i", "disable_safety_checker=true"]) == 0
    said = f"outputs/0002-seed7.webp: the same pixels, by other code: code {code}, not {'0' * len(code)}\n"
    assert capsys.readouterr().err.endswith(said)


def test_another_scale_of_a_picture_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    assert main(["--from", "outputs/0001-seed7.webp", "-i", "lora_scale=0", "-i", "disable_safety_checker=true"]) == 0
    assert "outputs/0002-seed7.webp: not the same: lora" in capsys.readouterr().err
    assert provenance.read(Path("outputs/0002-seed7.webp")).loras == ()


@pytest.mark.parametrize(("method", "again"), [("4", None), ("0", "6"), (None, "4")])
def test_a_webp_is_encoded_again_with_the_effort_of_its_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str | None, again: str | None
) -> None:
    """Other effort makes other pixels: a picture of before there was a choice would be called another one."""
    for value, arguments in ((method, ["-i", "prompt=a tomato", *SMALL]), (again, ["--from", "first.webp"])):
        monkeypatch.delenv("FLUX_WEBP_METHOD", raising=False)
        if value:
            monkeypatch.setenv("FLUX_WEBP_METHOD", value)
        assert main([*arguments, *([] if value == method else UNCHECKED)]) == 0
        (written,) = capsys.readouterr().out.split()[-1:]
        Path("first.webp").write_bytes(Path(written).read_bytes())
        assert provenance.read(Path(written)).webp_method == int(method or 2)


@pytest.mark.parametrize("name", ["version-1.webp", "version-1.jpg"])
def test_a_picture_of_version_1_is_drawn_again(capsys: pytest.CaptureFixture[str], name: str) -> None:
    old = ROOT / "tests/files/fixtures" / name
    assert main(["--from", str(old), "-i", "disable_safety_checker=true"]) == 0
    (new,) = capsys.readouterr().out.split()
    then, now = provenance.read(old), provenance.read(Path(new))
    assert [(lora.digest, lora.scale) for lora in now.loras] == [(lora.digest, lora.scale) for lora in then.loras]
    same = {"environment": then.environment, "loras": then.loras, "reused_steps": then.reused_steps}
    assert now.model_copy(update=same) == then


def test_what_a_strangers_record_says_reaches_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL, "-i", "lora_scale=0"])
    ours = provenance.read(Path("outputs/0001-seed7.webp"))
    environment = ours.environment.model_copy(update={"device": "\x1b[2J\x1b[31mowned", "base": "\u202e"})
    hostile = ours.model_copy(update={"environment": environment})
    Image.open("outputs/0001-seed7.webp").save("hostile.webp", **provenance.webp_options(hostile))
    capsys.readouterr()
    assert main(["--from", "hostile.webp", "-i", "disable_safety_checker=true"]) == 0
    shown = capsys.readouterr().err
    assert "not \\x1b[2J\\x1b[31mowned" in shown
    assert not {"\x1b", "\u202e"} & set(shown.rpartition("outputs/")[2])


def test_a_signed_picture_is_compared_without_its_signature(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in issue().write(tmp_path).items():
        monkeypatch.setenv(name, Path(path).name)
    assert main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL]) == 0
    assert main(["--from", "outputs/0001-seed7.webp", "-i", "disable_safety_checker=true"]) == 0
    assert "byte for byte, but for the signature, which differs each time" in capsys.readouterr().err
    first, second = (Path(f"outputs/000{n}-seed7.webp").read_bytes() for n in (1, 2))
    assert first != second
    assert signing.unsigned(first) == signing.unsigned(second)
    manifest = signing.manifest_of(first)
    assert manifest
    assert manifest["validation_state"] == "Valid"


def test_a_key_that_cannot_sign_ends_set_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in issue(days=(-2, -1)).write(tmp_path).items():
        monkeypatch.setenv(name, path)
    assert main(["-i", "prompt=a tomato", *SMALL]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: FLUX_C2PA_CERTIFICATE is valid from")


def test_other_base_weights_are_named(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    shutil.copytree(weights / "schnell/transformer", weights / "dev/transformer", dirs_exist_ok=True)
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    assert main(["--from", "outputs/0001-seed7.webp", "-i", "disable_safety_checker=true"]) == 0
    assert "outputs/0002-seed7.webp: not the same: base" in capsys.readouterr().err


def test_a_lora_that_is_not_at_hand_is_refused(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    (weights / "lora.safetensors").unlink()
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    monkeypatch.setenv("FLUX_ADAPTER_CACHE", str(weights / "cache"))
    assert main(["--from", "outputs/0001-seed7.webp"]) == 1
    assert "is not at hand" in capsys.readouterr().err


def test_a_lora_under_another_name_is_found_by_its_digest(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    (weights / "lora.safetensors").rename(weights / "renamed.safetensors")
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    assert main(["--from", "outputs/0001-seed7.webp", "-i", "disable_safety_checker=true"]) == 0
    assert "byte for byte" in capsys.readouterr().err


def test_the_original_may_be_overwritten_and_is_still_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL, "-o", "picture.webp"])
    again = ["--from", "picture.0.webp", "-o", "picture.webp", "-i", "disable_safety_checker=true"]
    assert main([*again, "-i", "seed=11"]) == 0
    assert "picture.0.webp: not the same: seed" in capsys.readouterr().err


def test_odd_files_beside_the_lora_are_passed_over(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL])
    (weights / "mine").mkdir()
    (weights / "lora.safetensors").rename(weights / "mine" / "deep.safetensors")
    (weights / "a.safetensors").mkdir()
    (weights / "b.safetensors").symlink_to("nowhere")
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    assert main(["--from", "outputs/0001-seed7.webp", "-i", "disable_safety_checker=true"]) == 0
    assert "byte for byte" in capsys.readouterr().err


def test_numbers_go_on_after_what_is_there() -> None:
    Path("outputs").mkdir()
    for name in ("9999-seed1.webp", "²²²²x", "notes.txt"):
        Path("outputs", name).touch()
    for _ in range(2):
        assert main(["-i", "prompt=a tomato", "-i", "seed=7", *SMALL]) == 0
    assert Path("outputs/10001-seed7.webp").stat().st_size > 1000


@pytest.mark.parametrize("output", [["-o", "no-folder/picture.webp"], ["-o", "no-folder/answer.json"], []])
def test_no_place_for_the_picture_is_refused_before_drawing(
    capsys: pytest.CaptureFixture[str], output: list[str]
) -> None:
    Path("outputs").touch()
    assert main(["-i", "prompt=a tomato", *output]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: No picture can be put into ")


def test_without_parameters_a_file_cannot_be_drawn_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_EMBED_PARAMETERS", "0")
    main(["-i", "prompt=a secret tomato", "-i", "seed=7", *SMALL])
    assert b"secret" not in Path("outputs/0001-seed7.webp").read_bytes()
    assert main(["--from", "outputs/0001-seed7.webp"]) == 1
    assert "no parameters" in capsys.readouterr().err


def test_damaged_weights_are_an_error_and_never_the_miniature(
    capsys: pytest.CaptureFixture[str], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights / "dev/model_index.json").unlink()
    monkeypatch.setenv("FLUX_WEIGHTS", str(weights))
    assert main(["-i", "prompt=a tomato"]) == 1
    assert "model_index.json" in capsys.readouterr().err


def test_help_is_quick() -> None:
    code = "import sys; from flux_lora.commands.predict import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "num_inference_steps" in done.stdout


def test_a_clean_run_prints_no_noise(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flux_lora.commands.predict", "-i", "prompt=a tomato", "-i", "seed=7", *SMALL],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin",
            "FLUX_WEIGHTS": str(MINI),
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        check=True,
    )
    lines = [line.split("\r")[-1] for line in done.stderr.decode().split("\n")]  # what a progress bar leaves behind
    ours = (
        "memory plan:",
        "fine-tune:",
        "dev now holds",
        "ready in",
        "this model sees",
        "seed:",
        "size:",
        "seconds:",
        " ",
    )
    assert [line for line in lines if line.strip() and not line.startswith(ours)] == []


# The extended interface

PHOTO = Image.linear_gradient("L").resize((320, 256)).convert("RGB")
FEW = ["--extended", "-i", "prompt=a tomato", "-i", "seed=7", "-i", "num_inference_steps=2", "-i", "output_format=png"]
UNCHECKED = ["-i", "disable_safety_checker=true"]


def test_an_edited_picture_is_drawn_again_from_the_files_of_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    PHOTO.save("photo.jpg")
    PHOTO.rotate(180).save("other.jpg")
    Image.new("L", (320, 256), 255).save("white.png")
    mask = Image.new("L", (320, 256), 255)
    mask.paste(0, (0, 0, 99, 256))
    mask.save("mask.png")
    files = ["-i", "image=@photo.jpg", "-i", "mask=@mask.png"]
    assert main([*FEW, *files, *UNCHECKED, "-i", "prompt_strength=0.6", "-i", "go_fast=true"]) == 0
    again = ["--from", "outputs/0001-seed7.png", *UNCHECKED]
    assert main(["--extended", *again, *files]) == 0
    assert "outputs/0002-seed7.png: byte for byte\n" in capsys.readouterr().err
    source = provenance.read(Path("outputs/0001-seed7.png")).source
    assert source
    for given, named in (
        ([], ["the image of SHA-256 " + source.image, "-i image=@FILE"]),
        (files[:2], [f"the mask of SHA-256 {source.mask}", "-i mask=@FILE"]),
        (["-i", "image=@other.jpg", *files[2:]], ["another image", source.image]),
        (["-i", "image=@no-such.jpg"], ["image: ", "no-such.jpg"]),
    ):
        assert main(["--extended", *again, *given]) == 1
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert all(word in line for word in named), line
    assert main(again) == 1
    assert "with --extended" in capsys.readouterr().err


def test_a_picture_of_two_loras_is_drawn_again(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name: tensor * 0.5 for name, tensor in load_file(MINI / "lora.safetensors").items()}
    save_file(tensors, "other.safetensors")
    scales = ["-i", "lora_scale=0.4", "-i", "extra_lora_scale=2.5"]
    size = SMALL[:6]
    assert main([*FEW, *UNCHECKED, *size, "-i", "extra_lora=@other.safetensors", *scales]) == 0
    assert main(["--extended", "--from", "outputs/0001-seed7.png", *UNCHECKED]) == 0
    assert "outputs/0002-seed7.png: byte for byte\n" in capsys.readouterr().err
    first = provenance.read(Path("outputs/0001-seed7.png"))
    assert sorted(lora.scale for lora in first.loras) == [0.4, 2.5]


def test_help_names_the_inputs_of_the_door(capsys: pytest.CaptureFixture[str]) -> None:
    for options, count in ([], 14), (["--extended"], 21):
        with pytest.raises(SystemExit):
            main([*options, "--help"])
        text = capsys.readouterr().out
        listed = text.partition("\ninputs:\n")[2].partition("\n\n")[0]
        assert len(listed.splitlines()) == count
        assert ("megapixels" in text) == bool(options)
