"""How a trained model is brought to few bits. One file, one family of quantizers; this file is the contract.

A quantizer is a frozen dataclass of parameters. `quantize` changes a copy of a model in place: every Linear
of its blocks becomes a low-bit module, and where the quantizer says so other sites (the residual stream, keys and
values, scores, ...) are rounded too. Embeddings and the output head stay in full precision unless they are asked for.
What is common to all (integer weights and activations, the swap, the exemption of extreme tokens) is written here once.

Shapes: B sequences, T tokens, M tokens of any sequences, K input features, N output features, G groups of K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration, Exemption, what_counts
from quantbench.ops.integers import dequantize, integer_matmul, pack_int4, quantize, scale_of, steps, unpack_int4
from quantbench.ops.ranges import Span

FULL = 16  # "bits" of what is not quantized
Scope = Literal[
    "static", "token", "tensor"
]  # a range set at calibration, by each token, or by all that arrive together
Chosen = Callable[[str, str], bool]  # (site or "weights", place): whether it is quantized


@dataclass(frozen=True)
class Quantizer:
    """The contract of an entry."""

    quantizes_activations: ClassVar[bool] = False  # else exemption has no meaning
    title: ClassVar[str] = ""
    version: ClassVar[int] = 1  # bumped by hand when its numbers change: it is part of the cells' keys

    def check(self, widths: list[int]) -> None:
        """ValueError where a Linear's input width cannot be quantized so (a group that does not divide it)."""

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        """Quantizes the model in place; what it wants recorded (share of columns kept, bits per weight, ...)."""
        raise NotImplementedError


# --- The low-bit Linear ---------------------------------------------------------------------------------------------


class LowBitLinear(nn.Module, ABC):
    """What replaces a Linear. Exempt positions meet the same low-bit weights with an input in full precision."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, exemption: Exemption) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.exemption = exemption
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @abstractmethod
    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        """The product as the quantizer makes it; at exempt positions, where counted is 0, the result is not used."""

    @abstractmethod
    def dequantized_NK(self) -> Tensor:
        """What the stored weights stand for."""

    @abstractmethod
    def stored_bits(self) -> int:
        """Bits of everything that stands for the weights, scales included."""

    def forward(self, x: Tensor) -> Tensor:
        exempt_BT = self.exemption.mask_for(x)
        y = self.low_bit(x, x if exempt_BT is None else x.masked_fill(exempt_BT.unsqueeze(-1), 0.0))
        if exempt_BT is not None:
            y[exempt_BT] = F.linear(x[exempt_BT], self.dequantized_NK().to(x.dtype), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.stored_bits()} bits"


class Rounding(nn.Module):
    """An activation as integers: one range for all (`static`), for what arrives together (`tensor`), or for each token.

    A token is what the last axis holds: [B, T, K], of heads [B, H, T, E], of scores [B, H, T, S].
    """

    static_scale: Tensor | None
    static_zero: Tensor | None

    def __init__(self, bits: int, scope: Scope, span: Span | None = None, symmetric: bool = True) -> None:
        super().__init__()
        self.bits, self.scope, self.symmetric = bits, scope, symmetric
        assert (span is not None) == (scope == "static"), (scope, span)
        scale, zero = (None, None) if span is None else steps(span.low, span.high, bits, symmetric)
        self.register_buffer("static_scale", scale)
        self.register_buffer("static_zero", None if symmetric else zero)

    def integers(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q int8, its scale and its zero point (None: 0), each broadcasting against x. `counted`: x, 0 where it counts
        for no range."""
        scale, zero = self.static_scale, self.static_zero
        if scale is None:
            if self.symmetric:
                absmax = counted.abs().amax(-1, keepdim=True) if self.scope == "token" else counted.abs().amax()
                scale = scale_of(absmax, self.bits)
            else:
                ends = torch.aminmax(counted, dim=-1, keepdim=True) if self.scope == "token" else torch.aminmax(counted)
                scale, zero = steps(ends.min.clamp(max=0), ends.max.clamp(min=0), self.bits, symmetric=False)
        return quantize(x, scale, self.bits, zero), scale, zero

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """What the integers stand for."""
        return dequantize(*self.integers(x, counted)).to(x.dtype)


