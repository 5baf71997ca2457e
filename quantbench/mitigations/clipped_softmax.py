"""Clipped softmax: a weight can be exactly 0 at finite logits: nothing must grow to say nothing (arXiv:2306.12929).

    A = clip((zeta - gamma) softmax(z) + gamma, 0, 1),    gamma = -alpha / T,    T the length of the track

The authors: zeta 1; alpha 12 for their decoder (OPT), where it did not help, and gamma -.025 at T 128 (alpha 3.2) for
BERT, where it did.

What it changes: the form of attention. It adds no parameters, a pass over the scores, and is nothing to fold. A clipped
weight has no gradient.
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
class ClippedSoftmax(Mitigation):
    zeta: float = 1.0
    alpha: float = 12.0

    def __post_init__(self) -> None:
        if self.zeta < 1 or self.alpha < 0:
            raise ValueError(f"zeta {self.zeta}, alpha {self.alpha}: zeta is at least 1, alpha at least 0")

    def weights(self, config: "QuantbenchConfig") -> Form:
        return Clipped(self.zeta, -self.alpha / config.max_position_embeddings)


class Clipped(Form):
    def __init__(self, zeta: float, gamma: float) -> None:
        super().__init__()
        self.zeta, self.gamma = zeta, gamma

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        softmax_BHTS = scores_BHTS.masked_fill(~visible, -torch.inf).softmax(-1)
        return ((self.zeta - self.gamma) * softmax_BHTS + self.gamma).clamp(0, 1)
