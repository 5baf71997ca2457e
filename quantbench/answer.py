"""What the records of a track answer, in words: what loses less, what survives, at what cost, and is it the peak.

Each sentence is made from the figures of the tables and is as old as they are. Plain text, not escaped.
"""

from __future__ import annotations

from typing import Any

from quantbench import relation
from quantbench.board import FRONT, Board, Row, value_of
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
        ("Which recipes lose less?", _lose_less(track, len(compared), better, apart[len(better) :])),
        ("Which survive?", _survive(track, compared)),
        ("What do they cost?", _cost(better)),
        ("Is it the peak?", _peak(track, better, related.get(track.ranking, {}))),
    ]
    return [(question, said) for question, said in found if said]


def _lose_less(track: Board, compared: int, better: list[Row], worse: list[Row]) -> str:
    if not compared:
        return ""

    def listed(rows: list[Row]) -> str:
        return ", ".join(f"{row.name} (× {plain(row.comparisons[track.ranking].ratio.mean)})" for row in rows)

    base = next((row for row in track.rows if row.name == BASELINE), None)
    lost = value_of(base.quantized(track.ranking, "damage") if base else None)
    said = f"{track.ranking} costs the baseline {plain(lost)} nats per token; "
    said += f"{len(better)} of {compared} lose less than it" + (f": {listed(better)}." if better else ".")
    if worse:
        said += f" {len(worse)} lose{'s' * (len(worse) == 1)} more: {listed(worse)}."
    if others := compared - len(better) - len(worse):
        said += f" {others} cannot be told from it."
    return f"{said} Factors are of the KL; the chance that any of a family is told apart wrongly is at most 5%."


def _survive(track: Board, compared: list[Row]) -> str:
    """Below a level that is stated, whatever the baseline loses."""
    if not compared:
        return ""
    rows = [row for row in track.rows if row.rank is not None and row.survives(track.ranking)]
    named = ", ".join(f"{row.name} ({plain(value_of(row.quantized(track.ranking, 'damage')))})" for row in rows)
    return f"Damage surely below {track.level:g} nats (95%): {named or 'none'}."


def _cost(better: list[Row]) -> str:
    """In full precision, of the recipes that lose less."""
    if not better:
        return ""
    less = [row.name for row in better if row.learned_less]
    front = [row.name for row in better if row.front is not None and row.front >= FRONT]
    said = f"Of those that lose less, {_and(less)} learned less than the baseline in full precision" if less else ""
    if len(less) < len(better):
        said += "; the loss of the others" if less else "The full-precision loss of those that lose less"
        said += " cannot be told to be higher"
    lie = f"On the Pareto front of loss and damage in {FRONT:.0%} of bootstrap draws or more: "
    return f"{said}. {lie}{_and(front) if front else 'none'}."


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _peak(track: Board, better: list[Row], by_predictor: dict[str, Any]) -> str:
    """By regression over recipes, against its rivals, and by leaving the extreme tokens out of quantization."""
    said = []
    peak, best = by_predictor.get(relation.PEAK), relation.winner(by_predictor)
    if peak and best and peak["rho"] and peak["rho"]["low"] is not None:
        said.append(
            f"KL goes with the residual peak at ρ = {estimate(peak['rho'])} over {peak['n']} runs of "
            f"{peak['recipes']} recipes ({_inside(peak)})."
        )
        if best != relation.PEAK:
            rival = by_predictor[best]
            said.append(
                f"It goes better with {best}, {relation.PREDICTORS[best]}: ρ = {estimate(rival['rho'])} "
                f"({_inside(rival)}), the largest in {hundredths(rival['won'])} of bootstrap draws; given it, the peak "
                f"adds {estimate(peak['given'][best])}, and given the peak it adds "
                f"{estimate(rival['given'][relation.PEAK])}."
            )
        if peak["exempt-rho"]:
            said.append(
                f"Where the extreme tokens stay in full precision, ρ with the peak is {estimate(peak['exempt-rho'])}."
            )
    base = next((row for row in track.rows if row.name == BASELINE), None)
    carried = base and base.share(track.ranking, "extreme")
    if base is not None and isinstance(carried, float):
        control = base.share(track.ranking, "random")
        aside = f" (as many random ones: {hundredths(control)})" if isinstance(control, float) else ""
        who = "BOS alone carries" if base.only_bos(track.ranking) else "The few extreme tokens carry"
        said.append(f"{who} {hundredths(carried)} of the baseline's damage{aside}")
        left = [share for row in better if isinstance(share := row.share(track.ranking, "extreme"), float)]
        range_ = f"{hundredths(min(left))} to {hundredths(max(left))}" if left else ""
        said[-1] += f", and {range_} of what is left in those that lose less." if left else "."
    return " ".join(said)


def _inside(found: dict[str, Any]) -> str:
    """What is left of a relation within recipes, and given what might explain it."""
    names = (("within-rho", "within a recipe"), ("given-loss", "given the loss"), ("given-rate", "given the rate"))
    told = [f"{name} {hundredths(found[key]['estimate'])}" for key, name in names if found[key]]
    return ", ".join([*told, f"R² of a recipe left out {plain(found['r2'])}"])
