"""One track's records as rows: means with intervals, comparisons with the baseline, ranks and notes.

A row is a recipe on a track, over seeds; where the model was there already and has one seed, over its held-out
sequences, each of another document. Rows are ranked by *damage*, the loss that the track's quantizer adds to the
model's own full-precision loss (ranking by quantized loss would rank full precision: its gaps are larger than the
damage). What a row claims is tested on log KL(full || quantized) and on the loss; see `stats`:

- a pretraining recipe against the baseline, in one family: log KL unpaired, since a seed draws other models from
  another recipe and explains nothing of it (`Board.seeds` has the test), the loss paired over the seeds of both;
- a post-hoc recipe against the recipe whose checkpoints it shares, paired over these, in a family of their own;
- where the model was there already, paired over documents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantbench import relation, stats
from quantbench.catalog import POST_HOC
from quantbench.matched import Matched, matched, rate_of
from quantbench.numerals import hundredths, plus_minus
from quantbench.results import BASELINE, Record, comparable, level_of, rank_by

LEARNED_LESS = "learned less"
SAME = 1e-5  # nats between losses of one function, computed in another order
FRONT = 0.8  # of the bootstrap draws: what a row's place on the Pareto front takes to be marked
DRAWS = 4000
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
    control: str = BASELINE  # the recipe it is compared with; of a post-hoc one, that whose checkpoints it shares
    comparisons: dict[str, stats.Comparison] = field(default_factory=dict)  # quantizer -> log KL against the control
    loss: stats.Comparison | None = None  # minus the control's, paired over the seeds or documents of both
    matched: Matched | None = None  # against the baseline at the recipe's own rate, and at its loss
    front: float | None = None  # share of bootstrap draws in which it lies on the Pareto front of loss and damage
    notes: list[str] = field(default_factory=list)

    @property
    def learned_less(self) -> bool:
        return self.loss is not None and self.loss.separates and self.loss.difference.mean > SAME

    def survives(self, quantizer: str) -> bool:
        """Whether the damage, its interval included, is below the level that the track states."""
        damage = self.quantized(quantizer, "damage")
        return damage is not None and damage.interval is not None and damage.interval.high < level_of(self.records[0])

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

    def damages(self, quantizer: str) -> dict[int, float]:
        """seed, or document -> damage, of those that have one."""
        by_seed = {r["seed"]: dig(r["quantized"].get(quantizer), ("damage",)) for r in self.records}
        found = self.units("damage", quantizer) or by_seed
        return {unit: damage for unit, damage in found.items() if damage is not None}

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

    def only_bos(self, quantizer: str) -> bool:
        """Whether the extreme tokens of every run are its sequences' first ones, and no other."""
        counts = [dig(r["quantized"].get(quantizer), ("exemption", "tokens")) for r in self.records]
        sequences = [dig(r["track"]["resolved"], ("evaluate", "sequences")) for r in self.records]
        return None not in counts and counts == sequences

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
    level: float  # of damage, below which a recipe survives
    seeds: dict[str, tuple[float, float]]  # log KL, loss -> (F, p) of the seed, over the pretraining recipes


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
    own, shared = _families(ranked, ranking)
    _compare(own, shared, quantizers)
    _note_alike(ranked, ranking)
    _note_front(ranked, ranking)
    curve = [record for row in own for record in row.records if rate_of(record) is not None]
    for row in own:
        row.matched = matched(row.records, curve, ranking) if row.name != BASELINE else None
    for row in ranked:
        row.notes += ["survives"] if row.survives(ranking) else []
    _note_environments(rows)
    last = sorted((r for r in rows if r.rank is None), key=lambda r: (r.diverged, r.name))
    effects = {
        "log KL": stats.unit_effect({row.name: _log_kl(row, ranking) for row in own}),
        "loss": stats.unit_effect({row.name: _losses(row) for row in own}),
    }
    seeds = {name: effect for name, effect in effects.items() if effect is not None}
    return Board(track["name"], track["title"], ranking, quantizers, ranked + last, records, level_of(kept[0]), seeds)


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


def _families(ranked: list[Row], ranking: str) -> tuple[list[Row], list[Row]]:
    """Rows of models of their own, and rows that share models with others, each of which gets its control."""
    shared = []
    for row in ranked:
        if relation.post_hoc(row.records[0]):
            row.control = _checkpoints_of(row, ranked)
            row.notes += [f"against {row.control}"] if row.control not in (BASELINE, row.name) else []
            shared.append(row)
        elif row.units("kl", ranking):
            shared.append(row)
    return [row for row in ranked if row not in shared], shared


