"""Delta logit: how far the logit of BOS stands above those of the other keys (Guo et al., arXiv:2410.13835).

logit(i, 0) - mean over 1 <= j < i of logit(i, j), the logits being q.k/sqrt(E) before the mask, for queries
i >= 2; mean over queries, sequences, heads and layers. It says what a form's weights cannot: ReLU and sigmoid
give weights on another scale than softmax, their logits compare.

Where learned tokens stand in front, BOS is not position 0, and they are no rivals either: the rivals are the keys
behind BOS. For models without a sink on BOS the same is given for the position that draws most attention (`argmax-k`,
one for the model): logit(i, k) - mean over 1 <= j < i, j != k.
"""

import torch
from torch import Tensor

from quantbench.metrics import LayerMean, Metric, Reading, finite
from quantbench.metrics.sink_rate import Received


class DeltaLogit(Metric):
    title = "logit of BOS minus the mean logit of the other earlier keys (Guo)"

    def __init__(self) -> None:
        self.received, self.deltas = Received(), LayerMean()

    def attention(self, layer: int, scores_BHTT: Tensor, weights_BHTT: Tensor) -> None:
        self.received.add(layer, weights_BHTT)
        deltas_BHK, seen_K = _deltas(scores_BHTT, self.front)
        self.deltas.add(layer, deltas_BHK, seen_K.expand_as(deltas_BHK))

    def result(self) -> Reading:
        deltas_LHK = self.deltas.stacked()
        if not deltas_LHK.numel():
            return Reading(None, [], {"largest-head": None, "argmax": None, "argmax-k": None})
        bos_LH, k = deltas_LHK[..., self.front], self.received.position()
        extra: dict[str, float | int | None] = {
            "largest-head": finite(float(bos_LH.max())),
            "argmax": None if k is None else finite(float(deltas_LHK[..., k].mean())),
            "argmax-k": k,
            **self.counted(),
        }
        return Reading(finite(float(bos_LH.mean())), [finite(float(delta)) for delta in bos_LH.mean(1)], extra)


def _deltas(scores_BHTT: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """The delta logit of every key k, [B, H, K], and whether some query sees k and a rival of it, [K].

    Rivals of k at query i are the keys bos+1..i-1 without k. With n their number and R_i the sum of the logits of
    bos+1..i-1, query i gives s_ik - (R_i - [k > bos] s_ik) / n = s_ik (1 + [k > bos] / n) - R_i / n.
    """
    length = scores_BHTT.shape[-2]
    places_T = torch.arange(length, device=scores_BHTT.device)
    query_T1, key_T = places_T[:, None], places_T
    rivals_TT = query_T1 - bos - 1 - (key_T > bos).long()
    usable_TT = (key_T < query_T1) & (rivals_TT > 0)
    inverse_TT = usable_TT / rivals_TT.clamp_min(1).double()

    past_BHTT = scores_BHTT[..., :length].tril(-1).double()  # tril writes zeros, also over -inf
    totals_BHT = past_BHTT[..., bos + 1 :].sum(-1)
    own_BHK = (past_BHTT * (usable_TT + inverse_TT * (key_T > bos))).sum(-2)
    queries_K = usable_TT.sum(0)
    return (own_BHK - totals_BHT @ inverse_TT) / queries_K.clamp_min(1), queries_K > 0
