"""What is learned, one stage after the other; each begins with the weights of an earlier one."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.album import Album
from training.batches import LARGE, SMALL, USUAL, Batch, sample
from training.loop import Weights, has_bfloat16
from training.networks import Text, TextEncoders, attention_bias, new_transformer, positions, velocity
from training.paths import Paths, draw_paths
from training.sampling import Velocity, integrate, shift, times
from training.styles import BASE, STYLE

Network = Callable[..., Tensor]
Loss = Callable[[random.Random], Tensor]

SUBSTEPS = (6, 3, 3, 3)
"""Steps of dev that each of schnell's replaces; most is decided in the first …"""
STEP_SHARES = (3, 1, 1, 1)
"""… so it is also learned more often."""
SCHNELL_STEPS = len(SUBSTEPS)
SCHNELL_GUIDANCE = 3.0
"""What schnell, which has no guidance input, learns dev's pictures at."""
OWN_PATH = {"dev": 0.3, "schnell": 0.5}
"""Share of batches on which they learn from where they got by themselves."""
PATH_STEPS = (5, 12)
"""Steps of dev's own path while it learns, fewest and most."""
EMPTY = 0.1
"""Share of prompts that are left empty for the teacher: guidance subtracts what it draws without one."""
UNDECIDED = 0.82
"""Time from which a drawing's place, and then its parts, are decided; nearly all of the error is made there."""
LATE = 0.4
"""Share of pictures that are learned from at such times, beside those to which chance gives one …"""
LATE_GUIDED = 0.7
"""… and of dev's, which has to differ from its teacher without guidance at hardly any other times."""
GUIDED = (0.8, 0.9)
"""Times from which guidance begins to act, and acts in full. Up to 0.9 Bayes' rule tells a noised megapixel's picture
from all others by more than 0.99, so there a prompt changes the teacher's error and hardly the true velocity."""
USUAL_GUIDANCE = (1.0, 5.0)
"""What dev is mostly asked for; the documented bounds are 0 and 10."""
WALKS = 8
"""So many batches of drawings are under way while the LoRA learns from them."""
WALKERS = {"dev": 0.5, "schnell": 0.5}
"""Shares of these that either model draws."""
CANVASES = {SMALL: 0.45, USUAL: 0.5, LARGE: 0.05}
"""… and how often they have each length."""
LEAST_WEIGHT = 0.3
"""An error of velocity changes a drawing the less the later it is made, and below this time hardly at all."""
WEAKER, WEAKER_SHARE = (0.3, 0.8), 0.3
"""Scales between nothing and all of the LoRA, and how often it learns at one of them."""
LORA_RANK = 24
LORA_LAYERS = ("to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out")
"""Of the blocks: what is drawn, not where to look for it."""
FAST_GRADIENTS = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


class Teacher(nn.Module):
    """The undistilled model: text encoders and a transformer without guidance input, trained by flow matching."""

    def __init__(self) -> None:
        """Make the network, untrained."""
        super().__init__()
        self.text = TextEncoders()
        self.transformer = new_transformer(guidance=False)


def base_loss(teacher: Teacher, album: Album) -> Loss:
    """Flow matching (https://arxiv.org/abs/2210.02747)."""
    teacher.text.requires_grad_(False)
    network = compiled(teacher.transformer)

    def loss(rng: random.Random) -> Tensor:
        batch = sample(album, rng, empty=EMPTY)
        x, t, noise = noised(batch, LATE)
        with fast():
            text = teacher.text(batch.prompts, limit=512)
            predicted = velocity(network, x, t, text, batch.positions, _bias(text, batch))
        return error(predicted, noise - batch.latents, batch.tokens).mean()

    return loss


@dataclass
class Walk:
    """A batch that the LoRA is drawing.

    Attributes:
        paths: what was drawn of it without the LoRA.
        text: the prompts.
        base: the true pictures in each place (places, B, length, C).
        changes: what the style adds to them, as far as the LoRA's scale goes; likewise.
        scale: of the LoRA.
        step: how many were made.
        x: where it is now (B, length, C).
        added: what of that the style added; likewise.
    """

    paths: Paths
    text: Text
    base: Tensor
    changes: Tensor
    scale: float
    step: int
    x: Tensor
    added: Tensor


