"""Gated attention as its first authors have it: each head's gate sees the head's own slice (arXiv:2306.12929).

    y'_h = y_h * sigmoid(x_h . w_h + b_h)        x_h [E]: features h E to (h + 1) E of what the attention reads

b starts at logit(`open`): .25 is what their OPT has, 1 - 2^-k other tables of theirs.

What it changes: the heads' outputs. It adds D + H parameters a layer and D multiply-adds a token; nothing is to be
folded, and no quantizer here rounds the gate, as in the paper.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation, Output

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class GatedAttentionQualcomm(Mitigation):
    open: float = 0.25  # of a gate at the start

    def __post_init__(self) -> None:
        if not 0 < self.open < 1:
            raise ValueError(f"open: {self.open} is no share between 0 and 1")

    def output(self, config: "QuantbenchConfig") -> Output:
        return GatedBySlice(config.heads, config.width // config.heads, math.log(self.open / (1 - self.open)))


class GatedBySlice(Output):
    def __init__(self, heads: int, features: int, bias: float) -> None:
        super().__init__()
        self.start = bias
        self.weight_HE = nn.Parameter(torch.zeros(heads, features))
        self.bias_H = nn.Parameter(torch.zeros(heads))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "bias_H":
            parameter.fill_(self.start)
        else:
            bound = self.weight_HE.shape[1] ** -0.5  # as a Linear of E inputs
            parameter.uniform_(-bound, bound, generator=generator)

    def multiply_adds(self) -> int:
        return self.weight_HE.numel()

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        x_BTHE = x_BTD.unflatten(-1, self.weight_HE.shape)
        gates_BTH = ((x_BTHE * self.weight_HE).sum(-1) + self.bias_H).sigmoid()
        return y_BHTE * gates_BTH.transpose(1, 2)[..., None].to(y_BHTE.dtype)
