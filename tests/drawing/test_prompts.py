from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from flux_lora.checkpoint.assembling import open_directory
from flux_lora.drawing.pipeline import Encoding, Tokenizer
from flux_lora.drawing.prompts import PromptEncoder, read_part, unknown_words
from tests.conftest import MINI
from tests.loaded import load


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return load().pipeline()


class Reader:
    """What of a pipeline reads prompts, with its encodings counted."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self.calls = 0
        self.tokenizer: Tokenizer = pipeline.tokenizer
        self.tokenizer_2: Tokenizer = pipeline.tokenizer_2
        self._encode_prompt = pipeline.encode_prompt

    def encode_prompt(self, *prompts: Any, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        tokens, pooled, ids = self._encode_prompt(*prompts, **arguments)
        return tokens, pooled, ids


@pytest.fixture
def counted(pipeline: FluxPipeline) -> Reader:
    return Reader(pipeline)


def test_a_known_prompt_is_not_encoded_again(counted: Reader, pipeline: FluxPipeline) -> None:
    encoder = PromptEncoder(capacity=2)
    first = encoder.encode(counted, "a cat", 512, ())
    assert encoder.encode(counted, "a cat", 512, ()) is first
    assert counted.calls == 1
    tokens, pooled, _ = pipeline.encode_prompt(prompt="a cat", prompt_2=None, max_sequence_length=512)
    assert torch.equal(first.tokens, tokens)
    assert torch.equal(first.pooled, pooled)


def test_all_that_the_result_depends_on_is_in_the_key(counted: Reader) -> None:
    encoder = PromptEncoder(capacity=10)
    for prompt, limit, state in (("a", 512, ()), ("b", 512, ()), ("a", 256, ()), ("a", 512, (("digest", 0.5),))):
        encoder.encode(counted, prompt, limit, state)
    assert counted.calls == 4


def test_the_least_recently_used_prompt_leaves(counted: Reader) -> None:
    encoder = PromptEncoder(capacity=2)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        encoder.encode(counted, prompt, 256, ())
    assert counted.calls == 4  # a, b, c, and b again


def test_capacity_zero_keeps_nothing(counted: Reader) -> None:
    encoder = PromptEncoder(capacity=0)
    encoder.encode(counted, "a", 256, ())
    encoder.encode(counted, "a", 256, ())
    assert counted.calls == 2


@pytest.mark.parametrize(("length", "lost"), [(0, 0), (255, 0), (256, 1), (1000, 745)])
def test_what_t5_cuts_is_said(pipeline: FluxPipeline, length: int, lost: int) -> None:
    """The miniature's T5 reads "a" at the beginning, one token for each letter that follows it, and the end mark."""
    prompt = "".join(chr(ord("a") + i % 26) for i in range(length))
    text, note = read_part(pipeline.tokenizer_2, prompt, 256)
    assert text == prompt
    assert note == (f"{lost} characters: {prompt[-lost:][:200] + '…' * (lost > 200)!r}" if lost else "")


@pytest.mark.parametrize("word", ["tomato", "é", "\u200b", "\u0001"])
def test_a_beginning_encodes_as_the_whole_prompt_does(pipeline: FluxPipeline, word: str) -> None:
    prompt = " ".join(f"{word}{i}" for i in range(3000))
    text, note = read_part(pipeline.tokenizer_2, prompt, 512)
    assert len(text) < len(prompt) / 4
    assert len(prompt) - len(text) < int(note.split()[0]) < len(prompt)
    whole = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=512)
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipeline.encode_prompt(prompt=text, prompt_2=None, max_sequence_length=512), whole, strict=True)
    )


TEXTS = {
    "one letter": "a",
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "base64": "data:image/png;base64,iVBORw0KGgo+/AAANSUhEUgAAB",
    "Chinese": "红色的番茄在蓝色背景上，",
    "entities": "& ",
    "spaces": " ",
    "lines": "a\n",
    "marks": "!?",
    "accents": "e\u0301",
    "nothing": "\u200b",
    "emoji": "🍅",
    "spread": "tomato" + " " * 500,
    "words": "a red tomato on a blue background, ",
    "digits": "1234567890",
}


@pytest.mark.parametrize("piece", TEXTS.values(), ids=TEXTS)
def test_what_is_enough_encodes_as_the_whole_prompt_does(pipeline: FluxPipeline, piece: str) -> None:
    """To the bit, for both encoders: by diffusers alone, which tokenizes all of it several times."""
    prompt, limit = (piece * 40_000)[:40_000], 512
    whole = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=limit)
    text, note = read_part(pipeline.tokenizer_2, prompt, limit)
    encoded = PromptEncoder(capacity=0).encode(pipeline, text, limit, ())
    assert torch.equal(encoded.tokens, whole[0])
    assert torch.equal(encoded.pooled, whole[1])
    tokens = pipeline.tokenizer_2(prompt, return_offsets_mapping=True)
    lost = len(prompt) - tokens.offset_mapping[limit - 1][0] if len(tokens.input_ids) > limit else 0
    assert note.startswith(f"{lost} characters: " if lost else "")
    assert bool(note) == bool(lost)


@pytest.mark.parametrize("piece", ["a", "abc", "& ", "!?", "tomato "])
def test_what_is_tokenized_does_not_grow_with_the_prompt(pipeline: FluxPipeline, piece: str) -> None:
    """Tokens cost a hundred times what their text does: 528 MB for one word of a megabyte."""
    lengths: list[int] = []

    class Counting:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.tokenizer, self.model_max_length = tokenizer, tokenizer.model_max_length

        def __call__(self, text: str, **options: Any) -> Encoding:
            lengths.append(len(text))
            return self.tokenizer(text, **options)

    text, _ = read_part(Counting(pipeline.tokenizer_2), piece * 1_000_000, 512)
    reader = Reader(pipeline)
    reader.tokenizer = Counting(pipeline.tokenizer)
    PromptEncoder(capacity=0).encode(reader, text, 512, ())
    assert sum(lengths) < 100_000
    assert len(text) < 50_000


@pytest.mark.parametrize(
    ("prompt", "strange"),
    [
        ("a cat", ""),
        ("A Cat, a CAT. a 'cat'!", "CAT"),  # T5 tells capitals from small letters
        ("a hat-cat and the cats", "hat-cat, and, the, cats"),
        ("a hat, a hat", "hat"),
        ("eine Kätzin’s 8k _cat_ 猫", "eine, Kätzin’s, 8k, 猫"),
        (" ".join(f"w{n}" for n in range(9)), "w0, w1, w2, w3, w4, w5, w6, w7, …"),
        ("\x1b[31m…", "31m"),
        ("", ""),
    ],
)
def test_words_that_are_not_known_are_listed(prompt: str, strange: str) -> None:
    assert unknown_words(prompt, {"a", "cat"}) == strange


def test_the_miniature_lists_the_words_that_its_tokenizers_know_whole(pipeline: FluxPipeline) -> None:
    known = open_directory(MINI, torch.float32).known_words
    vocabulary = pipeline.tokenizer_2.get_vocab()
    whole = {word.removeprefix("▁").lower() for word in vocabulary if len(word) > 2 or word == "▁a"}
    assert known == frozenset(whole - {"</s>", "<pad>", "<unk>"})
    assert {word for word in known if len(pipeline.tokenizer(word).input_ids) > 3} == set()
