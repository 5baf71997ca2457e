"""SmoothQuant: what is hard to round in an activation moves into the weights that read it (arXiv:2211.10438).

    y = (x / s) (W s)^T,    s_j = max|x_j|^a / max|W_ij|^(1 - a)

max|x_j| is feature j's largest magnitude over the calibration tokens, max|W_ij| that of column j over every Linear that
reads x. x is the output of a norm, whose gain takes the 1/s: the function stays, and inference pays nothing.

What it changes: gains of the norms and columns of the Linears that read them. A scalar gain becomes a vector. Inputs of
the attention's output projection and of the MLP's last Linear have no norm in front and stay as they are, as in the
paper; so does the head, which quantizers leave alone. A feature that is 0 throughout keeps s = 1.
What it cannot do: an outlier *token* sets max|x_j| of all its features, so that it helps against large channels.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration, passes
from quantbench.mitigations import Mitigation, Prepared, rewrite
from quantbench.strict import Range


@dataclass(frozen=True)
class SmoothQuant(Mitigation):
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.5  # a: the share of the difficulty that moves; .75 for large outliers

    def prepare(self, model: nn.Module, calibration: Calibration) -> Prepared:
        parts = anatomy(model)
        if parts.stream is None or any(not _gain(norm).numel() for norm, _ in parts.stream.norms):
            raise ValueError("smoothquant: not applicable: the Linears of this model have no norm with a gain in front")
        norms = parts.stream.norms
        largest = largest_inputs(model, calibration)
        name_of = {linear: name for name, (_, linear) in parts.linears().items()}

        def smooth() -> None:
            for norm, readers in norms:
                s_K = scales(largest[name_of[readers[0]]], [reader.weight for reader in readers], self.alpha)
                divide(norm, s_K)
                for reader in readers:
                    reader.weight.copy_(reader.weight.double() * s_K)

        rewrite("smoothquant", model, calibration, smooth)
        return Prepared(model)


def largest_inputs(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """max|x_j| of every feature of every Linear's input, [K]."""
    found: dict[str, Tensor] = {}

    def show(place: str, x: Tensor, exempt: Tensor | None) -> None:
        here_K = x.abs().flatten(0, -2).amax(0)
        found[place] = torch.maximum(found[place], here_K) if place in found else here_K

    passes(model, calibration, ("inputs",), show)
    return found


def scales(largest_K: Tensor, weights_NK: list[Tensor], alpha: float) -> Tensor:
    """s of each feature, from its largest magnitude and the weights that read it, float64."""
    x_K = largest_K.double()
    w_K = torch.cat([w_NK.detach().abs() for w_NK in weights_NK]).amax(0).double()
    return torch.where((x_K > 0) & (w_K > 0), x_K**alpha / w_K ** (1 - alpha), 1.0)


def divide(norm: Any, s_K: Tensor) -> None:
    """The norm's output, divided by s."""
    gain = _gain(norm)
    norm.weight = nn.Parameter((gain.double() / s_K).to(gain.dtype))
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(norm.bias.double() / s_K)


def _gain(norm: nn.Module) -> Tensor:
    """Its gain, a vector or a scalar; empty where it has none."""
    gain = getattr(norm, "weight", None)
    return gain if isinstance(gain, Tensor) else torch.empty(0)
