"""Train the miniature, stage by stage, on a CPU or a GPU; a stage that was interrupted goes on where it stopped.

    python -m training.train album smoothing words base dev schnell style export

To train the shipped miniature further instead of another from nothing, or only another LoRA for it:

    python -m training.train shipped base dev schnell style export --directory training/more
    python -m training.train shipped style lora --directory training/style

Checkpoints and contact sheets are kept in ``training/cache``.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training.album import Album, collect, linear_autoencoder
from training.export import export, save_lora
from training.loop import Weights, train
from training.networks import AUTOENCODER, TextEncoders, attention_bias, positions, velocity
from training.sampling import times
from training.sheets import COLUMNS, PROMPTS, ROWS, draw_sheet
from training.smoothing import smoothing_loss
from training.stages import (
    SCHNELL_STEPS,
    Loss,
    Teacher,
    base_loss,
    dev_loss,
    guided,
    new_dev,
    new_schnell,
    schnell_loss,
    split_guidance,
    style_loss,
)
from training.words import Reader, words_loss

Module = TypeVar("Module", bound=nn.Module)

MINI = Path("weights/mini")
GUIDANCE = 3.0
"""Of contact sheets."""
AMPLITUDE = 3.0
"""Standard deviation of the first principal component in latents."""
STEPS = {"smoothing": 2500, "words": 600, "base": 14000, "dev": 5600, "schnell": 1300, "style": 2500}
RATES = {"smoothing": 7e-4, "words": 2e-3, "base": 1.5e-3, "dev": 8e-4, "schnell": 8e-4, "style": 2.5e-3}


class Workshop:
    """The stages' common ground: a directory with what was made so far, and the steps and rates of each stage."""

    def __init__(self, directory: Path, steps: dict[str, int], rates: dict[str, float] | None = None) -> None:
        """Train in a directory, each stage for so many steps."""
        self.directory = directory
        self._steps = steps
        self._rates = rates or RATES

    def album(self) -> Album:
        """The drawings and their codes."""
        return Album(self._stored("album")["codes"], self.autoencoder())

    def autoencoder(self) -> PatchAutoencoder:
        """The trained VAE."""
        autoencoder: PatchAutoencoder = PatchAutoencoder(**AUTOENCODER)
        autoencoder.load_state_dict(self._stored("album")["autoencoder"])
        if (self.directory / "smoothing.pt").exists():
            autoencoder.load_state_dict(self._stored("smoothing")["average"], strict=False)
        return autoencoder

    def untrained(self) -> Teacher:
        """A teacher that can read and not yet draw, or the shipped one where `begin_with_shipped` was called."""
        reader, teacher = Reader(), Teacher()
        if self._is_shipped():
            teacher.load_state_dict(self._stored("shipped")["teacher"])
            teacher.text.clip_tokenizer = CLIPTokenizer.from_pretrained(self.directory / "tokenizer")
            teacher.text.t5_tokenizer = T5TokenizerFast.from_pretrained(self.directory / "tokenizer_2")
            return teacher
        reader.load_state_dict(self._stored("words")["average"], strict=False)
        teacher.text = reader.text
        return teacher

    def teacher(self) -> Teacher:
        """The trained teacher, from its checkpoint."""
        return self._trained(self.untrained(), "base")

    def untrained_dev(self) -> FluxTransformer2DModel:
        """Dev before its distillation; after `begin_with_shipped` it knows what guidance did to the shipped one."""
        return new_dev(self.teacher(), self._stored("shipped")["guidance"] if self._is_shipped() else None)

    def dev(self) -> FluxTransformer2DModel:
        """The trained dev."""
        return self._trained(self.untrained_dev(), "dev")

    def schnell(self) -> FluxTransformer2DModel:
        """The trained schnell; the shipped one as long as neither it nor dev was trained further."""
        schnell = new_schnell(self.dev())
        if self._is_shipped() and not (self.directory / "dev.pt").exists():
            schnell.load_state_dict(self._stored("shipped")["schnell"])
        return self._trained(schnell, "schnell")

    def style(self) -> Weights:
        """The trained LoRA."""
        average: Weights = self._stored("style")["average"]
        return average

    def train(self, name: str, module: Module, loss: Loss, draw: Callable[[Module, Path], None] | None = None) -> None:
        """Train a stage, from its last checkpoint if there is one."""

        def sheet(average: Weights, step: int) -> None:
            if draw:
                model = copy.deepcopy(module)
                model.load_state_dict(average, strict=False)
                draw(model, self.directory / f"{name}-{step:05}.png")

        steps, rate = self._steps[name], self._rates[name]
        decay = 1 - 8 / steps if steps < 8000 else 0.999
        train(
            name,
            module,
            loss,
            steps=steps,
            rate=rate,
            directory=self.directory,
            decay=decay,
            sheet=sheet,
        )

    def _trained(self, module: Module, name: str) -> Module:
        """A module with what a stage made of it; as it is where the shipped miniature was not trained further."""
        if not self._is_shipped() or (self.directory / f"{name}.pt").exists():
            module.load_state_dict(self._stored(name)["average"], strict=False)
        return module

    def _is_shipped(self) -> bool:
        return (self.directory / "shipped.pt").exists()

    def _stored(self, name: str) -> dict[str, Any]:
        file = self.directory / f"{name}.pt"
        if not file.exists():
            raise SystemExit(f"{file} is missing: run the stage {name} first.")
        stored: dict[str, Any] = torch.load(file, weights_only=False, map_location=torch.get_default_device())
        return stored


def make_album(shop: Workshop) -> None:
    """Fit the patch code and encode every drawing in every pose."""
    autoencoder = linear_autoencoder(AMPLITUDE)
    codes = collect(autoencoder)
    torch.save({"autoencoder": autoencoder.state_dict(), "codes": codes}, shop.directory / "album.pt")


