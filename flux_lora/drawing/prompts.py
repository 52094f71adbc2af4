"""Prompt -> text embeddings, kept for the next request with the same prompt."""

import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from flux_lora.drawing.pipeline import Pipeline, Tokenizer

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Embeddings:
    """What the transformer reads of a prompt: T5's tokens (1, limit, d_model) and CLIP's summary (1, hidden_size)."""

    tokens: Tensor
    pooled: Tensor


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders and remembers the last ``capacity`` of them."""

    def __init__(self, capacity: int) -> None:
        """Remember nothing yet."""
        self._capacity = capacity
        self._known: OrderedDict[Hashable, Embeddings] = OrderedDict()

    def forget(self) -> None:
        """Forget every prompt."""
        self._known.clear()

    def encode(self, pipeline: Pipeline, prompt: str, limit: int, encoders: Hashable) -> Embeddings:
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
        embeddings = Embeddings(tokens, pooled)
        self._known[key] = embeddings
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return embeddings


def read_part(tokenizer: Tokenizer, prompt: str, limit: int) -> tuple[str, str]:
    """Find the part of a prompt that is enough to encode, and the part that T5 does not read within ``limit`` tokens.

    T5 splits a text at its spaces and gives each word at least one token, so a beginning of more words than tokens are
    read encodes as the whole prompt does. Megabytes of text are not worth tokenizing.

    Returns:
        A beginning of the prompt; and a phrase for the log, empty when T5 reads all of it.
    """
    enough = prompt
    if (words := list(islice(re.finditer(r"\S+", prompt), limit + 1))) and len(words) > limit:
        beginning = prompt[: words[-1].end()]
        if len(tokenizer(beginning, verbose=False).input_ids) > limit:  # a word of deleted characters alone has none
            enough = beginning
    encoding = tokenizer(enough, return_offsets_mapping=True, verbose=False)
    if len(encoding["input_ids"]) <= limit:
        return prompt, ""
    rest = prompt[encoding["offset_mapping"][limit - 1][0] :]  # the last token that is read is the end mark
    shown = rest if len(rest) <= SHOWN_CHARACTERS else f"{rest[:SHOWN_CHARACTERS]}…"
    return enough, f"{len(rest)} characters: {shown!r}"
