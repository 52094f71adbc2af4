"""Triggers as trainers write them, and prompts that lack them."""

import json
from typing import Any

import pytest

from flux_lora.lora.formats.triggers import trigger_words, without_trigger


def subsets(*subsets: dict[str, Any]) -> str:
    return json.dumps([{"is_dreambooth": True, "subsets": [*subsets]}])


SIZES = json.dumps({"img": {"n_repeats": 10, "img_count": 12}})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.trigger_phrase": " TOK\n"}, ["TOK"]),
        ({"modelspec.trigger_phrase": "TOK, a toktok; third"}, ["TOK", "a toktok", "third"]),
        ({"ss_trigger_words": '["sks", "sks dog"]'}, ["sks", "sks dog"]),
        ({"instance_prompt": "a photo of sks dog"}, ["a photo of sks dog"]),
        ({"trigger_word": "TOK", "ss_tag_frequency": json.dumps({"1_x": {"x": 1}})}, ["TOK"]),
        ({"ss_tag_frequency": json.dumps({"1_TOK": {"TOK": 1}})}, ["TOK"]),  # ai-toolkit
        ({"ss_tag_frequency": json.dumps({"img": {"ohwx man": 12, "hat": 3}}), "ss_dataset_dirs": SIZES}, ["ohwx man"]),
        (  # the words of regularization images call nothing up
            {"ss_tag_frequency": json.dumps({"reg": {"man": 9}, "img": {"ohwx": 12}}), "ss_dataset_dirs": SIZES},
            ["ohwx"],
        ),
        ({"ss_datasets": subsets({"class_tokens": "ohwx man"}, {"class_tokens": "man", "is_reg": True})}, ["ohwx man"]),
        ({"ss_datasets": subsets({"class_tokens": "x", "caption_prefix": "ohwx, "})}, ["ohwx"]),
        ({"ss_tag_frequency": json.dumps({"img": {"a hat": 3, "a cat": 4}}), "ss_dataset_dirs": SIZES}, []),
        ({"ss_tag_frequency": json.dumps({"img": {"a man sits on the only picture": 1}})}, []),  # one caption
        ({"modelspec.trigger_phrase": "None"}, []),
        ({"modelspec.trigger_phrase": " ,; "}, []),
        ({}, []),
        *(
            ({name: text}, [])
            for name in ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs")
            for text in ("not JSON", "[" * 100_000, "7", '["TOK"]', '{"a": null}', '[{"subsets": [7]}]', '{"a": {}}')
        ),
    ],
)
def test_triggers_are_read_as_trainers_write_them(metadata: dict[str, str], expected: list[str]) -> None:
    assert list(trigger_words(metadata)) == expected


@pytest.mark.parametrize(
    ("prompt", "triggers", "lacking"),
    [
        ("a painting of a sks dog", ("a photo of sks dog",), False),
        ("A TOK, in the rain", ("TOK",), False),
        ("a tok-like thing", ("TOK",), False),
        ("a tomato", (), False),
        ("the second", ("first", "second"), False),
        ("OHWX_man in a hat", ("ohwx man",), False),
        ("the photo", ("a photo",), True),
        ("a photo", ("a photo",), False),
        ("a photo of a dog", ("a photo of sks dog",), True),
        ("a token", ("TOK",), True),
        ("", ("TOK",), True),
    ],
)
def test_a_prompt_without_any_trigger_is_told(prompt: str, triggers: tuple[str, ...], lacking: bool) -> None:
    assert (without_trigger(prompt, triggers) is not None) == lacking


def test_what_the_file_says_reaches_no_terminal() -> None:
    assert "'TOK\\x1b[31m\\u202e'" in str(without_trigger("a tomato", ("TOK\x1b[31m\u202e",)))
