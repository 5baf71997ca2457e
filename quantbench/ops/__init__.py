"""Numeric functions on tensors: no modules, no state, each tested against an independent reference.

Importing this registers `torch.ops.quantbench.outlier_stats`.
"""

from torch import Tensor

from quantbench.ops.outliers import OutlierStats, Totals, implementation, outlier_stats

__all__ = ["OutlierStats", "Totals", "implementation", "median", "outlier_stats"]


def median(x: Tensor) -> Tensor:
    """The median over the last axis: the mean of the two middle ones where their number is even."""
    ordered, count = x.sort(dim=-1).values, x.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2
