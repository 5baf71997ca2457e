"""Massive activations: elements of a block's output with |h| > 100 and |h| > 1000 x the median |h| of the
sequence (Sun et al., arXiv:2402.17762); their number per sequence, at the block that has most.
"""

from quantbench.metrics import Activations, LayerMean, Metric, Reading, median, worst_layer

MAGNITUDE = 100.0
TIMES_MEDIAN = 1000.0


class MassiveCount(Metric):
    title = "massive activations per sequence: |h| > 100 and > 1000 x median, at the worst block (Sun)"

    def __init__(self) -> None:
        self.counts = LayerMean()

    def residual(self, layer: int, hidden: Activations) -> None:
        size_BN = hidden.x_BTD.flatten(1).abs().float()
        massive_BN = (size_BN > MAGNITUDE) & (size_BN > TIMES_MEDIAN * median(size_BN)[:, None])
        # A comparison with NaN is False: without this line a model that overflowed would count nothing.
        counts_B = massive_BN.sum(-1).double() + 0 * size_BN.sum(-1)
        self.counts.add(layer, counts_B)

    def result(self) -> Reading:
        return worst_layer(self.counts.per_layer())
