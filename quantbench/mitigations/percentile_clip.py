"""Percentile clipping: a static range holds `percent` of the values and lets the rest saturate (arXiv:2004.09602).

    range = [-q, q],  q the least value that percent % of the |x| of the calibration do not exceed

What it changes: the static ranges of any quantizer that has them, in the place of its own rule; what has none is as it
was. Range and saturation of an asymmetric quantizer are those of either side, half of the rest on each. A sink token
that is one in thousands no longer sets everybody's step; it is clipped instead, which is what this costs. Nothing is
trained, added or to be folded.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from quantbench.calibration import Calibration
from quantbench.mitigations import Mitigation, Prepared
from quantbench.strict import Range


@dataclass(frozen=True)
class PercentileClip(Mitigation):
    percent: Annotated[float, Range(50.0, 100.0)] = 99.9  # of the values, kept within the range

    def prepare(self, model: nn.Module, calibration: Calibration) -> Prepared:
        return Prepared(model, rule="percentile", percent=self.percent)
