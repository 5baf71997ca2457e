"""ReLU attention: weights need not sum to one, so a head can rest without a sink (arXiv:2410.13835).

    A[i, j] = relu(q_i . k_j / sqrt(E)) / n_i,    n_i the number of keys that i sees (or its root, or 1)

What it changes: the form of attention. It adds no parameters, saves the exponential and the normalisation, and is
nothing to fold. `keys` is the paper's normaliser; it leaves position 0 undivided while late queries are divided by
hundreds, which sqrt-keys softens (arXiv:2309.08586 divides by the length).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from quantbench.attention import Form, batched_products, causal
from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig

POWER = {"keys": 1.0, "sqrt-keys": 0.5, "none": 0.0}


@dataclass(frozen=True)
class ReluAttention(Mitigation):
    normaliser: Literal["keys", "sqrt-keys", "none"] = "keys"

    def weights(self, config: "QuantbenchConfig") -> Form:
        return Relu(POWER[self.normaliser])


class Relu(Form):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power  # of the number of visible keys, by which a row is divided

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        return scores_BHTS.relu() * (visible / visible.sum(-1, keepdim=True) ** self.power)

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None or not batched_products(q_BHTE):
            return super().attend(q_BHTE, k_BHSE, v_BHSE, visible)
        B, H, T, E = q_BHTE.shape
        q, k, v = (x.reshape(B * H, T, E) for x in (q_BHTE, k_BHSE, v_BHSE))
        with torch.autocast("cpu", enabled=False):
            weights = torch.bmm(q, k.transpose(1, 2)).relu_() * factor(T, E, self.power, q.dtype, q.device)
            return torch.bmm(weights, v).view(B, H, T, E)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def factor(length: int, features: int, power: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask, normaliser and 1/sqrt(E) in one matrix: relu(s x) = s relu(x) for s > 0, [T, T]."""
    visible = causal(length, device)
    return (visible / visible.sum(-1, keepdim=True) ** power / features**0.5).to(dtype)
