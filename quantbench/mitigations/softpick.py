"""Softpick: a rectified softmax, whose weights may be 0 and need not sum to one (arXiv:2504.20966).

    A[i, j] = relu(e^z_ij - 1) / (sum_k |e^z_ik - 1| + eps),    k the keys that i sees

in a form that neither overflows nor, where all logits are far below 0, loses its gradient: with m = max(0, max_k z_ik)

    A[i, j] = relu(e^(z_ij - m) - e^-m) / (sum_k |e^(z_ik - m) - e^-m| + eps e^-m)

What it changes: the form of attention. It adds no parameters, some passes over the scores, and is nothing to fold. A
key with a negative logit gets nothing, and takes from the others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantbench.attention import Form
from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class Softpick(Mitigation):
    eps: float = 1e-8

    def weights(self, config: "QuantbenchConfig") -> Form:
        return Rectified(self.eps)


class Rectified(Form):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        # In fp32 at least: e^(z - m) - e^-m is what is left of two nearly equal numbers where z is small.
        z_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
        m_BHT1 = z_BHTS.detach().masked_fill(~visible, 0.0).amax(-1, keepdim=True).clamp(min=0.0)
        one_BHT1 = (-m_BHT1).exp()
        picked_BHTS = ((z_BHTS.masked_fill(~visible, -torch.inf) - m_BHT1).exp() - one_BHT1) * visible
        return picked_BHTS.relu() / (picked_BHTS.abs().sum(-1, keepdim=True) + self.eps * one_BHT1)
