"""The claims of arXiv:2410.13835, one row each: what was published, what the records say, and the verdict.

A row has a figure, measured once a seed, and a rule that was written before the runs: the claim *holds* where the whole
95% interval over seeds obeys it, *fails* where none of the interval does, and is *not decided at this size* otherwise.
A single seed has no interval; its verdict is that of its figure, and says so. Figures come from the records: the
metrics of the full-precision model, the watched timeline (a track with `watched: true`), and the interventions of
`quantbench probe`. What nobody has run is no row.

    sink        attention to BOS at queries that are no triggers, mean over heads, of the layer where it is largest
    drain       ||W_O v|| of BOS over the mean of the other tokens, of the layer where it is smallest
    peak        ||h|| of BOS over the median token, at the block where it is largest

The published figures are read from the authors' code, its committed tensors, and vector figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantbench import stats
from quantbench.relation import finished
from quantbench.results import BASELINE, Record, read_all, read_probes

Seeds = dict[int, float]  # seed -> figure
Figure = Callable[[Record], float | None]  # of one run, or of one record of interventions
Table = tuple[list[str], list[list[str]]]

HOLDS, FAILS, OPEN = "holds", "fails", "not decided at this size"
SINK, DRAIN, PEAK = 0.5, 0.5, 2.0  # a signature is there: above, below, above
NO_SINK, NO_DRAIN, NO_PEAK = 0.25, 0.8, 1.5  # and is not there: below, above, below
LEVERS = ("sgd", "relu-attn", "relu-attn-sqrt", "relu-attn-sgd", "baseline-low-lr", "baseline-wd0")


@dataclass(frozen=True)
class Rule:
    """What a figure obeys: above `low`, below `high`, or between the two."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"above {_shown(self.low)}"
        return f"below {_shown(self.high)}" if math.isinf(self.low) else f"{_shown(self.low)} to {_shown(self.high)}"

    def judge(self, values: Iterable[float]) -> str:
        """The verdict on a figure, from its value in each seed."""
        found = list(values)
        interval = stats.t_interval(found)
        if interval is None:
            return f"{HOLDS if self.low < found[0] < self.high else FAILS} (one seed)"
        if self.low < interval.low and interval.high < self.high:
            return HOLDS
        return FAILS if interval.high < self.low or interval.low > self.high else OPEN


def above(limit: float) -> Rule:
    """Obeyed by figures above a limit."""
    return Rule(low=limit)


def below(limit: float) -> Rule:
    """Obeyed by figures below a limit."""
    return Rule(high=limit)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    claim: str
    published: str
    rule: str
    values: Seeds
    verdict: str
    note: str = ""  # what stands in the place of a measured figure

    @property
    def measured(self) -> str:
        return self.note or _estimate(self.values)


@dataclass(frozen=True)
class Evidence:
    """What is known of one track: its runs and their interventions by recipe and seed, and those of other tracks."""

    track: str
    runs: Mapping[str, Mapping[int, Record]]
    probes: Mapping[str, Mapping[int, Record]]
    others: Mapping[str, Mapping[str, Mapping[int, Record]]] = field(default_factory=dict)  # track -> its runs

    def of(self, recipe: str, figure: Figure) -> Seeds:
        """The figure of every run of a recipe that has it."""
        return _each(self.runs.get(recipe, {}), figure)

    def probed(self, recipe: str, figure: Figure) -> Seeds:
        """The same of its records of interventions."""
        return _each(self.probes.get(recipe, {}), figure)

    def against(self, recipe: str, figure: Figure) -> Seeds:
        """The figure of a recipe over that of the baseline, seed by seed."""
        return _ratio(self.of(recipe, figure), self.of(BASELINE, figure))

    def together(self, recipe: str, figure: Callable[[Record, Record], float | None]) -> Seeds:
        """A figure of a recipe's run and the baseline's of the same seed."""
        base = self.runs.get(BASELINE, {})
        found = {s: figure(run, base[s]) for s, run in self.runs.get(recipe, {}).items() if s in base}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def structure(self, track: str, figure: Figure) -> Seeds:
        """The baseline's figure on another track over that on this one, seed by seed."""
        there = _each(self.others.get(track, {}).get(BASELINE, {}), figure)
        return _ratio(there, self.of(BASELINE, figure))


