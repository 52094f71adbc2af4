"""The operator's tokens, and the hosts that they belong to."""

import hashlib
from dataclasses import dataclass
from typing import Self

from pydantic import SecretStr

from flux_lora.errors import SettingsError
from flux_lora.settings import Settings
from flux_lora.sources.address import CIVITAI

VARIABLES = {
    "huggingface.co": "HF_TOKEN",
    **dict.fromkeys(CIVITAI, "CIVITAI_TOKEN"),
    "replicate.com": "REPLICATE_API_TOKEN",
    "api.replicate.com": "REPLICATE_API_TOKEN",
}
"""Which token a host may see. The names are exact: no subdomain, no mirror and no storage host sees any."""


def one_service(host: str, other: str) -> bool:
    """Whether two hosts are the same, or see the same token anyway."""
    return host == other or (host in VARIABLES and VARIABLES[host] == VARIABLES.get(other))


@dataclass(frozen=True)
class Tokens:
    """Tokens by the name of their variable; not shown by ``repr``.

    ``withheld`` says that the operator keeps them from whoever asks.

    Raises:
        SettingsError: a token holds characters that cannot be sent; the message names the variable.
    """

    hf_token: SecretStr | None = None
    civitai_token: SecretStr | None = None
    replicate_api_token: SecretStr | None = None
    withheld: bool = False

    def __post_init__(self) -> None:
        """Refuse a token that cannot be sent."""
        for variable in VARIABLES.values():
            token = self._get(variable)
            if not (token.isascii() and token.isprintable()) or " " in token:
                raise SettingsError(f"{variable} holds characters that no token has.")

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Take the operator's tokens."""
        return cls(settings.hf_token, settings.civitai_token, settings.replicate_api_token)

    @property
    def reach(self) -> str:
        """Who can reach the same files, as a prefix of what they are cached under; digests of tokens, not tokens."""
        held = [self._get(variable) for variable in dict.fromkeys(VARIABLES.values())]
        return f"{hashlib.sha256(' '.join(held).encode()).hexdigest() if any(held) else 'anyone'} "

    def hint(self, host: str) -> str:
        """What would give access to a host: the message of a refusal ends with it; nothing where no token would."""
        variable = VARIABLES.get(host)
        if variable is None:
            return ""
        if self.withheld:
            return "requests are sent without the operator's tokens (FLUX_REQUEST_TOKENS=1 would lend them)"
        if self.for_host(host):
            return f"the token in {variable} may not read it"
        return f"set {variable} to a token that may read it"

    def for_host(self, host: str) -> str:
        """The token to send to this host, or nothing."""
        return self._get(VARIABLES[host]) if host in VARIABLES else ""

    def _get(self, variable: str) -> str:
        token: SecretStr | None = getattr(self, variable.lower())
        return token.get_secret_value().strip() if token else ""