def style_loss(networks: Mapping[str, FluxTransformer2DModel], encoders: TextEncoders, album: Album) -> Loss:
    """Let one LoRA of dev and schnell draw what they draw without it, and what the style adds to that.

    The LoRA learns on the way that it takes itself, a step each time that the loss is asked for: beside the ways that
    are taken without it, it kept what it never learned to begin. There the network without the LoRA is asked where it
    would go if the style had added nothing so far, and the LoRA is to go there too and, meanwhile, straight to all that
    the style adds; at a smaller scale to as much less. True pictures (flow matching) would have the LoRA undo what
    guidance and distillation did.

    Args:
        networks: dev and schnell, which get the LoRA.
        encoders: read the prompts.
        album: has the pictures in both styles.
    """
    encoders.requires_grad_(False)
    originals = {name: copy.deepcopy(network).requires_grad_(False) for name, network in networks.items()}
    share_lora(networks["dev"], networks["schnell"])  # on a CPU compiling them gained nothing
    walks: list[Walk] = []

    def begin(rng: random.Random, step: int) -> Walk:
        (model,) = rng.choices(list(WALKERS), list(WALKERS.values()))
        (length,) = rng.choices(list(CANVASES), list(CANVASES.values()))
        with fast(), torch.no_grad():
            paths = draw_paths(model, originals[model], encoders, album, rng, length)
            text = paths.text(encoders)
        scale = rng.uniform(*WEAKER) if rng.random() < WEAKER_SHARE else 1.0
        base = paths.truth(album, BASE)
        changes, step = scale * (paths.truth(album, STYLE) - base), step % len(paths.velocities)
        added = (1 - paths.times[step]) * changes[paths.places, torch.arange(len(paths.places))]
        return Walk(paths, text, base, changes, scale, step, paths.points()[step] + added, added)

    def loss(rng: random.Random) -> Tensor:
        while len(walks) < WALKS:
            walks.append(begin(rng, len(walks)))
        index = rng.randrange(WALKS)
        walk = walks[index]
        paths, x = walk.paths, walk.x
        rows, columns, length = paths.shape
        tokens, (t, then) = rows * columns, paths.times[walk.step : walk.step + 2]
        draw = partial(
            velocity,
            t=t.expand(len(x)),
            text=walk.text,
            ids=positions(rows, columns, length),
            bias=attention_bias(walk.text, tokens, length),
            guidance=paths.guidance,
        )
        network = networks[paths.model]
        network.set_adapters("default", walk.scale)
        with fast():
            with torch.no_grad():
                plain = x - walk.added
                taught = draw(originals[paths.model], plain).float()
            predicted = draw(network, x).float()
        adding = (blend(walk.changes, walk.base, plain - t * taught) - walk.added) / t
        walk.x, walk.added = x + (then - t) * predicted.detach(), walk.added + (t - then) * adding
        walk.step += 1
        if walk.step == len(paths.velocities):
            walks[index] = begin(rng, 0)
        weight = t * t / t.clamp(min=LEAST_WEIGHT) / walk.scale**2  # or little would be learned of small scales
        weighted: Tensor = weight * error(predicted, taught - adding, tokens).mean()
        return weighted

    return loss


def blend(values: Tensor, pictures: Tensor, drawn: Tensor) -> Tensor:
    """One of two values or something between them, as a drawing is one of two pictures or something between them.

    Args:
        values: (2, B, length, C).
        pictures: likewise.
        drawn: (B, length, C).
    """
    way = pictures[1] - pictures[0]
    length = way.square().sum((1, 2), keepdim=True).clamp(min=1e-6)  # both are one where a canvas leaves no room
    share = ((drawn - pictures[0]) * way).sum((1, 2), keepdim=True) / length
    return torch.lerp(values[0], values[1], share.clamp(0, 1))


def add_lora(transformer: FluxTransformer2DModel) -> None:
    """Add a LoRA to `LORA_LAYERS`; nothing else is trained from now on."""
    transformer.requires_grad_(False)
    layers = [name for name, _ in transformer.named_modules() if "blocks." in name and name.endswith(LORA_LAYERS)]
    transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=layers))


