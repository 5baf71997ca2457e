"""What one full-precision forward pass over held-out sequences says about a model. One file, one metric.

A metric observes: it overrides the methods whose tensors it needs, keeps running statistics and never an
activation, and says at the end what it found. `trace.measure` feeds it, batch by batch, and only wires the
places that some metric observes.

Shapes: B sequences, T tokens, D residual features, H query heads, E features of a head, L layers.
Layer 0 is the first block. Sequences begin with BOS, at position 0, or behind the learned tokens that some models put
in front of every sequence: at position `front`. What is said of BOS is said of it wherever it stands; in every other
respect the learned tokens are tokens as all are, so that a peak or a sink that moved to one of them shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from quantbench.ops import OutlierStats, outlier_stats
from quantbench.ops import median as median


@dataclass(frozen=True)
class Reading:
    """What a metric found. `value` is None where it is undefined for this model (never NaN)."""

    value: float | None
    per_layer: list[float | None] = field(default_factory=list)
    extra: dict[str, float | int | None] = field(default_factory=dict)  # named companions of the value


class Activations:
    """What passes a site, [B, T, D], and the statistics of it: one pass, shared by all metrics that ask for them."""

    def __init__(self, x_BTD: Tensor) -> None:
        self.x_BTD = x_BTD

    @cached_property
    def stats(self) -> OutlierStats:
        """Of all B x T tokens."""
        return outlier_stats(self.x_BTD.flatten(0, -2))

    @property
    def norms_BT(self) -> Tensor:
        return self.stats.row_l2.view(self.x_BTD.shape[:-1])

    @property
    def largest(self) -> Tensor:
        """max |x|, a scalar; NaN where one is."""
        return self.stats.row_absmax.amax()


class Metric:
    """The contract. An instance measures one model once."""

    title: str  # one line for a table's legend: what it is, with the author whose definition it is
    version: int = 1  # bumped by hand when its numbers change: it is part of the cells' keys
    front: int = 0  # learned tokens in front of BOS, of the model that is observed

    def tokens(self, ids_BT: Tensor) -> None:
        """The ids of the batch that comes next: for a metric that treats some tokens apart."""

    def embedding(self, hidden: Activations) -> None:
        """The residual stream before the first block."""

    def residual(self, layer: int, hidden: Activations) -> None:
        """The residual stream after a block, before the final norm."""

    def attention(self, layer: int, scores_BHTT: Tensor, weights_BHTT: Tensor) -> None:
        """Logits q.k/sqrt(E) before masking (only j <= i means anything) and the weights that multiply values.

        The last axis may be longer than T where a form appends learned keys: these come after the T columns.
        """

    def values(self, layer: int, values_BHTE: Tensor, output_HED: Tensor) -> None:
        """Value states, repeated to the query heads, and each head's slice of the output projection."""

    def linear_input(self, name: str, layer: int | None, input: Activations) -> None:
        """The input of a Linear inside a block (layer) or outside (None: the head)."""

    def result(self) -> Reading:
        raise NotImplementedError

    def counted(self) -> dict[str, float | int | None]:
        """What stands beside a position that a reading names: how many learned tokens it counts, if there are any."""
        return {"front": self.front} if self.front else {}


class LayerMean:
    """A streaming mean per layer, in float64. Terms that are undefined are left out, each element by itself."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    def add(self, layer: int, terms: Tensor, defined: Tensor | None = None) -> None:
        """Terms [N, ...], of which the mean over N is wanted; `defined`: bool of the same shape, default all."""
        terms = terms.double()
        kept = torch.ones_like(terms, dtype=torch.bool) if defined is None else defined
        total, count = terms.where(kept, torch.zeros_like(terms)).sum(0), kept.sum(0)
        if layer in self.sums:
            assert self.sums[layer].shape == total.shape, "terms of one layer have one shape"
            total, count = self.sums[layer] + total, self.counts[layer] + count
        self.sums[layer], self.counts[layer] = total, count

    def mean(self, layer: int) -> Tensor:
        """The mean of each element; NaN where no term was defined. Layers may be on several devices, this is not."""
        return (self.sums[layer] / self.counts[layer]).cpu()

    def stacked(self) -> Tensor:
        """The means of all layers, [L, ...]."""
        return torch.stack([self.mean(layer) for layer in sorted(self.sums)]) if self.sums else torch.empty(0)

    def per_layer(self) -> list[float | None]:
        """Each layer's mean over all its elements that are defined; None where none is. May be infinite or NaN."""
        found: list[float | None] = []
        for layer in sorted(self.sums):
            defined = self.mean(layer)[self.counts[layer].cpu() > 0]
            found.append(float(defined.mean()) if defined.numel() else None)
        return found


def finite(number: float | None) -> float | None:
    """The number, or None where it is NaN or infinite."""
    return number if number is not None and math.isfinite(number) else None


def largest(per_layer: Sequence[float | None]) -> tuple[float | None, int | None]:
    """The largest figure of a layer, and the layer. Undefined layers (None) do not count.

    (None, None) where one is NaN or infinite: of a model that overflows, the largest that was left says nothing.
    """
    defined = [(number, layer) for layer, number in enumerate(per_layer) if number is not None]
    if not defined or not all(math.isfinite(number) for number, _ in defined):
        return None, None
    return max(defined, key=lambda pair: pair[0])


def worst_layer(per_layer: Sequence[float | None]) -> Reading:
    """The reading of a metric whose value is the largest over blocks."""
    value, layer = largest(per_layer)
    return Reading(value, [finite(number) for number in per_layer], {"layer": layer})
