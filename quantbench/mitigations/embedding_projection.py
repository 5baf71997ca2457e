"""Embedding projection: the stream has a basis of its own, not that of the embedding (OSP, arXiv:2506.19697).

    x = embedding P_in,    logits = (norm(h) P_out) head^T        P square, orthogonal at the start, then trained

What it changes: what enters the stream and what leaves it. It adds 2 D^2 parameters while training and nothing at
inference: both are folded into the embedding and the head before anything is measured or quantized.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation, Projection

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class EmbeddingProjection(Mitigation):
    def embedding(self, config: "QuantbenchConfig") -> Projection:
        return Orthogonal(config.width)


class Orthogonal(Projection):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.way_in, self.way_out = Square(width, width, bias=False), Square(width, width, bias=False)

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        return self.way_in(embedded_BTD).to(embedded_BTD.dtype)  # under autocast, too, the stream stays in fp32

    def leave(self, hidden_BTD: Tensor) -> Tensor:
        return self.way_out(hidden_BTD)

    @torch.no_grad()
    def fold(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        for table, matrix in ((embedding.weight, self.way_in.weight.T), (head.weight, self.way_out.weight)):
            table.copy_(table.double() @ matrix.double())


class Square(nn.Linear):
    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        gaussian = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        parameter.copy_(q * r.diagonal().sign())  # by the signs it is uniform over orthogonal matrices
