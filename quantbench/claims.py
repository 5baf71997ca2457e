"""The claims of arXiv:2410.13835, one row each: what was published, what the records say, and the verdict.

A row has a figure, measured once a seed, and a rule that was written before the runs: the claim *holds* where the whole
95% interval over seeds obeys it, *fails* where none of the interval does, and is *not decided at this size* otherwise.
A single seed has no interval; its verdict is that of its figure, and says so. Figures come from the records
(`signatures`). What nobody has run is no row.

The published figures are read from the authors' code, its committed tensors, and vector figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantbench import stats
from quantbench.markup import Table, escape, markdown
from quantbench.numerals import NOTHING
from quantbench.relation import finished
from quantbench.results import BASELINE, Record, read_all, read_probes
from quantbench.signatures import (
    DRAIN,
    NO_DRAIN,
    NO_PEAK,
    NO_SINK,
    PEAK,
    SINK,
    Figure,
    deep_peak,
    dormancy,
    drain,
    drain_after_sink,
    drain_that_goes,
    excess,
    exponent,
    growth_at_peak,
    learned,
    logit_slope,
    logit_that_goes,
    moving_costs,
    peak,
    peak_after_sink,
    peak_at_equal_loss,
    peak_at_first,
    peak_that_goes,
    relative_growth,
    risk,
    sink,
    sink_that_goes,
    straightness,
    watched,
)

Seeds = dict[int, float]  # seed -> figure

HOLDS, FAILS, OPEN = "holds", "fails", "not decided at this size"
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
            return f"{HOLDS if self.obeyed(found) else FAILS} (one seed)"
        if self.low < interval.low and interval.high < self.high:
            return HOLDS
        return FAILS if interval.high < self.low or interval.low > self.high else OPEN

    def obeyed(self, values: Iterable[float]) -> int:
        """How many values obey: what an interval hides where a figure ranges over powers of ten."""
        return sum(self.low < value < self.high for value in values)


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
    obeyed: int | None = None  # by how many seeds
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
        """The baseline's figure on another track over that on this one, seed by seed: whole blocks, like budgets."""
        there, here = self.others.get(track, {}).get(BASELINE, {}), self.runs.get(BASELINE, {})
        budgets = {_budget(run) for runs in (there, here) for run in runs.values()}
        whole = not any(run["track"]["resolved"]["model"].get("sublayers") for run in here.values())
        return _ratio(_each(there, figure), _each(here, figure)) if whole and len(budgets) == 1 else {}


def _budget(run: Record) -> tuple[Any, ...]:
    """What two tracks must share for their structures to be compared."""
    track = run["track"]["resolved"]
    return track["model"]["width"], *(track.get(key) for key in ("lr", "steps", "batch", "length"))


def _each(records: Mapping[int, Record], figure: Figure) -> Seeds:
    found = {seed: figure(record) for seed, record in sorted(records.items())}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def _ratio(mine: Seeds, base: Seeds) -> Seeds:
    return {seed: value / base[seed] for seed, value in mine.items() if base.get(seed)}


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
          _of(BASELINE, growth_at_peak), DEEP),
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


THREE = {  # signature -> its figure, what it obeys where it is there, and where it is gone
    "sink": (sink, above(SINK), below(NO_SINK)),
    "drain": (drain, below(DRAIN), above(NO_DRAIN)),
    "peak": (peak, above(PEAK), below(NO_PEAK)),
}


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
            obeyed = claim.rule.obeyed(values.values())
            found.append(Row(claim.name, claim.text, claim.published, str(claim.rule), values, verdict, obeyed))
    return found + [row for lever in LEVERS if (row := _dissociation(known, lever)) is not None]


def _dissociation(known: Evidence, lever: str) -> Row | None:
    """Whether the three come and go together under a lever; None where the baseline has not all of them."""
    states = _states(known, lever)
    if len(states) < len(THREE) or list(_states(known, BASELINE).values()) != ["there"] * len(THREE):
        return None
    shown = "; ".join(f"{name} {states[name]} ({_estimate(known.of(lever, THREE[name][0]))})" for name in THREE)
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
        note=shown,
    )