class Codes(NamedTuple):
    """A weight as integers."""

    q_NK: Tensor  # int8
    scale_NG: Tensor  # float32
    zero_NG: Tensor | None = None  # w ~ (q - zero) scale


def nearest(weight_NK: Tensor, bits: int, group: int = 0, symmetric: bool = True) -> Codes:
    """The weight rounded to the nearest integers, one range per output channel or per `group` input features."""
    weight_NGK = weight_NK.detach().float().unflatten(1, (-1, group or weight_NK.shape[1]))
    if symmetric:
        scale_NG, zero_NG = scale_of(weight_NGK.abs().amax(-1), bits), None
    else:
        low, high = weight_NGK.amin(-1).clamp(max=0), weight_NGK.amax(-1).clamp(min=0)
        scale_NG, zero_NG = steps(low, high, bits, symmetric)
    zero = None if zero_NG is None else zero_NG.unsqueeze(-1)
    return Codes(quantize(weight_NGK, scale_NG.unsqueeze(-1), bits, zero).flatten(1), scale_NG, zero_NG)


class IntegerLinear(LowBitLinear):
    """Weights of at most 8 bits (packed two a byte from 4 down), inputs of at most 8 or in full precision.

        y = sum over groups g of ((q_x - z_x)[g] @ q_W[g].T) * scale_W[:, g] * scale_x + bias

    The sums over integers are exact, so that a token's result does not depend on what else is in the batch,
    unless the range itself does (`tensor`: one range for all that arrive together). Asymmetric weights meet inputs in
    full precision only.
    """

    weight: Tensor  # int8 [N, K], or uint8 [N, K/2]
    scale_NG: Tensor
    zero_NG: Tensor | None

    def __init__(
        self, linear: nn.Linear, exemption: Exemption, codes: Codes, bits: int, rounding: Rounding | None = None
    ) -> None:
        """codes: the weight in `bits` bits; rounding: of the inputs, None: they stay in full precision."""
        super().__init__(linear, exemption)
        assert rounding is None or codes.zero_NG is None, "asymmetric weights need inputs in full precision"
        self.packed, self.rounding = bits <= 4, rounding
        self.register_buffer("weight", pack_int4(codes.q_NK) if self.packed else codes.q_NK)
        self.register_buffer("scale_NG", codes.scale_NG)
        self.register_buffer("zero_NG", codes.zero_NG)

    def q_NK(self) -> Tensor:
        return unpack_int4(self.weight) if self.packed else self.weight

    def dequantized_NK(self) -> Tensor:
        weight_NGK = self.q_NK().unflatten(1, (self.scale_NG.shape[1], -1))
        zero = None if self.zero_NG is None else self.zero_NG.unsqueeze(-1)
        return dequantize(weight_NGK, self.scale_NG.unsqueeze(-1), zero).flatten(1)

    def stored_bits(self) -> int:
        zeros = 0 if self.zero_NG is None else self.zero_NG.nbytes
        return 8 * (self.weight.nbytes + self.scale_NG.nbytes + zeros)

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        if self.rounding is None:
            return F.linear(x, self.dequantized_NK().to(x.dtype), self.bias)
        (q, scale, zero), q_NK = self.rounding.integers(x, counted), self.q_NK()
        groups = self.scale_NG.shape[1]
        first: Tensor | None = None
        for q_part, w_part, scale_N in zip(
            q.chunk(groups, -1), q_NK.chunk(groups, -1), self.scale_NG.unbind(-1), strict=True
        ):
            sums = integer_matmul(q_part, w_part)
            part = sums.float() if zero is None else sums.float() - zero * w_part.sum(-1, dtype=torch.int32)
            part *= scale_N
            first = part if first is None else first.add_(part)
        assert first is not None
        y = first.mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


