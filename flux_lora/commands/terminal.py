"""Text of strangers, as a terminal may show it."""

_JOINERS = "\u200d\ufe0f"
"""They make one emoji of several and move no other character."""


def printable(text: str) -> str:
    """Escape what a terminal would obey, and what would turn the direction of text; line breaks stay."""
    return "".join(each if each.isprintable() or each in _JOINERS or each == "\n" else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
