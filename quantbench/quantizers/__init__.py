"""How a trained model is brought to few bits. One file, one family of quantizers; this file is the contract.

A quantizer is a frozen dataclass of parameters. `quantize` changes a copy of a model in place: every Linear
of its blocks becomes a low-bit module, and where the quantizer says so the residual stream is quantized too.
Embeddings and the output head stay in full precision. What is common to all (calibration ranges,
the swap, the exemption of extreme tokens) is written here once.

Shapes: B sequences, T tokens, M tokens of any sequences, K input features, N output features, G groups of K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import anatomy
from quantbench.ops import Totals, outlier_stats
from quantbench.ops.integers import dequantize, integer_matmul, pack_int4, quantize, scale_of, unpack_int4

FULL = 16  # "bits" of an activation that is not quantized
Scope = Literal[
    "static", "token", "tensor"
]  # a range set at calibration, by each token, or by all that arrive together


class Exemption:
    """Which token positions of the batch at hand stay in full precision: extreme tokens, or none."""

    mask_BT: Tensor | None = None

    @contextmanager
    def of(self, mask_BT: Tensor | None) -> Iterator[None]:
        """Within it, positions that are True are not quantized, and do not count for ranges."""
        before, self.mask_BT = self.mask_BT, mask_BT
        try:
            yield
        finally:
            self.mask_BT = before

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask, having checked that it speaks of the positions of x, [B, T, features]."""
        if self.mask_BT is not None:
            expected, got = tuple(self.mask_BT.shape), tuple(x.shape[:-1])
            assert got == expected, f"positions {expected} are marked exempt, but a Linear or block sees {got}"
        return self.mask_BT


@dataclass(frozen=True)
class Calibration:
    """Sequences of the training split on which ranges are set, with the exempt positions of each (or None)."""

    batches: list[tuple[Tensor, Tensor | None]]  # (ids_BT, exempt_BT)
    exemption: Exemption = field(default_factory=Exemption)  # shared by every module of the quantized model


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


# --- Calibration: what the full-precision model's sites carry -------------------------------------------------------


