"""AdamW with other figures than the track's: the controls (arXiv:1711.05101).

What a lower learning rate or no weight decay does by itself, so that a mitigation is not credited with it.
Costs nothing at inference.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from quantbench.mitigations import Mitigation, Settings


@dataclass(frozen=True)
class AdamW(Mitigation):
    lr_scale: float = 1.0  # times the recipe's learning rate
    shrink_scale: float = 1.0  # times what a step of the track shrinks matrices by; 0: no weight decay

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        mine = replace(settings, lr=settings.lr * self.lr_scale, shrink=settings.shrink * self.shrink_scale)
        return super().optimizer(model, mine)
