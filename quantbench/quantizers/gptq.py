"""GPTQ: weights of 4 bits, each column's rounding error made good by the columns still to come (arXiv:2210.17323).

How it works. For a Linear with weights W and calibration inputs X, the error ||X (W - W_q)^T||^2 of every output
channel is the same quadratic form of its weights, H = 2 X^T X. Columns are rounded one after another; the error of
column j is spread over the columns behind it, in the amount that is optimal for them:

    H <- H + damping mean(diag H) I        U = upper Cholesky factor of H^-1, H^-1 = U^T U
    q_j = round(w_j / scale)        e_j = (w_j - q_j scale) / U_jj        w_k <- w_k - e_j U_jk for k > j

The row j of U is what the textbook gets by striking column j out of the inverse, step by step. A group's scale is the
absmax of its weights as they are when its first column's turn comes. The blocks of the model are quantized one after
another: H is that of the model whose earlier blocks are quantized already, and within a block that of its weights in
full precision.

How it differs from the authors' code. Symmetric codes (they are asymmetric by default), so that `w4a16-rtn` is the same
but for the compensation. A feature that is zero in the whole calibration keeps its rounded weights; there it loses
them. `act_order` (the largest inputs first) takes each group's scale from the original weights and leaves groups
contiguous, as its `static_groups` does. Everything is computed in float64, so that the blocking of the updates,
there a parameter, changes nothing. And it is never worse than rounding to nearest: an output channel whose error on the
calibration inputs the compensation did not lower is rounded instead; `rounded-instead` is the share of such channels.

What it leaves out. `true_sequential` (an H after each Linear within a block), the search for a clipped range,
kernels, and the storing of a block's outputs for the next one: each block's H needs a pass over the calibration, up
to there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration
from quantbench.ops.integers import dequantize, quantize, scale_of
from quantbench.quantizers import (
    Codes,
    Inputs,
    IntegerLinear,
    LowBitLinear,
    Quantizer,
    check_groups,
    inputs_of,
    nearest,
    swap,
)

BLOCK = 128  # columns whose updates reach the columns behind them together, where groups do not say


@dataclass(frozen=True)
class GPTQ(Quantizer):
    weights: int = 4  # bits, 2 to 8
    group: int = 64  # input features that share a weight scale; 0: all
    damping: float = 0.01  # of the mean of H's diagonal
    act_order: bool = False  # the columns with the largest inputs first

    @property
    def title(self) -> str:  # type: ignore[override]
        """What it is, in a line."""
        grouped = f" in groups of {self.group}" if self.group else ""
        return f"INT{self.weights} weights{grouped} by GPTQ, activations in full precision"

    def check(self, widths: list[int]) -> None:
        check_groups(self.weights, self.group, widths)
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping: {self.damping} makes no matrix invertible; choose more than 0, such as 0.01")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        linears = anatomy(model).linears()
        self.check([linear.in_features for _, linear in linears.values()])
        seen: dict[str, Inputs] = {}
        instead: list[Tensor] = []

        def make(name: str, linear: nn.Linear) -> LowBitLinear:
            if name not in seen:  # a block's first Linear: the blocks before it are quantized by now
                seen.clear()
                seen.update(inputs_of(model, calibration, [linears[name][0]]))
            codes, rounded_N = self.fit(linear.weight, seen[name])
            instead.append(rounded_N)
            return IntegerLinear(linear, calibration.exemption, codes, self.weights)

        return swap(model, make) | {"rounded-instead": torch.cat(instead).double().mean().item()}

    def fit(self, weight_NK: Tensor, inputs: Inputs) -> tuple[Codes, Tensor]:
        """The weight as integers, and which output channels are merely rounded."""
        rounded = nearest(weight_NK, self.weights, self.group)
        moved = compensated(weight_NK, inputs.gram_KK, self.weights, self.group, self.damping, self.act_order)
        before_N, after_N = (inputs.error_N(codes.dequantized_NK() - weight_NK) for codes in (rounded, moved))
        rounded_N = ~(after_N < before_N)  # nor where it is NaN
        choose = rounded_N.unsqueeze(1)
        q_NK = torch.where(choose, rounded.q_NK, moved.q_NK)
        return Codes(q_NK, torch.where(choose, rounded.scale_NG, moved.scale_NG)), rounded_N


def compensated(
    weight_NK: Tensor, gram_KK: Tensor, bits: int, group: int = 0, damping: float = 0.01, act_order: bool = False
) -> Codes:
    """The weight as integers by the formula above; gram_KK: X^T X, whose factor 2 cancels."""
    width = weight_NK.shape[1]
    diagonal_K = gram_KK.diagonal()
    order_K = torch.arange(width, device=diagonal_K.device)
    if act_order:
        order_K = diagonal_K.argsort(descending=True, stable=True)
    w_NK, q_NK = weight_NK.detach().double()[:, order_K], weight_NK.new_empty(weight_NK.shape, dtype=torch.int8)
    factor_KK = _factor(gram_KK[order_K][:, order_K], damping * diagonal_K.mean())
    group_of = (order_K // (group or width)).tolist()
    scale_NG = nearest(weight_NK, bits, group).scale_NG
    for start in range(0, width, group or BLOCK):
        here, behind = slice(start, start + (group or BLOCK)), slice(start + (group or BLOCK), None)
        w_NJ, factor_JJ = w_NK[:, here], factor_KK[here, here]
        if group and not act_order:
            scale_NG[:, start // group] = scale_of(w_NJ.abs().amax(-1), bits)
        error_NJ = torch.empty_like(w_NJ)
        for j in range(w_NJ.shape[1]):
            scale_N = scale_NG[:, group_of[start + j]]
            q_NK[:, start + j] = q_N = quantize(w_NJ[:, j], scale_N, bits)
            error_NJ[:, j] = (w_NJ[:, j] - dequantize(q_N, scale_N)) / factor_JJ[j, j]
            w_NJ[:, j + 1 :].addr_(error_NJ[:, j], factor_JJ[j, j + 1 :], alpha=-1)
        w_NK[:, behind] -= error_NJ @ factor_KK[here, behind]
    return Codes(q_NK[:, order_K.argsort()], scale_NG)


def _factor(gram_KK: Tensor, damp: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped matrix' inverse. A matrix of zeros (no inputs) counts as the identity."""
    damped_KK = gram_KK + torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device) * damp.where(damp > 0, 1)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    return torch.linalg.cholesky(inverse_KK, upper=True)
