"""What a run of the source paper's task shows: sink, drain and peak, how they grew, what interventions take away.

A figure is a number of one record, None where the record cannot tell. Of a run: the metrics of its full-precision model
and its watched timeline (a track with `watched: true`); of a record of `quantbench probe`: a figure before and after an
intervention.

    sink        attention to BOS at queries that are no triggers, mean over heads, of the layer where it is largest
    drain       ||W_O v|| of BOS over the mean of the other tokens, of the layer where it is smallest
    peak        ||h|| of BOS over the median token, at the block where it is largest
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from quantbench.results import Record

Figure = Callable[[Record], float | None]  # of one run, or of one record of interventions

SINK, DRAIN, PEAK = 0.5, 0.5, 2.0  # a signature is there: above, below, above
NO_SINK, NO_DRAIN, NO_PEAK = 0.25, 0.8, 1.5  # and is not there: below, above, below


# --- figures of a run ------------------------------------------------------------------------------------------------


def watched(run: Record) -> list[tuple[int, dict[str, Any]]]:
    """(step, figures) of a watched timeline, ascending; empty where the track is not watched."""
    entries = [entry for entry in run["training"]["timeline"] if "watched" in entry]
    return [(entry["step"], entry["watched"]) for entry in entries]


def _last(run: Record) -> dict[str, Any]:
    entries = watched(run)
    return entries[-1][1] if entries else {}


def _defined(values: Iterable[float | None] | None) -> list[float]:
    return [value for value in values or [] if value is not None]


def sink_of(figures: Mapping[str, Any]) -> float | None:
    """The sink of an entry of a watched timeline."""
    return max(_defined(figures.get("bos-attention")), default=None)


def drain_of(figures: Mapping[str, Any]) -> float | None:
    """The drain of an entry."""
    return min(_defined(figures.get("value-drain")), default=None)


def peak_of(figures: Mapping[str, Any]) -> float | None:
    """The peak of an entry, over the median of the other tokens."""
    return max(_over(figures.get("residual-bos"), figures.get("residual-median")), default=None)


def _over(above_L: Iterable[float | None] | None, below_L: Iterable[float | None] | None) -> list[float]:
    pairs = zip(above_L or [], below_L or [], strict=True)
    return [a / b for a, b in pairs if a is not None and b]


def sink(run: Record) -> float | None:
    """Of the trained model."""
    return sink_of(_last(run))


def drain(run: Record) -> float | None:
    """Of the trained model."""
    return drain_of(_last(run))


def _peaks(run: Record) -> dict[str, float]:
    found: dict[str, float] = run["full-precision"]["metrics"].get("residual-peak", {}).get("extra", {})
    return found


def peak(run: Record) -> float | None:
    """Of the trained model, at its worst block."""
    return _peaks(run).get("bos")


def peak_at_first(run: Record) -> float | None:
    """Of the trained model after block 0, where the paper looks."""
    return _peaks(run).get("bos.0")


def deep_peak(run: Record) -> float | None:
    """Of the trained model, at the worst block behind block 0."""
    return max((value for layer, value in _by_block(run).items() if layer > 0), default=None)


def _by_block(run: Record) -> dict[int, float]:
    """Block -> norm of BOS over the median."""
    named = [(name.removeprefix("bos."), value) for name, value in _peaks(run).items() if name.startswith("bos.")]
    return {int(layer): value for layer, value in named if value is not None}


def excess(run: Record) -> float | None:
    """||h|| of BOS minus the mean of the others' after block 0, as published."""
    return _peaks(run).get("excess.0")


def _sink_layer(run: Record) -> int | None:
    values = _last(run).get("bos-attention") or []
    known = [(value, layer) for layer, value in enumerate(values) if value is not None]
    return max(known)[1] if known else None


def _peak_layer(run: Record) -> int:
    known = _by_block(run)
    return max(known, key=lambda layer: known[layer], default=0)


def dormancy(run: Record) -> float | None:
    """Attention to BOS at queries that may rest minus that at triggers, at the layer of the sink."""
    last, layer = _last(run), _sink_layer(run)
    if layer is None or not last.get("trigger-attention"):
        return None
    active = last["trigger-attention"][layer]
    return None if active is None else float(last["bos-attention"][layer] - active)


def learned(run: Record) -> float | None:
    """Excess risk at triggers, nats, on all of the track's held-out sequences."""
    return (run["full-precision"].get("task") or {}).get("excess-risk-trigger")


