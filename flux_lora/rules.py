"""What the operator allows of what can be asked."""

from flux_lora.errors import RequestError
from flux_lora.request import Request
from flux_lora.settings import Settings


def check(request: Request, settings: Settings) -> None:
    """Refuse what this server does not do, although it is a valid request.

    Raises:
        RequestError: the message names the input, and the number where there is one.
    """
    if (length := len(request.prompt)) > settings.max_prompt:
        raise RequestError(
            f"prompt has {length:,} characters, and this server reads at most {settings.max_prompt:,}: shorten it."
        )
    if request.disable_safety_checker and not settings.allow_disable_safety_checker:
        raise RequestError("disable_safety_checker is not allowed on this server: leave it out.")
