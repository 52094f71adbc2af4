"""The operator's tokens, and the hosts that they belong to."""

from dataclasses import dataclass
from typing import Self

from pydantic import SecretStr

from flux_lora.errors import SettingsError
from flux_lora.settings import Settings

VARIABLES = {
    "huggingface.co": "HF_TOKEN",
    "civitai.com": "CIVITAI_TOKEN",
    "replicate.com": "REPLICATE_API_TOKEN",
    "api.replicate.com": "REPLICATE_API_TOKEN",
}
"""Which token a host may see. The names are exact: no subdomain, no mirror and no storage host sees any."""


@dataclass(frozen=True)
class Tokens:
    """Tokens by the name of their variable; not shown by ``repr``.

    Raises:
        SettingsError: a token holds characters that cannot be sent; the message names the variable.
    """

    hf_token: SecretStr | None = None
    civitai_token: SecretStr | None = None
    replicate_api_token: SecretStr | None = None

    def __post_init__(self) -> None:
        for variable in VARIABLES.values():
            token = self._get(variable)
            if not (token.isascii() and token.isprintable()) or " " in token:
                raise SettingsError(f"{variable} holds characters that no token has.")

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(settings.hf_token, settings.civitai_token, settings.replicate_api_token)

    def for_host(self, host: str) -> str:
        """The token to send to this host, or nothing."""
        return self._get(VARIABLES[host]) if host in VARIABLES else ""

    def _get(self, variable: str) -> str:
        token: SecretStr | None = getattr(self, variable.lower())
        return token.get_secret_value().strip() if token else ""
