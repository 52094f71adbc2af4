"""Prompt -> text embeddings, kept for the next request with the same prompt."""

import re
from collections import OrderedDict
from collections.abc import Container, Hashable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from flux_lora.drawing.pipeline import PromptReader, Tokenizer

SHOWN_CHARACTERS, SHOWN_WORDS = 200, 8

CHARACTERS_A_TOKEN = 32
"""More than most have, in any language."""

MARGIN = 1024
"""Characters, many times the longest token."""

LONG = 4096
"""Characters from which CLIP, which reads 77 tokens, is given a beginning only."""

_SPACE, _WORD = re.compile(r"\s"), re.compile(r"\S+")


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

    def encode(self, pipeline: PromptReader, prompt: str, limit: int, encoders: Hashable) -> Embeddings:
        """Encode ``prompt`` with at most ``limit`` T5 tokens.

        Args:
            pipeline: a FluxPipeline; only its text encoders and tokenizers are used.
            prompt: what is enough of it for T5 (``read_part``).
            limit: of T5; CLIP has its own.
            encoders: what is merged into the text encoders; with prompt and limit, all that the result depends on.
        """
        key = (prompt, limit, encoders)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        for_clip, for_t5 = prompt, None
        if len(prompt) > LONG:
            for_clip, for_t5 = _beginning(pipeline.tokenizer, prompt, pipeline.tokenizer.model_max_length)[0], prompt
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(prompt=for_clip, prompt_2=for_t5, max_sequence_length=limit)
        embeddings = Embeddings(tokens, pooled)
        self._known[key] = embeddings
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return embeddings


def read_part(tokenizer: Tokenizer, prompt: str, limit: int) -> tuple[str, str]:
    """Find the part of a prompt that is enough to encode, and the part that T5 does not read within ``limit`` tokens.

    Returns:
        A beginning of the prompt; and a phrase for the log, empty when T5 reads all of it.
    """
    enough, unread = _beginning(tokenizer, prompt, limit)
    if unread == len(prompt):
        return prompt, ""
    rest = len(prompt) - unread
    shown = prompt[unread : unread + SHOWN_CHARACTERS] + "…" * (rest > SHOWN_CHARACTERS)
    return enough, f"{rest} characters: {shown!r}"


def unknown_words(prompt: str, known: Container[str]) -> str:
    """List the words of a prompt that are not among the known ones, for the log; empty when all are.

    Args:
        prompt: only its first ``LONG`` characters are looked at.
        known: all words that are known, in small letters; they are known with a capital, too.
    """
    words = dict.fromkeys(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", prompt[:LONG]))
    strange = [word for word in words if word[:1].lower() + word[1:] not in known]
    return ", ".join(strange[:SHOWN_WORDS]) + ", …" * (len(strange) > SHOWN_WORDS)


def _beginning(tokenizer: Tokenizer, prompt: str, limit: int) -> tuple[str, int]:
    """A beginning of a prompt whose first ``limit`` tokens are the whole prompt's, and the index of what is not read.

    Megabytes of text are not worth tokenizing, and cost a hundred times their size. Both tokenizers split a text at its
    spaces, so a beginning of whole words has the tokens of the whole. A word that goes on for ``MARGIN`` characters
    after the last token that is read is cut: what comes that far behind hardly ever changes how it begins.

    Returns:
        The beginning, which is the prompt where all of it is read; and the number of characters that are read of it.
    """
    size = limit * CHARACTERS_A_TOKEN
    while True:
        words = list(islice(_WORD.finditer(prompt, 0, size), limit + 1))  # each has a token at least
        end = words[limit].end() if len(words) > limit else min(size, len(prompt))
        if space := _SPACE.search(prompt, end, end + MARGIN):
            end = space.start()
        encoding = tokenizer(prompt[:end], return_offsets_mapping=True, verbose=False)
        if len(encoding["input_ids"]) > limit:
            unread = encoding["offset_mapping"][limit - 1][0]  # the last token that is read is the end mark
            if end == len(prompt) or prompt[end].isspace() or unread <= end - MARGIN:
                return prompt[:end], unread
        elif end == len(prompt):
            return prompt, end
        size *= 4  # spaces, and characters that are nothing to the tokenizer, or one token however many they are
