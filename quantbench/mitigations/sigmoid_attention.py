"""Sigmoid attention: each weight by itself, so that none is owed to a sink (arXiv:2409.04431; Gu, arXiv:2410.10781).

    none    A[i, j] = sigmoid(z_ij)
    log     A[i, j] = sigmoid(z_ij - log n_i)        n_i the number of keys that i sees

What it changes: the form of attention. It adds no parameters, saves the row's sum, and is nothing to fold. Without a
bias a row's weights sum to about n_i / 2 at the start; `log` starts them at about 1, as softmax does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from quantbench.attention import Form
from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class SigmoidAttention(Mitigation):
    bias: Literal["none", "log"] = "none"

    def weights(self, config: "QuantbenchConfig") -> Form:
        return Sigmoid(self.bias == "log")


class Sigmoid(Form):
    def __init__(self, by_keys: bool) -> None:
        super().__init__()
        self.by_keys = by_keys

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        if self.by_keys:
            keys = visible.sum(-1, keepdim=True).to(torch.promote_types(scores_BHTS.dtype, torch.float32))
            scores_BHTS = scores_BHTS - keys.log()
        return scores_BHTS.sigmoid() * visible