def _states(known: Evidence, recipe: str) -> dict[str, str]:
    """Each of the three is there, is gone, or lies between; empty for one that no run of the recipe has."""
    found = {}
    for name, (figure, there, gone) in THREE.items():
        if values := known.of(recipe, figure):
            yes, no = (rule.judge(values.values()).startswith(HOLDS) for rule in (there, gone))
            found[name] = "there" if yes else "gone" if no else "between"
    return found


# --- theory -----------------------------------------------------------------------------------------------------------


def theory_rows() -> list[Row]:
    """What the simplified model says, computed: see theory.py."""
    from quantbench import theory

    found = theory.figures()

    def row(name: str, claim: str, published: str, key: str, rule: Rule) -> Row:
        value = found[key]
        verdict = HOLDS if rule.obeyed([value]) else FAILS
        return Row(name, claim, published, str(rule), {}, verdict, note=_shown(value))

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

HEADER = ["claim", "published", "holds if", "measured", "seeds that obey", "verdict"]


def table(rows: Iterable[Row]) -> Table:
    """Rows as a header and cells."""
    return HEADER, [[row.claim, row.published, row.rule, row.measured, _of_seeds(row), row.verdict] for row in rows]


def _of_seeds(row: Row) -> str:
    return NOTHING if row.obeyed is None else f"{row.obeyed} of {len(row.values)}"


def _counted(rows: list[Row]) -> str:
    """How many claims hold, fail, and are not decided."""
    counts = [sum(row.verdict.startswith(verdict) for row in rows) for verdict in (HOLDS, FAILS, OPEN)]
    return f"Of {len(rows)} claims {counts[0]} hold, {counts[1]} fail, {counts[2]} are not decided."


def plain(found: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Rows fit for JSON, and those of theory."""
    every = {**found, "theory": theory_rows()}
    return {track: [_plain(row) for row in some] for track, some in every.items()}


def _plain(row: Row) -> dict[str, Any]:
    seeds = {str(seed): value for seed, value in row.values.items()}
    words = {"name": row.name, "claim": row.claim, "published": row.published, "rule": row.rule}
    return {**words, "measured": row.measured, "seeds": seeds, "obeyed": row.obeyed, "verdict": row.verdict}


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
before the runs. Where a figure ranges over powers of ten the interval says little: look at the *seeds that obey*.
*sink*: attention to BOS at queries that are no triggers, of the layer where it is largest. *drain*: what BOS would
add to the stream over what other tokens would, of the layer where it is smallest. *peak*: norm of BOS over the median
token, at the block where it is largest."""


def render(results_root: Path, examined: Mapping[str, list[Row]] | None = None) -> dict[Path, bytes]:
    """claims.md by its path, from what `examine` gives; nothing where no record answers a claim of the task."""
    runs, _ = _sorted(results_root)
    known = examine(results_root) if examined is None else examined
    found = {name: some for name, some in known.items() if _on_task(runs[name])}
    if not found:
        return {}
    parts = [INTRODUCTION]
    for track, some in found.items():
        parts += [f"## {escape(_title(runs[track]))} (`{track}`)", escape(_setting(runs[track]))]
        parts += [_counted(some), markdown(table(some))]
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
    rates = ", ".join(f"{name} {_rate(next(iter(by.values()))):g}" for name, by in sorted(runs.items()))
    return (
        f"{model['layers']} layer{'s' * (model['layers'] > 1)}, width {model['width']}, "
        f"batch {track['batch']}, {track['length']} tokens, "
        f"{track['steps']:,} steps. Learning rates: {rates}. Seeds: {seeds}."
    )


def _rate(run: Record) -> float:
    """The learning rate a run was trained at: a control scales the one that it states."""
    resolved = run["recipe"]["resolved"]
    scales = [fields.get("lr-scale", 1.0) for fields in (resolved.get("mitigations") or {}).values()]
    return float(resolved["lr"] * math.prod(scales))


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