def begin_with_shipped(shop: Workshop) -> None:
    """Take reading, patch code and drawing from the shipped miniature: its dev at guidance 1 is the first teacher."""
    autoencoder = PatchAutoencoder.from_pretrained(MINI / "dev" / "vae", torch_dtype=torch.float32)
    torch.save({"autoencoder": autoencoder.state_dict(), "codes": collect(autoencoder)}, shop.directory / "album.pt")
    teacher = Teacher()
    for part, folder in ((teacher.text.clip, "text_encoder"), (teacher.text.t5, "text_encoder_2")):
        part.load_state_dict(type(part).from_pretrained(MINI / "dev" / folder, dtype=torch.float32).state_dict())
    dev = FluxTransformer2DModel.from_pretrained(MINI / "dev" / "transformer", torch_dtype=torch.float32)
    weights, embedder = split_guidance(dev)
    teacher.transformer.load_state_dict(weights)
    schnell = FluxTransformer2DModel.from_pretrained(MINI / "schnell" / "transformer", torch_dtype=torch.float32)
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINI / "dev" / folder, shop.directory / folder, dirs_exist_ok=True)
    shipped = {"teacher": teacher.state_dict(), "guidance": embedder, "schnell": schnell.state_dict()}
    torch.save(shipped, shop.directory / "shipped.pt")


def train_smoothing(shop: Workshop) -> None:
    """Teach the decoder to smooth what a linear code leaves ragged."""
    autoencoder = shop.autoencoder()
    shop.train("smoothing", autoencoder, smoothing_loss(autoencoder))


def train_words(shop: Workshop) -> None:
    """Teach the text encoders what the words mean."""
    reader = Reader()
    shop.train("words", reader, words_loss(reader))


def train_base(shop: Workshop) -> None:
    """Teach the undistilled transformer to draw."""
    teacher = shop.untrained()

    def draw(model: Teacher, file: Path) -> None:
        text, tokens = model.text(PROMPTS, 512), ROWS * COLUMNS
        scale = torch.full((len(PROMPTS),), GUIDANCE)
        ids, bias = positions(ROWS, COLUMNS, tokens), attention_bias(text, tokens, tokens)
        guide = guided(model.transformer, model.text, PROMPTS, scale, ids, bias)
        draw_sheet(guide, times("dev", 28, tokens), shop.autoencoder(), file)

    shop.train("base", teacher, base_loss(teacher, shop.album()), draw)


def train_dev(shop: Workshop) -> None:
    """Teach dev to draw at once what the teacher draws under classifier-free guidance."""
    teacher, dev = shop.teacher(), shop.untrained_dev()
    shop.train("dev", dev, dev_loss(dev, teacher, shop.album()), _sheet(shop, teacher.text, "dev"))


def train_schnell(shop: Workshop) -> None:
    """Teach schnell to draw in four steps what dev draws in more."""
    text, dev = shop.teacher().text, shop.dev()
    schnell = new_schnell(dev)
    loss = schnell_loss(schnell, dev, text, shop.album())
    shop.train("schnell", schnell, loss, _sheet(shop, text, "schnell"))


def train_style(shop: Workshop) -> None:
    """Fine-tune a LoRA of dev and schnell that draws in the other style."""
    text, networks = shop.teacher().text, {"dev": shop.dev(), "schnell": shop.schnell()}
    loss = style_loss(networks, text, shop.album())  # also adds the LoRA
    shop.train("style", networks["dev"], loss, _sheet(shop, text, "dev"))


def _sheet(shop: Workshop, encoders: TextEncoders, name: str) -> Callable[[FluxTransformer2DModel, Path], None]:
    """Contact sheets as dev or schnell draws them."""
    steps, limit = {"dev": (28, 512), "schnell": (SCHNELL_STEPS, 256)}[name]

    def draw(model: FluxTransformer2DModel, file: Path) -> None:
        text, tokens = encoders(PROMPTS, limit), ROWS * COLUMNS
        ids, bias = positions(ROWS, COLUMNS, tokens), attention_bias(text, tokens, tokens)
        scale = torch.full((len(PROMPTS),), GUIDANCE) if name == "dev" else None
        draw_sheet(
            lambda x, t: velocity(model, x, t, text, ids, bias, scale),
            times(name, steps, tokens),
            shop.autoencoder(),
            file,
        )

    return draw


def export_all(shop: Workshop) -> None:
    """Write the weights directory."""
    export(MINI, shop.teacher().text, shop.dev(), shop.schnell(), shop.autoencoder(), shop.style())


def export_lora(shop: Workshop) -> None:
    """Replace the LoRA alone in the weights directory."""
    save_lora(MINI / "lora.safetensors", shop.style())


STAGES: dict[str, Callable[[Workshop], None]] = {
    "album": make_album,
    "shipped": begin_with_shipped,
    "smoothing": train_smoothing,
    "words": train_words,
    "base": train_base,
    "dev": train_dev,
    "schnell": train_schnell,
    "style": train_style,
    "export": export_all,
    "lora": export_lora,
}


def main() -> None:
    """Train the stages that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="stage", help=", ".join(STAGES))
    parser.add_argument("--directory", type=Path, default=Path("training/cache"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of the stages named, instead of the recipe's")
    parser.add_argument("--rate", type=float, help="of learning, likewise; a short run on shipped weights wants less")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    steps = STEPS if options.steps is None else dict.fromkeys(STEPS, options.steps)
    rates = RATES if options.rate is None else dict.fromkeys(RATES, options.rate)
    options.directory.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.directory, steps, rates)
    torch.manual_seed(0)
    for stage in options.stages:
        STAGES[stage](shop)


if __name__ == "__main__":
    main()
