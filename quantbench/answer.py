"""What the records of a track answer, in words: which recipes survive, what they cost, and whether it is the peak.

Each sentence is made from the figures of the tables and is as old as they are. Plain text, not escaped.
"""

from __future__ import annotations

import math
from typing import Any

from quantbench.board import Board, Row
from quantbench.numerals import plain
from quantbench.results import BASELINE


def answers(track: Board, related: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer), of those that the records can answer; `related` is the track's part of `relation.relate`."""
    apart = [row for row in track.rows if track.ranking in row.comparisons and row.comparisons[track.ranking].separates]
    apart.sort(key=lambda row: _ratio(row, track.ranking))
    better = [row for row in apart if _ratio(row, track.ranking) < 1]
    found = [
        ("Which recipes survive?", _survive(track, better, apart[len(better) :])),
        ("What do they cost?", _cost(better)),
        ("Is it the peak?", _peak(track, better, related.get(track.ranking, {}).get("residual-peak"))),
    ]
    return [(question, said) for question, said in found if said]


def _ratio(row: Row, quantizer: str) -> float:
    return math.exp(row.comparisons[quantizer].difference.mean)


def _survive(track: Board, better: list[Row], worse: list[Row]) -> str:
    compared = [row for row in track.rows if track.ranking in row.comparisons and row.name != BASELINE]
    if not compared:
        return ""

    def listed(rows: list[Row]) -> str:
        return ", ".join(f"{row.name} (× {plain(_ratio(row, track.ranking))})" for row in rows)

    said = f"Under {track.ranking}, {len(better)} of {len(compared)} lose less than the baseline"
    said += f": {listed(better)}." if better else "."
    if worse:
        said += f" {len(worse)} lose{'s' * (len(worse) == 1)} more: {listed(worse)}."
    if others := len(compared) - len(better) - len(worse):
        said += f" {others} cannot be told from it."
    return f"{said} Factors are of the KL, paired; all of them hold together at 95%."


def _cost(better: list[Row]) -> str:
    """In full precision, of the recipes that survive."""
    if not better:
        return ""
    less = [row.name for row in better if "learned less" in row.notes]
    front = [row.name for row in better if "Pareto" in row.notes]
    said = f"Of these, {_and(less)} learned less than the baseline in full precision" if less else ""
    said += "; the loss of the others" if less else "Their full-precision loss"
    said += " cannot be told to be higher. "
    return said + (
        f"On the Pareto front of loss and damage: {_and(front)}." if front else "None is on the Pareto front."
    )


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _peak(track: Board, better: list[Row], relation: dict[str, Any] | None) -> str:
    """By regression over recipes, and by leaving the extreme tokens out of quantization."""
    said = []
    rho = relation and relation["rho"]
    if relation and rho and rho["low"] is not None:
        given = [
            f"{name} {relation[key]['estimate']:.2f}"
            for key, name in (("within-rho", "within a recipe"), ("partial-rho", "given the full-precision loss"))
            if relation[key]
        ]
        said.append(
            f"KL goes with the residual peak at ρ = {rho['estimate']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}] over "
            f"{relation['n']} runs of {relation['recipes']} recipes" + "".join(f", {one}" for one in given) + "."
        )
    base = next((row for row in track.rows if row.name == BASELINE), None)
    carried = base and base.share(track.ranking, "extreme")
    if base is not None and isinstance(carried, float):
        control = base.share(track.ranking, "random")
        aside = f" (as many random ones: {control:.2f})" if isinstance(control, float) else ""
        said.append(f"The few extreme tokens carry {carried:.2f} of the baseline's damage{aside}")
        left = [share for row in better if isinstance(share := row.share(track.ranking, "extreme"), float)]
        said[-1] += f", and {min(left):.2f} to {max(left):.2f} of what is left where it survives." if left else "."
    return " ".join(said).replace("-0.", "−0.")
