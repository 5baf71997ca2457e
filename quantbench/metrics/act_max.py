"""Largest activation: max |x| over the inputs of every Linear, the output head's included.

Linear inputs are what most INT8 schemes quantize, so it stands beside the residual peak: a norm between the
two may hide a peak, and a gated MLP may make one of its own. `layer` is None where the head's input is the
largest.
"""

import torch
from torch import Tensor

from quantbench.metrics import Activations, Metric, Reading, finite


class ActMax(Metric):
    title = "largest |input| of any Linear"

    def __init__(self) -> None:
        self.maxima: dict[int, Tensor] = {}
        self.head: Tensor | None = None

    def linear_input(self, name: str, layer: int | None, input: Activations) -> None:
        found = input.largest.double()
        if layer is None:
            self.head = found if self.head is None else torch.maximum(self.head, found)
        else:
            self.maxima[layer] = torch.maximum(self.maxima.get(layer, found), found)

    def result(self) -> Reading:
        per_layer = {layer: float(found) for layer, found in sorted(self.maxima.items())}
        head = None if self.head is None else float(self.head)
        everywhere: dict[int | None, float] = dict(per_layer.items())
        if head is not None:
            everywhere[None] = head
        value, layer = None, None
        if everywhere and all(finite(number) is not None for number in everywhere.values()):
            layer = max(everywhere, key=lambda at: everywhere[at])
            value = everywhere[layer]
        return Reading(value, [finite(x) for x in per_layer.values()], {"layer": layer, "head": finite(head)})
