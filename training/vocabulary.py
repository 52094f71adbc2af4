"""Tokenizers of FLUX.1's own classes, with a vocabulary made for the miniature's words.

Words that are known are one token each; any other is spelt in characters, so nothing is lost and nothing fails.
"""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5TokenizerFast

from training.subjects import WORDS

CLIP_MAX_TOKENS, T5_MAX_TOKENS = 77, 512
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE, lower-cased, whose merges make each known word one token."""
    alphabet = sorted(ByteLevel.alphabet())
    ends = [f"{character}</w>" for character in alphabet]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=ends,  # left to the trainer, their numbers would change from call to call, and the merges' too
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS, trainer)
    merges = [tuple(pair) for pair in _merges(bpe)]
    pieces = dict.fromkeys([*alphabet, *ends])
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *SPECIAL])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_MAX_TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: the known words, also with a capital, and single characters for all else."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    words = [(f"▁{word}", -1.0) for known in WORDS for word in dict.fromkeys((known, known.capitalize()))]
    characters = [(c, -4.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=[*special, *words, *characters], extra_ids=0, model_max_length=T5_MAX_TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
