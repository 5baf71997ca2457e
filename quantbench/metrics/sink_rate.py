"""Sink rate: the share of heads that put much of their attention on one position (Gu et al., arXiv:2410.10781).

alpha_k = mean over queries i > k of A[i, k], for each sequence, layer and head; the rate at k is the mean over
sequences, layers and heads of 1[alpha_k > .3]. One k serves the whole model: the one with the highest rate
(of equal rates, the one that draws more attention), searched over k <= T/2. The query i = k is left out and
late keys are not searched, because they see almost only themselves: a purely diagonal head would read as a
sink there, and a previous-token head as half a one.

Weights are the absolute ones, never renormalised: a form whose weights need not sum to one (ReLU, sigmoid, softpick)
counts by the mass it really puts on k, and learned keys beyond the T columns are no position. Learned tokens in front
are positions: k counts them.
"""

import torch
from torch import Tensor

from quantbench.metrics import LayerMean, Metric, Reading, finite

EPSILON = 0.3


def received(weights_BHTT: Tensor) -> Tensor:
    """alpha_k [B, H, K] of the positions k <= T/2 that a later query sees; K = 0 where T = 1."""
    length = weights_BHTT.shape[-2]
    searched = min(length // 2 + 1, length - 1)
    later_BHTK = weights_BHTT[..., :searched].tril(-1)  # query i sees key k, and i > k
    queries_K = length - 1 - torch.arange(searched, device=weights_BHTT.device)
    return later_BHTK.sum(-2, dtype=torch.float64) / queries_K


def searched(rates_K: Tensor, alphas_K: Tensor) -> int:
    """The position with the highest rate; of equal rates, the one that draws more attention."""
    return int(alphas_K.where(rates_K == rates_K.max(), torch.full_like(alphas_K, -torch.inf)).argmax())


class Received:
    """The attention that each position draws, over layers and heads: which one of the model draws most."""

    def __init__(self) -> None:
        self.alphas = LayerMean()

    def add(self, layer: int, weights_BHTT: Tensor) -> None:
        self.alphas.add(layer, received(weights_BHTT))

    def position(self) -> int | None:
        """The position k <= T/2 with the largest alpha, averaged over layers and heads."""
        alphas_LHK = self.alphas.stacked()
        if not alphas_LHK.numel() or not alphas_LHK.isfinite().all():
            return None
        return int(alphas_LHK.mean((0, 1)).argmax())


class SinkRate(Metric):
    title = "sink rate: share of heads with mean attention above .3 on one position, absolute mass (Gu)"

    def __init__(self) -> None:
        self.hits, self.alphas = LayerMean(), LayerMean()

    def attention(self, layer: int, scores_BHTT: Tensor, weights_BHTT: Tensor) -> None:
        alphas_BHK = received(weights_BHTT)
        self.alphas.add(layer, alphas_BHK)
        self.hits.add(layer, (alphas_BHK > EPSILON).double())

    def result(self) -> Reading:
        rates_LHK, alphas_LHK = self.hits.stacked(), self.alphas.stacked()
        if not rates_LHK.numel() or not alphas_LHK.isfinite().all():
            return Reading(None, [None] * len(rates_LHK), {"k": None, "bos": None, **self.counted()})
        rates_K, alphas_K = rates_LHK.mean((0, 1)), alphas_LHK.mean((0, 1))
        k = searched(rates_K, alphas_K)
        per_layer = [finite(float(rate)) for rate in rates_LHK[:, :, k].mean(1)]
        bos = float(rates_K[self.front]) if self.front < len(rates_K) else None
        return Reading(float(rates_K[k]), per_layer, {"k": k, "bos": bos, **self.counted()})
