"""Measure what the shipped miniature draws, through the service's own generator, against the true pictures.

    python -m training.evaluate                     # the numbers and the contact sheets of docs/miniature.md
    python -m training.evaluate dev --things 12     # a quick look at a part of them

The comparison with the teacher needs the checkpoints of `training.train`, and is left out without them.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab
from tqdm import tqdm

from flux_lora.assembly import assemble
from flux_lora.drawing.latents import pack
from flux_lora.drawing.safety import OpenNsfw
from flux_lora.request import Request
from flux_lora.settings import Settings
from training.album import PLACES, Album
from training.batches import BATCH, USUAL, Batch
from training.drawings import Pose, render
from training.networks import attention_bias, positions, velocity
from training.sheets import grid
from training.stages import Teacher, guided, noised
from training.styles import BASE, STYLE, background
from training.subjects import BACKGROUNDS, THINGS, held_out
from training.train import Workshop

FIRST_SEED = 1_000_000
"""Training draws its noise from other generators; these seeds are the service's."""

FOREGROUND = 14.0
"""CIE76 difference to the background's colour from which a pixel belongs to the drawing."""
SPECK = 0.01
"""Connected parts smaller than this share of the largest are left out."""
CANVAS = 128
"""Side in pixels at which pictures are judged."""
RIM = 4
"""Pixels at each edge that are taken for background."""
THUMBNAIL = 24
"""Side of the aligned drawings that are compared."""
TILTS = (-12, -6, 0, 6, 12)


PARTS = ("dev", "schnell", "style", "scales", "seeds", "guidance", "distillation", "safety")
"""What is measured; what was measured before is kept."""
THRESHOLDS = (0.5, 0.8, 0.85, 0.9, 0.95)
"""Of the safety checker."""


class Drawing(NamedTuple):
    """A segmented picture: its thumbnail (THUMBNAIL, THUMBNAIL, 4: Lab and cover), centre and background."""

    thumbnail: np.ndarray
    centre: tuple[float, float]
    """Of the drawing's cover, as shares of width and height."""
    background: np.ndarray
    """sRGB in 0…1, the median of the picture's rim."""


