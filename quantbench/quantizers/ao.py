"""torchao's INT8: weights per output channel, inputs dynamically per token, as `quantize_` makes them: a reference.

How it works. `Int8DynamicActivationInt8WeightConfig` in its defaults, symmetric and per row, on each Linear:

    scale = max(absmax / 127.5, 2^-23)        q = clamp(round(x * (1 / scale)), -128, 127)

for the rows of the weights once and for each token of the inputs as it arrives; the product of the integers is exact.

How it differs from `w8a8-token`. There the scale is absmax / 127 and the code mirrors itself. Here the step is .4%
finer, -128 is in use, and the largest positive value of each range is clipped by half a step (127.5 has no code). A
range below 127.5 * 2^-23 = 1.5e-5 is not resolved.

How it differs from calling torchao by hand. `set_inductor_config` is off: it changes how the whole process compiles.
Exempt positions are fed as zeros, and computed apart. What the package says as it is imported, of extensions for other
machines and of its use of torch, is silenced.

What it leaves out. torchao's other schemes: its 4-bit kernels need a GPU. The package is an optional extra.
"""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from quantbench.calibration import Calibration, Exemption
from quantbench.quantizers import LowBitLinear, Quantizer, swap

LOUD = ("torchao", "torch.utils._pytree")  # loggers, when it is imported


@dataclass(frozen=True)
class TorchaoInt8(Quantizer):
    title: ClassVar[str] = "torchao: INT8 weights per channel, activations dynamic per token"
    packages: ClassVar[tuple[str, ...]] = ("torchao",)
    quantizes_activations: ClassVar[bool] = True

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        torchao()
        return swap(model, lambda name, linear: TorchaoLinear(linear, calibration.exemption))


def torchao() -> ModuleType:
    """torchao.quantization, imported when it is needed; ValueError where it is not installed."""
    before = {name: logging.getLogger(name).level for name in LOUD}
    try:
        for name in LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        import torchao.quantization
    except ImportError as error:
        raise ValueError(f"torchao-int8dyn: {error}; it comes with: pip install quantbench[peers]") from None
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    return torchao.quantization


class TorchaoLinear(LowBitLinear):
    def __init__(self, linear: nn.Linear, exemption: Exemption) -> None:
        super().__init__(linear, exemption)
        ao = torchao()
        self.inner = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        self.inner.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        ao.quantize_(self.inner, ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        y = self.inner(counted)
        return y if self.bias is None else y + self.bias

    def dequantized_NK(self) -> Tensor:
        return self.inner.weight.dequantize()

    def stored_bits(self) -> int:
        weight: Any = self.inner.weight  # an Int8Tensor
        return 8 * sum(part.nbytes for part in (weight.qdata, weight.scale, weight.zero_point) if part is not None)