def _compare(own: list[Row], shared: list[Row], quantizers: list[str]) -> None:
    """Log KL under every quantizer, and the loss, against each row's control; who learned less."""
    for quantizer in quantizers:
        logs = {row.name: _log_kl(row, quantizer) for row in (*own, *shared)}
        found = stats.against({row.name: logs[row.name] for row in own if logs[row.name]}, BASELINE)
        found |= stats.paired(_differences(shared, logs))
        for row in (*own, *shared):
            if row.name in found:
                row.comparisons[quantizer] = found[row.name]
    losses = {row.name: _losses(row) for row in (*own, *shared)}
    for family in (own, shared):
        found = stats.paired(_differences(family, losses))
        for row in family:
            row.loss = found.get(row.name)
            if row.learned_less:
                row.notes.append(LEARNED_LESS)


def _note_alike(ranked: list[Row], ranking: str) -> None:
    """Marks the best, who is like the best, and who could not be compared in whole."""
    logs = {row.name: _log_kl(row, ranking) for row in ranked}
    for row in ranked:
        documents = len(row.units("kl", ranking))
        count, what = (documents, "documents") if documents else (len(row.records), "runs")
        if left_out := count - len(logs[row.name]):
            row.notes.append(f"KL not above 0 in {left_out} of {count} {what}, not compared")
    if len(ranked) > 1:
        alike = stats.like_the_best({name: values for name, values in logs.items() if values}, ranked[0].name)
        ranked[0].notes.insert(0, "best")
        for row in ranked[1:]:
            if row.name in alike:
                row.notes.insert(0, "like the best")


def _checkpoints_of(row: Row, rows: list[Row]) -> str:
    """The recipe of the same pretraining and rate, whose checkpoints a post-hoc one shares; else the row itself."""

    def pretraining(of: Row) -> Any:
        resolved = of.records[0]["recipe"]["resolved"]
        mine = {name: kw for name, kw in (resolved.get("mitigations") or {}).items() if name not in POST_HOC}
        return mine, resolved.get("lr")

    others = (r for r in rows if r.records and not relation.post_hoc(r.records[0]))
    return next((other.name for other in others if pretraining(other) == pretraining(row)), row.name)


def _differences(rows: list[Row], values: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    """Of every row but the controls: value minus its control's, of the units that both have."""
    found = {}
    for row in rows:
        mine, base = values[row.name], values.get(row.control, {})
        if both := [mine[unit] - base[unit] for unit in sorted(mine.keys() & base.keys()) if row.control != row.name]:
            found[row.name] = both
    return found


def _losses(row: Row) -> dict[int, float]:
    """seed, or document -> full-precision loss."""
    found = row.units("loss") or {r["seed"]: r["full-precision"]["loss"] for r in row.records}
    return {unit: loss for unit, loss in found.items() if loss is not None}


def _log_kl(row: Row, quantizer: str) -> dict[int, float]:
    """seed, or document -> log KL, of those that have one."""
    kls = row.units("kl", quantizer) or {r["seed"]: dig(r["quantized"].get(quantizer), ("kl",)) for r in row.records}
    return {seed: math.log(kl) for seed, kl in kls.items() if kl is not None and kl > 0}


def _note_front(ranked: list[Row], ranking: str) -> None:
    """How sure it is that no other row has both a lower loss and a lower damage, and a note from `FRONT` on.

    A draw resamples each row's seeds (documents), the same ones for rows that have the same. The loss of a row is
    that of the baseline plus the difference over the seeds of both, since not all have the same seeds.
    """
    import numpy as np

    base = next((_losses(row) for row in ranked if row.name == BASELINE), {})
    middle = math.fsum(base.values()) / len(base) if base else 0.0
    units = {}
    for row in ranked:
        losses, damages = _losses(row), row.damages(ranking)
        both = [unit for unit in sorted(losses.keys() & damages.keys()) if not base or unit in base]
        if len(both) > 1:
            units[row.name] = [(losses[unit] - base.get(unit, middle), damages[unit]) for unit in both]
    if not units:
        return
    uniform = np.random.default_rng(0).random((DRAWS, max(map(len, units.values()))))
    drawn = np.stack([
        np.array(values)[(uniform[:, : len(values)] * len(values)).astype(int)].mean(1) for values in units.values()
    ])  # fmt: skip
    loss_RB, damage_RB = drawn[..., 0], drawn[..., 1]
    for index, name in enumerate(units):
        beaten_B = ((loss_RB < loss_RB[index] + SAME) & (damage_RB < damage_RB[index])).any(0)
        row = next(row for row in ranked if row.name == name)
        row.front = float(1 - beaten_B.mean())
        if row.front >= FRONT:
            row.notes.insert(0, f"Pareto {hundredths(row.front)}")


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
