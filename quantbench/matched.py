"""A recipe against the baseline at the recipe's own learning rate, and at its own full-precision loss.

At tuned rates a recipe that prefers a lower rate than the baseline is compared with a baseline of weaker extremes: what
the rate does and what the recipe does cannot be told apart. The baseline trained at several rates is a curve,

    log rate -> full-precision loss, log KL

straight between its points. The recipe's KL over the curve's, at its own rate, and where the curve has its loss, on the
side of the curve's lowest loss that the recipe's rate is on (at that rate itself: on the side of the lower ones).
Outside the curve there is nothing to compare with. Limits are percentiles 2.5 and 97.5 of a bootstrap that draws the
seeds of the recipe and of every point of the curve.

Losses are over the seeds that a recipe shares with the curve's points, as far as these have them: a seed makes every
model better or worse (see `board`).

Shapes: B bootstrap draws (the first is the sample itself), C points of the curve, by rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantbench import catalog
from quantbench.results import Record
from quantbench.stats import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DRAWS = 2000
NEAR = 0.1  # relative: rates as close as this are one (4.1e-3 and a third of 1.3e-2)
OUTSIDE = 0.1  # of the draws: with more of them beyond the curve its end is not known well enough


@dataclass(frozen=True)
class Matched:
    """KL relative to the baseline's; None: not reachable, the curve does not go there."""

    at_rate: Interval | None
    at_loss: Interval | None


def rate_of(record: Record) -> float | None:
    """The learning rate of a run of the plain baseline, at whatever rate; None for every other run.

    A control that scales AdamW's rate and holds its shrink per step is the baseline at that rate.
    """
    resolved = record["recipe"]["resolved"]
    mitigations, rate = resolved.get("mitigations") or {}, resolved.get("lr")
    adamw = mitigations.get("adamw", {})
    if rate is None or mitigations.keys() - {"adamw"} or adamw.get("shrink-scale", 1.0) != 1.0:
        return None
    return float(rate) * float(adamw.get("lr-scale", 1.0))


def matched(recipe: Sequence[Record], curve: Sequence[Record], quantizer: str) -> Matched | None:
    """A recipe's runs against the baseline's at several rates. None where there is no curve, or no KL or no rate."""
    import numpy as np

    resolved = recipe[0]["recipe"]["resolved"]
    rate, own_optimizer = resolved.get("lr"), any(map(_is_optimizer, resolved.get("mitigations") or {}))
    mine = _points(recipe, quantizer)
    by_rate: dict[float, list[Record]] = {}
    for record in curve:
        if (at := rate_of(record)) is not None:
            by_rate.setdefault(at, []).append(record)
    points = {at: found for at in sorted(by_rate) if (found := _points(by_rate[at], quantizer))}
    if rate is None or not mine or len(points) < 2:
        return None
    seeds = set(mine).intersection(*points.values()) or set(mine)
    generator = np.random.default_rng(0)
    drawn = [_drawn(found, seeds, generator) for found in (mine, *points.values())]
    loss_B, kl_B = drawn[0]
    loss_CB, kl_CB = (np.stack([one[axis] for one in drawn[1:]]) for axis in (0, 1))
    log_rates = np.log(list(points))
    return Matched(
        # A rate of another optimizer's means something else.
        None if own_optimizer else _interval(kl_B - _at_rate(math.log(rate), log_rates, kl_CB)),
        _interval(kl_B - _at_loss(loss_B, math.log(rate), log_rates, loss_CB, kl_CB)),
    )


def _is_optimizer(mitigation: str) -> bool:
    known = mitigation in catalog.names("mitigations") and mitigation != "adamw"
    return known and "optimizer" in catalog.seams(mitigation)


def _points(runs: Sequence[Record], quantizer: str) -> dict[int, tuple[float, float]]:
    """seed -> (loss, log KL)."""
    kls = {r["seed"]: r["quantized"].get(quantizer, {}).get("kl") for r in runs}
    return {
        r["seed"]: (r["full-precision"]["loss"], math.log(kl))
        for r in runs
        if (kl := kls[r["seed"]]) is not None and kl > 0
    }


def _drawn(points: dict[int, tuple[float, float]], seeds: set[int], generator: np.random.Generator) -> list[Floats]:
    """Means of loss, over the seeds that are shared, and of log KL, over all, [B] each."""
    import numpy as np

    found = []
    for axis, kept in ((0, sorted(seeds & points.keys()) or sorted(points)), (1, sorted(points))):
        values = np.array([points[seed][axis] for seed in kept])
        index_BN = generator.integers(len(values), size=(DRAWS, len(values)))
        found.append(np.concatenate([[values.mean()], values[index_BN].mean(1)]))
    return found


def _at_rate(log_rate: float, log_rates: Floats, kl_CB: Floats) -> Floats:
    """log KL of the curve at a rate, [B]; NaN outside."""
    import numpy as np

    near = np.abs(log_rates - log_rate)
    if near.min() <= math.log1p(NEAR):
        return kl_CB[near.argmin()]
    if not log_rates[0] < log_rate < log_rates[-1]:
        return np.full(kl_CB.shape[1], np.nan)
    right = int(np.searchsorted(log_rates, log_rate))
    share = (log_rate - log_rates[right - 1]) / (log_rates[right] - log_rates[right - 1])
    return (1 - share) * kl_CB[right - 1] + share * kl_CB[right]


def _at_loss(loss_B: Floats, log_rate: float, log_rates: Floats, loss_CB: Floats, kl_CB: Floats) -> Floats:
    """log KL of the curve where its loss is the recipe's, [B]; NaN outside. On the side of the recipe's rate."""
    import numpy as np

    best = int(loss_CB[:, 0].argmin())
    left = log_rate <= log_rates[best] + math.log1p(NEAR)
    order = range(best, -1, -1) if left else range(best, len(log_rates))  # from the lowest loss outwards
    found = np.full(len(loss_B), np.nan)
    for inner, outer in zip(order, list(order)[1:]):
        width_B = loss_CB[outer] - loss_CB[inner]
        with np.errstate(divide="ignore", invalid="ignore"):
            share_B = (loss_B - loss_CB[inner]) / width_B
        here = np.isnan(found) & (share_B >= 0) & (share_B <= 1)
        found = np.where(here, (1 - share_B) * kl_CB[inner] + share_B * kl_CB[outer], found)
    return found


def _interval(log_ratio_B: Floats) -> Interval | None:
    """The ratio and its limits; None where the sample, or too many draws, lie outside the curve."""
    import numpy as np

    defined = log_ratio_B[1:][np.isfinite(log_ratio_B[1:])]
    if not math.isfinite(log_ratio_B[0]) or len(defined) < (1 - OUTSIDE) * DRAWS:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(*(math.exp(float(x)) for x in (log_ratio_B[0], low, high)))
