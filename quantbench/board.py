"""One track's records as rows: means with intervals, comparisons with the baseline, ranks and notes.

A row is a recipe on a track, over seeds; where the model was there already and has one seed, over its held-out
sequences, each of another document. Rows are ranked by *damage*, the loss that the track's quantizer adds to the
model's own full-precision loss (ranking by quantized loss would rank full precision: its gaps are larger than the
damage). What a row claims against the baseline is tested on log KL(full || quantized), paired over seeds; see
`stats`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantbench import stats
from quantbench.numerals import plus_minus
from quantbench.results import BASELINE, Record, comparable, rank_by

LEARNED_LESS, PARETO = "learned less", "Pareto"  # notes that `answer` reads
SAME = 1e-5  # nats between losses of one function, computed in another order
SIGNATURES = ("residual-peak", "bos-attention", "value-drain")


@dataclass(frozen=True)
class Mean:
    """Over seeds, or the documents of a single one; the interval is Student's, None for a single value."""

    value: float
    interval: stats.Interval | None

    def __str__(self) -> str:
        return plus_minus(self.value, None if self.interval is None else self.interval.half_width)


@dataclass
class Row:
    """A recipe on a track. `records` are its finished runs that may be pooled."""

    name: str
    title: str
    records: list[Record]
    rank: int | None = None
    diverged: bool = False  # one of its seeds did: the others are the lucky ones, and cannot be ranked
    comparisons: dict[str, stats.Comparison] = field(default_factory=dict)  # quantizer -> log KL against the baseline
    notes: list[str] = field(default_factory=list)

    def full(self, *keys: str) -> Mean | None:
        """The mean of a full-precision figure, such as `loss`, or `metrics`, `act-max`, `value`."""
        return self._over_documents(*keys) or mean_of(dig(r["full-precision"], keys) for r in self.records)

    def quantized(self, quantizer: str, *keys: str) -> Mean | None:
        """The mean of a figure under a quantizer; None unless every run has it."""
        if found := self._over_documents(*keys, quantizer=quantizer):
            return found
        return mean_of(dig(r["quantized"].get(quantizer), keys) for r in self.records)

    def _over_documents(self, *keys: str, quantizer: str | None = None) -> Mean | None:
        """The mean of a loss, damage or KL over the documents of a model that was there already; else None."""
        (key,) = keys if len(keys) == 1 else ("",)
        found = list(self.units(key, quantizer).values())
        return None if len(found) < 2 or None in found else mean_of(found)

    def units(self, key: str, quantizer: str | None = None) -> dict[int, float | None]:
        """Of each document: `loss`, `damage` or `kl`; empty for a row over seeds."""
        if len(self.records) != 1 or "sequence-losses" not in (full := self.records[0]["full-precision"]):
            return {}
        exact = full["sequence-losses"]
        if quantizer is None:
            return dict(enumerate(exact)) if key == "loss" else {}
        rough = self.records[0]["quantized"].get(quantizer)
        if rough is None or key not in ("loss", "damage", "kl"):
            return {}
        if key == "damage":
            pairs = zip(rough["sequence-losses"], exact, strict=True)
            return {i: None if a is None or b is None else a - b for i, (a, b) in enumerate(pairs)}
        return dict(enumerate(rough["sequence-kl" if key == "kl" else "sequence-losses"]))

    def share(self, quantizer: str, exempt: str) -> float | str | None:
        """The share of the damage that goes away when some tokens stay in full precision, mean over seeds."""
        damage = self.quantized(quantizer, "damage")
        left = [dig(r["quantized"].get(quantizer), ("exemption", exempt, "damage")) for r in self.records]
        if damage is None or not left or None in left:
            return None
        damages = [r["quantized"][quantizer]["damage"] for r in self.records]
        if damage.interval is None or damage.interval.low <= 0.0 or min(damages) <= 0.0:
            return "undefined"
        shares = [1 - part / whole for part, whole in zip(left, damages, strict=True)]
        return math.fsum(shares) / len(shares)

    def share_interval(self, quantizer: str, exempt: str) -> stats.Interval | None:
        """The share with its interval over documents; None for a row over seeds, or where it is undefined."""
        whole, share = self.units("damage", quantizer), self.share(quantizer, exempt)
        if not whole or not isinstance(share, float):
            return None
        full, rough = self.records[0]["full-precision"], self.records[0]["quantized"][quantizer]
        spared = rough["exemption"][exempt]["sequence-losses"]
        left = [None if a is None else a - b for a, b in zip(spared, full["sequence-losses"], strict=True)]
        return stats.share_spared(left, list(whole.values()))


@dataclass(frozen=True)
class Board:
    """One track's rows in the order of the table: ranked, then those that cannot be ranked."""

    name: str
    title: str
    ranking: str  # the quantizer by whose damage rows are ranked
    quantizers: list[str]
    rows: list[Row]
    records: list[Record]


