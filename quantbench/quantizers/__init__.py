"""How a trained model is brought to few bits. One file, one family of quantizers; this file is the contract.

A quantizer is a frozen dataclass of parameters. `quantize` changes a copy of a model in place: every Linear
of its blocks becomes a low-bit module, and where the quantizer says so other sites (the residual stream, keys and
values, scores, ...) are rounded too. Embeddings and the output head stay in full precision unless they are asked for.
What is common to all (integer weights and activations, the swap, the exemption of extreme tokens) is written here once.

Shapes: B sequences, T tokens, M tokens of any sequences, K input features, N output features, G groups of K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import anatomy, bar_saving, check_plain, replace, scale_of_table
from quantbench.calibration import Calibration, Exemption, learned_keys, passes, what_counts
from quantbench.ops.integers import (
    dequantize,
    offsets,
    pack_int4,
    product,
    qmax,
    quantize,
    scale_of,
    steps,
    unpack_int4,
)
from quantbench.ops.ranges import Span

FULL = 16  # "bits" of what is not quantized
KEPT = 1 << 20  # weights of a Linear up to which their float form is kept: beside it, converting them anew is dear
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
    packages: ClassVar[tuple[str, ...]] = ()  # whose own code decides its numbers, beside torch and bitsandbytes

    def check(self, widths: list[int]) -> None:
        """ValueError where a Linear's input width cannot be quantized so (a group that does not divide it)."""

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        """Quantizes the model in place; what it wants recorded (share of columns kept, bits per weight, ...)."""
        raise NotImplementedError


def check_groups(bits: int, group: int, widths: list[int]) -> None:
    """ValueError where weights of so many bits, in groups of so many input features, do not suit a Linear's width."""
    if not 2 <= bits <= 8:
        raise ValueError(f"weights: {bits} bits; choose 2 to 8")
    for width in widths:
        if group < 0 or (group and width % group):
            raise ValueError(f"group: {group} does not divide a Linear's input width {width}")
        if bits <= 4 and width % 2:
            raise ValueError(f"weights: {bits} bits are packed two a byte; the input width {width} is odd")


# --- The low-bit Linear ---------------------------------------------------------------------------------------------


Plan = dict[str, Any]  # JSON: what, beside the Linear it replaces and its tensors, makes a low-bit module