def _each(records: Mapping[int, Record], figure: Figure) -> Seeds:
    found = {seed: figure(record) for seed, record in sorted(records.items())}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def _ratio(mine: Seeds, base: Seeds) -> Seeds:
    return {seed: value / base[seed] for seed, value in mine.items() if base.get(seed)}


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


# --- the claims -------------------------------------------------------------------------------------------------------

ONE_LAYER = "1 layer, Adam"
THREE_LAYERS = "3 layers"


@dataclass(frozen=True)
class Claim:
    """What was said, what was published of it, the rule, and how the figure is measured; `layers`: of which tracks."""

    name: str
    text: str
    published: str
    rule: Rule
    measure: Callable[[Evidence], Seeds]
    layers: tuple[int, int] = (1, 1024)  # from and to


def _of(recipe: str, figure: Figure) -> Callable[[Evidence], Seeds]:
    return lambda known: known.of(recipe, figure)


def _probed(figure: Figure, recipe: str = BASELINE) -> Callable[[Evidence], Seeds]:
    return lambda known: known.probed(recipe, figure)


DEEP, SHALLOW = (2, 1024), (1, 1)
CLAIMS = (
    Claim("learned", "The task is learned (excess risk at triggers, nats)", "7.8e-5 (1 layer, 10k steps); 5e-5 (3)",
          below(0.05), _of(BASELINE, learned)),
    Claim("sink", "Softmax and Adam form a sink", ".811 after 10k steps (1 layer)", above(SINK), _of(BASELINE, sink)),
    Claim("drain", "Softmax and Adam drain the value of BOS", "1.42 of 5.20 left after 10k steps (1 layer)",
          below(DRAIN),
          _of(BASELINE, drain)),
    Claim("peak", "Softmax and Adam grow a residual peak", "140.7 against some 26: about 5 (3 layers, 10k)",
          above(PEAK),
          _of(BASELINE, peak), DEEP),
    Claim("no-peak", "One layer has no relative peak", "every token's norm grows", below(NO_PEAK), _of(BASELINE, peak),
          SHALLOW),
    Claim("drain-later", "The drain follows the sink (log10 of steps to half of each)", "sinks at 200 to 1,000 steps",
          above(0.0), _of(BASELINE, drain_after_sink)),
    Claim("peak-later", "The peak comes last (log10 of its steps to half over the sink's)", "grows on to 199k steps",
          above(0.0), _of(BASELINE, peak_after_sink), DEEP),
    Claim("dormant", "The head is active at triggers, dormant elsewhere (difference in attention to BOS)",
          "sink at non-triggers alone", above(0.25), _of(BASELINE, dormancy)),
    Claim("attention-triggers", "Without attention, triggers are lost (nats added)", "7.683 (1 layer)", above(1.0),
          _probed(risk("attention.0", "excess-risk-trigger")), SHALLOW),
    Claim("attention-bigrams", "Without attention, nothing but triggers is lost (nats added elsewhere)",
          ".007 in all (1 layer)", below(0.05),
          _probed(risk("attention.0", "excess-risk-bigram")), SHALLOW),
    Claim("mlp-bigrams", "The MLP holds the bigrams (nats added without it)", "1.990 (1 layer)", above(1.0),
          _probed(risk("mlp.0", "excess-risk-bigram")), SHALLOW),
    Claim("moved-triggers", "A head moved to BOS wholly costs at triggers (nats added)", "not published", above(0.25),
          _probed(moving_costs("excess-risk-trigger"))),
    Claim("moved-bigrams", "A head moved to BOS wholly costs nothing elsewhere (nats added)", "not published",
          below(0.05),
          _probed(moving_costs("excess-risk-bigram"))),
    Claim("block-0-peak", "Without block 0 the peak is gone (share that goes)", "excess 106 to .7 (2 blocks + MLP)",
          above(0.5), _probed(peak_that_goes("block.0")), DEEP),
    Claim("block-0-logit", "Without block 0 the sink's logit is gone (share of delta logit that goes)", "18.9 to 1.9",
          above(0.5), _probed(logit_that_goes("block.0")), DEEP),
    Claim("block-0-sink", "Without block 0 the sink is gone (share of its mass that goes)", "not published",
          above(0.5), _probed(sink_that_goes("block.0")), DEEP),
    Claim("block-0-drain", "Without block 0 the drain is gone (share that goes)", "value norm .73 to 10.6", above(0.5),
          _probed(drain_that_goes("block.0")), DEEP),
    Claim("at-bos-peak", "Without what block 0 does at BOS alone the peak is gone (share that goes)", "not published",
          above(0.5), _probed(peak_that_goes("first.0")), DEEP),
    Claim("at-bos-logit", "Without what block 0 does at BOS alone the sink's logit is gone (share that goes)",
          "not published", above(0.5), _probed(logit_that_goes("first.0")), DEEP),
    Claim("at-bos-sink", "Without what block 0 does at BOS alone the sink is gone (share of its mass)", "not published",
          above(0.5), _probed(sink_that_goes("first.0")), DEEP),
    Claim("at-bos-drain", "Without what block 0 does at BOS alone the drain is gone (share that goes)", "not published",
          above(0.5), _probed(drain_that_goes("first.0")), DEEP),
    Claim("at-bos-risk", "Without what block 0 does at BOS alone triggers are copied as before (nats added)",
          "2.4 without the whole block",
          below(0.25), _probed(risk("first.0", "excess-risk-trigger")), DEEP),
    Claim("peak-alone-sink", "The peak makes the sink: scaled away after every block, the sink goes (share)",
          "not published: block 0 was removed", above(0.5), _probed(sink_that_goes("peak.all")), DEEP),
    Claim("peak-alone-drain", "The peak makes the drain: scaled away likewise, the drain goes (share)", "not published",
          above(0.5), _probed(drain_that_goes("peak.all")),
          DEEP),
    Claim("two-blocks", "Two blocks grow little of the peak of three (excess after block 0, share)", "14.6 of 114.5",
          below(0.5), lambda known: known.structure("bb-2tf", excess), (3, 3)),
    Claim("two-blocks-mlp", "Two blocks and an MLP grow most of it: the smallest structure", "106 of 114.5", above(0.5),
          lambda known: known.structure("bb-2tf-mlp", excess), (3, 3)),
    Claim("mlp-block-mlp", "MLP + block + MLP grows little of it", "10.8 of 114.5", below(0.5),
          lambda known: known.structure("bb-mlp-tf-mlp", excess), (3, 3)),
    Claim("attention-block-mlp", "Attention + block + MLP grows none", "-1.3 of 114.5", below(0.25),
          lambda known: known.structure("bb-attn-tf-mlp", excess), (3, 3)),
    Claim("relu-sink", "ReLU attention removes the sink (absolute mass over softmax's)", "no sink", below(0.5),
          lambda known: known.against("relu-attn", sink)),
    Claim("relu-peak-0", "ReLU attention removes the peak after block 0", "24.5 against 140.7", below(NO_PEAK),
          _of("relu-attn", peak_at_first), DEEP),
    Claim("relu-peak-deep", "ReLU attention removes the peak behind block 0 (open: published curves stop there)",
          "23,647 against 47 to 367 after block 2", below(NO_PEAK), _of("relu-attn", deep_peak), DEEP),
    Claim("relu-drain", "ReLU attention leaves values undrained (open: published curves are copies of Adam's)",
          "unknown", above(NO_DRAIN), _of("relu-attn", drain)),
    Claim("relu-learned", "ReLU attention learns the task (excess risk at triggers, nats)", "not tabulated",
          below(0.05), _of("relu-attn", learned)),
    Claim("sgd-learned", "SGD learns the task (excess risk at triggers, nats)", ".0557", below(0.05),
          _of("sgd", learned)),
    Claim("sgd-sink", "SGD keeps the sink", "sinks form", above(SINK), _of("sgd", sink)),
    Claim("sgd-peak", "SGD removes the peak, at every block", "20.4 against 140.7 after block 0", below(NO_PEAK),
          _of("sgd", peak), DEEP),
    Claim("sgd-drain", "SGD drains values (open: published curves are copies of Adam's)", "unknown", below(DRAIN),
          _of("sgd", drain)),
    Claim("growth", "Under Adam BOS's norm grows at the peak (per 1,000 steps)", "+12.4", above(0.0),
          lambda known: known.of(BASELINE, lambda run: growth(run, _peak_layer(run))), DEEP),
    Claim("linear", "It grows linearly (exponent of the excess over the last decade of steps)", "1", Rule(0.7, 1.3),
          _of(BASELINE, exponent), DEEP),
    Claim("flat", "Under SGD it does not grow (growth over Adam's)", "-.77 of +12.4", below(0.1),
          lambda known: known.together("sgd", relative_growth), DEEP),
    Claim("flat-relu", "With ReLU it does not grow (growth over softmax's)", "+.05 of +12.4", below(0.1),
          lambda known: known.together("relu-attn", relative_growth), DEEP),
    Claim("sgd-equal-loss", "At equal loss SGD has less of a peak than Adam (ratio of the two)",
          "not compared: .0557 against 5e-5 at triggers", below(0.9),
          lambda known: known.together("sgd", peak_at_equal_loss), DEEP),
    Claim("relu-equal-loss", "At equal loss ReLU has less of a peak than softmax", "not compared", below(0.9),
          lambda known: known.together("relu-attn", peak_at_equal_loss), DEEP),
    Claim("low-lr-peak", "Adam at a third of its rate has the peak: it is not the rate", "not compared",
          above(NO_PEAK), _of("baseline-low-lr", peak), DEEP),
    Claim("logit", "Delta logit grows like log t (R2 of the line)", "9.70, 16.8, 35.7 at 1k, 10k, 100k (1 layer)",
          above(0.9), _of(BASELINE, straightness)),
    Claim("logit-slope", "The slope of that line is above 0 (gradient flow has .5)", "3.1, then 8.2 (1 layer)",
          above(0.0), _of(BASELINE, logit_slope)),
)  # fmt: skip


