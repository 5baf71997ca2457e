"""Context-aware scaling: a head scales what it read by what it sees, up as well as down (arXiv:2502.06415).

    y'_h = y_h * 2 sigmoid(x w_h)        w_h [D], x the normalised residual state that the attention reads

What it changes: the heads' outputs. It differs from a gate a head by the 2, which leaves a head as it was where x w_h =
0. It adds D H parameters a layer and as many multiply-adds a token; nothing is to be folded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantbench.mitigations import Mitigation, Output

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class ContextScale(Mitigation):
    def output(self, config: "QuantbenchConfig") -> Output:
        return Scaled(config.width, config.heads)


class Scaled(Output):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.scale = nn.Linear(width, heads, bias=False)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        scale_BTH = 2 * self.scale(x_BTD).sigmoid()
        return y_BHTE * scale_BTH.transpose(1, 2)[..., None]
