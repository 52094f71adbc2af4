"""Speed profiles: what each does for its speed. A table, so that no other room asks for a profile by its name."""

from dataclasses import dataclass

import torch

from flux_lora.errors import SettingsError
from flux_lora.settings import ProfileName
from flux_lora.speed.quantization import Scheme
from flux_lora.speed.step_cache import Schedule

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability with eight-bit products (Ada, Hopper)."""


@dataclass(frozen=True)
class Profile:
    """What a profile does."""

    name: ProfileName
    compiled: bool
    """The repeated blocks and the VAE's decoder run compiled."""
    scheme: Scheme | None = None
    """How the blocks' linear layers are quantized; None: not at all."""
    schedule: Schedule | None = None
    """In which steps the transformer's output is extrapolated; None: in none."""
    exact_attention: bool = True
    """Only attention kernels that compute in the model's own type."""


PROFILES: dict[ProfileName, Profile] = {
    "eager": Profile("eager", compiled=False),
    "exact": Profile("exact", compiled=True),
    "balanced": Profile("balanced", compiled=True, scheme="fp8"),
    "fast": Profile("fast", compiled=True, scheme="fp8", schedule=Schedule(), exact_attention=False),
}


def find_profile(name: ProfileName | None, device: torch.device) -> Profile:
    """Find the profile that ``FLUX_PROFILE`` names; unset it is ``exact`` on a CUDA device and ``eager`` elsewhere.

    Raises:
        SettingsError: the device cannot run it.
    """
    profile = PROFILES[name or ("exact" if device.type == "cuda" else "eager")]
    if profile.scheme and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise SettingsError(
                f"FLUX_PROFILE={profile.name} needs a GPU with fp8 (compute capability 8.9 or later), and "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: take exact or eager."
            )
    return profile