def examine(results_root: Path, track: str | None = None) -> dict[str, list[Row]]:
    """Track -> its rows, of every track (or of the one named) whose records can answer a claim.

    ValueError where the track that is named has none.
    """
    runs, probes = _sorted(results_root)
    known = [name for name in runs if track in (None, name)]
    found = {name: rows(Evidence(name, runs[name], probes.get(name, {}), runs)) for name in sorted(known)}
    found = {name: some for name, some in found.items() if some}
    if track is not None and not found:
        raise ValueError(
            f"{results_root} has no records of track {track} that answer a claim: on a track with `watched: true`, run "
            f"`quantbench bench baseline sgd relu-attn --track {track}` or `quantbench probe baseline --track {track}`"
        )
    return found


def _sorted(results_root: Path) -> tuple[dict[str, dict[str, dict[int, Record]]], ...]:
    """(runs, interventions), each by track, recipe and seed; of interventions those whose run is there."""
    records, probed = read_all(results_root), read_probes(results_root)
    runs: dict[str, dict[str, dict[int, Record]]] = {}
    for track in sorted({r["track"]["name"] for r in records}):
        for run in finished([r for r in records if r["track"]["name"] == track]):
            runs.setdefault(track, {}).setdefault(run["recipe"]["name"], {})[run["seed"]] = run
    probes: dict[str, dict[str, dict[int, Record]]] = {}
    for record in probed:
        track, recipe, seed = record["track"]["name"], record["recipe"]["name"], record["seed"]
        measured = runs.get(track, {}).get(recipe, {}).get(seed)
        if measured is not None and record["status"] == "finished" and _same(record, measured):
            probes.setdefault(track, {}).setdefault(recipe, {})[seed] = record
    return runs, probes


