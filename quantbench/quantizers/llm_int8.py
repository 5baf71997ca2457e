"""LLM.int8() with its decomposition fixed at calibration (after arXiv:2208.07339).

How it works. A feature of a Linear's input is an outlier where at least `share` of the calibration tokens reach
the threshold in it. Those columns are multiplied in full precision by full-precision weights; the rest in int8,
one scale per token, one per output channel (over the weights that are left).

How it differs from bitsandbytes. There any token of the batch at or above the threshold takes its columns out of
the int8 part for all tokens, so that a sink token changes its neighbours' results, and one long peak makes most
columns outliers. Here a token's integers depend on that token alone. The share of 6% is the paper's criterion for
an outlier feature (at least 6% of the sequence positions); `share: 0` lets one token suffice, as in bitsandbytes.

What it leaves out. The paper's second criterion, that the feature is an outlier in at least 25% of the layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.calibration import Calibration, Exemption, survey
from quantbench.ops import outlier_stats
from quantbench.ops.integers import integer_matmul
from quantbench.quantizers import IntegerLinear, LowBitLinear, Quantizer, Rounding, nearest, swap


@dataclass(frozen=True)
class LLMInt8(Quantizer):
    version: ClassVar[int] = 2  # integers and columns by ops.outlier_stats
    title: ClassVar[str] = "INT8 per token, outlier columns (fixed at calibration) in full precision"
    quantizes_activations: ClassVar[bool] = True

    threshold: float = 6.0  # |activation|
    share: float = 0.06  # of the calibration tokens; 0: one token suffices

    def check(self, widths: list[int]) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold: {self.threshold} keeps every column; choose one above 0, or w8a8-token")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: {self.share} is no share of the tokens; choose 0 to 1")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        self.check([])
        outlier_K = {
            name: (found.col_count > 0) & (found.col_count >= self.share * found.tokens)
            for name, found in survey(model, calibration, self.threshold).items()
        }
        report = swap(model, lambda name, linear: MixedLinear(linear, calibration.exemption, outlier_K[name]))
        columns = torch.cat(list(outlier_K.values()))
        return report | {"columns-kept": columns.double().mean().item()}


class MixedLinear(LowBitLinear):
    """Some columns in full precision, the rest in int8 per token. J: columns kept."""

    outlier_K: Tensor
    columns_J: Tensor
    kept_NJ: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, outlier_K: Tensor) -> None:
        super().__init__(linear, exemption)
        self.register_buffer("outlier_K", outlier_K)
        self.register_buffer("columns_J", outlier_K.nonzero().flatten())
        self.register_buffer("kept_NJ", linear.weight.detach()[:, outlier_K])
        rest = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        codes = nearest(linear.weight.masked_fill(outlier_K, 0.0), 8)
        self.rest = IntegerLinear(rest, exemption, codes, 8, Rounding(8, "token"))

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        found = outlier_stats(x.flatten(0, -2), skip_columns=self.outlier_K, quantize=True)
        y_MN = integer_matmul(found.q, self.rest.weight).float() * self.rest.scale_NG.T
        y = (y_MN * (found.row_scale / 127).unsqueeze(-1)).to(x.dtype).unflatten(0, x.shape[:-1])
        if len(self.columns_J):
            y = y + F.linear(x[..., self.columns_J], self.kept_NJ.to(x.dtype))
        return y if self.bias is None else y + self.bias

    def dequantized_NK(self) -> Tensor:
        return self.rest.dequantized_NK().index_copy(1, self.columns_J, self.kept_NJ.float())

    def stored_bits(self) -> int:
        return self.rest.stored_bits() + 8 * (self.kept_NJ.nbytes + self.columns_J.nbytes)
