"""Outlier-protected block: no norm singles out a feature, and no sublayer adds much (arXiv:2405.19279).

    h <- h + beta f(h),    beta a learned number a sublayer, starting at 1 / sqrt(2 layers)

f is attention or MLP without a norm in front; queries and keys are normalised instead (QK-norm), which keeps
attention's entropy. The norm in front of the head stays. The paper's starting value of beta was not seen; it is of
order 1 / sqrt(depth) there.

What it changes: norms, the residual connection, queries and keys. It has 2 D parameters a layer fewer and 2 E + 2 more;
beta folds into the projections that write the stream.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation, NormalisedQueryKey

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class OutlierProtectedBlock(Mitigation):
    def norm(self, config: "QuantbenchConfig", last: bool = False) -> nn.Module:
        return super().norm(config, last) if last else nn.Identity()

    def block(self, config: "QuantbenchConfig") -> nn.Module:
        return ScaledJoin((2 * config.layers) ** -0.5)

    def query_key(self, config: "QuantbenchConfig") -> nn.Module:
        return NormalisedQueryKey(config.width // config.heads)


class ScaledJoin(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.beta = nn.Parameter(torch.full((1,), start))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(self.start)

    def forward(self, residual_BTD: Tensor, update_BTD: Tensor) -> Tensor:
        return residual_BTD + self.beta * update_BTD