def _same(record: Record, run: Record) -> bool:
    return all(record[key]["digest"] == run[key]["digest"] for key in ("recipe", "track")) and (
        record["data"] == run["data"]
    )


def rows(known: Evidence) -> list[Row]:
    """Every claim that the evidence answers, in the order of CLAIMS, and then which signatures each lever leaves."""
    some = next((run for runs in known.runs.values() for run in runs.values()), None)
    if some is None:
        return []
    layers = int((some["track"]["resolved"].get("model") or {}).get("layers", 8))
    found = []
    for claim in CLAIMS:
        if claim.layers[0] <= layers <= claim.layers[1] and (values := claim.measure(known)):
            verdict = claim.rule.judge(values.values())
            found.append(Row(claim.name, claim.text, claim.published, str(claim.rule), values, verdict))
    return found + [row for lever in LEVERS if (row := _dissociation(known, lever)) is not None]


def _dissociation(known: Evidence, lever: str) -> Row | None:
    """Whether the three come and go together under a lever: each is there, is not there, or cannot be told."""
    judged = {
        "sink": (known.of(lever, sink), above(SINK), below(NO_SINK)),
        "drain": (known.of(lever, drain), below(DRAIN), above(NO_DRAIN)),
        "peak": (known.of(lever, peak), above(PEAK), below(NO_PEAK)),
    }
    if not all(values for values, _, _ in judged.values()) or not known.of(BASELINE, sink):
        return None
    states = {}
    for name, (values, there, gone) in judged.items():
        yes, no = (rule.judge(values.values()).startswith(HOLDS) for rule in (there, gone))
        states[name] = "there" if yes else "gone" if no else "between"
    shown = "; ".join(f"{name} {states[name]} ({_estimate(judged[name][0])})" for name in judged)
    apart = {"there", "gone"} <= set(states.values())
    verdict = FAILS if apart else HOLDS if len(set(states.values())) == 1 and "between" not in states.values() else OPEN
    return Row(
        f"together-{lever}",
        f"Under {lever} the three signatures come and go together",
        "one cause (section 3); they dissociate (arXiv:2603.17771)",
        f"there: sink above {SINK}, drain below {DRAIN}, peak above {PEAK:g}; "
        f"gone: below {NO_SINK}, above {NO_DRAIN}, below {NO_PEAK}",
        {},
        verdict,
        shown,
    )


