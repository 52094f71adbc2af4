import pytest
import torch

from flux_lora.errors import SettingsError
from flux_lora.settings import ProfileName, Settings
from flux_lora.speed import profiles
from flux_lora.speed.profiles import PROFILES

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_the_default_is_compiled_on_a_gpu_and_plain_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert profiles.find_profile(None, CPU).name == "eager"
    assert profiles.find_profile(None, GPU).name == "exact"


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_a_gpu_without_fp8_is_told_which_profiles_it_can_run(
    monkeypatch: pytest.MonkeyPatch, name: ProfileName
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(SettingsError, match=rf"FLUX_PROFILE={name} needs .* A100 has 8\.0: take exact or eager"):
        profiles.find_profile(name, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert profiles.find_profile(name, GPU) is PROFILES[name]
    assert profiles.find_profile(name, CPU) is PROFILES[name]


def test_the_operator_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROFILES:
        monkeypatch.setenv("FLUX_PROFILE", name)
        assert Settings.from_environment().profile == name
    monkeypatch.setenv("FLUX_PROFILE", "warp")
    with pytest.raises(SettingsError, match="FLUX_PROFILE=warp.*'eager', 'exact', 'balanced' or 'fast'"):
        Settings.from_environment()


def test_what_changes_numbers_is_where_it_says() -> None:
    assert [name for name, profile in PROFILES.items() if profile.scheme] == ["balanced", "fast"]
    assert [name for name, profile in PROFILES.items() if profile.schedule or not profile.exact_attention] == ["fast"]
