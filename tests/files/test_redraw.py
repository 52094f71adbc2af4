"""What is said of a picture that was drawn again."""

from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from flux_lora.errors import RequestError, SourceError
from flux_lora.files import outputs, provenance, redraw
from flux_lora.files.record import Environment, Lora, Parameters, Software, Source
from flux_lora.inputs import EXTENDED
from flux_lora.request import Request

SOFTWARE = Software(
    flux_lora="0.2.0", code="0" * 16, torch="2.13.0", diffusers="0.42.1", transformers="5.23.0", pillow="13.0.0"
)
ENVIRONMENT = Environment(base="5f" * 32, device="cpu", dtype="float32", software=SOFTWARE)
PARAMETERS = Parameters(
    prompt="a tomato",
    seed=7,
    width=48,
    height=32,
    model="dev",
    num_inference_steps=4,
    guidance_scale=3.5,
    loras=(),
    output_format="webp",
    output_quality=80,
    environment=ENVIRONMENT,
)
RED, GREEN = (Image.new("RGB", (48, 32), color) for color in ("red", "green"))
FORMATS = ("webp", "jpg", "png")


def by(**software: str | None) -> Parameters:
    environment = ENVIRONMENT.model_copy(update={"software": SOFTWARE.model_copy(update=software)})
    return PARAMETERS.model_copy(update={"environment": environment})


def compared(folder: Path, new: tuple[Image.Image, Parameters], embed: bool = True, output_format: str = "webp") -> str:
    """What is said of a new picture, where a red one with ``PARAMETERS`` was to be drawn again."""
    files = folder / f"new.{output_format}", folder / f"old.{output_format}"
    for file, (image, parameters), embedded in zip(files, (new, (RED, PARAMETERS)), (embed, True), strict=True):
        quality = None if output_format == "png" else 80
        changes = {"output_format": output_format, "output_quality": quality}
        outputs.write(outputs.encode(image, parameters.model_copy(update=changes), embed=embedded), file)
    return redraw.compare(files[0], files[1].read_bytes(), provenance.read(files[1]))


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(
    ("new", "said"),
    [
        ((RED, PARAMETERS), "byte for byte"),
        ((RED, by(code="1" * 16)), f"the same pixels, by other code: code {'1' * 16}, not {'0' * 16}"),
        (
            (RED, by(code="1" * 16, flux_lora="0.3.0")),
            f"the same pixels, by other code: flux_lora 0.3.0, not 0.2.0, code {'1' * 16}, not {'0' * 16}",
        ),
        ((RED, by(flux_lora="0.1.0", code=None)), "the same pixels, by other code: flux_lora 0.1.0, not 0.2.0"),
        ((RED, by(torch="2.12.1")), "the same pixels, although torch 2.12.1, not 2.13.0"),
        (
            (RED, by(code="1" * 16, torch="2.12.1")),
            f"the same pixels, although code {'1' * 16}, not {'0' * 16}, torch 2.12.1, not 2.13.0",
        ),
        ((GREEN, by(code="1" * 16)), f"not the same: code {'1' * 16}, not {'0' * 16}"),
        ((GREEN, PARAMETERS), "not the same: although all parameters are equal"),
        ((GREEN, PARAMETERS.model_copy(update={"seed": 8})), "not the same: seed"),
        ((RED.resize((32, 48)), PARAMETERS), "not the same: although all parameters are equal"),
    ],
)
def test_pictures_are_compared(
    tmp_path: Path, new: tuple[Image.Image, Parameters], said: str, output_format: str
) -> None:
    assert compared(tmp_path, new, output_format=output_format) == said


def test_pictures_without_parameters_are_compared_by_their_pixels(tmp_path: Path) -> None:
    missing = "it was drawn with FLUX_EMBED_PARAMETERS=0"
    assert compared(tmp_path, (RED, PARAMETERS), embed=False) == f"the same pixels; {missing}"
    assert compared(tmp_path, (GREEN, PARAMETERS), embed=False) == f"not the same; why cannot be told, since {missing}"


def test_a_file_that_another_program_rewrote_has_the_same_pixels(tmp_path: Path) -> None:
    old, new = tmp_path / "old.webp", tmp_path / "new.webp"
    outputs.write(outputs.encode(RED, PARAMETERS, embed=True), old)
    new.write_bytes(old.read_bytes())
    with Image.open(old) as image:
        rewritten = tmp_path / "rewritten.webp"
        image.save(rewritten, lossless=True, xmp=image.info["xmp"])
    assert redraw.compare(new, rewritten.read_bytes(), PARAMETERS) == "the same pixels, with other metadata"


OLD = Path(__file__).parent / "written-by-0.1.0.webp"


def test_a_file_of_the_first_version_is_read_and_asked_for_again() -> None:
    parameters = provenance.read(OLD)
    assert parameters.environment.software.model_dump() == {
        "flux_lora": "0.1.0",
        "code": None,
        "torch": "2.13.0+cpu",
        "diffusers": "0.42.1",
        "transformers": "5.23.0",
        "pillow": "13.0.0",
    }
    assert redraw.inputs_of(parameters) == {
        "prompt": "a tomato",
        "aspect_ratio": "custom",
        "width": 256,
        "height": 256,
        "num_outputs": 1,
        "lora_scale": 1.0,
        "num_inference_steps": 4,
        "model": "dev",
        "guidance_scale": 3.5,
        "seed": 7,
        "output_format": "webp",
        "output_quality": 20,
    }