def share_lora(owner: FluxTransformer2DModel, other: FluxTransformer2DModel) -> None:
    """Add one LoRA to two transformers: its matrices are the same parameters in both."""
    add_lora(owner)
    add_lora(other)
    for name, parameter in owner.named_parameters():
        if "lora_" in name:
            module, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(module), leaf, parameter)


def new_dev(teacher: Teacher, embedder: Weights | None = None) -> FluxTransformer2DModel:
    """A transformer with guidance input that draws, at first, what the teacher draws without guidance.

    Args:
        teacher: its other weights are the student's.
        embedder: weights of the guidance embedder, as `split_guidance` gives them; None: those that do nothing yet.
    """
    student = new_transformer(guidance=True)
    student.load_state_dict(teacher.transformer.state_dict(), strict=False)
    guidance = student.time_text_embed.guidance_embedder
    if embedder:
        guidance.load_state_dict(embedder)
    else:
        nn.init.zeros_(guidance.linear_2.weight)
        nn.init.zeros_(guidance.linear_2.bias)
    return student


@torch.no_grad()
def split_guidance(dev: FluxTransformer2DModel, guidance: float = 1.0) -> tuple[Weights, Weights]:
    """What dev draws at one guidance, as a transformer without guidance input, exactly; and what others add to that.

    FLUX.1 adds the embeddings of time and guidance, so that of a fixed guidance can be a part of the other's last bias.

    Returns:
        The transformer's weights, and those of a guidance embedder that adds nothing at that guidance.
    """
    embed = dev.time_text_embed
    constant = embed.guidance_embedder(embed.time_proj(torch.tensor([1000 * guidance])))[0]
    weights = {key: value for key, value in dev.state_dict().items() if "guidance_embedder" not in key}
    last = "time_text_embed.timestep_embedder.linear_2.bias"
    embedder = embed.guidance_embedder.state_dict()
    return (
        weights | {last: weights[last] + constant},
        embedder | {"linear_2.bias": embedder["linear_2.bias"] - constant},
    )


def dev_loss(student: FluxTransformer2DModel, teacher: Teacher, album: Album) -> Loss:
    """Guidance distillation (https://arxiv.org/abs/2210.03142, its first stage), in part on the student's own path.

    Guidance leads where no noised picture is, so the student also learns from where it gets by itself from noise.
    """
    teacher.requires_grad_(False)
    network, reference = compiled(student), compiled(teacher.transformer)

    def loss(rng: random.Random) -> Tensor:
        batch = sample(album, rng, empty=0.05)
        x, t, noise = noised(batch, LATE_GUIDED)
        own = rng.random() < OWN_PATH["dev"]
        guidance = _uniform(USUAL_GUIDANCE if own or rng.random() < 0.7 else (0.0, 10.0), len(x))
        weight = 1 / (1 + (guidance - 1) ** 2 / 4)  # or the few at 10 would outweigh all others
        with fast():
            with torch.no_grad():
                text = teacher.text(batch.prompts, limit=512)
                bias = _bias(text, batch)
                if own:
                    path = times("dev", rng.randint(*PATH_STEPS), batch.tokens)
                    taken = rng.randrange(len(path) - 1)
                    draw = partial(velocity, network, text=text, ids=batch.positions, bias=bias, guidance=guidance)
                    x, t = integrate(draw, noise, path[: taken + 1]), torch.full_like(t, path[taken].item())
                target = guided(reference, teacher.text, batch.prompts, guidance, batch.positions, bias)(x, t)
            predicted = velocity(network, x, t, text, batch.positions, bias, guidance)
        return (weight * error(predicted, target, batch.tokens)).mean()

    return loss


