"""Kurtosis of block outputs, after three authors, who disagree by orders of magnitude. Each value is the
largest over blocks. A Gaussian reads 1 (He), 0 (OSP) and 3 (Qualcomm).

- He (arXiv:2405.19279): mean_j(s_j^4) / mean_j(s_j^2)^2, s_j the RMS of feature j over all tokens: are some
  *features* large throughout? Not centred, by definition.
- OSP (arXiv:2506.19697): excess kurtosis over the features of one token, averaged over tokens: one sink token
  among many hardly shows.
- Qualcomm (arXiv:2306.12929): kurtosis of the flattened sequence, averaged over sequences: one sink token is
  nearly all that shows.

Moments are taken about the mean, after subtracting it, in float64, and no epsilon stands in a denominator
(1e-6 there reads .03 for a Gaussian of standard deviation .01; an uncentred numerator reads 7.05 for a shift
by one). Where all elements are equal there is no kurtosis: such tokens or sequences are left out.
"""

import torch
from torch import Tensor

from quantbench.metrics import Activations, LayerMean, Metric, Reading, worst_layer
from quantbench.ops import outlier_stats


class KurtosisHe(Metric):
    title = "kurtosis of the features' RMS, at the worst block (He)"

    def __init__(self) -> None:
        self.squares = LayerMean()  # s_j^2, [D]

    def residual(self, layer: int, hidden: Activations) -> None:
        self.squares.add(layer, hidden.x_BTD.flatten(0, 1).double().square())

    def result(self) -> Reading:
        per_layer: list[float | None] = []
        for squares_D in self.squares.stacked():
            mean = squares_D.mean()
            per_layer.append(float((squares_D / mean).square().mean()) if mean != 0 else None)
        return worst_layer(per_layer)


class KurtosisOSP(Metric):
    title = "excess kurtosis over a token's features, mean over tokens, at the worst block (OSP)"

    def __init__(self) -> None:
        self.tokens_excess = LayerMean()

    def residual(self, layer: int, hidden: Activations) -> None:
        kurtosis_N, defined_N = _kurtosis(hidden.x_BTD.flatten(0, 1))
        self.tokens_excess.add(layer, kurtosis_N - 3, defined_N)

    def result(self) -> Reading:
        return worst_layer(self.tokens_excess.per_layer())


class KurtosisQualcomm(Metric):
    title = "kurtosis of the flattened sequence, at the worst block (Qualcomm)"

    def __init__(self) -> None:
        self.sequences = LayerMean()

    def residual(self, layer: int, hidden: Activations) -> None:
        moments_B5 = torch.stack([outlier_stats(x_TD).moments for x_TD in hidden.x_BTD])
        count_B, _, M2_B, _, M4_B = moments_B5.unbind(-1)
        largest_B = hidden.stats.row_absmax.view(hidden.x_BTD.shape[:-1]).amax(-1)
        self.sequences.add(layer, count_B * M4_B / M2_B**2, _defined((M2_B / count_B).sqrt(), largest_B))

    def result(self) -> Reading:
        return worst_layer(self.sequences.per_layer())


def _kurtosis(x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x - m)^4 / (E(x - m)^2)^2 over the last axis, and whether it is defined: the elements are not all equal."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    defined = _defined(centred.abs().amax(-1), x.abs().amax(-1))
    variance = centred.square().mean(-1, keepdim=True)
    return (centred.square() / variance).square().mean(-1), defined


def _defined(deviation: Tensor, largest: Tensor) -> Tensor:
    """Equal float32 numbers differ from their computed mean by rounding alone, of which a kurtosis can be made."""
    return ~(deviation <= torch.finfo(torch.float32).eps * largest)
