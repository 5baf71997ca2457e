"""Value gate: a gate that sees the value states, so that no value has to drain to be ignored (VGA, arXiv:2510.09017).

    output    y'_i = g_i y_i                        g_i = sigmoid(v_i . w_h) of the query's own token (their appendix)
    source    y'_i = sum_j A_ij g_j v_j             g_j of the token that is read (their main text)

What it changes: the heads' outputs, or the values before they are mixed (and cached). It adds D parameters a layer and
D multiply-adds a token; nothing is to be folded, and no quantizer here rounds the gate.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation, Output

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class ValueGate(Mitigation):
    gates: Literal["output", "source"] = "output"

    def output(self, config: "QuantbenchConfig") -> Output:
        kind = {"output": ByOwnValue, "source": AtSource}[self.gates]
        return kind(config.heads, config.width // config.heads)


class ByOwnValue(Output):
    def __init__(self, heads: int, features: int) -> None:
        super().__init__()
        self.weight_HE = nn.Parameter(torch.zeros(heads, features))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        bound = self.weight_HE.shape[1] ** -0.5  # as a Linear of E inputs
        parameter.uniform_(-bound, bound, generator=generator)

    def multiply_adds(self) -> int:
        return self.weight_HE.numel()

    def gates(self, v_BHTE: Tensor) -> Tensor:
        """[B, H, T, 1]."""
        return (v_BHTE * self.weight_HE[:, None]).sum(-1, keepdim=True).sigmoid().to(v_BHTE.dtype)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        return y_BHTE * self.gates(v_BHTE)


class AtSource(ByOwnValue):
    def source(self, v_BHTE: Tensor) -> Tensor:
        return v_BHTE * self.gates(v_BHTE)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        return y_BHTE
