"""Muon: matrices move by their orthogonalised momentum, so that no direction of a matrix outgrows the others.

    m <- momentum m + (1 - momentum) g;    W <- W - lr .2 sqrt(max(rows, columns)) NS(g + momentum (m - g))

NS: five Newton-Schulz steps towards the nearest (semi-)orthogonal matrix (Jordan 2024), scaled to the size of Adam's
steps (arXiv:2502.16982), which makes AdamW's learning rates and decay apply. It is torch's own. Embeddings, head,
norms, biases and whatever is no Linear's weight stay with the track's AdamW. Fused matrices (queries, keys and values;
gate and up) are orthogonalised as one.

What it changes: how parameters move. Costs nothing at inference; one state a parameter instead of two, and some 15
small matrix products a matrix a step. On its own the evidence is contested (arXiv:2506.19697, arXiv:2509.23500).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantbench.mitigations import Mitigation, Settings, by_shape


@dataclass(frozen=True)
class Muon(Mitigation):
    momentum: float = 0.95
    nesterov: bool = True

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        head = getattr(model, "head", None)
        linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        chosen = {id(weight) for weight in linears}
        matrices, others = ([p for p in side if id(p) not in chosen] for side in by_shape(model))
        return Together(
            torch.optim.Muon(
                linears,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=self.momentum,
                nesterov=self.nesterov,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": settings.weight_decay},
                    {"params": others, "weight_decay": 0.0},
                ],
                lr=settings.lr,
                betas=settings.betas,
                fused=True,
            ),
        )


class Together(torch.optim.Optimizer):
    """Several optimizers as one: one list of groups, one state, one step."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on the groups and the state that are here."""
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            start += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None
        for part in self.parts:
            part.step()
