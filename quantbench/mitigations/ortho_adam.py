"""OrthoAdam: Adam in a random basis, so that no feature is one of its axes (arXiv:2410.17174).

    g' = Q g;    m, s <- Adam's moments of g';    w <- w - lr Q^T (m^ / (sqrt(s^) + eps))

Q is orthogonal, fixed and random. The paper's Q acts on the whole parameter; of a matrix here it is the Kronecker
product of one for the rows and one for the columns, which is what can be stored: g' = Q_rows g Q_columns^T. A side
longer than `largest` (a vocabulary) keeps its axes.

What it changes: how parameters move. Weight decay commutes with Q and is the track's. Costs nothing at inference; four
matrix products a matrix a step, and the bases (drawn from `seed`, and never stored) in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantbench.mitigations import Mitigation, Settings, by_shape


@dataclass(frozen=True)
class OrthoAdam(Mitigation):
    seed: int = 0  # of the bases
    largest: int = 4096  # side of a parameter that gets one

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        matrices, others = by_shape(model)
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return AdamInBasis(groups, settings, self.seed, self.largest)


class AdamInBasis(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], settings: Settings, seed: int, largest: int) -> None:
        super().__init__(groups, {"lr": settings.lr, "betas": settings.betas, "eps": 1e-8})
        generator = torch.Generator().manual_seed(seed)
        self.bases = {
            p: [basis(side, generator).to(p) if side <= largest else None for side in p.shape]
            for group in self.param_groups
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                t = int(state["step"])
                g = turned(p.grad, self.bases[p])
                state["mean"].lerp_(g, 1 - first)
                state["square"].mul_(second).addcmul_(g, g, value=1 - second)
                move = (state["mean"] / (1 - first**t)) / ((state["square"] / (1 - second**t)).sqrt() + group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(turned(move, self.bases[p], back=True), alpha=group["lr"])


def turned(x: Tensor, bases: list[Tensor | None], back: bool = False) -> Tensor:
    """Each side of x, a vector or a matrix, in its basis, or back from it."""
    for side, q in enumerate(bases):
        if q is not None:
            x = torch.tensordot(q.T if back else q, x.movedim(side, 0), 1).movedim(0, side)
    return x


def basis(order: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
