"""bitsandbytes' own modules, as a user of `load_in_8bit` or `load_in_4bit` meets them: the reference.

How it works. `Linear8bitLt`: int8 weights per output channel, inputs int8 per token; columns in which any token of
the batch reaches the threshold are multiplied in full precision with dequantized weights (LLM.int8(), batch-
dependent). `Linear4bit`: weights as one of 16 levels times the absmax of their block of 64, a float32; activations in
full precision. The levels of `nf4` (arXiv:2305.14314) are quantiles of a normal distribution; those of `fp4` are floats
of a sign, two bits of exponent and one of fraction, over their largest: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1.

How it differs from calling bitsandbytes by hand. Its modules are always in eval mode (in train mode Linear8bitLt
quantizes no activations and ignores the threshold); its log line on every float32 input is silenced; Linear4bit's
in-place repacking on CPUs with AVX512-BF16 is off, because it computes in bf16 and its result would depend on the
machine; exempt positions are fed as zeros, so that they make no columns outliers, and computed apart.

What it leaves out. Nested ("double") quantization of the scales, fp16 models. Inputs and weights of Linear8bitLt still
pass through fp16 on their way to int8, and on a GPU its outputs do, before the bias: what exceeds 65,504 is infinite
there. `above-fp16` reports the share of calibration tokens (over all Linears) of which an input or an output does, or
whose Linear has such a weight. With a threshold, inputs alone are spared: their columns are taken out before.
"""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration, Exemption, passes
from quantbench.quantizers import LowBitLinear, Quantizer, swap

ABOVE_FP16 = 65_504 + 2.0**-8  # the float32 after float16's largest
BLOCK = 64  # weights of 4 bits that share a scale

Kind = Literal["nf4", "fp4"]


def bitsandbytes() -> ModuleType:
    """The package, imported when it is needed (5 s) and kept quiet."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@dataclass(frozen=True)
class BnbInt8(Quantizer):
    title: ClassVar[str] = "bitsandbytes Linear8bitLt: INT8, outlier columns of each batch in full precision"
    quantizes_activations: ClassVar[bool] = True

    threshold: float = 6.0  # |activation| from which a column is an outlier; 0: none

    def check(self, widths: list[int]) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: {self.threshold} means nothing; choose 0 (no outliers) or more")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        self.check([])
        share = above_fp16(model, calibration)
        report = swap(model, lambda name, linear: BnbInt8Linear(linear, calibration.exemption, self.threshold))
        return report | {"above-fp16": share}


def above_fp16(model: nn.Module, calibration: Calibration) -> float:
    """The share of calibration tokens, over all Linears, of whose products float16 cannot hold a part."""
    linears = {name: linear for name, (_, linear) in anatomy(model).linears().items()}
    loud = {name: bool((linear.weight.abs() >= ABOVE_FP16).any()) for name, linear in linears.items()}
    above = tokens = 0

    def show(place: str, x: Tensor, exempt: Tensor | None) -> None:
        nonlocal above, tokens
        x_MK = x.flatten(0, -2) if exempt is None else x[~exempt.squeeze(-1)]
        tokens += len(x_MK)
        if loud[place]:
            above += len(x_MK)
            return
        y_MN = F.linear(x_MK, linears[place].weight)
        above_M = ((x_MK.abs() >= ABOVE_FP16).any(-1)) | ~(y_MN.abs() < ABOVE_FP16).all(-1)
        above += int(above_M.sum())

    passes(model, calibration, ("inputs",), show)
    return above / max(1, tokens)


@dataclass(frozen=True)
class Bnb4(Quantizer):
    kind: Kind = "nf4"

    @property
    def title(self) -> str:  # type: ignore[override]
        """What it is, in a line."""
        kind = self.kind.upper()
        return f"bitsandbytes Linear4bit: {kind} weights in blocks of {BLOCK}, activations in full precision"

    def check(self, widths: list[int]) -> None:
        for width in widths:
            if width % BLOCK:
                raise ValueError(f"bnb-{self.kind}: blocks of {BLOCK} do not divide a Linear's input width {width}")

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        for name, (_, linear) in anatomy(model).linears().items():
            try:
                self.check([linear.in_features])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return swap(model, lambda name, linear: Bnb4Linear(linear, calibration.exemption, self.kind))


class BnbInt8Linear(LowBitLinear):
    def __init__(self, linear: nn.Linear, exemption: Exemption, threshold: float) -> None:
        super().__init__(linear, exemption)
        bnb = bitsandbytes().nn
        self.inner = bnb.Linear8bitLt(
            self.in_features, self.out_features, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        weight = linear.weight.detach().cpu()  # quantized as it moves from the CPU to its device
        self.inner.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        self.inner.to(linear.weight.device).eval()
        self.inner.init_8bit_state()

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        y = self.inner(counted.flatten(0, -2)).unflatten(0, x.shape[:-1])  # it mistakes more than 3 axes
        return y if self.bias is None else y + self.bias

    def dequantized_NK(self) -> Tensor:
        state = self.inner.state
        return state.CB.float() * (state.SCB / 127).unsqueeze(1)

    def stored_bits(self) -> int:
        return 8 * (self.inner.state.CB.nbytes + self.inner.state.SCB.nbytes)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # in train mode Linear8bitLt would not quantize its input


class Bnb4Linear(LowBitLinear):
    def __init__(self, linear: nn.Linear, exemption: Exemption, kind: Kind) -> None:
        super().__init__(linear, exemption)
        bnb = bitsandbytes().nn
        self.inner = bnb.Linear4bit(
            self.in_features, self.out_features, bias=False, compute_dtype=torch.float32, device="meta"
        )
        self.inner.support_avx512bf16_for_cpu = False
        weight = linear.weight.detach().cpu()
        self.inner.weight = bnb.Params4bit(
            weight, blocksize=BLOCK, compress_statistics=False, quant_type=kind, module=self.inner
        )
        self.inner.to(linear.weight.device).eval()

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        y = self.inner(x)
        return y if self.bias is None else y + self.bias

    def dequantized_NK(self) -> Tensor:
        return bitsandbytes().functional.dequantize_4bit(self.inner.weight.data, self.inner.weight.quant_state)

    def stored_bits(self) -> int:
        return 8 * (self.inner.weight.nbytes + self.inner.weight.quant_state.absmax.nbytes)
