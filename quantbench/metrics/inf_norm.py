"""Infinity norm: max |h| over the residual stream after every block (Bondarenko et al., arXiv:2306.12929)."""

import torch
from torch import Tensor

from quantbench.metrics import Activations, Metric, Reading, worst_layer


class InfNorm(Metric):
    title = "largest |h| of the residual stream after a block (Bondarenko)"

    def __init__(self) -> None:
        self.maxima: dict[int, Tensor] = {}

    def residual(self, layer: int, hidden: Activations) -> None:
        found = hidden.largest.double()
        self.maxima[layer] = torch.maximum(self.maxima.get(layer, found), found)

    def result(self) -> Reading:
        return worst_layer([float(found) for _, found in sorted(self.maxima.items())])
