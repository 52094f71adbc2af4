"""What is used of diffusers' FLUX.1 pipelines, as types: diffusers itself has none that a checker could read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

AfterStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""diffusers' callback: (pipeline, step from 0, timestep, tensors by name) -> tensors to replace."""


class TransformerConfig(Protocol):
    """The configuration of a FluxTransformer2DModel."""

    in_channels: int
    num_attention_heads: int
    attention_head_dim: int
    guidance_embeds: bool


class Transformer(Protocol):
    """A FluxTransformer2DModel."""

    x_embedder: torch.nn.Linear
    """The first layer: it runs once in each step that is computed."""

    @property
    def config(self) -> TransformerConfig:
        """What it was built by."""


class AutoencoderConfig(Protocol):
    """The configuration of a VAE."""

    scaling_factor: float
    shift_factor: float


class Autoencoder(Protocol):
    """A VAE: images (B, 3, H, W) in −1…1, latents (B, C, h, w)."""

    @property
    def config(self) -> AutoencoderConfig:
        """What it was built by."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Turn images into latents, or a distribution of them; with ``return_dict=False`` as a tuple's first item."""

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Turn latents into pixels; with ``return_dict=False`` a tuple whose first item they are."""


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The tokens."""

    def __getitem__(self, name: str, /) -> Any:
        """Get one of the sequences that belong to the tokens, such as ``offset_mapping``."""


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    @property
    def model_max_length(self) -> int:
        """How many tokens its model reads."""

    def __call__(self, text: str, *, return_offsets_mapping: bool = False, verbose: bool = True) -> Encoding:
        """Split a text into tokens."""


class ImageProcessor(Protocol):
    """diffusers' VaeImageProcessor."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """Turn an image whose sides the model can draw into pixels (1, 3, H, W) in −1…1."""


class PipelineOutput(Protocol):
    """What a pipeline gives."""

    @property
    def images(self) -> Any:
        """Latents as tokens (1, h/2·w/2, 4C), if those were asked for."""


class PromptReader(Protocol):
    """What of a FluxPipeline reads prompts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """CLIP's."""

    @property
    def tokenizer_2(self) -> Tokenizer:
        """T5's."""

    def encode_prompt(
        self, prompt: str, prompt_2: str | None, *, max_sequence_length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a prompt: T5's tokens (1, n, d_model), CLIP's summary (1, hidden_size), and position ids."""


class Pipeline(PromptReader, Protocol):
    """A FluxPipeline."""

    progress_bar: Any
    """A context manager of what counts the steps."""

    @property
    def transformer(self) -> Any:
        """A `Transformer` that is also a module."""

    @property
    def vae(self) -> Any:
        """An `Autoencoder` that is also a module."""

    @property
    def scheduler(self) -> Any:
        """A FlowMatchEulerDiscreteScheduler."""

    @property
    def image_processor(self) -> ImageProcessor:
        """What turns images into the VAE's pixels."""

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a side of a latent pixel has."""

    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        latents: Tensor,
        height: int,
        width: int,
        sigmas: Sequence[float],
        guidance_scale: float,
        output_type: str,
        callback_on_step_end: AfterStep,
    ) -> PipelineOutput:
        """Denoise in a step for each of ``sigmas``, the noise levels with which they begin, before they are shifted."""


Pipelines = Mapping[str, Pipeline]
"""By model: dev, schnell."""
