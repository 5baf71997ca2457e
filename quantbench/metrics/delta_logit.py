"""Delta logit: how far the logit of BOS stands above those of the other keys (Guo et al., arXiv:2410.13835).

logit(i, 0) - mean over 1 <= j < i of logit(i, j), the logits being q.k/sqrt(E) before the mask, for queries
i >= 2; mean over queries, sequences, heads and layers. It says what a form's weights cannot: ReLU and sigmoid
give weights on another scale than softmax, their logits compare.

For models without a sink on BOS the same is given for the position that draws most attention (`argmax-k`, one
for the model): logit(i, k) - mean over 1 <= j < i, j != k.
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
        deltas_BHK, seen_K = _deltas(scores_BHTT)
        self.deltas.add(layer, deltas_BHK, seen_K.expand_as(deltas_BHK))

    def result(self) -> Reading:
        deltas_LHK = self.deltas.stacked()
        if not deltas_LHK.numel():
            return Reading(None, [], {"largest-head": None, "argmax": None, "argmax-k": None})
        bos_LH, k = deltas_LHK[..., 0], self.received.position()
        extra: dict[str, float | int | None] = {
            "largest-head": finite(float(bos_LH.max())),
            "argmax": None if k is None else finite(float(deltas_LHK[..., k].mean())),
            "argmax-k": k,
        }
        return Reading(finite(float(bos_LH.mean())), [finite(float(delta)) for delta in bos_LH.mean(1)], extra)


def _deltas(scores_BHTT: Tensor) -> tuple[Tensor, Tensor]:
    """The delta logit of every key, [B, H, T], and for which keys there is a query with another key to compare."""
    length = scores_BHTT.shape[-2]
    past_TT = torch.ones(length, length, dtype=torch.bool, device=scores_BHTT.device).tril(-1)
    # What lies on or above the diagonal means nothing and may be -inf: replaced, not multiplied by zero.
    scores_BHTT = scores_BHTT[..., :length].double()
    past_BHTT = scores_BHTT.where(past_TT, torch.zeros_like(scores_BHTT))
    rival_TT = past_TT.clone()
    rival_TT[:, 0] = False  # BOS is nobody's rival
    others_TT = rival_TT.sum(-1, keepdim=True) - rival_TT.long()  # how many rivals key k has at query i
    rivals_BHTT = (past_BHTT * rival_TT).sum(-1, keepdim=True) - past_BHTT * rival_TT
    usable_TT = past_TT & (others_TT > 0)
    delta_BHTT = past_BHTT - rivals_BHTT / others_TT.clamp_min(1)
    queries_K = usable_TT.sum(0)
    deltas_BHK = delta_BHTT.where(usable_TT, torch.zeros_like(delta_BHTT)).sum(-2) / queries_K.clamp_min(1)
    return deltas_BHK, queries_K > 0
