"""Value-state drain: what BOS would add to the residual, against what other tokens would (arXiv:2410.13835).

||W_O^h v_0|| / mean over t >= 1 of ||W_O^h v_t||, with that layer's and that head's own slice of W_O (the authors'
figures use layer 0's throughout); mean over sequences, heads and layers. Low is drained. Learned tokens in front of BOS
are among the others. `plain` is the same ratio of ||v|| itself, which a rescaling between W_V and W_O can move. The
smallest heads are given too: a few heads may be drained while the mean hardly moves.

For models without a sink on BOS the ratio is given for the position that draws most attention (`argmax-k`, one
for the model), against all other positions.
"""

import torch
from torch import Tensor

from quantbench.metrics import LayerMean, Metric, Reading, finite
from quantbench.metrics.sink_rate import Received


class ValueDrain(Metric):
    title = "||W_O v|| of BOS over the mean of the other tokens, own layer and head (Guo)"

    def __init__(self) -> None:
        self.received, self.projected, self.plain = Received(), LayerMean(), LayerMean()

    def attention(self, layer: int, scores_BHTT: Tensor, weights_BHTT: Tensor) -> None:
        self.received.add(layer, weights_BHTT)

    def values(self, layer: int, values_BHTE: Tensor, output_HED: Tensor) -> None:
        self.plain.add(layer, *_against_others(_norms(values_BHTE)))
        # Head by head: all heads at once would hold H residual streams.
        norms = [_norms(values_BHTE[:, h].float() @ output_HED[h].float()) for h in range(len(output_HED))]
        self.projected.add(layer, *_against_others(torch.stack(norms, 1)))

    def result(self) -> Reading:
        projected_LHT, plain_LHT = self.projected.stacked(), self.plain.stacked()
        bos_LH = projected_LHT[..., self.front] if projected_LHT.numel() else projected_LHT
        plain_LH = plain_LHT[..., self.front] if plain_LHT.numel() else plain_LHT
        k = self.received.position() if projected_LHT.numel() else None
        extra: dict[str, float | int | None] = {
            "smallest-head": _smallest(bos_LH),
            "plain": _mean(plain_LH),
            "plain-smallest-head": _smallest(plain_LH),
            "argmax": None if k is None else _mean(projected_LHT[..., k]),
            "argmax-k": k,
            **self.counted(),
        }
        return Reading(_mean(bos_LH), [_mean(heads_H) for heads_H in bos_LH], extra)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)


def _against_others(norms_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's norm over the mean of all others', and where that is defined: the others are not all zero."""
    others_BHT = (norms_BHT.sum(-1, keepdim=True) - norms_BHT) / max(norms_BHT.shape[-1] - 1, 1)
    return norms_BHT / others_BHT, others_BHT != 0


def _defined(x: Tensor) -> Tensor:
    return x[~x.isnan()]  # a head whose other values are all zero has no ratio


def _mean(x: Tensor) -> float | None:
    kept = _defined(x)
    return finite(float(kept.mean())) if kept.numel() else None


def _smallest(x: Tensor) -> float | None:
    kept = _defined(x)
    return finite(float(kept.min())) if kept.numel() else None