class RoundedLinear(LowBitLinear):
    """Inputs as integers, weights in full precision: for asking what the inputs alone cost."""

    weight: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, rounding: Rounding) -> None:
        super().__init__(linear, exemption)
        self.rounding = rounding
        self.register_buffer("weight", linear.weight.detach().clone())

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        return F.linear(self.rounding(x, counted), self.weight, self.bias)

    def dequantized_NK(self) -> Tensor:
        return self.weight

    def stored_bits(self) -> int:
        return 8 * self.weight.nbytes


# --- What changes the model -----------------------------------------------------------------------------------------


def swap(model: nn.Module, make: Callable[[str, nn.Linear], LowBitLinear | None]) -> dict[str, float]:
    """Replaces every Linear of the blocks by what `make(name, linear)` returns, and leaves the model in eval mode.

    Where that is None the Linear stays. Returns `share-of-weights`, of the blocks' matrix-product weights those that
    sit in a Linear, and `bits-per-weight` of these as stored. ValueError where the share is below 95%: the figure would
    be another model's.
    """
    assert not any(isinstance(module, LowBitLinear) for module in model.modules()), "the model is quantized already"
    parts = anatomy(model)
    linears = parts.linears()
    inside = sum(linear.weight.numel() for _, linear in linears.values())
    outside = [module for block in parts.blocks for module in block.modules() if _unseen_weights(module)]
    share = inside / max(1, inside + sum(map(_unseen_weights, outside)))
    if share < 0.95:
        kinds = ", ".join(sorted({type(module).__name__ for module in outside})) or "no module known to quantbench"
        raise ValueError(
            f"only {share:.0%} of the blocks' weights are those of a Linear, the rest of {kinds}: turn these into "
            "nn.Linear first, or the quantized model would be full precision in disguise"
        )
    bits = 0
    for name, (layer, linear) in linears.items():
        low_bit = make(name, linear)
        if low_bit is None:
            bits += 8 * linear.weight.nbytes
            continue
        bits += low_bit.stored_bits()
        parts.blocks[layer].set_submodule(name.partition(".")[2], low_bit)
    model.requires_grad_(False).eval()
    return {"share-of-weights": share, "bits-per-weight": bits / inside}


def _unseen_weights(module: nn.Module) -> int:
    """How many weights it multiplies by that are no Linear's (GPT-2's Conv1D does)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, nn.Linear | nn.Embedding):
        return 0
    return weight.numel()


class IntegerEmbedding(nn.Module):
    """A table of at most 8 bits, one range per row, looked up as floats."""

    weight: Tensor
    scale_V1: Tensor

    def __init__(self, embedding: nn.Embedding, bits: int) -> None:
        super().__init__()
        codes = nearest(embedding.weight, bits)
        self.packed, self.dtype = bits <= 4, embedding.weight.dtype
        self.register_buffer("weight", pack_int4(codes.q_NK) if self.packed else codes.q_NK)
        self.register_buffer("scale_V1", codes.scale_NG)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids]
        return dequantize(unpack_int4(rows) if self.packed else rows, self.scale_V1[ids]).to(self.dtype)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module where another one is, by identity."""
    path = next(path for path, module in model.named_modules() if module is old)
    model.set_submodule(path, new)


def round_site(module: nn.Module, kind: str, rounding: Rounding, exemption: Exemption) -> None:
    """From now on what passes the module's output passes through integers, but for exempt positions."""
    module.add_module(f"rounding_of_{kind}", rounding)  # so that it moves and is saved with the model

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        low, exempt = rounding(x, what_counts(x, kind, exemption)), exemption.spread(x, kind)
        if exempt is not None:
            low = torch.where(exempt, x, low)
        return (low, *output[1:]) if isinstance(output, tuple) else low

    module.register_forward_hook(hook)
