"""SGD with momentum: without per-coordinate scaling the residual peak need not grow (arXiv:2410.13835).

    v <- momentum * v + g;    w <- w - lr * v    (or the Nesterov form, w <- w - lr * (g + momentum * v))

Weight decay stays what the track gives every recipe: decoupled, matrices shrink by the same factor a step as
under the baseline. Otherwise dropping the decay, which itself feeds peaks, would be credited to SGD. (The
paper's run used coupled 1e-4.) Costs nothing at inference; one state a parameter instead of two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantbench.mitigations import Mitigation, Settings, by_shape


@dataclass(frozen=True)
class SGD(Mitigation):
    momentum: float = 0.9
    nesterov: bool = False

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        return DecoupledSGD(model, settings.lr, self.momentum, self.nesterov, settings.weight_decay)


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD after the matrices have shrunk by lr * decay, as AdamW does it; it follows the schedule of lr."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, nesterov: bool, decay: float) -> None:
        matrices, others = by_shape(model)
        groups = [{"params": matrices, "shrink": decay}, {"params": others, "shrink": 0.0}]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, foreach=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            if group["shrink"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["shrink"])
        return super().step()
