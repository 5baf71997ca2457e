"""Numeric functions on tensors: no modules, no state, each tested against an independent reference.

Importing this registers `torch.ops.quantbench.outlier_stats`.
"""

from quantbench.ops.outliers import OutlierStats, Totals, implementation, outlier_stats

__all__ = ["OutlierStats", "Totals", "implementation", "outlier_stats"]