def board(records: list[Record]) -> Board:
    """The table of one track's records, computed."""
    kept, stale = comparable(records)
    track, ranking = kept[0]["track"], rank_by(kept[0])
    quantizers = sorted({q for r in kept for q in r["quantized"]}, key=lambda q: (q != ranking, q))
    rows = [_row(name, kept, stale) for name in sorted({r["recipe"]["name"] for r in records})]
    ranked = [r for r in rows if r.rank is not None]
    ranked.sort(key=lambda r: (value_of(r.quantized(ranking, "damage")), r.name))
    for rank, row in enumerate(ranked, 1):
        row.rank = rank
    _compare(ranked, quantizers, ranking)
    _note_front(ranked, ranking)
    _note_environments(rows)
    last = sorted((r for r in rows if r.rank is None), key=lambda r: (r.diverged, r.name))
    return Board(track["name"], track["title"], ranking, quantizers, ranked + last, records)


def _row(name: str, kept: list[Record], stale: list[Record]) -> Row:
    """A row with all notes that need no other row. Its rank is 0 until it has one, None if it cannot have one."""
    mine, old = ([r for r in records if r["recipe"]["name"] == name] for records in (kept, stale))
    runs = [r for r in mine if r["status"] == "finished"]
    row = Row(name, (mine or old)[0]["recipe"]["title"], runs, rank=0)
    ranking, due = rank_by(kept[0]), len(kept[0]["track"]["resolved"].get("seeds", []))
    failed = [r for r in mine if r["status"] == "diverged"]
    broken = [r for r in runs if r["quantized"][ranking]["damage"] is None]
    if failed:
        row.rank, row.diverged = None, True
        row.notes += [f"diverged: seed {r['seed']}: {r['reason']}" for r in failed]
    if broken:
        row.rank = None
        row.notes.append(f"quantized loss not finite in {len(broken)} of {len(runs)} runs")
    if not mine:
        row.rank = None
        row.notes.append("stale: all its runs are of other digests than the table")
    elif old:
        row.notes.append(f"stale: {len(old)} of {len(old) + len(mine)} runs, of other digests, left out")
    if runs and len(runs) < due:
        row.notes.append(f"{len(runs)} of {due} seeds")
    return row


def _compare(ranked: list[Row], quantizers: list[str], ranking: str) -> None:
    """Log KL against the baseline under every quantizer; who is like the best; who learned less."""
    for quantizer in quantizers:
        logs = {row.name: _log_kl(row, quantizer) for row in ranked}
        family = stats.with_control({name: values for name, values in logs.items() if values}, BASELINE)
        for row in ranked:
            if row.name in family:
                row.comparisons[quantizer] = family[row.name]
            documents = len(row.units("kl", quantizer))
            count, what = (documents, "documents") if documents else (len(row.records), "runs")
            left_out = count - len(logs[row.name])
            if left_out and quantizer == ranking:
                row.notes.append(f"KL not above 0 in {left_out} of {count} {what}, not compared")
        if quantizer == ranking and len(ranked) > 1:
            present = {name: values for name, values in logs.items() if values}
            alike = stats.like_the_best(present, ranked[0].name)
            ranked[0].notes.insert(0, "best")
            for row in ranked[1:]:
                if row.name in alike:
                    row.notes.insert(0, "like the best")
    losses = {row.name: _losses(row) for row in ranked}
    learned = stats.with_control(losses, BASELINE)
    for row in ranked:
        if row.name in learned and learned[row.name].difference.low > 0:
            row.notes.append(LEARNED_LESS)


def _losses(row: Row) -> dict[int, float]:
    """seed, or document -> full-precision loss."""
    found = row.units("loss") or {r["seed"]: r["full-precision"]["loss"] for r in row.records}
    return {unit: loss for unit, loss in found.items() if loss is not None}


def _log_kl(row: Row, quantizer: str) -> dict[int, float]:
    """seed, or document -> log KL, of those that have one."""
    kls = row.units("kl", quantizer) or {r["seed"]: dig(r["quantized"].get(quantizer), ("kl",)) for r in row.records}
    return {seed: math.log(kl) for seed, kl in kls.items() if kl is not None and kl > 0}


def _note_front(ranked: list[Row], ranking: str) -> None:
    """Marks rows than which no other has both a lower full-precision loss and a lower damage."""
    lowest = math.inf
    for row in ranked:  # by damage
        loss = value_of(row.full("loss"))
        if loss < lowest - SAME:
            lowest = loss
            row.notes.insert(0, PARETO)


def _note_environments(rows: list[Row]) -> None:
    """Marks rows that were not run, all of them, in the environment class of most of the baseline's runs."""
    classes = {row.name: [tuple(sorted(r["environment"].items(), key=str)) for r in row.records] for row in rows}
    every = [kind for kinds in classes.values() for kind in kinds]
    counts = Counter(classes.get(BASELINE) or every)
    table = min(counts, key=lambda kind: (-counts[kind], str(kind)), default=None)
    for row in rows:
        kinds = set(classes[row.name])
        if len(kinds) > 1:
            row.notes.append("mixed environments")
        elif kinds and kinds != {table}:
            row.notes.append("other environment")


def dig(value: Any, keys: Sequence[str]) -> float | None:
    """The figure at the end of a path of keys; None where the path breaks off."""
    for key in keys:
        if value is None:
            return None
        value = value.get(key)
    return value if value is None else float(value)


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """None unless all are there: a mean over what happens to be defined would compare different seeds."""
    listed = list(values)
    present = [value for value in listed if value is not None]
    if not listed or len(present) < len(listed):
        return None
    return Mean(math.fsum(present) / len(present), stats.t_interval(present))


def value_of(mean: Mean | None) -> float:
    """NaN where there is none."""
    return math.nan if mean is None else mean.value
