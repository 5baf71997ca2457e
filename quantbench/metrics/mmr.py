"""Max-to-median ratio: max_j |h_j| / median_j |h_j| over a token's features, averaged over tokens, at a block's
output; the value is the largest over blocks. A token whose median is zero has no ratio and is left out.
"""

from quantbench.metrics import Activations, LayerMean, Metric, Reading, median, worst_layer


class MMR(Metric):
    title = "max |h_j| / median |h_j| of a token, mean over tokens, at the worst block"

    def __init__(self) -> None:
        self.ratios = LayerMean()

    def residual(self, layer: int, hidden: Activations) -> None:
        size_ND = hidden.x_BTD.flatten(0, 1).abs().double()
        median_N = median(size_ND)
        self.ratios.add(layer, size_ND.amax(-1) / median_N, median_N != 0)

    def result(self) -> Reading:
        return worst_layer(self.ratios.per_layer())
