"""Names that others chose, as messages may show them: what cannot be printed is escaped, and none is too long."""


def quoted(name: str, length: int = 100) -> str:
    """Quote a name that somebody else chose, shortened."""
    return repr(name if len(name) <= length else f"{name[:length]}…")


def listing(names: list[str]) -> str:
    """File names; a repository can have thousands."""
    shown = ", ".join(map(quoted, names[:20]))
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
