"""Contestants in turns: what each takes, and its ratio to an anchor in the same round."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
ROUND = 0.15  # seconds that each contestant runs in a round, at least


@dataclass(frozen=True)
class Goal:
    """What kernels are asked to reach: `at_most` or `at_least` so many times the anchor (time or, inverted, speed)."""

    against: str
    at_most: float

    def __str__(self) -> str:
        return (
            f"≤ {self.at_most:g} × {self.against}"
            if self.at_most >= 1
            else f"{1 / self.at_most:.3g} × faster than {self.against}"
        )


def clock(device: str) -> float:
    """Seconds; on one thread those that the process worked, whatever else the machine does meanwhile."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def contest(
    table: str,
    case: str,
    contestants: dict[str, Callable[[], object]],
    anchor: str,
    *,
    device: str = "cpu",
    rounds: int = 7,
    goals: dict[str, list[Goal]] | None = None,
) -> list[Row]:
    """Rows of milliseconds and of ratios to the anchor: medians over rounds in which all take turns, and quartiles.

    A goal's ratio is taken against the contestant it names. The first calls (compilation, page faults) do not count.
    """
    repeats = {}
    for name, run in contestants.items():
        run()
        start = clock(device)
        run()
        repeats[name] = max(1, round(ROUND / max(clock(device) - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = clock(device)
            for _ in range(repeats[name]):
                run()
            times[name].append((clock(device) - start) / repeats[name] * 1e3)
    rows = []
    for name in contestants:
        reached = [
            {"goal": str(goal), "ratio": ratio(times, name, goal.against), "at-most": goal.at_most}
            for goal in (goals or {}).get(name, [])
        ]
        rows.append({
            "table": table, "case": case, "what": name, "ms": round(statistics.median(times[name]), 4),
            "anchor": anchor, "ratio": ratio(times, name, anchor), "quartiles": quartiles(times, name, anchor),
            "goals": reached,
        })  # fmt: skip
        print(f"{table}, {case}: {name} {rows[-1]['ms']:.3f} ms, {rows[-1]['ratio']:.3g} x {anchor}", flush=True)
    return rows


def ratio(times: dict[str, list[float]], name: str, anchor: str) -> float:
    """The median over rounds of one time over another."""
    return _digits(statistics.median(_ratios(times, name, anchor)))


def quartiles(times: dict[str, list[float]], name: str, anchor: str) -> list[float]:
    """Between which half of the rounds' ratios lie."""
    low, _, high = statistics.quantiles(_ratios(times, name, anchor), n=4, method="inclusive")
    return [_digits(low), _digits(high)]


def _ratios(times: dict[str, list[float]], name: str, anchor: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(times[name], times[anchor], strict=True)]


def _digits(x: float) -> float:
    return float(f"{x:.3g}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
