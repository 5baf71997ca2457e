"""Softmax with one more logit in the denominator: a head can attend to nothing without a sink token.

    softmax1      A[i, j] = exp(z_ij) / (1 + sum_k exp(z_ik))           (Miller 2023; arXiv:2404.03828)
    sink-logit    A[i, j] = exp(z_ij) / (exp(b_h) + sum_k exp(z_ik))    b_h learned, from N(0, std) (gpt-oss)

    = softmax(z) sigmoid(lse_i - b_h),    lse_i = log sum_k exp(z_ik),  k the keys that i sees

What it changes: the form of attention. softmax1 adds no parameters, sink-logit one a head; nothing is to be folded.
Both cost a few passes over the heads' outputs where the attention kernel returns its lse (`ops.sink`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from quantbench.attention import Form
from quantbench.mitigations import Mitigation
from quantbench.ops.sink import sink_attention

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class Softmax1(Mitigation):
    def weights(self, config: "QuantbenchConfig") -> Form:
        return SoftmaxPlus()


@dataclass(frozen=True)
class SinkLogit(Mitigation):
    std: float = 0.02  # of the logits at the start

    def weights(self, config: "QuantbenchConfig") -> Form:
        return SoftmaxPlusLearned(config.heads, self.std)


class SoftmaxPlus(Form):
    """With the logit 0."""

    def sink(self, scores_BHTS: Tensor) -> Tensor:
        """The logit of each head, [H]."""
        return scores_BHTS.new_zeros(scores_BHTS.shape[1])

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        sink_BHT1 = self.sink(scores_BHTS).to(scores_BHTS.dtype)[:, None, None].expand(*scores_BHTS.shape[:3], 1)
        return torch.cat((sink_BHT1, scores_BHTS.masked_fill(~visible, -torch.inf)), -1).softmax(-1)[..., 1:]

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None:
            return super().attend(q_BHTE, k_BHSE, v_BHSE, visible)
        return sink_attention(q_BHTE, k_BHSE, v_BHSE, self.sink(q_BHTE))


class SoftmaxPlusLearned(SoftmaxPlus):
    def __init__(self, heads: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.sink_H = nn.Parameter(torch.zeros(heads))

    def initial(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0, self.std, generator=generator)

    def sink(self, scores_BHTS: Tensor) -> Tensor:
        return self.sink_H
