"""Round to nearest: weights and activations as symmetric integers, with nothing learned, moved or searched.

How it works. A Linear's weights take one scale per output channel, or per group of its input features. Its inputs
take one scale for everything, set at calibration (`static`) or by the batch at hand (`tensor`), or one per token
(`token`). Which it is decides whether an extreme token hurts the others: one feature of 300 in a Gaussian
[256, 512] leaves its neighbours 3.5 dB under a shared scale, and 42.6 dB under their own. With `residual` the
residual stream is rounded after every block, too, per tensor and statically; there the peak itself lives.

How it differs from bitsandbytes and torchao. Integer products are exact here and results float32: no fp16 cast in
front (which rounds inputs and overflows at 65,504), no zero points, no fused kernels; what is measured is the
rounding, not a backend. The price is speed on large models.

What it leaves out. Qualcomm's full scheme (arXiv:2306.12929) also rounds norm outputs, attention scores and
probabilities; asymmetric ranges; clipping searches (GPTQ, AWQ). Queries, keys and values stay in full precision.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from quantbench.anatomy import anatomy
from quantbench.quantizers import (
    FULL,
    Calibration,
    IntegerLinear,
    LowBitLinear,
    Quantizer,
    Scope,
    absmax,
    quantize_residual,
    swap,
)


@dataclass(frozen=True)
class Integer(Quantizer):
    """Every scheme of this file; the subclasses change only defaults."""

    quantizes_activations: ClassVar[bool] = True

    weights: int = 8  # bits, 2 to 8
    activations: int = 8  # bits, 2 to 8; 16: full precision
    group: int = 0  # input features that share a weight scale; 0: all, one scale per output channel
    range: Scope = "static"
    residual: bool = False  # the residual stream after each block, at `activations` bits, always static

    def check(self, widths: list[int]) -> None:
        if not 2 <= self.weights <= 8:
            raise ValueError(f"weights: {self.weights} bits; choose 2 to 8")
        if not (2 <= self.activations <= 8 or self.activations == FULL):
            raise ValueError(f"activations: {self.activations} bits; choose 2 to 8, or {FULL} for full precision")
        if self.residual and self.activations == FULL:
            raise ValueError(f"residual: needs activations of 2 to 8 bits, not {FULL}")
        if self.quantizes_activations != (self.activations < FULL):
            raise ValueError(f"activations: {self.activations} bits contradict the name; choose another quantizer")
        for width in widths:
            if self.group < 0 or (self.group and width % self.group):
                raise ValueError(f"group: {self.group} does not divide a Linear's input width {width}")
            if self.weights <= 4 and width % 2:
                raise ValueError(f"weights: {self.weights} bits are packed two a byte; the input width {width} is odd")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        parts = anatomy(model)
        self.check([linear.in_features for _, linear in parts.linears().values()])
        static = self.range == "static" and self.activations < FULL
        largest = absmax(model, calibration, self.residual) if static or self.residual else {}

        def make(name: str, linear: nn.Linear) -> LowBitLinear:
            span = largest[name] if static else None
            return IntegerLinear(
                linear, calibration.exemption, self.weights, self.group, self.activations, self.range, span
            )

        report = swap(model, make)
        if self.residual:
            for layer, block in enumerate(parts.blocks):
                quantize_residual(block, largest[str(layer)], self.activations, calibration.exemption)
        return report


@dataclass(frozen=True)
class W8A8StaticResidual(Integer):
    title: ClassVar[str] = "INT8 weights, INT8 Linear inputs and residual stream, static ranges per tensor"
    residual: bool = True


@dataclass(frozen=True)
class W8A8Static(Integer):
    title: ClassVar[str] = "INT8 weights, INT8 Linear inputs, static ranges per tensor"


@dataclass(frozen=True)
class W8A8Tensor(Integer):
    title: ClassVar[str] = "INT8 weights, INT8 Linear inputs, one range per batch"
    range: Scope = "tensor"


@dataclass(frozen=True)
class W8A8Token(Integer):
    title: ClassVar[str] = "INT8 weights, INT8 Linear inputs, one range per token"
    range: Scope = "token"


@dataclass(frozen=True)
class W4A16RTN(Integer):
    title: ClassVar[str] = "INT4 weights in groups, activations in full precision"
    quantizes_activations: ClassVar[bool] = False
    weights: int = 4
    activations: int = FULL
    group: int = 64


@dataclass(frozen=True)
class W4A8Token(Integer):
    title: ClassVar[str] = "INT4 weights in groups, INT8 Linear inputs, one range per token"
    weights: int = 4
    group: int = 64
    range: Scope = "token"


@dataclass(frozen=True)
class W4A4Token(W4A8Token):
    title: ClassVar[str] = "INT4 weights in groups, INT4 Linear inputs, one range per token"
    activations: int = 4
