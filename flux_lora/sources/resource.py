"""A source, found: where its bytes are and what is known about them before they are fetched."""

from typing import Annotated

from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config={"strict": True})
class Resource:
    """A file to download; ``fixed`` if what ``key`` stands for can never change.

    Raises:
        ValueError: the facts, which services tell, are not of this form.
    """

    key: str
    url: str
    fixed: bool
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    size: NonNegativeInt | None = None