def _halfway(run: Record, figure: Callable[[Mapping[str, Any]], float | None], logarithmic: bool = False) -> float:
    """The step at which a figure has come half of its way from its first to its last value; NaN where it never does.

    Interpolated in log(1 + step).
    """
    course = [(math.log1p(step), figure(entry)) for step, entry in watched(run)]
    points = [(x, math.log(y) if logarithmic else y) for x, y in course if y is not None and (y > 0 or not logarithmic)]
    if len(points) < 2:
        return math.nan
    middle = (points[0][1] + points[-1][1]) / 2
    rising = points[-1][1] > points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if (y1 >= middle) if rising else (y1 <= middle):
            share = (middle - y0) / (y1 - y0) if y1 != y0 else 0.0
            return math.expm1(x0 + max(0.0, share) * (x1 - x0))
    return math.nan


def drain_after_sink(run: Record) -> float | None:
    """log10 of the steps to half of the drain over those to half of the sink."""
    return _log_ratio(_halfway(run, drain_of, logarithmic=True), _halfway(run, sink_of))


def peak_after_sink(run: Record) -> float | None:
    """The same of the peak; None where the model has none."""
    if (found := peak(run)) is None or found < NO_PEAK:
        return None
    return _log_ratio(_halfway(run, peak_of), _halfway(run, sink_of))


def _log_ratio(one: float, other: float) -> float | None:
    return math.log10(one / other) if one > 0 and other > 0 else None


def _growing(run: Record, layer: int, since: float, excess: bool) -> list[tuple[float, float]]:
    """(step, norm of BOS after a block, or its excess over the mean of the others) from a share of the steps on."""
    entries = watched(run)
    start = since * entries[-1][0] if entries else 0.0
    found = []
    for step, figures in entries:
        bos, others = figures["residual-bos"][layer], figures["residual-others"][layer]
        if step >= max(start, 1) and bos is not None and others is not None:
            found.append((float(step), bos - others if excess else bos))
    return found


def growth(run: Record, layer: int) -> float | None:
    """What BOS's norm after a block gains in 1,000 steps: least squares over the last three quarters."""
    line = _line(_growing(run, layer, 0.25, excess=False))
    return None if line is None else 1000 * line[0]


def growth_at_peak(run: Record) -> float | None:
    """The growth of a run at its own peak."""
    return growth(run, _peak_layer(run))


def relative_growth(run: Record, base: Record) -> float | None:
    """The growth of a run over the baseline's, at the baseline's peak."""
    layer = _peak_layer(base)
    mine, theirs = growth(run, layer), growth(base, layer)
    return None if mine is None or not theirs or theirs <= 0 else mine / theirs


def exponent(run: Record) -> float | None:
    """a of excess ~ step^a over the last decade of steps, at the peak: 1 is linear. None where there is no peak."""
    if (found := peak(run)) is None or found < NO_PEAK:
        return None
    points = [(math.log(x), math.log(y)) for x, y in _growing(run, _peak_layer(run), 0.1, excess=True) if y > 0]
    line = _line(points)
    return None if line is None else line[0]


def straightness(run: Record) -> float | None:
    """R2 of a line through delta logit over log step, at the layer of the sink, over the last factor 30 of steps."""
    line = _line(_delta_logits(run))
    return None if line is None else line[1]


def logit_slope(run: Record) -> float | None:
    """The slope of that line."""
    line = _line(_delta_logits(run))
    return None if line is None else line[0]


def _delta_logits(run: Record) -> list[tuple[float, float]]:
    entries, layer = watched(run), _sink_layer(run)
    if layer is None or not entries:
        return []
    first = entries[-1][0] / 30
    return [(math.log(s), f["delta-logit"][layer]) for s, f in entries if s >= first and f["delta-logit"][layer]]


