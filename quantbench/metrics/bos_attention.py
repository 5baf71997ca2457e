"""Attention to BOS: the mean of A[i, 0] over layers, heads and queries i >= 1 (Guo et al., arXiv:2410.13835).

Absolute mass, never renormalised. Learned keys, which a form may append beyond the T columns, are counted apart
(`learned-keys`: the mass they draw), and so are learned tokens in front (`registers`), which are no queries. On
Bigram-Backcopy the paper leaves out queries that are triggers, at which a head is active and so looks elsewhere: give
their ids as `triggers`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantbench.metrics import LayerMean, Metric, Reading, finite


class BosAttention(Metric):
    title = "mean attention to position 0, absolute mass (Guo)"

    def __init__(self, triggers: Iterable[int] = ()) -> None:
        self.triggers = list(triggers)
        self.counted_BT: Tensor | None = None  # which queries of the batch at hand count
        self.bos, self.learned, self.registers = LayerMean(), LayerMean(), LayerMean()

    def tokens(self, ids_BT: Tensor) -> None:
        if self.triggers:
            self.counted_BT = ~torch.isin(ids_BT, torch.tensor(self.triggers, device=ids_BT.device))

    def attention(self, layer: int, scores_BHTT: Tensor, weights_BHTT: Tensor) -> None:
        length, bos = weights_BHTT.shape[-2], self.front
        self._add(self.bos, layer, weights_BHTT[:, :, bos + 1 :, bos])
        if weights_BHTT.shape[-1] > length:
            self._add(self.learned, layer, weights_BHTT[:, :, bos + 1 :, length:].sum(-1, dtype=torch.float64))
        if bos:
            self._add(self.registers, layer, weights_BHTT[:, :, bos + 1 :, :bos].sum(-1, dtype=torch.float64))

    def _add(self, means: LayerMean, layer: int, mass_BHT: Tensor) -> None:
        """mass_BHT: of the queries behind BOS."""
        terms_NH = mass_BHT.transpose(1, 2).flatten(0, 1)
        counted_NH = None
        if self.counted_BT is not None:
            counted_NH = self.counted_BT[:, 1:].flatten()[:, None].expand_as(terms_NH)
        means.add(layer, terms_NH, counted_NH)

    def result(self) -> Reading:
        per_layer = self.bos.per_layer()
        heads_LH = self.bos.stacked()
        extra: dict[str, float | int | None] = {"largest-head": None, "heads-above-half": None}
        value = None
        if heads_LH.numel() and heads_LH.isfinite().all():
            value = float(heads_LH.mean())
            extra = {
                "largest-head": float(heads_LH.max()),
                "heads-above-half": float((heads_LH > 0.5).double().mean()),
            }
        extra["learned-keys"] = _mean(self.learned)
        if self.front:
            extra["registers"] = _mean(self.registers)
        return Reading(value, [finite(mass) for mass in per_layer], extra)


def _mean(means: LayerMean) -> float | None:
    """Over the layers."""
    found = [mass for mass in means.per_layer() if mass is not None]
    return finite(sum(found) / len(found)) if found else None
