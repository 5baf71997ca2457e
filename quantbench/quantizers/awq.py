"""AWQ: weights of 4 bits, the channels that carry large inputs scaled up before they are rounded (arXiv:2306.00978).

How it works. A weight's rounding error is about the same wherever it stands in its group, but it is multiplied by its
input. So each input channel j of the weights is multiplied by s_j before rounding, and its input by 1 / s_j:

    y = (x / s) W_q^T + bias        W_q = nearest(W diag(s))
    s_j = m_j^alpha, over the geometric mean of its largest and smallest        m_j = mean |x_j|

alpha is one of 0, 1/20, ..., 19/20: that with the least ||X (W - W_q diag(1/s))^T||^2 over the calibration inputs. At
alpha 0 nothing is scaled. Then the range of each group is shrunk, to 19/20, 18/20, ... of it: to where the group's own
error is least. `alpha` (mean over Linears) and `clipped` (share of groups) are reported.

How it differs from the authors' code. There 1 / s is folded into what comes before (a norm's gain, the rows of another
Linear), the same s for all Linears that read it, and alpha is judged by the output of the attention or MLP that they
are a part of. Here every Linear has its own s, stored beside its integers and multiplied into its input as the model
runs: this suits any architecture and costs K multiplications a token and 32 bits an input feature; alpha is judged by
that Linear's output alone. Codes are symmetric (there they are not), so that `w4a16-rtn` is the same but for the
scaling. m is taken relative to the largest, so that the least s (1e-4) is that of no unit. A clip stays only in those
output channels where it lowers the error of all groups together; query and key projections are clipped, too. All inputs
are those of the full-precision model; errors are exact (over all tokens, by X^T X), not those of a sample.

What it leaves out. Folding, kernels. The X^T X are collected in portions of as many blocks as fill a GiB, a pass each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration, Exemption
from quantbench.ops.integers import quantize
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

LEAST = 1e-4  # of m, over its largest
PORTION = 2**30  # bytes


@dataclass(frozen=True)
class AWQ(Quantizer):
    weights: int = 4  # bits, 2 to 8
    group: int = 64  # input features that share a weight scale; 0: all
    grid: int = 20  # steps of alpha, and of the shrinking
    max_shrink: float = 0.5  # of a group's range; 0: no clipping

    @property
    def title(self) -> str:  # type: ignore[override]
        """What it is, in a line."""
        grouped = f" in groups of {self.group}" if self.group else ""
        return f"INT{self.weights} weights{grouped}, input channels scaled by AWQ, activations in full precision"

    def check(self, widths: list[int]) -> None:
        check_groups(self.weights, self.group, widths)
        if self.grid < 1:
            raise ValueError(f"grid: {self.grid} steps; choose 1 (alpha 0 alone) or more")
        if not 0 <= self.max_shrink < 1:
            raise ValueError(f"max-shrink: {self.max_shrink} of a range; choose 0 (no clipping) to less than 1")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        linears = anatomy(model).linears()
        self.check([linear.in_features for _, linear in linears.values()])
        made: dict[str, LowBitLinear] = {}
        alphas, clipped = [], []
        for layers in _portions(linears.values()):
            for name, inputs in inputs_of(model, calibration, layers).items():
                _, linear = linears[name]
                s_K, alpha = self.scales(linear.weight, inputs)
                codes, clipped_NG = self.clip(linear.weight, inputs, s_K)
                made[name] = ScaledLinear(linear, calibration.exemption, codes, self.weights, s_K)
                alphas.append(alpha)
                clipped.append(clipped_NG.flatten())
        report = swap(model, lambda name, linear: made[name])
        return report | {"alpha": sum(alphas) / len(alphas), "clipped": torch.cat(clipped).double().mean().item()}

    def scales(self, weight_NK: Tensor, inputs: Inputs) -> tuple[Tensor, float]:
        """s of every input channel, float32, and the alpha it comes from."""
        largest = inputs.absolute_K.amax()
        m_K = (inputs.absolute_K / largest.where(largest > 0, 1)).clamp(min=LEAST)
        found: list[tuple[float, Tensor, float]] = []
        for step in range(self.grid):
            s_K = m_K.pow(step / self.grid)
            s_K = (s_K / (s_K.amax() * s_K.amin()).sqrt()).float()
            codes = nearest(weight_NK.detach().float() * s_K, self.weights, self.group)
            error_N = inputs.error_N(codes.dequantized_NK() / s_K - weight_NK.detach())
            found.append((error_N.nansum().item(), s_K, step / self.grid))  # NaN: of channels with a NaN weight
        _, s_K, alpha = min(found, key=lambda one: one[0])
        return s_K, alpha

    def clip(self, weight_NK: Tensor, inputs: Inputs, s_K: Tensor) -> tuple[Codes, Tensor]:
        """The scaled weight as integers in ranges that may be shrunk, and which groups' are."""
        w_NK = weight_NK.detach().float() * s_K
        inputs = Inputs(inputs.gram_KK / s_K.outer(s_K), inputs.absolute_K / s_K)
        full = best = nearest(w_NK, self.weights, self.group)
        groups = full.scale_NG.shape[1]
        gram_GKK = torch.stack(
            [part.chunk(groups, 1)[index] for index, part in enumerate(inputs.gram_KK.chunk(groups, 0))]
        )

        def error_NG(codes: Codes) -> Tensor:
            change_GNK = (codes.dequantized_NK() - w_NK).double().unflatten(1, (groups, -1)).transpose(0, 1)
            return ((change_GNK @ gram_GKK) * change_GNK).sum(-1).T

        least_NG = error_NG(full)
        for step in range(1, int(self.max_shrink * self.grid)):
            scale_NG = full.scale_NG * (1 - step / self.grid)
            q_NGK = quantize(w_NK.unflatten(1, (groups, -1)), scale_NG.unsqueeze(-1), self.weights)
            tried = Codes(q_NGK.flatten(1), scale_NG)
            here_NG = error_NG(tried)
            best = _either(here_NG < least_NG, tried, best)
            least_NG = torch.minimum(here_NG, least_NG)
        helped_N = inputs.error_N(best.dequantized_NK() - w_NK) < inputs.error_N(full.dequantized_NK() - w_NK)
        best = _either(helped_N.unsqueeze(1).expand(-1, groups), best, full)
        return best, best.scale_NG < full.scale_NG


