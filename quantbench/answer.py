"""What the records of a track answer, in words: which recipes survive, what they cost, and whether it is the peak.

Each sentence is made from the figures of the tables and is as old as they are. Plain text, not escaped.
"""

from __future__ import annotations

from typing import Any

from quantbench.board import LEARNED_LESS, PARETO, Board, Row
from quantbench.numerals import estimate, hundredths, plain
from quantbench.results import BASELINE


def answers(track: Board, related: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer), of those that the records can answer; `related` is the track's part of `relation.relate`."""
    compared = [row for row in track.rows if track.ranking in row.comparisons]
    apart = sorted(
        (row for row in compared if row.comparisons[track.ranking].separates),
        key=lambda row: row.comparisons[track.ranking].ratio.mean,
    )
    better = [row for row in apart if row.comparisons[track.ranking].ratio.mean < 1]
    found = [
        ("Which recipes survive?", _survive(track.ranking, len(compared), better, apart[len(better) :])),
        ("What do they cost?", _cost(better)),
        ("Is it the peak?", _peak(track, better, related.get(track.ranking, {}).get("residual-peak"))),
    ]
    return [(question, said) for question, said in found if said]


def _survive(quantizer: str, compared: int, better: list[Row], worse: list[Row]) -> str:
    if not compared:
        return ""

    def listed(rows: list[Row]) -> str:
        return ", ".join(f"{row.name} (× {plain(row.comparisons[quantizer].ratio.mean)})" for row in rows)

    said = f"Under {quantizer}, {len(better)} of {compared} lose less than the baseline"
    said += f": {listed(better)}." if better else "."
    if worse:
        said += f" {len(worse)} lose{'s' * (len(worse) == 1)} more: {listed(worse)}."
    if others := compared - len(better) - len(worse):
        said += f" {others} cannot be told from it."
    return f"{said} Factors are of the KL, paired; all of them hold together at 95%."


def _cost(better: list[Row]) -> str:
    """In full precision, of the recipes that survive."""
    if not better:
        return ""
    less = [row.name for row in better if LEARNED_LESS in row.notes]
    front = [row.name for row in better if PARETO in row.notes]
    said = f"Of these, {_and(less)} learned less than the baseline in full precision" if less else ""
    if len(less) < len(better):
        said += "; the loss of the others" if less else "Their full-precision loss"
        said += " cannot be told to be higher"
    lie = f"On the Pareto front of loss and damage: {_and(front)}." if front else "None is on the Pareto front."
    return f"{said}. {lie}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _peak(track: Board, better: list[Row], relation: dict[str, Any] | None) -> str:
    """By regression over recipes, and by leaving the extreme tokens out of quantization."""
    said = []
    rho = relation and relation["rho"]
    if relation and rho and rho["low"] is not None:
        given = [
            f"{name} {hundredths(relation[key]['estimate'])}"
            for key, name in (("within-rho", "within a recipe"), ("partial-rho", "given the full-precision loss"))
            if relation[key]
        ]
        said.append(
            f"KL goes with the residual peak at ρ = {estimate(rho)} over "
            f"{relation['n']} runs of {relation['recipes']} recipes" + "".join(f", {one}" for one in given) + "."
        )
    base = next((row for row in track.rows if row.name == BASELINE), None)
    carried = base and base.share(track.ranking, "extreme")
    if base is not None and isinstance(carried, float):
        control = base.share(track.ranking, "random")
        aside = f" (as many random ones: {hundredths(control)})" if isinstance(control, float) else ""
        said.append(f"The few extreme tokens carry {hundredths(carried)} of the baseline's damage{aside}")
        left = [share for row in better if isinstance(share := row.share(track.ranking, "extreme"), float)]
        range_ = f"{hundredths(min(left))} to {hundredths(max(left))}" if left else ""
        said[-1] += f", and {range_} of what is left where it survives." if left else "."
    return " ".join(said)
