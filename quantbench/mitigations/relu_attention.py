"""ReLU attention: weights need not sum to one, so a head can rest without a sink (arXiv:2410.13835).

    A[i, j] = relu(q_i . k_j / sqrt(E)) / n_i,    n_i the number of keys that i sees (or its root, or 1)

What it changes: the form of attention. It adds no parameters, saves the exponential and the normalisation, and is
nothing to fold. `keys` is the paper's normaliser; it leaves position 0 undivided while late queries are divided by
hundreds, which sqrt-keys softens (arXiv:2309.08586 divides by the length).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from quantbench.attention import Form
from quantbench.mitigations import Mitigation
from quantbench.ops.relu import relu_attention

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig

POWER = {"keys": 1.0, "sqrt-keys": 0.5, "none": 0.0}


@dataclass(frozen=True)
class ReluAttention(Mitigation):
    version: ClassVar[int] = 2  # by ops.relu, with a backward pass of its own

    normaliser: Literal["keys", "sqrt-keys", "none"] = "keys"

    def weights(self, config: "QuantbenchConfig") -> Form:
        return Relu(POWER[self.normaliser])


class Relu(Form):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power  # of the number of visible keys, by which a row is divided

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        keys = visible.sum(-1, keepdim=True).to(torch.promote_types(scores_BHTS.dtype, torch.float32))
        return scores_BHTS.relu() * (visible / keys**self.power)

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None:
            return super().attend(q_BHTE, k_BHSE, v_BHSE, visible)
        return relu_attention(q_BHTE, k_BHSE, v_BHSE, self.power)