def test_a_record_without_a_digest_differs_by_its_version() -> None:
    installed = ENVIRONMENT.model_copy(update={"software": Software.installed()})
    phrases = installed.differences(provenance.read(OLD).environment)
    ours = [phrase for phrase in phrases if phrase.startswith(("flux_lora", "code"))]
    assert ours == [f"flux_lora {Software.installed().flux_lora}, not 0.1.0"]


LORA = Lora(digest="a1" * 32, scale=0.5)


def test_a_lora_that_acts_otherwise_is_named(tmp_path: Path) -> None:
    one = PARAMETERS.model_copy(update={"loras": (LORA,)})
    assert compared(tmp_path, (GREEN, one)) == "not the same: loras"


@pytest.mark.parametrize("loras", [(), (LORA,)])
def test_inputs_ask_for_the_same_picture(loras: tuple[Lora, ...]) -> None:
    parameters = PARAMETERS.model_copy(update={"loras": loras, "width": 256, "height": 320})
    asked = Request.parse(**redraw.inputs_of(parameters))
    assert (asked.seed, asked.size, asked.num_outputs) == (PARAMETERS.seed, (256, 320), 1)
    assert asked.lora_scale == (loras[0].scale if loras else 0)


OTHER = Lora(digest="b2" * 32, scale=3)
IMAGE, MASK = b"the image's file", b"the mask's"
SOURCE = Source(image=sha256(IMAGE).hexdigest(), mask=sha256(MASK).hexdigest(), prompt_strength=0.65, megapixels="0.25")


def test_of_several_loras_the_first_scale_is_an_input() -> None:
    two = PARAMETERS.model_copy(update={"loras": (LORA, OTHER), "width": 256, "height": 256})
    assert redraw.inputs_of(two)["lora_scale"] == redraw.inputs_of(two, EXTENDED)["lora_scale"] == 0.5


@pytest.mark.parametrize("size", [(128, 128), (136 * 2, 160), (720, 128), (512, 512), (1344, 768), (256, 1440)])
def test_the_extended_interface_asks_for_the_same_size(size: tuple[int, int]) -> None:
    drawn = PARAMETERS.model_copy(update={"width": size[0], "height": size[1]})
    assert Request.parse(EXTENDED, **redraw.inputs_of(drawn, EXTENDED)).size == size


def test_inputs_ask_for_the_same_picture_of_another() -> None:
    drawn = PARAMETERS.model_copy(update={"source": SOURCE, "go_fast": True})
    with pytest.raises(RequestError, match=r"does not have \(prompt_strength, megapixels, go_fast\): draw it"):
        redraw.inputs_of(drawn)
    asked = Request.parse(EXTENDED, **redraw.inputs_of(drawn, EXTENDED), image="x", mask="y")
    assert (asked.prompt_strength, asked.megapixels, asked.go_fast) == (0.65, "0.25", True)


def test_the_files_that_a_picture_was_drawn_from_are_asked_for_by_their_digests() -> None:
    drawn = PARAMETERS.model_copy(update={"source": SOURCE})
    redraw.check_files(drawn, {"image": IMAGE, "mask": MASK})
    redraw.check_files(PARAMETERS, {})
    redraw.check_files(drawn.model_copy(update={"source": SOURCE.model_copy(update={"mask": None})}), {"image": IMAGE})
    with pytest.raises(RequestError, match=f"image of SHA-256 {SOURCE.image}, .* -i image=@FILE"):
        redraw.check_files(drawn, {"mask": MASK})
    with pytest.raises(RequestError, match=f"mask of SHA-256 {SOURCE.mask}, .* -i mask=@FILE"):
        redraw.check_files(drawn, {"image": IMAGE})
    with pytest.raises(RequestError, match=f"another mask: its SHA-256 is {SOURCE.mask}, .* {SOURCE.image}"):
        redraw.check_files(drawn, {"image": IMAGE, "mask": IMAGE})


def test_older_records_do_not_say_how_many_steps_were_reused(tmp_path: Path) -> None:
    now = PARAMETERS.model_copy(update={"reused_steps": 0})
    assert compared(tmp_path, (GREEN, now)) == "not the same: although all parameters are equal"


def test_missing_loras_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    here = Lora(digest=sha256(b"a").hexdigest(), scale=1)
    candidates = [tmp_path / "nothing", tmp_path / "folder", tmp_path / "a"]
    assert redraw.find_loras([here], candidates) == {here.digest: tmp_path / "a"}
    assert redraw.find_loras([], candidates) == {}
    others = [LORA, Lora(digest="b2" * 32, scale=1, name="ink\x1b")]
    with pytest.raises(
        SourceError, match=rf"3 LoRAs, of which SHA-256 {'a1' * 32} and SHA-256 {'b2' * 32} \('ink\\x1b'\)"
    ):
        redraw.find_loras([here, *others], candidates)
