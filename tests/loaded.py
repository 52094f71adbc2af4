"""Networks as the service loads them: opened, placed on the device, quantized where that is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux_lora.assembly import merged_module
from flux_lora.checkpoint.assembling import Checkpoints, open_directory
from flux_lora.checkpoint.components import ENCODERS
from flux_lora.lora.merge import MergedModule
from flux_lora.memory import placement
from flux_lora.memory.placement import Placement
from flux_lora.settings import PlanName, Settings
from flux_lora.speed.quantization import Scheme
from tests.conftest import MINI

CPU = torch.device("cpu")
ADAPTABLE = (*ENCODERS, "transformer")
"""The components that adapters change."""


@dataclass(frozen=True)
class Loaded:
    """A weights directory in memory."""

    checkpoints: Checkpoints
    memory: Placement
    device: torch.device

    def pipeline(self, model: str = "dev") -> Any:
        """The pipeline of a model."""
        return self.checkpoints.pipelines[model]

    def merged(self, key: str = "dev") -> MergedModule:
        """What merges adapters into a network: a model for its transformer, or a component's name."""
        return merged_module(self.memory, key, self.device)

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """What adapters may change, by component."""
        return {name: self.merged("dev" if name == "transformer" else name).shapes for name in ADAPTABLE}


def load(
    dtype: torch.dtype = torch.float32,
    weights: Path = MINI,
    device: torch.device = CPU,
    scheme: Scheme | None = None,
    plan: PlanName = "resident",
) -> Loaded:
    """Load a weights directory under a memory plan."""
    checkpoints = open_directory(weights, dtype)
    memory = placement.place(checkpoints, Settings(memory_plan=plan), device, dtype, lambda _: None, scheme)
    return Loaded(checkpoints, memory, device)
