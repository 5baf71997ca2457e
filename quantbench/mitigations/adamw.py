"""AdamW with other figures than the track's: the controls (arXiv:1711.05101).

What a lower learning rate or no weight decay does by itself, so that a mitigation is not credited with it.
Costs nothing at inference.
"""

from dataclasses import dataclass

import torch
from torch import nn

from quantbench.mitigations import Mitigation, Settings, decoupled_adam


@dataclass(frozen=True)
class AdamW(Mitigation):
    lr_scale: float = 1.0  # times the recipe's learning rate
    weight_decay: float | None = None  # None: the track's

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        decay = settings.weight_decay if self.weight_decay is None else self.weight_decay
        return decoupled_adam(model, settings.lr * self.lr_scale, decay, settings.betas)