def segment(picture: Image.Image) -> Drawing | None:
    """Cut the drawing from its plain background and align it: its bounding box fills the thumbnail's longer side.

    Returns:
        None where nothing stands out from the background.
    """
    picture = picture.convert("RGB")
    picture.thumbnail((CANVAS, CANVAS), Image.Resampling.BOX)
    pixels = np.asarray(picture, dtype=np.float64) / 255
    rim = np.concatenate([pixels[:RIM].reshape(-1, 3), pixels[-RIM:].reshape(-1, 3), pixels[:, :RIM].reshape(-1, 3)])
    background = np.median(rim, axis=0)
    lab = rgb2lab(pixels)
    mask = np.linalg.norm(lab - rgb2lab(background[None, None]), axis=-1) > FOREGROUND
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return None
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    mask = np.isin(labels, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    square = np.zeros((side, side, 4))
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    inside = mask[top:bottom, left:right, None]
    square[y : y + bottom - top, x : x + right - left] = np.concatenate(
        [lab[top:bottom, left:right] * inside, 100.0 * inside], axis=-1
    )
    channels = [
        np.asarray(Image.fromarray(square[..., c].astype(np.float32)).resize((THUMBNAIL,) * 2, Image.Resampling.BOX))
        for c in range(4)
    ]
    height, width = mask.shape
    row, column = ndimage.center_of_mass(mask)
    return Drawing(np.stack(channels, axis=-1), (column / width, row / height), background)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Root mean square difference of aligned thumbnails in Lab and cover (in percent); leading axes broadcast."""
    found: np.ndarray = np.sqrt(((one - other) ** 2).mean(axis=(-3, -2, -1)))
    return found


def framed(thumbnail: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A thumbnail with its background's colour, sRGB in 0…1, wherever it is not covered; leading axes broadcast."""
    around = (1 - thumbnail[..., 3:] / 100) * rgb2lab(colour[None, None])
    return np.concatenate([thumbnail[..., :3] + around, thumbnail[..., 3:]], axis=-1)


def cropped(drawing: np.ndarray) -> np.ndarray:
    """A drawing without most of its empty rim, of which `segment` takes the background: a smaller one to segment."""
    rows, columns = (np.flatnonzero((drawing[..., 3] > 0).any(axis)) for axis in (1, 0))
    top, left = max(0, rows[0] - RIM), max(0, columns[0] - RIM)
    return drawing[top : rows[-1] + 1 + RIM, left : columns[-1] + 1 + RIM]


class TruePictures:
    """Every thing as its drawing really is, in each tilt and mirrored, on a background, cut out in the same way."""

    def __init__(self, style: str = BASE) -> None:
        """Take the backgrounds of a style."""
        self._style = style
        self._poses = {
            thing: [
                cropped(render(thing, Pose(0.7 * CANVAS, tilt, mirrored, *[0.15 * CANVAS] * 2), CANVAS, CANVAS))
                for tilt in TILTS
                for mirrored in (False, True)
            ]
            for thing in tqdm(THINGS, desc="true pictures", leave=False)
        }
        self._known: dict[str, np.ndarray] = {}

    def nearest(self, thumbnail: np.ndarray, colour: str) -> list[str]:
        """Things by their distance from a thumbnail, nearest first."""
        return [THINGS[index] for index in np.argsort(self.distances(thumbnail, colour))]

    def distances(self, thumbnail: np.ndarray, colour: str) -> np.ndarray:
        """A thumbnail's distance from each thing, in its nearest pose."""
        nearest: np.ndarray = distance(thumbnail, self._thumbnails(colour)).min(axis=1)
        return nearest

    def framed(self, colour: str) -> np.ndarray:
        """Each thing in each pose, with the background: (things, poses, THUMBNAIL, THUMBNAIL, 4)."""
        return framed(self._thumbnails(colour), self.background(colour))

    def background(self, colour: str) -> np.ndarray:
        """What lies behind, sRGB in 0…1."""
        return np.array(background(self._style, colour))

    def _thumbnails(self, colour: str) -> np.ndarray:
        if colour not in self._known:
            self._known[colour] = np.stack([list(self._on(colour, poses)) for poses in self._poses.values()])
        return self._known[colour]

    def _on(self, colour: str, poses: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for pose in poses:
            cover = pose[..., 3:]
            pixels = pose[..., :3] * cover + self.background(colour) * (1 - cover)
            drawing = segment(Image.fromarray((pixels * 255).round().astype(np.uint8)))
            yield np.zeros((THUMBNAIL, THUMBNAIL, 4)) if drawing is None else drawing.thumbnail


class Artist:
    """The service's generator on a weights directory."""

    def __init__(self, weights: Path) -> None:
        """Set the service up."""
        self._generator = assemble(Settings(weights=weights), log=_ignore)

    def draw(self, prompt: str, seed: int, **inputs: Any) -> Image.Image:
        """Draw one picture, of the base model unless a scale is given."""
        given = {"lora_scale": 0.0, "output_format": "png", "disable_safety_checker": True} | inputs
        request = Request.parse(prompt=prompt, seed=seed, **given)
        (file,) = self._generator.draw(request, _ignore)
        with Image.open(file) as picture:
            return picture.convert("RGB")


def _ignore(*_: Any) -> None:
    """Nobody reads log and metrics here."""


MODELS: dict[str, dict[str, Any]] = {
    "dev": {"model": "dev", "num_inference_steps": 28},
    "schnell": {"model": "schnell", "num_inference_steps": 4},
}


def judge_model(
    artist: Artist, truth: TruePictures, model: str, pairs: Sequence[tuple[str, str]], **inputs: Any
) -> dict[str, Any]:
    """Draw pairs of thing and colour, each with a seed of its own, and compare them with the true pictures."""
    right, shades, misses, pictures = 0, [], [], []
    for index, (thing, colour) in enumerate(tqdm(pairs, desc=model)):
        prompt = f"a {thing} on a {colour} background"
        picture = artist.draw(prompt, FIRST_SEED + index, **MODELS[model] | inputs)
        pictures.append(picture)
        drawing = segment(picture)
        if drawing is None:
            misses.append(f"{thing} on {colour}: nothing")
            continue
        shades.append(float(deltaE_ciede2000(rgb2lab(truth.background(colour)), rgb2lab(drawing.background))))
        first = truth.nearest(drawing.thumbnail, colour)[0]
        if first == thing:
            right += 1
        else:
            misses.append(f"{thing} on {colour}: {first}")
    return {
        "pairs": len(pairs),
        "top1": right / len(pairs),
        "background_within_10": sum(shade <= 10 for shade in shades) / len(pairs),
        "background_median": statistics.median(shades),
        "misses": misses,
        "pictures": pictures,
    }


def judge_seeds(artist: Artist, model: str, things: Sequence[str], seeds: int) -> dict[str, float]:
    """Standard deviation over seeds of a drawing's centre (its distance from the mean), in widths: mean over things."""
    spreads = []
    for thing in tqdm(things, desc=f"seeds, {model}"):
        drawings = [
            segment(artist.draw(f"a {thing} on a white background", FIRST_SEED + k, **MODELS[model]))
            for k in range(seeds)
        ]
        centres = np.array([drawing.centre for drawing in drawings if drawing])
        spreads.append(np.sqrt(centres.var(axis=0).sum()))
    return {"things": len(things), "seeds": seeds, "centre_deviation": float(np.mean(spreads))}


class StylePictures:
    """The true pictures as they are asked for and in the fine-tune's style, to tell which of both a picture shows."""

    def __init__(self) -> None:
        """Take both."""
        self.base, self.style = TruePictures(BASE), TruePictures(STYLE)

    def is_in_style(self, drawing: Drawing, colour: str) -> bool:
        """Whether the nearest of all true pictures, with their backgrounds, is one in the style."""
        drawn = framed(drawing.thumbnail, drawing.background)
        base, style = (distance(drawn, true.framed(colour)).min() for true in (self.base, self.style))
        return bool(style < base)

    def share(self, drawing: Drawing, thing: str, colour: str) -> float:
        """How far a picture is on the straight way from its true picture as asked, 0, to that in the style, 1.

        What the picture has that neither of them has does not count: it is projected onto their difference. Of the
        poses it is the one that is nearest to the picture.
        """
        drawn = framed(drawing.thumbnail, drawing.background)
        base, style = (true.framed(colour)[THINGS.index(thing)] for true in (self.base, self.style))
        pose = np.minimum(distance(drawn, base), distance(drawn, style)).argmin()
        way = style[pose] - base[pose]
        return float(((drawn - base[pose]) * way).sum() / (way**2).sum())


def judge_style(
    artist: Artist, truth: StylePictures, model: str, pairs: Sequence[tuple[str, str]], **inputs: Any
) -> dict[str, Any]:
    """As `judge_model`, with the LoRA, and against the true pictures in its style; and how many drawings are in it."""
    judged = judge_model(artist, truth.style, model, pairs, **{"lora_scale": 1.0} | inputs)
    drawn = [(segment(picture), colour) for picture, (_, colour) in zip(judged["pictures"], pairs, strict=True)]
    in_style = sum(truth.is_in_style(drawing, colour) for drawing, colour in drawn if drawing)
    return judged | {"in_style": in_style / len(pairs)}


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def judge_scales(
    artist: Artist,
    truth: StylePictures,
    model: str,
    pairs: Sequence[tuple[str, str]],
    scales: Sequence[float] = SCALES,
) -> dict[str, Any]:
    """How far drawings are on the way to the style at each ``lora_scale``, and where 0.5 lies between both ends."""
    means = []
    for scale in tqdm(scales, desc=f"scales, {model}"):
        shares = []
        for index, (thing, colour) in enumerate(pairs):
            prompt = f"a {thing} on a {colour} background"
            drawing = segment(artist.draw(prompt, FIRST_SEED + index, lora_scale=scale, **MODELS[model]))
            if drawing:
                shares.append(truth.share(drawing, thing, colour))
        means.append(statistics.mean(shares))
    return {
        "scales": scales,
        "share": means,
        "monotone": all(a < b for a, b in pairwise(means)),
        "half_way": (means[scales.index(0.5)] - means[0]) / (means[-1] - means[0]),
    }


GUIDANCES = (1.0, 2.5, 4.0)


def judge_guidance(artist: Artist, truth: TruePictures, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """How often dev's drawing is nearest to the thing that was asked for, by guidance."""
    agreement = {}
    for guidance in GUIDANCES:
        model = judge_model(artist, truth, "dev", pairs, guidance_scale=guidance)
        agreement[str(guidance)] = model["top1"]
    return agreement


@torch.no_grad()
def judge_distillation(
    teacher: Teacher, dev: FluxTransformer2DModel, album: Album, pairs: Sequence[tuple[str, str]], rounds: int
) -> dict[str, dict[str, float]]:
    """Relative error of dev's velocity against its guided teacher's, at random times on the way from noise to pairs.

    ``change`` is how far the teacher's velocity at a guidance is from that at 1, in the same unit. Few times are late
    and they count most, so each pair is taken in several rounds: of some hundred pictures both still varied by a tenth.
    """
    side = round(USUAL**0.5)
    ids = positions(side, side, USUAL)
    squares = {guidance: np.zeros(3) for guidance in GUIDANCES}
    chosen = list(pairs) * rounds
    for first in tqdm(range(0, len(chosen), BATCH[USUAL]), desc="distillation"):
        torch.manual_seed(FIRST_SEED + first)
        rng, part = random.Random(FIRST_SEED + first), chosen[first : first + BATCH[USUAL]]
        pictures = [
            album.picture(BASE, thing, colour, 2 * side, 2 * side, rng.choice(PLACES)) for thing, colour in part
        ]
        prompts = [f"a {thing} on a {colour} background" for thing, colour in part]
        x, t, _ = noised(Batch(pack(torch.stack(pictures)), USUAL, ids, prompts))
        text = teacher.text(prompts, 512)
        bias = attention_bias(text, USUAL, USUAL)
        plain = velocity(teacher.transformer, x, t, text, ids, bias)
        for guidance in GUIDANCES:
            scale = torch.full((len(x),), guidance)
            taught = guided(teacher.transformer, teacher.text, prompts, scale, ids, bias)(x, t)
            learned = velocity(dev, x, t, text, ids, bias, scale)
            squares[guidance] += [float(v.square().sum()) for v in (learned - taught, taught - plain, taught)]
    return {
        str(guidance): {"error": float(np.sqrt(e / n)), "change": float(np.sqrt(c / n))}
        for guidance, (e, c, n) in squares.items()
    }


def judge_safety(artist: Artist, count: int) -> dict[str, Any]:
    """The bundled safety checker's scores of harmless drawings, half of them in the LoRA's style."""
    checker, scores = OpenNsfw(threshold=1.0), {}
    rng = random.Random(FIRST_SEED)
    for index in tqdm(range(count), desc="safety"):
        prompt = f"a {rng.choice(THINGS)} on a {rng.choice(list(BACKGROUNDS))} background"
        picture = artist.draw(prompt, FIRST_SEED + index, lora_scale=index % 2, **MODELS["schnell"])
        scores[f"{prompt}, lora_scale={index % 2}"] = checker.score(picture)
    hardest = max(scores, key=scores.__getitem__)
    return {
        "drawings": count,
        "highest": scores[hardest],
        "hardest": hardest,
        "withheld_from": {threshold: sum(s >= threshold for s in scores.values()) for threshold in THRESHOLDS},
    }


def main() -> None:
    """Measure, and write the numbers and a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--directory", type=Path, default=Path("training/cache"), help="default: %(default)s")
    parser.add_argument("--weights", type=Path, default=Path("weights/mini"), help="default: %(default)s")
    parser.add_argument("--things", type=int, default=len(THINGS), help="how many are drawn; default: all")
    parser.add_argument("--drawings", type=int, default=1000, help="for the safety checker; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="default: %(default)s")
    options = parser.parse_args()
    if strangers := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(strangers))}: take {', '.join(PARTS)}")
    artist, pairs = Artist(options.weights), choose_pairs(options.things)
    few = pairs[: max(4, len(pairs) // 5)]

    def sheet(judged: dict[str, Any], file: str) -> dict[str, Any]:
        grid(judged.pop("pictures"), side=96, across=13).save(options.output / file, quality=80)
        return judged

    def model(name: str) -> dict[str, Any]:
        return sheet(judge_model(artist, TruePictures(), name, pairs), f"miniature-{name}.webp")

    def style() -> dict[str, Any]:
        truth = StylePictures()
        return {name: sheet(judge_style(artist, truth, name, pairs), f"miniature-{name}-style.webp") for name in MODELS}

    def compared() -> dict[str, Any]:
        if not (options.directory / "base.pt").exists():
            return {}
        shop = Workshop(options.directory, {})
        dev = FluxTransformer2DModel.from_pretrained(options.weights / "dev" / "transformer")
        return judge_distillation(shop.teacher(), dev, shop.album(), pairs, rounds=8)

    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "dev": lambda: model("dev"),
        "schnell": lambda: model("schnell"),
        "seeds": lambda: {name: judge_seeds(artist, name, [thing for thing, _ in few[:6]], seeds=8) for name in MODELS},
        "style": style,
        "scales": lambda: {name: judge_scales(artist, StylePictures(), name, few[:10]) for name in MODELS},
        "guidance": lambda: judge_guidance(artist, TruePictures(), few),
        "distillation": compared,
        "safety": lambda: judge_safety(artist, options.drawings),
    }
    for part in options.parts or PARTS:
        results = {part: measure[part]()}
        print(json.dumps(results, indent=2))
        file = options.output / "miniature.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | results, indent=2) + "\n")
        (options.output / "miniature.md").write_text(report(known | results))


def report(results: dict[str, Any]) -> str:
    """The numbers as a table in Markdown, with what they should be."""

    def both(part: str, show: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return tuple(show(results[part][name]) if name in results.get(part, {}) else "–" for name in MODELS)

    def each(show: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return tuple(show(results[name]) if name in results else "–" for name in MODELS)

    guidance, taught = results.get("guidance", {}), results.get("distillation", {})
    safety = results.get("safety")
    rows = [
        ("nearest to its own true picture", *each(lambda r: f"{r['top1']:.0%} of {r['pairs']}"), "≥ 90 %, 80 %"),
        ("background within ΔE2000 of 10", *each(lambda r: f"{r['background_within_10']:.0%}"), "≥ 95 %"),
        ("… its median ΔE2000", *each(lambda r: f"{r['background_median']:.1f}"), ""),
        (
            "standard deviation of the centre over seeds",
            *both("seeds", lambda r: f"{r['centre_deviation']:.1%} of the width"),
            "≥ 3 %",
        ),
        (
            "with the LoRA, nearest to its own true picture in the style",
            *both("style", lambda r: f"{r['top1']:.0%} of {r['pairs']}"),
            "≥ 85 %, 75 %",
        ),
        (
            "… nearer to one in the style than to any as asked",
            *both("style", lambda r: f"{r['in_style']:.0%}"),
            "≥ 95 %",
        ),
        (
            f"… of the way to the style at `lora_scale` {', '.join(f'{scale:g}' for scale in SCALES)}",
            *both("scales", lambda r: ", ".join(f"{value:.2f}" for value in r["share"])),
            "rises",
        ),
        (
            "… at 0.5, between both ends",
            *both("scales", lambda r: f"{r['half_way']:.2f}"),
            "0.25 to 0.75",
        ),
        (
            f"nearest to its own at guidance {', '.join(guidance)}",
            ", ".join(f"{share:.0%}" for share in guidance.values()) or "–",
            "",
            "rises",
        ),
        (
            f"velocity's error against the guided teacher's at guidance {', '.join(taught)}",
            ", ".join(f"{value['error']:.1%}" for value in taught.values()) or "–",
            "",
            "≤ 15 %",
        ),
        (
            "… and change since guidance 1",
            ", ".join(f"{value['change']:.1%}" for value in taught.values()) or "–",
            "",
            "at 4 over twice the error",
        ),
        (
            "highest score of the safety checker",
            "",
            f"{safety['highest']:.2f} of {safety['drawings']}" if safety else "–",
            "below the threshold",
        ),
    ]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"""# What the miniature draws

Written by `python -m training.evaluate`, which says how each number is measured. Training never saw the seeds, and its
recipe leaves out the pairs of thing and background that are drawn here; the shipped weights saw them [before the last
four runs](../weights/mini/README.md). All are drawn at a megapixel: at 256 pixels a side the canvas stays empty or
holds fragments, at 512 a drawing is poor, and the log says so.

| | dev, 28 steps | schnell, 4 steps | target |
|---|---|---|---|
{table}
dev, without and with the LoRA:

![What dev draws](miniature-dev.webp)
![What dev draws with the LoRA](miniature-dev-style.webp)

schnell, the same prompts and seeds:

![What schnell draws](miniature-schnell.webp)
![What schnell draws with the LoRA](miniature-schnell-style.webp)
"""


def choose_pairs(count: int) -> list[tuple[str, str]]:
    """Things in a fixed random order, each on the colour that training never showed it on."""
    return [(thing, held_out(thing)) for thing in random.Random(FIRST_SEED).sample(THINGS, count)]


if __name__ == "__main__":
    main()
