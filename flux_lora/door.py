"""What the doors that Cog reads have in common: all but their inputs, which Cog has to find in their own files."""

from collections.abc import Mapping
from pathlib import Path

import cog

from flux_lora.assembly import assemble
from flux_lora.generator import Generator
from flux_lora.inputs import Interface
from flux_lora.ledger import Record
from flux_lora.request import Request
from flux_lora.settings import Settings
from flux_lora.wording import say


def set_up(weights: Path | str | None) -> Generator:
    """Load the models as the environment says; ``weights`` is the fine-tune that ``COG_WEIGHTS`` names."""
    for note in Settings.notes():
        say(note)
    return assemble(Settings.from_environment(), fine_tune=None if weights is None else str(weights))


def draw(generator: Generator, interface: Interface, inputs: Mapping[str, object], record: Record) -> list[cog.Path]:
    """Draw what a predictor's ``run`` was asked for; the files are in the order of their seeds.

    Args:
        generator: draws.
        interface: of the door.
        inputs: all of them; one that the caller left out may still be the marker that ``Input()`` makes, where Python
            and not Cog's server called ``run``.
        record: receives the metrics by name.

    Raises:
        FluxLoraError: the request cannot be drawn; the message says why and what to do.
    """
    given = {name: inputs[name] for name in interface if not isinstance(inputs[name], cog.FieldInfo)}
    return [cog.Path(file) for file in generator.draw(Request.parse(interface, **given), record)]
