"""Gated attention: what a head read is scaled before it joins, so that a head can say nothing (arXiv:2505.06708).

    y' = y * sigmoid(x W)        W [D, H E] elementwise, or [D, H], one gate a head

x is the normalised residual state that the attention reads, y the heads' outputs before the projection.

What it changes: the heads' outputs. It adds D^2 parameters a layer (elementwise; the paper's choice) or D H, and as
many multiply-adds a token; nothing is to be folded. The gate's Linear is quantized as every other one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from quantbench.mitigations import Mitigation, Output

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class GatedAttention(Mitigation):
    gates: Literal["elementwise", "head"] = "elementwise"

    def output(self, config: "QuantbenchConfig") -> Output:
        return Gated(config.width, config.heads, config.width if self.gates == "elementwise" else config.heads)


class Gated(Output):
    def __init__(self, width: int, heads: int, gates: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate = nn.Linear(width, gates, bias=False)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        gates_BTHE = self.gate(x_BTD).sigmoid().unflatten(-1, (self.heads, -1))  # E of them, or one
        return y_BHTE * gates_BTHE.transpose(1, 2)