# --- theory -----------------------------------------------------------------------------------------------------------


def theory_rows() -> list[Row]:
    """What the simplified model says, computed: see theory.py."""
    from quantbench import theory

    found = theory.figures()

    def row(name: str, claim: str, published: str, key: str, rule: Rule) -> Row:
        value = found[key]
        return Row(
            name, claim, published, str(rule), {}, HOLDS if rule.low < value < rule.high else FAILS, _shown(value)
        )

    late, early = "slope 1e6 to 1e8", "slope 1e4 to 1e6"
    rate, stops = found["drain rate, eigenvalue"], found["y of the minimum"]
    slow = found["adam a step, in the end"]
    return [
        row("theory-early", "Sink logit, drained value: slope in log t, 1e4 to 1e6", ".54", early, Rule(0.5, 0.58)),
        row("theory-late", "... from 1e6 to 1e8: 1/2 in the end", ".503", late, Rule(0.5, 0.51)),
        row("theory-rest", "Undrained value: the logit stops, at the minimum", "finite", "y at rest",
            Rule(stops - 1e-6, stops + 1e-6)),
        row("theory-drain", "Drain at a fixed logit: exponential, at the smallest eigenvalue", "exponential",
            "drain rate", Rule(0.98 * rate, 1.02 * rate)),
        row("theory-adam", "Norm under Adam: linear at -1/2 log beta2 a step, whatever the rate", "about .0045",
            "adam a step", Rule(0.99 * slow, 1.01 * slow)),
        row("theory-adam-10k", "... from 10, after 10,000 steps", "64.0", "adam 10000", Rule(55, 75)),
        row("theory-sgd", "Norm under SGD, after 10,000 steps: a plateau", "10.01", "sgd 10000", Rule(10, 10.5)),
    ]  # fmt: skip


# --- shown ------------------------------------------------------------------------------------------------------------

HEADER = ["claim", "published", "holds if", "measured", "verdict"]


def table(rows: Iterable[Row]) -> Table:
    """Rows as a header and cells."""
    return HEADER, [[row.claim, row.published, row.rule, row.measured, row.verdict] for row in rows]


