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

from quantbench.metrics import LayerMean, Metric, Reading, worst_layer


class KurtosisHe(Metric):
    title = "kurtosis of the features' RMS, at the worst block (He)"

    def __init__(self) -> None:
        self.squares = LayerMean()  # s_j^2, [D]

    def residual(self, layer: int, hidden_BTD: Tensor) -> None:
        self.squares.add(layer, hidden_BTD.flatten(0, 1).double().square())

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

    def residual(self, layer: int, hidden_BTD: Tensor) -> None:
        kurtosis_N, defined_N = _kurtosis(hidden_BTD.flatten(0, 1))
        self.tokens_excess.add(layer, kurtosis_N - 3, defined_N)

    def result(self) -> Reading:
        return worst_layer(self.tokens_excess.per_layer())


class KurtosisQualcomm(Metric):
    title = "kurtosis of the flattened sequence, at the worst block (Qualcomm)"

    def __init__(self) -> None:
        self.sequences = LayerMean()

    def residual(self, layer: int, hidden_BTD: Tensor) -> None:
        self.sequences.add(layer, *_kurtosis(hidden_BTD.flatten(1)))

    def result(self) -> Reading:
        return worst_layer(self.sequences.per_layer())


def _kurtosis(x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x - m)^4 / (E(x - m)^2)^2 over the last axis, and whether it is defined: the elements are not all equal."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    # Equal float32 numbers differ from their computed mean by rounding alone, of which a kurtosis can be made.
    defined = ~(centred.abs().amax(-1) <= torch.finfo(torch.float32).eps * x.abs().amax(-1))
    variance = centred.square().mean(-1, keepdim=True)
    return (centred.square() / variance).square().mean(-1), defined
