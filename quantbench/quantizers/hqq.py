"""HQQ: weights of 4 bits, their zero points fitted to the weights alone, without data: the package `hqq` itself.

How it works (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; no arXiv id). A
group takes its scale s from the least to the largest of its weights, and a zero point z that need not be whole. z is
found by half-quadratic splitting, so that sum |W - s (q - z)|^p with p = .7 is small, which forgives single large
errors:

    q = clamp(round(W / s + z), 0, 15)        e = shrink(W - s (q - z))        z = mean(q - (W - e) / s)
    shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)        beta from 10, times 1.01 each round

for at most 20 rounds, while the layer's mean |W - s (q - z)| falls.

How it differs from calling the package by hand. Nothing in the numbers: its codes, scales and zero points move into our
own packed Linear, which is float32 where the package's default is float16; 8 is taken from codes and zero points alike,
so that codes fit our nibbles. Groups lie along the input features (the package's `axis=1`), as everywhere here.

What it leaves out. Other bits, `axis=0`, quantized scales, the package's kernels. On a GPU the package iterates in
float16, so that its zero points differ a little from those of a CPU. Groups that span less than 1e-4 become a constant
(the package gives them scale 1), and a NaN weight stops the rounds for its whole layer: both are the package's.

The package is an optional extra, and no part of `make setup`'s environment: where it is installed transformers imports
it into every process, and it takes some seconds.
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration
from quantbench.quantizers import Codes, IntegerLinear, Quantizer, check_groups, swap

BITS = 4


@dataclass(frozen=True)
class HQQ(Quantizer):
    title: ClassVar[str] = "INT4 weights in groups with fitted zero points (HQQ), activations in full precision"
    packages: ClassVar[tuple[str, ...]] = ("hqq",)

    group: int = 64  # input features that share a scale and a zero point

    def check(self, widths: list[int]) -> None:
        if self.group < 8:
            raise ValueError(f"group: {self.group} weights for a scale and a zero point; choose 8 or more")
        check_groups(BITS, self.group, widths)

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        self.check([linear.in_features for _, linear in anatomy(model).linears().values()])
        package = packaged_quantizer()
        return swap(
            model,
            lambda name, linear: IntegerLinear(
                linear, calibration.exemption, codes_of(package, linear.weight, self.group), BITS
            ),
        )


def packaged_quantizer() -> Any:
    """The package's `Quantizer`; ValueError where it is not installed."""
    try:
        with warnings.catch_warnings():  # it compiles functions as it is imported, and so loads what torch deprecates
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
            from hqq.core.quantize import Quantizer as Packaged
    except ImportError as error:
        raise ValueError(f"w4a16-hqq: {error}; it comes with: pip install quantbench[peers]") from None
    return Packaged


def codes_of(package: Any, weight_NK: Tensor, group: int) -> Codes:
    """The weight as the package's integers, less 8."""
    q, found = package.quantize(
        weight_NK.detach(), BITS, group_size=group, axis=1, bitpack=False, device=str(weight_NK.device)
    )
    q_NK = (q.reshape(weight_NK.shape).float() - 8).nan_to_num(0.0).to(torch.int8)
    scale_NG, zero_NG = (found[name].reshape(len(weight_NK), -1).float() for name in ("scale", "zero"))
    return Codes(q_NK, scale_NG.clone(), zero_NG - 8)
