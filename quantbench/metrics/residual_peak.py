"""Residual-state peak: one token's residual norm is far larger than the others'.

peak = max_t ||h_t|| / median_t ||h_t|| at a block's output, for each sequence by itself; mean over sequences; the value
is the largest over blocks, because a change that flattens the first block's output may leave the peak in the later
ones. The embedding is given apart. Beside it, over the same median: BOS alone, and the largest of all but BOS, so that
peak = max(bos, others) in every sequence. `excess` is ||h_BOS|| minus the mean norm of the others (Guo et al.,
arXiv:2410.13835). Learned tokens in front are among the others; where there are any, `registers` is the largest of
them, over the same median.
"""

from torch import Tensor

from quantbench.metrics import Activations, LayerMean, Metric, Reading, finite, largest, median


class ResidualPeak(Metric):
    title = "residual-state peak: largest token norm over the median, at the worst block (Guo)"

    def __init__(self) -> None:
        self.peak, self.bos, self.others, self.excess = LayerMean(), LayerMean(), LayerMean(), LayerMean()
        self.embedded, self.registers = LayerMean(), LayerMean()

    def embedding(self, hidden: Activations) -> None:
        norms_BT, median_B = self._norms(hidden)
        self.embedded.add(0, norms_BT.amax(-1) / median_B, median_B != 0)

    def residual(self, layer: int, hidden: Activations) -> None:
        norms_BT, median_B = self._norms(hidden)
        defined_B = median_B != 0
        self.peak.add(layer, norms_BT.amax(-1) / median_B, defined_B)
        self.bos.add(layer, norms_BT[:, 0] / median_B, defined_B)
        if norms_BT.shape[1] > 1:
            self.others.add(layer, norms_BT[:, 1:].amax(-1) / median_B, defined_B)
            self.excess.add(layer, norms_BT[:, 0] - norms_BT[:, 1:].mean(-1))
        if self.front:
            self.registers.add(layer, norms_BT[:, -self.front :].amax(-1) / median_B, defined_B)

    def result(self) -> Reading:
        peaks = self.peak.per_layer()
        value, layer = largest(peaks)
        extra: dict[str, float | int | None] = {"layer": layer}
        companions = {"bos": self.bos, "others": self.others, "excess": self.excess}
        for name, means in (companions | ({"registers": self.registers} if self.front else {})).items():
            found = means.per_layer()
            extra[name] = largest(found)[0]
            extra |= {f"{name}.{at}": finite(number) for at, number in enumerate(found)}
        extra["embedding"] = largest(self.embedded.per_layer())[0]
        return Reading(value, [finite(peak) for peak in peaks], extra)

    def _norms(self, hidden: Activations) -> tuple[Tensor, Tensor]:
        """Of every token, BOS first and learned ones last, and their median."""
        norms_BT = hidden.norms_BT.double().roll(-self.front, -1)
        return norms_BT, median(norms_BT)
