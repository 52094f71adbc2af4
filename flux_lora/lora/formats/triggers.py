"""The words that call up what a fine-tune was trained on: those that its metadata names, and those a prompt lacks."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flux_lora.wording import printable

NAMED = (
    "modelspec.trigger_phrase",
    "trigger_phrase",
    "trigger_word",
    "trigger_words",
    "ss_trigger_words",
    "activation text",
    "instance_prompt",
)
"""Where the trigger stands by that name; the first is that of the Stability AI Model Metadata Standard."""

MOST, LONGEST = 8, 80
"""How many triggers are read of a file, and how many characters of each."""

FEW_WORDS = 4
"""Up to so many a caption may be a trigger; a longer one is a sentence."""

PLAIN = frozenset(re.findall("[a-z]+", "a an and by drawing image in of on painting photo picture style the with"))
"""Words that surround a trigger in phrases such as "a photo of sks dog", and call nothing up."""


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words or phrases of which any calls up what was trained; empty when the metadata does not tell.

    Told are: fields by that name; what sd-scripts puts before every caption (``caption_prefix``); the tag that all
    images have in common (``ss_tag_frequency``, where ai-toolkit writes its trigger word as the only one); and what
    sd-scripts takes for images without a caption (``class_tokens``).
    """
    for name in NAMED:
        if words := _listed(metadata.get(name)):
            return words
    subsets = list(_subsets(metadata))
    for words in (_of_all(subsets, "caption_prefix"), _common_tag(metadata), _of_all(subsets, "class_tokens")):
        if words:
            return words
    return ()


def without_trigger(prompt: str, triggers: Sequence[str]) -> str | None:
    """A sentence for the log when a prompt has none of a fine-tune's triggers; None when it has one, or none is known.

    Neither case nor the order of words matters, nor words that would stand beside any trigger.
    """
    said = set(_words(prompt))
    if not triggers or any(_calling(trigger) <= said for trigger in triggers):
        return None
    named = " or ".join(f"'{printable(trigger)}'" for trigger in triggers)
    return f"the prompt lacks {named}, which this LoRA was trained on: without it, it may show little"


def _calling(trigger: str) -> set[str]:
    words = set(_words(trigger))
    return words - PLAIN or words


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _listed(text: str | None) -> tuple[str, ...]:
    """Triggers as JSON, or separated by commas or semicolons."""
    value = _json(text)
    if not isinstance(value, list):
        value = re.split("[,;]", text or "")
    return _tidy(value)


def _tidy(values: Sequence[object]) -> tuple[str, ...]:
    texts = (" ".join(value.split())[:LONGEST] for value in values[: 10 * MOST] if isinstance(value, str))
    return tuple(dict.fromkeys(text for text in texts if _words(text) and text.lower() not in ("none", "null")))[:MOST]


def _subsets(metadata: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What sd-scripts trained on, but for regularization images."""
    datasets = _json(metadata.get("ss_datasets"))
    for dataset in datasets if isinstance(datasets, list) else ():
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else ():
            if isinstance(subset, dict) and not subset.get("is_reg"):
                yield subset


def _of_all(subsets: Sequence[Mapping[str, Any]], name: str) -> tuple[str, ...]:
    values = [subset.get(name) for subset in subsets]
    return _tidy([value.strip(" ,") for value in values if isinstance(value, str)])


def _common_tag(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The tag of every image of every folder: the first, as trainers keep it in front."""
    folders, sizes = _json(metadata.get("ss_tag_frequency")), _json(metadata.get("ss_dataset_dirs"))
    if not isinstance(folders, dict):
        return ()
    if isinstance(sizes, dict) and sizes:  # without them, regularization images could not be told apart
        folders = {name: tags for name, tags in folders.items() if name in sizes}
    common: list[str] | None = None
    for folder, tags in folders.items():
        if not isinstance(tags, dict):
            return ()
        size = sizes.get(folder) if isinstance(sizes, dict) else None
        images = size.get("img_count") if isinstance(size, dict) else None
        everywhere = {tag for tag, count in tags.items() if len(tags) == 1 or (images and count == images)}
        common = [tag for tag in (tags if common is None else common) if tag in everywhere]
    words = _tidy([tag for tag in common or () if len(tag.split()) <= FEW_WORDS])
    return words[:1]


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
