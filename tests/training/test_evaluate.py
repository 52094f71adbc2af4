import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from training import evaluate
from training.album import Album
from training.drawings import Pose, render
from training.evaluate import StylePictures, TruePictures, judge_distillation, report, segment
from training.stages import Teacher, new_dev
from training.styles import BASE, STYLE, background
from training.subjects import BACKGROUNDS, held_out

SOME = ("tomato", "cat", "castle", "panda", "banana", "owl", "key", "zebra")


@pytest.fixture(scope="module")
def truth() -> TruePictures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "THINGS", SOME)
        return TruePictures()


@pytest.fixture(scope="module")
def styles() -> StylePictures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "THINGS", SOME)
        return StylePictures()


def draw(thing: str, colour: str, pose: Pose, style: str = BASE) -> Image.Image:
    drawing = render(thing, pose, 640, 512)
    cover = drawing[..., 3:]
    pixels = drawing[..., :3] * cover + np.array(background(style, colour)) * (1 - cover)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


@pytest.mark.parametrize("thing", SOME)
def test_a_drawing_is_nearest_to_its_own_thing_wherever_it_is(
    truth: TruePictures, thing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "THINGS", SOME)
    for colour, pose in (("blue", Pose(300, 8, False, 250, 90)), ("pink", Pose(210, -9, True, 60, 200))):
        drawing = segment(draw(thing, colour, pose).filter(ImageFilter.GaussianBlur(4)))
        assert drawing
        assert truth.nearest(drawing.thumbnail, colour)[0] == thing
        centre = (pose.left + pose.side / 2) / 640, (pose.top + pose.side / 2) / 512
        assert np.abs(np.subtract(drawing.centre, centre)).max() < 0.12
        assert np.abs(drawing.background * 255 - BACKGROUNDS[colour]).max() < 3


def test_nothing_on_the_background_is_nothing() -> None:
    assert segment(Image.new("RGB", (64, 64), "red")) is None


def test_the_share_of_the_style_grows_as_it_is_blended_in(
    styles: StylePictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "THINGS", SOME)
    pose, shares = Pose(300, 5, False, 160, 90), []
    for thing in SOME:
        base, styled = (draw(thing, "teal", pose, style) for style in (BASE, STYLE))
        blends = [Image.blend(base, styled, strength).filter(ImageFilter.GaussianBlur(4)) for strength in (0, 0.5, 1)]
        drawings = [drawing for drawing in map(segment, blends) if drawing]
        assert [styles.is_in_style(drawings[k], "teal") for k in (0, 2)] == [False, True]
        shares.append([styles.share(drawing, thing, "teal") for drawing in drawings])
        assert shares[-1] == sorted(shares[-1])
    assert np.mean(shares, axis=0) == pytest.approx([0, 0.5, 1], abs=0.12)


def test_the_report_has_a_place_for_what_was_not_measured() -> None:
    judged = {"pairs": 4, "top1": 0.75, "background_within_10": 1.0, "background_median": 0.7}
    lines = report({"dev": judged}).splitlines()
    assert "| nearest to its own true picture | 75% of 4 | – | ≥ 90 %, 80 % |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {5}


def test_a_student_that_ignores_guidance_errs_by_all_that_guidance_changes(pictures: Album) -> None:
    torch.manual_seed(0)
    teacher = Teacher()
    judged = judge_distillation(teacher, new_dev(teacher), pictures, [("cat", held_out("cat"))], rounds=16)
    assert judged["1.0"] == {"error": pytest.approx(0, abs=1e-5), "change": pytest.approx(0, abs=1e-5)}
    for guidance in ("2.5", "4.0"):
        assert judged[guidance]["error"] == pytest.approx(judged[guidance]["change"], rel=1e-4)
    # by hand: the change grows as g − 1 does; the velocity that it is measured in is nearly the same
    assert judged["4.0"]["change"] == pytest.approx(2 * judged["2.5"]["change"], rel=0.2)
    assert judged["4.0"]["change"] > 1e-3
