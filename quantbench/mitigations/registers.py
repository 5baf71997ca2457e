"""Registers: learned tokens in front of every sequence, for heads to park on (arXiv:2309.16588; arXiv:2510.09017).

    [r_1 .. r_R, x_0, x_1, ...]        r learned, from N(0, embedding-std) as the embeddings

What it changes: the sequence. It adds R D parameters and R tokens to every sequence; their keys and values stand in
front of the cache. BOS is position R of the stream then: figures of BOS are its own, and a position that is searched
for, as that of a sink, counts the registers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.mitigations import Mitigation

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class Registers(Mitigation):
    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: {self.count} registers; give 1 or more")

    def inputs(self, config: "QuantbenchConfig") -> nn.Module:
        return Front(self.count, config.width, config.embedding_std)


class Front(nn.Module):
    def __init__(self, count: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.tokens_RD = nn.Parameter(torch.zeros(count, width))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0, self.std, generator=generator)

    def forward(self, batch: int) -> Tensor:
        return self.tokens_RD.expand(batch, -1, -1)
