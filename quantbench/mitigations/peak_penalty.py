"""Peak penalty: the loss itself says that no residual state may be large (TWEO, arXiv:2511.23225).

    loss + weight * mean over blocks, tokens and features of (|h| / (tau + eps))^power

h are the blocks' outputs. `relative` measures |h| in units of each output's own root mean square, without a gradient
through it: in a model whose ordinary states are of size tau already (embeddings of N(0, 1), as on the track `text`),
the absolute form would fight the stream and not its peaks.

What it changes: the gradient. The term is left out of every loss that is logged or tuned on. Costs nothing at
inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantbench.mitigations import Mitigation


@dataclass(frozen=True)
class PeakPenalty(Mitigation):
    weight: float = 0.01
    tau: float = 3.0
    power: float = 4.0
    relative: bool = False

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.tau > 0 and self.power >= 1):
            raise ValueError(f"weight {self.weight} and tau {self.tau} are above 0, power {self.power} at least 1")

    def penalty(self, blocks_BTD: Sequence[Tensor]) -> Tensor:
        terms = []
        for h_BTD in blocks_BTD:
            h_BTD = h_BTD.float()
            unit = h_BTD.detach().square().mean().sqrt() if self.relative else 1.0
            terms.append((h_BTD.abs() / (self.tau * unit + 1e-6)).pow(self.power).mean())
        return self.weight * torch.stack(terms).mean()
