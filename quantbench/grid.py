"""The map of rounding to nearest: scope of the ranges x residual stream rounded or not x bits.

A cell is a quantizer of the track that differs from the others in these three alone: as many bits for activations as
for weights, symmetric, plain absmax ranges. It separates a recipe from the baseline where the interval of the log KL
ratio (Holm, over the recipes of that cell) leaves out 0; cells are not adjusted for one another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCOPES = ("static", "tensor", "token")
ACTIVATIONS = {("inputs",): False, ("inputs", "residual"): True}  # sites -> whether the residual stream is rounded


@dataclass(frozen=True, order=True)
class Cell:
    """A place on the map."""

    bits: int
    scope: str
    residual: bool

    def __str__(self) -> str:
        return f"{self.scope}{', residual' if self.residual else ''}"


def cells(quantizers: Mapping[str, Any]) -> dict[Cell, str]:
    """cell -> name, of a resolved track's quantizers; most bits first, then from the widest scope to the narrowest."""
    found = {cell: name for name, fields in quantizers.items() if (cell := _cell(fields)) is not None}
    return dict(sorted(found.items(), key=lambda item: (-item[0].bits, SCOPES.index(item[0].scope), item[0].residual)))


def _cell(fields: Mapping[str, Any]) -> Cell | None:
    plain = {"symmetric": True, "symmetric-weights": True, "rule": "absmax"}
    residual = ACTIVATIONS.get(tuple(fields.get("sites", ())))
    if residual is None or any(fields.get(name) != value for name, value in plain.items()):
        return None
    if fields["weights"] != fields["activations"]:
        return None
    return Cell(fields["activations"], fields["range"], residual)
