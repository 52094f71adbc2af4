from pathlib import Path

from transformers import CLIPTokenizer, T5TokenizerFast

from training.subjects import WORDS
from training.vocabulary import clip_tokenizer, t5_tokenizer


def test_known_words_are_single_tokens_and_unknown_ones_are_spelt() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word  # between the marks of beginning and end
        assert len(t5(word).input_ids) == len(t5(word.capitalize()).input_ids) == 2, word
    unknown = "Qwxz, 7 é!"
    assert clip.unk_token_id not in clip(unknown).input_ids[1:-1]
    assert len(t5(unknown).input_ids) > 6


def test_each_call_makes_the_same_tokenizers() -> None:
    first = clip_tokenizer().get_vocab(), t5_tokenizer().get_vocab()
    for _ in range(4):
        assert (clip_tokenizer().get_vocab(), t5_tokenizer().get_vocab()) == first


def test_saved_tokenizers_read_as_the_ones_that_were_made(tmp_path: Path) -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip.save_pretrained(tmp_path / "clip")
    t5.save_pretrained(tmp_path / "t5")
    for text in ("a tomato on a blue background", "Tomatoes! catapult é, blue.", ""):
        assert CLIPTokenizer.from_pretrained(tmp_path / "clip")(text).input_ids == clip(text).input_ids
        assert T5TokenizerFast.from_pretrained(tmp_path / "t5")(text).input_ids == t5(text).input_ids