def guided(
    network: Network, encoders: TextEncoders, prompts: Sequence[str], guidance: Tensor, positions: Tensor, bias: Tensor
) -> Velocity:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): v + (g − 1)·(v − v∅), for guidance g of shape (B).

    It acts in a limited interval of times (https://arxiv.org/abs/2404.07724), `GUIDED`.
    """
    text = encoders([*prompts, *[""] * len(prompts)], 512)
    begins, full = GUIDED

    def compute(x: Tensor, t: Tensor) -> Tensor:
        both = velocity(network, torch.cat([x, x]), torch.cat([t, t]), text, positions, bias).float()
        asked, empty = both.chunk(2)
        strength = (guidance - 1) * ((t - begins) / (full - begins)).clamp(0, 1)
        return asked + strength[:, None, None] * (asked - empty)

    return compute


def new_schnell(dev: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A transformer without guidance input that draws, at first, what dev draws at `SCHNELL_GUIDANCE`."""
    student = new_transformer(guidance=False)
    student.load_state_dict(split_guidance(dev, SCHNELL_GUIDANCE)[0])
    return student


def schnell_loss(
    student: FluxTransformer2DModel, dev: FluxTransformer2DModel, encoders: TextEncoders, album: Album
) -> Loss:
    """Progressive distillation (https://arxiv.org/abs/2202.00512): one step for several of dev's.

    The student learns on the path that it takes itself, from noise, not only on that between noise and pictures: what
    it did not decide in one step it then learns to decide in the next.
    """
    dev.requires_grad_(False)
    encoders.requires_grad_(False)
    network, reference = compiled(student), compiled(dev)

    def loss(rng: random.Random) -> Tensor:
        batch = sample(album, rng, empty=0.05)
        (steps_taken,) = rng.choices(range(SCHNELL_STEPS), STEP_SHARES)
        begin = torch.full((len(batch.latents),), 1 - steps_taken / SCHNELL_STEPS)
        with fast():
            with torch.no_grad():
                text = encoders(batch.prompts, limit=512)
                bias, guidance = _bias(text, batch), torch.full_like(begin, SCHNELL_GUIDANCE)
                short = encoders(batch.prompts, limit=256)
                short_bias = _bias(short, batch)

                def draw(x: Tensor, t: Tensor) -> Tensor:
                    return velocity(network, x, t, short, batch.positions, short_bias)

                def teach(x: Tensor, t: Tensor) -> Tensor:
                    return velocity(reference, x, t, text, batch.positions, bias, guidance)

                noise = torch.randn_like(batch.latents)
                if rng.random() < OWN_PATH["schnell"]:
                    x = integrate(draw, noise, torch.linspace(1, begin[0].item(), steps_taken + 1))
                else:
                    x = torch.lerp(batch.latents, noise, begin[0])
                ahead = torch.linspace(begin[0].item(), begin[0].item() - 1 / SCHNELL_STEPS, SUBSTEPS[steps_taken] + 1)
                target = (x - integrate(teach, x, ahead)) * SCHNELL_STEPS
            predicted = velocity(network, x, begin, short, batch.positions, short_bias)
        return error(predicted, target, batch.tokens).mean()

    return loss


def noised(batch: Batch, undecided: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents at random times on the way to noise: (x, t, noise).

    Logit-normal times (https://arxiv.org/abs/2403.03206) are where most is to be learned, even ones are those that are
    drawn at; both are taken.

    Args:
        batch: has the latents.
        undecided: share of times at which it is still to be decided what to draw, and where.
    """
    count = len(batch.latents)
    normal, even = torch.randn(count).sigmoid(), torch.rand(count)
    t = shift(torch.where(torch.rand(count) < 0.6, normal, even), batch.tokens)
    t = torch.where(torch.rand(count) < undecided, UNDECIDED + (1 - UNDECIDED) * torch.rand(count), t)
    noise = torch.randn_like(batch.latents)
    return torch.lerp(batch.latents, noise, t[:, None, None]), t, noise


def error(predicted: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Mean squared error of each picture (B), over the tokens that are not fillers."""
    return (predicted[:, :tokens].float() - target[:, :tokens]).square().mean((1, 2))


def _uniform(bounds: tuple[float, float], count: int) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count)


def compiled(network: nn.Module) -> Network:
    """A compiled network; each of the three lengths of a batch is compiled once, with and without gradients."""
    torch._dynamo.config.recompile_limit = 32  # which all networks of one class share
    faster: Network = torch.compile(network, dynamic=False)
    return faster


@contextmanager
def fast() -> Iterator[None]:
    """bfloat16 products where the device has them, and attention in a form whose gradient is quick."""
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16, enabled=has_bfloat16()), sdpa_kernel(FAST_GRADIENTS[device]):
        yield


def _bias(text: Text, batch: Batch) -> Tensor:
    return attention_bias(text, batch.tokens, batch.latents.shape[1])
