"""Key and value biases: each head has one more key to park its attention on (arXiv:2402.17762; Gu, arXiv:2410.10781).

    y_i = softmax([z_i, q_i . k'_h / sqrt(E)]) [V; v'_h]        k', v' learned, from N(0, std)

k' has no position and stands in no cache; every token sees it. With `value: false` v' is 0: a sink logit that the query
moves.

What it changes: the form of attention. It adds 2 D parameters a layer (D without v') and as many multiply-adds a token;
nothing is to be folded. They are biases: without weight decay, and rounded by no quantizer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.attention import Form, Softmax
from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class KVBias(Mitigation):
    value: bool = True
    std: float = 0.02  # of both at the start

    def weights(self, config: "QuantbenchConfig") -> Form:
        return SoftmaxWithBias(config.heads, config.width, self.value, self.std)


class SoftmaxWithBias(Softmax):
    """Its weights have one more column, the last, for the learned key."""

    appended = 1

    def __init__(self, heads: int, width: int, value: bool, std: float) -> None:
        super().__init__()
        self.heads, self.std = heads, std
        self.key_D = nn.Parameter(torch.zeros(width))  # flat, so that it counts as a bias and not as a matrix
        self.value_D = nn.Parameter(torch.zeros(width)) if value else None

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0, self.std, generator=generator)

    def multiply_adds(self) -> int:
        return 2 * self.key_D.numel()

    def extend(self, k_BHSE: Tensor, v_BHSE: Tensor) -> tuple[Tensor, Tensor]:
        value_D = torch.zeros_like(self.key_D) if self.value_D is None else self.value_D
        return self._append(k_BHSE, self.key_D), self._append(v_BHSE, value_D)

    def _append(self, x_BHSE: Tensor, bias_D: Tensor) -> Tensor:
        bias_BH1E = bias_D.to(x_BHSE.dtype).view(1, self.heads, 1, -1).expand(len(x_BHSE), -1, -1, -1)
        return torch.cat((x_BHSE, bias_BH1E), 2)
