"""LLM.int8() with its decomposition fixed at calibration (after arXiv:2208.07339), and by single elements.

How it works. A feature of a Linear's input is an outlier where at least `share` of the calibration tokens reach
the threshold in it. Those columns are multiplied in full precision by full-precision weights; the rest in int8,
one scale per token, one per output channel (over the weights that are left). With `elementwise` no column is chosen:
every element that reaches the threshold as the model runs stays in full precision and meets full-precision weights,
which therefore are all kept beside the int8 ones.

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
from quantbench.quantizers import Derived, IntegerLinear, LowBitLinear, Plan, Quantizer, Rounding, nearest, swap


@dataclass(frozen=True)
class LLMInt8(Quantizer):
    version: ClassVar[int] = 2  # integers and columns by ops.outlier_stats
    quantizes_activations: ClassVar[bool] = True

    threshold: float = 6.0  # |activation| from which on it is an outlier; 0: none is
    share: float = 0.06  # of the calibration tokens; 0: one token suffices
    elementwise: bool = False  # outliers by themselves, not by columns

    @property
    def title(self) -> str:  # type: ignore[override]
        """What it is, in a line."""
        if not self.threshold:
            return "INT8 per token, no outliers kept"
        kept = "elements" if self.elementwise else "columns (fixed at calibration)"
        return f"INT8 per token, outlier {kept} from {self.threshold:g} in full precision"

    def check(self, widths: list[int]) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: {self.threshold} means nothing; choose 0 (no outliers) or more")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: {self.share} is no share of the tokens; choose 0 to 1")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        """Reports shares: of input columns, calibration tokens with an outlier, and weights in full precision."""
        self.check([])
        found = survey(model, calibration, self.threshold)
        tokens = sum(totals.tokens for totals in found.values())
        report = {"tokens-with-outliers": sum(int(totals.outlier_tokens) for totals in found.values()) / tokens}
        outlier_K = {
            name: torch.zeros_like(totals.col_count, dtype=torch.bool)
            if self.elementwise
            else (totals.col_count > 0) & (totals.col_count >= self.share * totals.tokens)
            for name, totals in found.items()
        }
        report["columns-kept"] = torch.cat(list(outlier_K.values())).double().mean().item()
        if self.elementwise:
            elements = sum(totals.tokens * len(totals.col_count) for totals in found.values())
            report["elements-kept"] = sum(int(totals.col_count.sum()) for totals in found.values()) / elements

        def make(name: str, linear: nn.Linear) -> LowBitLinear:
            if self.elementwise:
                return ElementLinear(linear, calibration.exemption, self.threshold)
            return MixedLinear(linear, calibration.exemption, outlier_K[name])

        report |= swap(model, make)
        mixed = [module for module in model.modules() if isinstance(module, MixedLinear | ElementLinear)]
        weights = sum(module.in_features * module.out_features for module in mixed)
        return report | {"weights-kept": sum(module.kept() for module in mixed) / weights}


class MixedLinear(LowBitLinear):
    """Some columns in full precision, the rest in int8 per token. J: columns kept."""

    outlier_K: Tensor
    kept_NJ: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, outlier_K: Tensor) -> None:
        super().__init__(linear, exemption)
        self.register_buffer("outlier_K", outlier_K)
        self.register_buffer("kept_NJ", linear.weight.detach()[:, outlier_K])
        self.rest = _int8(linear, exemption, linear.weight.masked_fill(outlier_K, 0.0))
        self.columns = Derived()

    @property
    def columns_J(self) -> Tensor:
        """Those that are kept, ascending."""
        return self.columns.of(self.outlier_K, lambda outlier_K: outlier_K.nonzero().flatten())

    def plan(self) -> Plan:
        return {"columns": len(self.columns_J)}

    @classmethod
    def blank(cls, linear: nn.Linear, exemption: Exemption, plan: Plan) -> "MixedLinear":
        return cls(linear, exemption, torch.arange(linear.in_features) < plan["columns"])

    def kept(self) -> int:
        """Weights in full precision."""
        return self.kept_NJ.numel()

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        found = outlier_stats(x.flatten(0, -2), skip_columns=self.outlier_K, quantize=True)
        y = _product(found.q, found.row_scale, self.rest).to(x.dtype).unflatten(0, x.shape[:-1])
        if len(self.columns_J):
            y += F.linear(x[..., self.columns_J], self.kept_NJ.to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)

    def dequantized_NK(self) -> Tensor:
        return self.rest.dequantized_NK().index_copy(1, self.columns_J, self.kept_NJ.float())

    def stored_bits(self) -> int:
        return self.rest.stored_bits() + 8 * (self.kept_NJ.nbytes + self.columns_J.nbytes)


class ElementLinear(LowBitLinear):
    """Inputs from the threshold on meet full-precision weights, the rest int8 ones, per token."""

    weight: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, threshold: float) -> None:
        super().__init__(linear, exemption)
        self.threshold = threshold
        self.register_buffer("weight", linear.weight.detach().clone())
        self.rest = _int8(linear, exemption, linear.weight)

    def plan(self) -> Plan:
        return {"threshold": self.threshold}

    @classmethod
    def blank(cls, linear: nn.Linear, exemption: Exemption, plan: Plan) -> "ElementLinear":
        return cls(linear, exemption, plan["threshold"])

    def kept(self) -> int:
        """Weights in full precision."""
        return self.weight.numel()

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        x_MK = x.flatten(0, -2)
        found = outlier_stats(x_MK, self.threshold, quantize=True)
        y_MN = _product(found.q, found.row_scale, self.rest).to(x.dtype)
        (rows,) = found.row_count.nonzero(as_tuple=True)
        if len(rows):
            x_RK = x_MK[rows]
            ordinary = x_RK.float().abs() < self.threshold  # in float32, as the op compares
            y_MN[rows] += F.linear(x_RK.masked_fill(ordinary | x_RK.isnan(), 0.0), self.weight.to(x.dtype))
        y = y_MN.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y.add_(self.bias)

    def dequantized_NK(self) -> Tensor:
        return self.rest.dequantized_NK()

    def stored_bits(self) -> int:
        return self.rest.stored_bits() + 8 * self.weight.nbytes


def _int8(linear: nn.Linear, exemption: Exemption, weight_NK: Tensor) -> IntegerLinear:
    shape = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    return IntegerLinear(shape, exemption, nearest(weight_NK, 8), 8, Rounding(8, "token"))


def _product(q_MK: Tensor, row_scale_M: Tensor, rest: IntegerLinear) -> Tensor:
    return rest.scaled_sums(q_MK.float(), 127).mul_((row_scale_M / 127).unsqueeze(-1))
