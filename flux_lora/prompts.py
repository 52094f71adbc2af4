"""Prompt -> text embeddings, kept for the next request with the same prompt."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Encoded:
    """What the transformer reads of a prompt: T5's tokens (1, limit, d_model) and CLIP's summary (1, hidden_size)."""

    tokens: Tensor
    pooled: Tensor


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders and remembers the last ``capacity`` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[Hashable, Encoded] = OrderedDict()

    def encode(self, pipeline: Any, prompt: str, limit: int, encoders: Hashable) -> Encoded:
        """Encode ``prompt`` with at most ``limit`` T5 tokens.

        Args:
            pipeline: a FluxPipeline; only its text encoders and tokenizers are used.
            encoders: what is merged into the text encoders; with prompt and limit, all that the result depends on.
        """
        key = (prompt, limit, encoders)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=limit)
        encoded = Encoded(tokens, pooled)
        self._known[key] = encoded
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return encoded


def cut(tokenizer: Any, prompt: str, limit: int) -> str | None:
    """Say what T5 does not read of a prompt that is longer than ``limit`` tokens; None when it reads all."""
    encoding = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    total, kept = len(encoding["input_ids"]), limit - 1  # the last token is the end mark
    if total <= limit:
        return None
    rest = prompt[encoding["offset_mapping"][kept][0] :]
    shown = rest if len(rest) <= SHOWN_CHARACTERS else f"{rest[:SHOWN_CHARACTERS]}…"
    return f"T5 reads {kept} of the prompt's {total - 1} tokens; cut off are its last {len(rest)} characters: {shown!r}"
