"""Single-scale RMSNorm: one gain for all features, so that no feature is favoured (OSP, arXiv:2506.19697).

    y = g x / sqrt(mean(x^2) + eps),    g one number

What it changes: every norm, the last one included. It has D - 1 parameters a norm fewer than RMSNorm; its gain folds
into the Linears that read it. (The paper writes g x / |x|, with g starting at sqrt(D).)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class SingleScaleNorm(Mitigation):
    def norm(self, config: "QuantbenchConfig", last: bool = False) -> nn.Module:
        return SingleScale(config.width)


class SingleScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.eps = width, 1e-6
        self.weight = nn.Parameter(torch.ones(1))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), None, self.eps) * self.weight