def plain(found: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Rows fit for JSON, and those of theory."""
    every = {**found, "theory": theory_rows()}
    return {track: [_plain(row) for row in some] for track, some in every.items()}


def _plain(row: Row) -> dict[str, Any]:
    seeds = {str(seed): value for seed, value in row.values.items()}
    words = {"name": row.name, "claim": row.claim, "published": row.published, "rule": row.rule}
    return {**words, "measured": row.measured, "seeds": seeds, "verdict": row.verdict}


def probe_table(records: list[Record]) -> Table:
    """What interventions change in the seeds of one recipe: means; sinks, drains and norms at their largest layer."""
    figures = list(records[0]["untouched"])
    kept = [name for name in figures if name.partition(".")[0] in _PROBED or name.startswith("excess")]
    lines = [["untouched", *(_mean(records, None, name) for name in kept)]]
    for name in records[0]["interventions"]:
        lines.append([name, *(_mean(records, name, figure) for figure in kept)])
    return ["intervention", *kept], lines


_PROBED = ("loss", "bos-attention", "trigger-attention", "value-drain", "residual-bos")


def _mean(records: list[Record], intervention: str | None, figure: str) -> str:
    values = [
        found[0]
        for record in records
        if (
            found := (record["interventions"].get(intervention, {}) if intervention else record["untouched"]).get(
                figure
            )
        )
    ]
    return _shown(math.fsum(values) / len(values)) if values else "–"


INTRODUCTION = """# The claims of arXiv:2410.13835, held against the records

Rendered by `quantbench leaderboard` from the records in this folder; never edited. `quantbench claims` prints it,
`quantbench bench` and `quantbench probe` make the records. A claim *holds* where the whole 95% interval over seeds
obeys the rule, *fails* where none of it does, and is *not decided at this size* otherwise; the rules were written
before the runs. *sink*: attention to BOS at queries that are no triggers, of the layer where it is largest. *drain*:
what BOS would add to the stream over what other tokens would, of the layer where it is smallest. *peak*: norm of BOS
over the median token, at the block where it is largest."""


def render(results_root: Path, markdown: Callable[[Table], str], escape: Callable[[str], str]) -> dict[Path, bytes]:
    """claims.md by its path; nothing where no record answers a claim of the task."""
    runs, _ = _sorted(results_root)
    found = {name: some for name, some in examine(results_root).items() if _on_task(runs[name])}
    if not found:
        return {}
    parts = [INTRODUCTION]
    for track, some in found.items():
        parts += [f"## {escape(_title(runs[track]))} (`{track}`)", escape(_setting(runs[track])), markdown(table(some))]
        if any(watched(run) for by_seed in runs[track].values() for run in by_seed.values()):
            parts.append(f"![Risks, attention to BOS, delta logit, values and norms over steps]({track}/dynamics.svg)")
    parts += [
        "## The simplified model, computed",
        "`quantbench/theory.py`; no records.",
        markdown(table(theory_rows())),
    ]
    return {results_root / "claims.md": ("\n\n".join(parts) + "\n").encode()}


def _on_task(runs: Mapping[str, Mapping[int, Record]]) -> bool:
    return any(
        "bigram-backcopy" in (r["track"]["resolved"].get("task") or {}) for by in runs.values() for r in by.values()
    )


def _title(runs: Mapping[str, Mapping[int, Record]]) -> str:
    return next(str(run["track"]["title"]) for by_seed in runs.values() for run in by_seed.values())


def _setting(runs: Mapping[str, Mapping[int, Record]]) -> str:
    track = next(run["track"]["resolved"] for by_seed in runs.values() for run in by_seed.values())
    model = track["model"]
    seeds = ", ".join(f"{recipe} {len(by_seed)}" for recipe, by_seed in sorted(runs.items()))
    rates = ", ".join(f"{r} {next(iter(by.values()))['recipe']['resolved']['lr']:g}" for r, by in sorted(runs.items()))
    return (
        f"{model['layers']} layers, width {model['width']}, batch {track['batch']}, {track['length']} tokens, "
        f"{track['steps']:,} steps. Learning rates: {rates}. Seeds: {seeds}."
    )


def _estimate(values: Seeds) -> str:
    """Mean, 95% limits and how many seeds."""
    found = list(values.values())
    mean, interval = math.fsum(found) / len(found), stats.t_interval(found)
    if interval is None:
        return f"{_shown(mean)} (one seed)"
    return f"{_shown(mean)} [{_shown(interval.low)}, {_shown(interval.high)}], {len(found)} seeds"


def _shown(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    magnitude = math.floor(math.log10(abs(value)))
    text = f"{value:,.{max(0, 2 - magnitude)}f}" if -3 <= magnitude < 9 else f"{value:.2e}"
    return text.replace("-", "−")