class LowBitLinear(nn.Module, ABC):
    """What replaces a Linear. Exempt positions meet the same low-bit weights with an input in full precision.

    One that quantbench can save says its `plan`, from which `blank` makes it without its tensors' values.
    """

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

    def plan(self) -> Plan | None:
        """What `blank` needs; None: it saves itself by its own means."""
        return None

    @classmethod
    def blank(cls, linear: nn.Linear, exemption: Exemption, plan: Plan) -> LowBitLinear:
        """One like that which gave the plan, of the same tensors with other values."""
        raise NotImplementedError

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

    def plan(self) -> Plan:
        """As that of a LowBitLinear."""
        return {"bits": self.bits, "scope": self.scope, "symmetric": self.symmetric}

    @classmethod
    def blank(cls, plan: Plan) -> Rounding:
        """As that of a LowBitLinear."""
        zero = torch.zeros(())
        return cls(
            plan["bits"], plan["scope"], Span(zero, zero) if plan["scope"] == "static" else None, plan["symmetric"]
        )

    def range(self, counted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: 0), each broadcasting against x. `counted`: x, 0 where it counts for no range."""
        if self.static_scale is not None:
            return self.static_scale, self.static_zero
        if self.scope == "token":
            low, high = counted.amin(-1, keepdim=True), counted.amax(-1, keepdim=True)
        else:
            low, high = counted.amin(), counted.amax()
        if self.symmetric:
            return scale_of(torch.maximum(high, -low), self.bits), None
        return steps(low.clamp(max=0), high.clamp(min=0), self.bits, symmetric=False)

    def integers(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q int8, its scale and its zero point (None: 0)."""
        scale, zero = self.range(counted)
        return quantize(x, scale, self.bits, zero), scale, zero

    def offsets(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """q - zero as float32, and its scale."""
        scale, zero = self.range(counted)
        return offsets(x, scale, self.bits, zero), scale

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """What the integers stand for."""
        q, scale = self.offsets(x, counted)
        return q.mul_(scale).to(x.dtype)


class Codes(NamedTuple):
    """A weight as integers."""

    q_NK: Tensor  # int8
    scale_NG: Tensor  # float32
    zero_NG: Tensor | None = None  # w ~ (q - zero) scale

    def dequantized_NK(self) -> Tensor:
        """What the integers stand for, float32."""
        q_NGK = self.q_NK.unflatten(1, (self.scale_NG.shape[1], -1))
        zero = None if self.zero_NG is None else self.zero_NG.unsqueeze(-1)
        return dequantize(q_NGK, self.scale_NG.unsqueeze(-1), zero).flatten(1)


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


class Derived:
    """A tensor made of another one and kept as long as that one stays as it is; a copy starts without it."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.version = -1
        self.made = torch.empty(0)

    def __deepcopy__(self, memo: Any) -> Derived:
        return Derived()

    def of(self, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """make(source); of large sources, and of those that torch does not watch for changes, anew at every call."""
        if source.numel() > KEPT or source.is_inference():
            return make(source)
        if self.source is not source or self.version != source._version:
            self.source, self.version = source, source._version
            with torch.inference_mode(False):  # what is first asked for under inference mode must serve elsewhere, too
                self.made = make(source)
        return self.made


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
        assert 2 <= bits <= 8, bits
        assert rounding is None or codes.zero_NG is None, "asymmetric weights need inputs in full precision"
        self.bits, self.packed, self.rounding = bits, bits <= 4, rounding
        self.register_buffer("weight", pack_int4(codes.q_NK) if self.packed else codes.q_NK)
        self.register_buffer("scale_NG", codes.scale_NG)
        self.register_buffer("zero_NG", codes.zero_NG)
        self.floats = Derived()

    def plan(self) -> Plan:
        rounding = None if self.rounding is None else self.rounding.plan()
        groups = self.scale_NG.shape[1]
        return {"bits": self.bits, "groups": groups, "symmetric": self.zero_NG is None, "rounding": rounding}

    @classmethod
    def blank(cls, linear: nn.Linear, exemption: Exemption, plan: Plan) -> IntegerLinear:
        N, K = linear.weight.shape
        scale_NG = torch.zeros(N, plan["groups"])
        zero_NG = None if plan["symmetric"] else torch.zeros_like(scale_NG)
        codes = Codes(torch.zeros(N, K, dtype=torch.int8), scale_NG, zero_NG)
        rounding = None if plan["rounding"] is None else Rounding.blank(plan["rounding"])
        return cls(linear, exemption, codes, plan["bits"], rounding)

    def q_NK(self) -> Tensor:
        """int8."""
        return unpack_int4(self.weight) if self.packed else self.weight

    def float_NK(self) -> Tensor:
        """The integers as float32."""
        return self.floats.of(self.weight, lambda weight: self.q_NK().float())

    def dequantized_NK(self) -> Tensor:
        weight_NGK = self.float_NK().unflatten(1, (self.scale_NG.shape[1], -1))
        zero = None if self.zero_NG is None else self.zero_NG.unsqueeze(-1)
        return dequantize(weight_NGK, self.scale_NG.unsqueeze(-1), zero).flatten(1)

    def stored_bits(self) -> int:
        zeros = 0 if self.zero_NG is None else self.zero_NG.nbytes
        return 8 * (self.weight.nbytes + self.scale_NG.nbytes + zeros)

    def forward(self, x: Tensor) -> Tensor:
        # Where no input is rounded none is exempt: of the head's there are fewer than of the stream's, with registers.
        return self.low_bit(x, x) if self.rounding is None else super().forward(x)

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        if self.rounding is None:
            return F.linear(x, self.dequantized_NK().to(x.dtype), self.bias)
        q, scale = self.rounding.offsets(x, counted)
        y = self.scaled_sums(q.flatten(0, -2), (1 if self.rounding.symmetric else 2) * qmax(self.rounding.bits) + 1)
        y = y.unflatten(0, x.shape[:-1]).mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def scaled_sums(self, q_MK: Tensor, most: int) -> Tensor:
        """sum over groups g of (q[g] @ q_W[g].T) * scale_W[:, g], float32 [M, N]; |q| is at most `most`."""
        groups = self.scale_NG.shape[1]
        first: Tensor | None = None
        for q_part, w_part, scale_N in zip(
            q_MK.chunk(groups, -1), self.float_NK().chunk(groups, -1), self.scale_NG.unbind(-1), strict=True
        ):
            part = product(q_part, w_part, most, qmax(self.bits) + 1).mul_(scale_N)
            first = part if first is None else first.add_(part)
        assert first is not None
        return first


class RoundedLinear(LowBitLinear):
    """Inputs as integers, weights in full precision: for asking what the inputs alone cost."""

    weight: Tensor

    def __init__(self, linear: nn.Linear, exemption: Exemption, rounding: Rounding) -> None:
        super().__init__(linear, exemption)
        self.rounding = rounding
        self.register_buffer("weight", linear.weight.detach().clone())

    def plan(self) -> Plan:
        return {"rounding": self.rounding.plan()}

    @classmethod
    def blank(cls, linear: nn.Linear, exemption: Exemption, plan: Plan) -> RoundedLinear:
        return cls(linear, exemption, Rounding.blank(plan["rounding"]))

    def low_bit(self, x: Tensor, counted: Tensor) -> Tensor:
        return F.linear(self.rounding(x, counted), self.weight, self.bias)

    def dequantized_NK(self) -> Tensor:
        return self.weight

    def stored_bits(self) -> int:
        return 8 * self.weight.nbytes


# --- What weights are fitted to -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a Linear's inputs X [M, K] were, over the calibration tokens that are not exempt."""

    gram_KK: Tensor  # X^T X, float64
    absolute_K: Tensor  # sum of |X|, float64

    def error_N(self, change_NK: Tensor) -> Tensor:
        """||X change^T||^2 of each output channel: what a change of the weights costs on these tokens."""
        return ((change_NK.double() @ self.gram_KK) * change_NK).sum(-1).clamp(min=0)


class _Enough(Exception):
    """Ends a pass whose rest nobody needs."""


def inputs_of(model: nn.Module, calibration: Calibration, layers: Collection[int]) -> dict[str, Inputs]:
    """The inputs of every Linear of these blocks; 8 K^2 bytes a Linear. The model may be quantized in part.

    ValueError where a value is infinite or NaN.
    """
    assert calibration.batches, "a calibration needs batches"
    parts, found = anatomy(model), dict[str, Inputs]()
    names = {name for name, (layer, _) in parts.linears().items() if layer in layers}

    def show(place: str, x: Tensor, exempt: Tensor | None) -> None:
        if place in names:
            x_MK = x.flatten(0, -2).double()  # 0 at exempt positions, which add nothing
            here = Inputs(x_MK.T @ x_MK, x_MK.abs().sum(0))
            if before := found.get(place):
                here = Inputs(before.gram_KK.add_(here.gram_KK), before.absolute_K.add_(here.absolute_K))
            found[place] = here

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    hook = parts.blocks[max(layers)].register_forward_hook(stop)
    try:
        for batch in calibration.batches:
            with suppress(_Enough):
                passes(model, Calibration([batch]), ("inputs",), show)
    finally:
        hook.remove()
    for place, inputs in found.items():
        if not inputs.absolute_K.isfinite().all():
            raise ValueError(
                f"site {place}: activations overflow on the calibration batches; look at this run's losses"
            )
    return found


# --- What changes the model -----------------------------------------------------------------------------------------


def swap(model: nn.Module, make: Callable[[str, nn.Linear], LowBitLinear | None]) -> dict[str, float]:
    """Replaces every Linear of the blocks by what `make(name, linear)` returns, and leaves the model in eval mode.

    Each is in its place before the next is made, in the order of the model; where that is None the Linear stays.
    Returns `share-of-weights`, of the blocks' matrix-product weights those that sit in a Linear, and `bits-per-weight`
    of these as stored. ValueError where the share is below 95%: the figure would be another model's; and for a Linear
    that computes more than its weights say.
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
    for name, (_, linear) in linears.items():
        check_plain(name, linear, nn.Linear)
    bits = 0
    for name, (layer, linear) in linears.items():
        low_bit = make(name, linear)
        if low_bit is None:
            bits += 8 * linear.weight.nbytes
            continue
        bits += low_bit.stored_bits()
        replace(parts.blocks[layer], linear, low_bit)
    bar_saving(model.requires_grad_(False).eval())
    return {"share-of-weights": share, "bits-per-weight": bits / inside}


def _unseen_weights(module: nn.Module) -> int:
    """How many weights it multiplies by that are no Linear's: a Conv1D's, or those of experts, [experts, N, K]."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return 0
    own = dict(module.named_parameters(recurse=False))
    return sum(p.numel() for name, p in own.items() if p.dim() > 2 or (p.dim() == 2 and name == "weight"))


class IntegerEmbedding(nn.Module):
    """A table of at most 8 bits, one range per row, looked up as floats; a scale of the rows stays what it was."""

    weight: Tensor
    multiplier: Tensor | None

    def __init__(self, embedding: nn.Embedding, bits: int) -> None:
        super().__init__()
        codes = nearest(embedding.weight, bits)
        self.bits, self.packed, self.dtype = bits, bits <= 4, embedding.weight.dtype
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.register_buffer("weight", pack_int4(codes.q_NK) if self.packed else codes.q_NK)
        # A parameter, for libraries take a model's device from its first, and all else may be low-bit.
        self.scale_V1 = nn.Parameter(codes.scale_NG, requires_grad=False)
        self.register_buffer("multiplier", scale_of_table(embedding), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)  # unlike an index it refuses ids below 0
        found = dequantize(unpack_int4(rows) if self.packed else rows, self.scale_V1[ids]).to(self.dtype)
        return found if self.multiplier is None else found * self.multiplier.to(self.dtype)


ROUNDING_OF = "rounding_of_"  # a kind of site: the name of the Rounding, inside the module whose output it rounds


def round_site(module: nn.Module, kind: str, rounding: Rounding, exemption: Exemption) -> None:
    """From now on what passes the module's output passes through integers, but for exempt positions."""
    name, appended = ROUNDING_OF + kind, learned_keys(module)
    module.add_module(name, rounding)  # so that it moves, and is saved and copied, with the model

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        rounding = getattr(module, name)  # the copy's, where the module is one
        x = output[0] if isinstance(output, tuple) else output
        counted = x if rounding.scope == "static" else what_counts(x, kind, exemption, appended)
        low, exempt = rounding(x, counted), exemption.spread(x, kind, appended)
        if exempt is not None:
            low = torch.where(exempt, x, low)
        return (low, *output[1:]) if isinstance(output, tuple) else low

    module.register_forward_hook(hook)