def _line(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    """(slope, R2) by least squares, R2 NaN where all y are one; None below three points."""
    if len(points) < 3:
        return None
    n = len(points)
    mean_x, mean_y = (math.fsum(values) / n for values in zip(*points, strict=True))
    xx = math.fsum((x - mean_x) ** 2 for x, _ in points)
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    yy = math.fsum((y - mean_y) ** 2 for _, y in points)
    return None if xx == 0 else (xy / xx, xy**2 / (xx * yy) if yy > 0 else math.nan)


def peak_at_equal_loss(run: Record, base: Record) -> float | None:
    """The peak of a run over the baseline's at the step where that had the run's final loss on the watched sequences.

    1 or so: the run has no less of a peak than the baseline had when it knew as much.
    """
    mine, entries = _last(run), watched(base)
    if not mine or not entries:
        return None
    goal, points = mine["task"].get("loss"), [(e["task"].get("loss"), peak_of(e)) for _, e in entries]
    known = [(loss, found) for loss, found in points if loss is not None and found is not None]
    own = peak_of(mine)
    if goal is None or own is None or not known:
        return None
    then = known[-1][1]  # a run that has learned more than the baseline ever does is held against its end
    for (loss0, peak0), (loss1, peak1) in pairwise(known):
        if loss1 <= goal < loss0:
            then = peak0 + (peak1 - peak0) * (loss0 - goal) / (loss0 - loss1)
            break
    return own / then


# --- figures of interventions -----------------------------------------------------------------------------------------


def _after(record: Record, intervention: str | None, figure: str) -> float | None:
    """A figure of the model as it is (None), or after an intervention."""
    before = (record["untouched"] or {}).get(figure)
    if before is None or intervention is None:
        return None if before is None else before[0]
    change = record["interventions"].get(intervention, {}).get(figure)
    return None if change is None else before[0] + change[0]


def _by_layer(record: Record, intervention: str | None, figure: str) -> dict[int, float]:
    names = [name for name in record["untouched"] or {} if name.partition(".")[0] == figure]
    found = {int(name.partition(".")[2]): _after(record, intervention, name) for name in names}
    return {layer: value for layer, value in found.items() if value is not None}


def _first(intervention: str) -> int:
    """The first layer that sees what an intervention changed."""
    return 0 if intervention == "peak.all" else int(intervention.rpartition(".")[2]) + 1


def sink_that_goes(intervention: str) -> Figure:
    """1 - sink after / before, at the layer behind the intervention that had the largest; None where none had one."""

    def figure(record: Record) -> float | None:
        before = _behind(_by_layer(record, None, "bos-attention"), intervention)
        after = _by_layer(record, intervention, "bos-attention")
        layer = max(before, key=lambda at: before[at], default=None)
        if layer is None or before[layer] < SINK / 2 or layer not in after:
            return None
        return 1 - after[layer] / before[layer]

    return figure


def logit_that_goes(intervention: str) -> Figure:
    """1 - delta logit after / before, at that layer: a sink may hold nearly all mass before and after."""

    def figure(record: Record) -> float | None:
        sinks = _behind(_by_layer(record, None, "bos-attention"), intervention)
        layer = max(sinks, key=lambda at: sinks[at], default=None)
        if layer is None or sinks[layer] < SINK / 2:
            return None
        before, after = (_after(record, name, f"delta-logit.{layer}") for name in (None, intervention))
        return None if before is None or after is None or before <= 0 else 1 - after / before

    return figure


def drain_that_goes(intervention: str) -> Figure:
    """1 - log drain after / log drain before, at the layer behind that had the deepest; None where none had one."""

    def figure(record: Record) -> float | None:
        before = _behind(_by_layer(record, None, "value-drain"), intervention)
        after = _by_layer(record, intervention, "value-drain")
        layer = min(before, key=lambda at: before[at], default=None)
        if layer is None or not 0 < before[layer] < NO_DRAIN or after.get(layer, 0) <= 0:
            return None
        return 1 - math.log(after[layer]) / math.log(before[layer])

    return figure


def peak_that_goes(intervention: str) -> Figure:
    """1 - (peak after - 1) / (peak before - 1), over all blocks; None where there was none."""

    def peak(record: Record, name: str | None) -> float:
        medians = _by_layer(record, name, "residual-median")
        norms = _by_layer(record, name, "residual-bos")
        return max((x / medians[at] for at, x in norms.items() if medians.get(at)), default=0.0)

    def figure(record: Record) -> float | None:
        before, after = peak(record, None), peak(record, intervention)
        return None if before < NO_PEAK or after == 0 else 1 - (after - 1) / (before - 1)

    return figure


def _behind(by_layer: Mapping[int, float], intervention: str) -> dict[int, float]:
    return {layer: value for layer, value in by_layer.items() if layer >= _first(intervention)}


def risk(intervention: str, figure: str) -> Figure:
    """What an intervention adds to a figure of the task."""

    def change(record: Record) -> float | None:
        found = record["interventions"].get(intervention, {}).get(figure)
        return None if found is None else float(found[0])

    return change


def moving_costs(figure: str) -> Figure:
    """What it adds to put all weight of the sink's layer on BOS, at triggers too."""

    def change(record: Record) -> float | None:
        sinks = _by_layer(record, None, "bos-attention")
        layer = max(sinks, key=lambda at: sinks[at], default=None)
        return None if layer is None or sinks[layer] < SINK / 2 else risk(f"bos.{layer}", figure)(record)

    return change