@torch.no_grad()
def survey(
    model: nn.Module, calibration: Calibration, threshold: float = 0.0, residual: bool = False
) -> dict[str, Totals]:
    """What each site carries over the calibration tokens that are not exempt: ranges, outliers, moments.

    Sites are the inputs of the Linears, under their names in `anatomy(model).linears()`, and with `residual` the
    residual stream after each block, under the number of its layer. To be called before anything is quantized.
    An outlier is an element of at least `threshold`.
    """
    assert calibration.batches, "a survey needs calibration batches"
    parts, exemption = anatomy(model), Exemption()
    totals: dict[str, Totals] = {}

    def show(site: str, x: Tensor) -> None:
        exempt_BT = exemption.mask_for(x)
        x_MK = x.flatten(0, -2) if exempt_BT is None else x[~exempt_BT]
        if len(x_MK):  # a batch may be exempt as a whole
            here = Totals.of(outlier_stats(x_MK, threshold))
            totals[site] = totals[site].merge(here) if site in totals else here

    def on_input(site: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: show(site, args[0])

    def on_output(site: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: show(site, output[0] if isinstance(output, tuple) else output)

    hooks = [linear.register_forward_pre_hook(on_input(name)) for name, (_, linear) in parts.linears().items()]
    if residual:
        hooks += [block.register_forward_hook(on_output(str(layer))) for layer, block in enumerate(parts.blocks)]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        for ids_BT, exempt_BT in calibration.batches:
            with exemption.of(None if exempt_BT is None else exempt_BT.to(device)):
                model(ids_BT.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    assert totals, "every calibration position is exempt"
    return totals


def absmax(model: nn.Module, calibration: Calibration, residual: bool = False) -> dict[str, Tensor]:
    """The largest magnitude of each site of `survey`: static ranges. ValueError where one is infinite or NaN."""
    largest = {site: found.row_absmax for site, found in survey(model, calibration, residual=residual).items()}
    for site, value in largest.items():
        if not value.isfinite():
            raise ValueError(f"site {site}: activations overflow on the calibration batches; look at this run's losses")
    return largest


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
    def low_bit(self, x: Tensor, exempt_BT: Tensor | None) -> Tensor:
        """The product as the quantizer makes it. What it returns at exempt positions is not used."""

    @abstractmethod
    def dequantized_NK(self) -> Tensor:
        """What the stored weights stand for."""

    @abstractmethod
    def stored_bits(self) -> int:
        """Bits of everything that stands for the weights, scales included."""

    def forward(self, x: Tensor) -> Tensor:
        exempt_BT = self.exemption.mask_for(x)
        y = self.low_bit(x, exempt_BT)
        if exempt_BT is not None:
            y[exempt_BT] = F.linear(x[exempt_BT], self.dequantized_NK().to(x.dtype), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.stored_bits()} bits"


class IntegerLinear(LowBitLinear):
    """Weights of at most 8 bits (packed two a byte from 4 down), inputs of at most 8 or in full precision.

        y = sum over groups g of (q_x[g] @ q_W[g].T) * scale_W[:, g] * scale_x + bias

    The sums over integers are exact, so that a token's result does not depend on what else is in the batch,
    unless the range itself does (`tensor`: one range for all that arrive together).
    """

    weight: Tensor  # int8 [N, K], or uint8 [N, K/2]
    scale_NG: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        exemption: Exemption,
        weights: int = 8,
        group: int = 0,
        activations: int = FULL,
        scope: Scope = "token",
        largest: Tensor | None = None,
    ) -> None:
        """group: input features that share a weight scale, 0 for all; largest: the range, where it is static."""
        super().__init__(linear, exemption)
        self.activations, self.scope, self.packed = activations, scope, weights <= 4
        weight_NGK = linear.weight.detach().unflatten(1, (-1, group or self.in_features))
        scale_NG = scale_of(weight_NGK.abs().amax(-1), weights)
        q_NK = quantize(weight_NGK, scale_NG.unsqueeze(-1), weights).flatten(1)
        self.register_buffer("weight", pack_int4(q_NK) if self.packed else q_NK)
        self.register_buffer("scale_NG", scale_NG)
        assert (largest is not None) == (scope == "static" and activations < FULL)
        self.register_buffer("input_scale", None if largest is None else scale_of(largest, activations))

    def q_NK(self) -> Tensor:
        return unpack_int4(self.weight) if self.packed else self.weight

    def dequantized_NK(self) -> Tensor:
        weight_NGK = self.q_NK().unflatten(1, (self.scale_NG.shape[1], -1))
        return dequantize(weight_NGK, self.scale_NG.unsqueeze(-1)).flatten(1)

    def stored_bits(self) -> int:
        return 8 * (self.weight.nbytes + self.scale_NG.nbytes)

    def scale_for(self, x: Tensor, exempt_BT: Tensor | None) -> Tensor:
        """The scale of this input: one number, or one a token."""
        if self.input_scale is not None:
            return self.input_scale
        if self.scope == "token":
            return scale_of(x.abs().amax(-1, keepdim=True), self.activations)
        counted = x if exempt_BT is None else x.masked_fill(exempt_BT.unsqueeze(-1), 0.0)
        return scale_of(counted.abs().amax(), self.activations)

    def low_bit(self, x: Tensor, exempt_BT: Tensor | None) -> Tensor:
        if self.activations == FULL:
            return F.linear(x, self.dequantized_NK().to(x.dtype), self.bias)
        scale = self.scale_for(x, exempt_BT)
        q, q_NK = quantize(x, scale, self.activations), self.q_NK()
        groups = self.scale_NG.shape[1]
        parts = zip(q.chunk(groups, -1), q_NK.chunk(groups, -1), self.scale_NG.unbind(-1), strict=True)
        first, *rest = (integer_matmul(q_part, w_part).float().mul_(scale_N) for q_part, w_part, scale_N in parts)
        for part in rest:
            first += part
        y = first.mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


# --- What changes the model -----------------------------------------------------------------------------------------


def swap(model: nn.Module, make: Callable[[str, nn.Linear], LowBitLinear]) -> dict[str, float]:
    """Replaces every Linear of the blocks by what `make(name, linear)` returns, and leaves the model in eval mode.

    Returns `share-of-weights`, of the blocks' matrix-product weights those that sit in a Linear, and
    `bits-per-weight` of these as stored. ValueError where the share is below 95%: the figure would be another model's.
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


def quantize_residual(block: nn.Module, largest: Tensor, bits: int, exemption: Exemption) -> None:
    """From now on the block's output passes through integers of one static scale, but for exempt positions."""
    scale = scale_of(largest, bits)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        low_BTD = dequantize(quantize(hidden_BTD, scale, bits), scale).to(hidden_BTD.dtype)
        exempt_BT = exemption.mask_for(hidden_BTD)
        if exempt_BT is not None:
            low_BTD = torch.where(exempt_BT.unsqueeze(-1), hidden_BTD, low_BTD)
        return (low_BTD, *output[1:]) if isinstance(output, tuple) else low_BTD

    block.register_forward_hook(hook)
