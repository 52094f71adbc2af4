"""FLUX.1's repeated blocks, computed by the fused kernels: what diffusers' blocks compute, from the same layers.

    place(transformer)

gives each block another `forward`. Its layers, their names and weights stay, so adapters, quantization, fused
projections, the chosen attention kernel and compilation by block work as before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.device.libraries import diffusers
from flux_lora.speed import kernels
from flux_lora.speed.quantization import QuantizedLinear

Rows = list[Tensor]
"""Tokens for a product: themselves, or their eight-bit values and scales."""

flux = diffusers.models.transformers.transformer_flux


class DoubleBlock(flux.FluxTransformerBlock):  # type: ignore[misc, name-defined]  # diffusers is untyped
    """Text and image tokens with weights of their own, and attention over both."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens after the block, as diffusers' block returns them."""
        if joint_attention_kwargs or image_rotary_emb is None:
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        dtype, texts = hidden_states.dtype, encoder_hidden_states.shape[1]
        both = [encoder_hidden_states, hidden_states]
        of_text, of_image = (norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in (self.norm1_context, self.norm1))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            list(pair) for pair in zip(of_text, of_image, strict=True)
        )
        attn = self.attn
        text_layers, image_layers = _projections(attn, added=True), _projections(attn, added=False)
        rows = kernels.modulate(
            both, scale, shift, [], [], self.norm1.norm.eps, _quantized(*text_layers, *image_layers)
        )
        text, image = _split(rows, texts)
        attention = _attend(
            attn,
            _heads(attn, [_multiply(layer, image, dtype) for layer in image_layers]),
            _heads(attn, [_multiply(layer, text, dtype) for layer in text_layers]),
            image_rotary_emb,
        )
        if _quantized(attn.to_out[0], attn.to_add_out):
            text, image = _split(kernels.join(attention, None, True), texts)
        else:
            text, image = [attention[:, :texts].flatten(2)], [attention[:, texts:].flatten(2)]
        out = [_multiply(attn.to_add_out, text, dtype), _multiply(attn.to_out[0], image, dtype)]
        ups = (self.ff_context.net[0].proj, self.ff.net[0].proj)
        downs = (self.ff_context.net[2], self.ff.net[2])
        sums, *rows = kernels.modulate(both, mlp_scale, mlp_shift, out, gate, self.norm2.eps, _quantized(*ups))
        done = []
        for up, down, stream, total, factor in zip(
            ups, downs, _split(rows, texts), _split([sums], texts), mlp_gate, strict=True
        ):
            wide = _multiply(up, stream, dtype)
            active = kernels.join(None, wide, True) if _quantized(down) else [F.gelu(wide, approximate="tanh")]
            done.append(total[0] + factor[:, None] * _multiply(down, active, dtype))
        return done[0], done[1]


class SingleBlock(flux.FluxSingleTransformerBlock):  # type: ignore[misc, name-defined]  # diffusers is untyped
    """Text and image tokens with the same weights; attention and MLP beside each other."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens after the block, as diffusers' block returns them."""
        if joint_attention_kwargs or image_rotary_emb is None:
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        dtype, texts = hidden_states.dtype, encoder_hidden_states.shape[1]
        both = [encoder_hidden_states, hidden_states]
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        layers = _projections(self.attn, added=False)
        quantized = _quantized(*layers, self.proj_mlp)
        rows = kernels.modulate(both, [scale, scale], [shift, shift], [], [], self.norm.norm.eps, quantized)
        heads = _heads(self.attn, [_multiply(layer, rows, dtype) for layer in layers])
        wide = _multiply(self.proj_mlp, rows, dtype)
        attention = _attend(self.attn, heads, [], image_rotary_emb)
        out = _multiply(self.proj_out, kernels.join(attention, wide, _quantized(self.proj_out)), dtype)
        # Two tensors, as the first block gets them: views of one would be compiled for once more.
        return encoder_hidden_states + gate[:, None] * out[:, :texts], hidden_states + gate[:, None] * out[:, texts:]


CLASSES = {flux.FluxTransformerBlock: DoubleBlock, flux.FluxSingleTransformerBlock: SingleBlock}


def place(transformer: Any) -> None:
    """Compute a FluxTransformer2DModel's blocks by the fused kernels from now on; in bfloat16 or float32."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.__class__ = CLASSES.get(type(block), type(block))
    names = [placed.__name__ for placed in CLASSES.values()]
    transformer._repeated_blocks = names  # noqa: SLF001 - by these diffusers knows what to compile


def _projections(attn: Any, *, added: bool) -> list[nn.Module]:
    """The layers that make query, key and value: one or three."""
    if attn.fused_projections:
        return [attn.to_added_qkv if added else attn.to_qkv]
    return [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj] if added else [attn.to_q, attn.to_k, attn.to_v]


def _heads(attn: Any, projected: Sequence[Tensor]) -> list[Tensor]:
    """Query, key and value, (batch, tokens, heads, width) each."""
    three = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
    return [x.reshape(*x.shape[:-1], -1, attn.head_dim) for x in three]


def _attend(attn: Any, image: list[Tensor], text: list[Tensor], rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over text and image, (batch, tokens, heads, width)."""
    norms = [attn.norm_q.weight, attn.norm_k.weight]
    text_norms = [attn.norm_added_q.weight, attn.norm_added_k.weight] if text else []
    kinds = 3 if text else 2  # values need not be joined where they are already
    joint = kernels.rotate(image[:kinds], text[:kinds], norms, text_norms, *rotary, attn.norm_q.eps)
    backend = attn.processor._attention_backend  # noqa: SLF001 - as diffusers' own blocks read it
    out: Tensor = diffusers.models.attention_dispatch.dispatch_attention_fn(
        *joint.unbind(2), *image[kinds:], backend=backend
    )
    return out


def _quantized(*layers: nn.Module) -> bool:
    return all(isinstance(layer, QuantizedLinear) for layer in layers)


def _multiply(layer: Any, rows: Rows, dtype: torch.dtype) -> Tensor:
    out: Tensor = layer(rows[0]) if len(rows) == 1 else layer.multiply(*rows, dtype)
    return out


def _split(rows: Rows, texts: int) -> tuple[Rows, Rows]:
    return [x[:, :texts] for x in rows], [x[:, texts:] for x in rows]