class ScaledLinear(LowBitLinear):
    """Integer weights of scaled input channels, the inputs divided by the same scales."""

    inverse_K: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, codes: Codes, bits: int, s_K: Tensor) -> None:
        super().__init__(linear, exemption)
        self.register_buffer("inverse_K", 1 / s_K)
        bare = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        self.scaled = IntegerLinear(bare, exemption, codes, bits)

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        inverse_K = self.inverse_K.to(x.dtype)
        y = self.scaled.low_bit(x * inverse_K, counted * inverse_K)
        return y if self.bias is None else y + self.bias

    def dequantized_NK(self) -> Tensor:
        return self.scaled.dequantized_NK() * self.inverse_K

    def stored_bits(self) -> int:
        return self.scaled.stored_bits() + 8 * self.inverse_K.nbytes


def _either(choose_NG: Tensor, yes: Codes, no: Codes) -> Codes:
    """Of every group the codes of one or the other."""
    columns = yes.q_NK.shape[1] // choose_NG.shape[1]
    return Codes(
        torch.where(choose_NG.repeat_interleave(columns, 1), yes.q_NK, no.q_NK),
        torch.where(choose_NG, yes.scale_NG, no.scale_NG),
    )


def _portions(linears: Iterable[tuple[int, nn.Linear]]) -> Iterator[list[int]]:
    """Blocks whose X^T X fill a portion together, in the order of the model, from (layer, Linear)."""
    bytes_of: dict[int, int] = {}
    for layer, linear in linears:
        bytes_of[layer] = bytes_of.get(layer, 0) + 8 * linear.in_features**2
    layers: list[int] = []
    for layer in bytes_of:
        if layers and sum(bytes_of[other] for other in (*layers, layer)) > PORTION:
            yield layers
            layers = []
        layers.append(layer)
    yield layers
