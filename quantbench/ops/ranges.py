"""From what a site carried to the range its integers span: absmax, a percentile, or the least squared error.

A histogram keeps of every float32 its sign, its exponent and ten bits of its fraction: magnitudes are known to a part
in a thousand, whatever their scale, and histograms of batches add up. A symmetric range is [-high, high]; an asymmetric
one reaches from low to high and always holds 0, so that what is zero (padding, ReLU, a masked weight) stays zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantbench.ops import integers

KEPT = 10  # bits of the fraction
BINS = 1 << (9 + KEPT)  # of both signs: a float32's bit pattern without its last 23 - KEPT bits
CANDIDATES = 200  # shares of the absmax that `least_error` tries


@dataclass(frozen=True)
class Span:
    """The range of a site: scalars, float32, low <= 0 <= high."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """The symmetric range that holds it."""
        return torch.maximum(-self.low, self.high)


class Histogram:
    """How often each magnitude passed; of finite values only. `add` takes tensors of any shape."""

    def __init__(self) -> None:
        self.counts_N: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Counts the finite elements of x in."""
        pattern = x.detach().float()[x.isfinite()].view(torch.int32).long().bitwise_and_(0xFFFFFFFF) >> (23 - KEPT)
        counts_N = torch.bincount(pattern, minlength=BINS)
        self.counts_N = counts_N if self.counts_N is None else self.counts_N + counts_N

    def values(self) -> tuple[Tensor, Tensor]:
        """What occurred, ascending, and how often; each bin stands for its middle. float64, int64."""
        assert self.counts_N is not None, "nothing was counted"
        assert self.counts_N.any(), "nothing was counted"
        (pattern,) = self.counts_N.nonzero(as_tuple=True)
        middle = (pattern << (23 - KEPT)) | (1 << (22 - KEPT))
        middle = middle.where((pattern & (BINS // 2 - 1)) > 0, pattern << (23 - KEPT))  # zero is zero
        values = middle.to(torch.int64).where(middle < 2**31, middle - 2**32).to(torch.int32).view(torch.float32)
        order = values.argsort()
        return values[order].double(), self.counts_N[pattern][order]

    def percentile(self, percent: float, symmetric: bool) -> Span:
        """What holds `percent` of the elements: of |x|, or of x with as many left out on either side."""
        values_N, counts_N = self.values()
        if symmetric:
            high = _quantile(*_sorted(values_N.abs(), counts_N), percent / 100)
            return Span(-high, high)
        share = 1 - (1 - percent / 100) / 2
        low = -_quantile(*_sorted(-values_N, counts_N), share)
        return Span(low.clamp(max=0), _quantile(values_N, counts_N, share).clamp(min=0))

    def least_error(self, bits: int, symmetric: bool) -> Span:
        """The range, of shares of the whole, under which the squared error of the integers is least."""
        values_N, counts_N = self.values()
        low, high = values_N.min().clamp(max=0), values_N.max().clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        shares = torch.arange(1, CANDIDATES + 1, dtype=torch.float64, device=values_N.device) / CANDIDATES
        errors = []
        for share in shares:
            span = Span((low * share).float(), (high * share).float())
            scale, zero = integers.steps(span.low, span.high, bits, symmetric)
            lowest, top = integers.limits(bits, symmetric)
            stands_for = ((values_N / scale).round() + zero).clamp(lowest, top).sub(zero) * scale
            errors.append(((stands_for - values_N).square() * counts_N).sum())
        share = shares[int(torch.stack(errors).argmin())]
        return Span((low * share).float(), (high * share).float())


def _sorted(values_N: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    order = values_N.argsort()
    return values_N[order], counts_N[order]


def _quantile(values_N: Tensor, counts_N: Tensor, share: float) -> Tensor:
    """The least value that at least `share` of the elements do not exceed, float32."""
    reached = counts_N.cumsum(0).double() >= share * counts_N.sum() - 1e-9 * counts_N.sum()
    return values_N[int(reached.int().argmax())].float()
