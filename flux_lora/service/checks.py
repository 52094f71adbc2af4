"""Everything that a front has to check before Cog's server, or ours, sees a request of somebody who is not trusted.

Cog's own server checks none of it (``docs/operating.md``): it uses an id as a path, posts webhooks to any address, and
reads bodies of up to 100 MB.
"""

import re
from collections.abc import Mapping

from flux_lora.errors import RequestError, SourceError
from flux_lora.sources.guard import Network, check_url, host_of, parse_url, require_public
from flux_lora.sources.wording import quoted

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A prediction's id: it becomes a folder's name, a part of addresses, and a word in logs."""

MAX_BODY = 100 * 1024**2
"""Bytes of a request's body; Cog's own limit. A LoRA as a ``data:`` URI is what is large."""

EVENTS = ("start", "output", "logs", "completed")
"""What a webhook may ask for."""

MAX_URL = 2048
"""Characters of a webhook's address."""

HARMLESS = frozenset({"id", "input", "webhook", "webhook_events_filter"})
"""The fields of a body that a caller may fill: not ``context``, for example, which Cog hands to the model."""


def is_id(text: str) -> bool:
    """Whether a text can be a prediction's id."""
    return ID.fullmatch(text) is not None


def check_id(text: object) -> str:
    """Return a prediction's id.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(text, str) or not is_id(text):
        raise RequestError(f"id must be 1 to 64 of the characters A-Z, a-z, 0-9, _ and -, not {quoted(str(text))}.")
    return text


def check_size(length: int | None, limit: int = MAX_BODY) -> None:
    """Refuse a body by its announced length, before any of it is read.

    Args:
        length: of the ``Content-Length`` header in bytes; None when there is none.
        limit: bytes that are read at most.

    Raises:
        RequestError: it is too long, or does not say how long it is.
    """
    if length is None or length < 0:
        raise RequestError("The request must say how long its body is (Content-Length).")
    if length > limit:
        raise RequestError(f"The request's body has {length:,} bytes, and {limit:,} are read at most.")


def check_fields(body: Mapping[str, object]) -> None:
    """Refuse a body with fields that are the operator's, and webhook events that do not exist.

    Raises:
        RequestError: it holds one; the message names it.
    """
    if foreign := [name for name in body if name not in HARMLESS]:
        raise RequestError(f"{quoted(foreign[0])} cannot be given here: {', '.join(sorted(HARMLESS))} can.")
    events = body.get("webhook_events_filter", [])
    if not isinstance(events, list) or any(event not in EVENTS for event in events):
        raise RequestError(f"webhook_events_filter must be a list of {', '.join(EVENTS)}.")


def check_webhook(address: object, network: Network | None = None) -> str:
    """Return the address of a webhook: https, port 443, a named host all of whose addresses are public.

    A name may lead elsewhere a moment later, so who posts to it connects through ``sources.guard.GuardedBackend``,
    which checks the very address that it connects to, and follows no redirect.

    Raises:
        RequestError: nothing is posted there; the message says why.
    """
    if not isinstance(address, str) or len(address) > MAX_URL:
        raise RequestError(f"webhook must be an address of at most {MAX_URL:,} characters.")
    try:
        url = parse_url(address)
        check_url(url)
        require_public(host_of(url), _addresses(host_of(url), network or Network()))
    except SourceError as error:
        raise RequestError(f"webhook: {error}.") from None
    return address


def _addresses(host: str, network: Network) -> list[str]:
    try:
        return list(network.resolve(host))
    except (OSError, UnicodeError):
        return []
