"""What is learned, one stage after the other; each begins with the weights of an earlier one."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from training.album import Album
from training.batches import USUAL, Batch, sample
from training.drawings import STYLE
from training.loop import Weights
from training.networks import Text, TextEncoders, attention_bias, new_transformer, velocity
from training.sampling import Velocity, integrate, shift

Network = Callable[..., Tensor]
Loss = Callable[[random.Random], Tensor]

SCHNELL_STEPS, SUBSTEPS = 4, 3
"""Steps that schnell is made for, and steps of dev that each replaces."""
SCHNELL_GUIDANCE = 3.0
"""What schnell, which has no guidance input, learns dev's pictures at."""
LORA_RANK = 12
FAST_GRADIENTS = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


class Teacher(nn.Module):
    """The undistilled model: text encoders and a transformer without guidance input, trained by flow matching."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoders()
        self.transformer = new_transformer(guidance=False)


def base_loss(teacher: Teacher, album: Album) -> Loss:
    """Flow matching (https://arxiv.org/abs/2210.02747), times logit-normal (https://arxiv.org/abs/2403.03206)."""
    teacher.text.requires_grad_(False)
    return _flow_matching(teacher, lambda rng: sample(album, rng))


def style_loss(teacher: Teacher, album: Album) -> Loss:
    """Flow matching again, of the other style, by a LoRA on all linear layers of the blocks."""
    add_lora(teacher)
    return _flow_matching(teacher, lambda rng: sample(album, rng, STYLE, only=USUAL))


def _flow_matching(teacher: Teacher, draw: Callable[[random.Random], Batch]) -> Loss:
    network = compiled(teacher.transformer)

    def loss(rng: random.Random) -> Tensor:
        batch = draw(rng)
        x, t, noise = noised(batch)
        with fast():
            text = teacher.text(batch.prompts, limit=512)
            predicted = velocity(network, x, t, text, batch.positions, _bias(text, batch))
        return error(predicted, noise - batch.latents, batch.tokens)

    return loss


def add_lora(teacher: Teacher) -> None:
    """Add a LoRA to all linear layers of the blocks; nothing else is trained from now on."""
    teacher.requires_grad_(False)
    layers = [n for n, m in teacher.transformer.named_modules() if "blocks." in n and isinstance(m, nn.Linear)]
    teacher.transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=layers))


def new_dev(teacher: Teacher, embedder: Weights | None = None) -> nn.Module:
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
def split_guidance(dev: nn.Module, guidance: float = 1.0) -> tuple[Weights, Weights]:
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


def dev_loss(student: nn.Module, teacher: Teacher, album: Album) -> Loss:
    """Guidance distillation (https://arxiv.org/abs/2210.03142, its first stage)."""
    teacher.requires_grad_(False)
    network, reference = compiled(student), compiled(teacher.transformer)

    def loss(rng: random.Random) -> Tensor:
        batch = sample(album, rng, empty=0.05, only=USUAL)
        x, t, _ = noised(batch)
        low, high = (1.0, 5.0) if rng.random() < 0.8 else (0.0, 10.0)
        guidance = low + (high - low) * torch.rand(len(x))
        with fast():
            with torch.no_grad():
                text = teacher.text(batch.prompts, limit=512)
                bias = _bias(text, batch)
                target = guided(reference, teacher.text, batch.prompts, guidance, batch.positions, bias)(x, t)
            predicted = velocity(network, x, t, text, batch.positions, bias, guidance)
        return error(predicted, target, batch.tokens)

    return loss


def guided(
    network: Network, encoders: TextEncoders, prompts: Sequence[str], guidance: Tensor, positions: Tensor, bias: Tensor
) -> Velocity:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): v∅ + g·(v − v∅), for guidance g of shape (B)."""
    text = encoders([*prompts, *[""] * len(prompts)], 512)

    def compute(x: Tensor, t: Tensor) -> Tensor:
        both = velocity(network, torch.cat([x, x]), torch.cat([t, t]), text, positions, bias).float()
        asked, empty = both.chunk(2)
        return empty + guidance[:, None, None] * (asked - empty)

    return compute


def new_schnell(dev: nn.Module) -> nn.Module:
    """A transformer without guidance input that draws, at first, what dev draws at `SCHNELL_GUIDANCE`."""
    student = new_transformer(guidance=False)
    student.load_state_dict(split_guidance(dev, SCHNELL_GUIDANCE)[0])
    return student


def schnell_loss(student: nn.Module, dev: nn.Module, encoders: TextEncoders, album: Album) -> Loss:
    """Progressive distillation (https://arxiv.org/abs/2202.00512): one step for several of dev's."""
    dev.requires_grad_(False)
    encoders.requires_grad_(False)
    network, reference = compiled(student), compiled(dev)

    def loss(rng: random.Random) -> Tensor:
        batch = sample(album, rng, empty=0.05, only=USUAL)
        noise = torch.randn_like(batch.latents)
        begin = 1 - torch.randint(SCHNELL_STEPS, (len(noise),)) / SCHNELL_STEPS
        x = torch.lerp(batch.latents, noise, begin[:, None, None])
        with fast():
            with torch.no_grad():
                text = encoders(batch.prompts, limit=512)
                bias, guidance = _bias(text, batch), torch.full((len(x),), SCHNELL_GUIDANCE)

                def teach(x: Tensor, fraction: Tensor) -> Tensor:
                    return velocity(reference, x, begin - fraction, text, batch.positions, bias, guidance)

                # Time runs backwards, so integrating over a fraction of time from 0 goes against the velocity.
                fractions = torch.linspace(0, 1 / SCHNELL_STEPS, SUBSTEPS + 1)
                end = integrate(lambda x, fraction: -teach(x, fraction), x, fractions)
                target = (x - end) * SCHNELL_STEPS
                text = encoders(batch.prompts, limit=256)
            predicted = velocity(network, x, begin, text, batch.positions, _bias(text, batch))
        return error(predicted, target, batch.tokens)

    return loss


def noised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Latents at random times on the way to noise: (x, t, noise)."""
    noise = torch.randn_like(batch.latents)
    t = shift(torch.randn(len(noise)).sigmoid(), batch.tokens)
    return torch.lerp(batch.latents, noise, t[:, None, None]), t, noise


def error(predicted: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Mean squared error over the tokens that are not fillers."""
    return mse_loss(predicted[:, :tokens].float(), target[:, :tokens])


def compiled(network: nn.Module) -> Network:
    """A compiled network; each of the three lengths of a batch is compiled once."""
    return torch.compile(network, dynamic=False)


@contextmanager
def fast() -> Iterator[None]:
    """bfloat16 products, and attention in a form whose gradient is quick."""
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(FAST_GRADIENTS[device]):
        yield


def _bias(text: Text, batch: Batch) -> Tensor:
    return attention_bias(text, batch.tokens, batch.latents.shape[1])
