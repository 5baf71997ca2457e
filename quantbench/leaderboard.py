"""Records -> the leaderboard: Markdown, CSV, figures, and the short table in the project's README.

A row is a recipe on a track, over seeds; where the model was there already and has one seed, over its held-out
sequences, each of another document. Rows are ranked by *damage*, the loss that the track's quantizer adds to the
model's own full-precision loss (ranking by quantized loss would rank full precision: its gaps are larger than the
damage). What a row claims against the baseline is tested on log KL(full || quantized), paired over seeds; see
`stats`. Nothing here is edited by hand: the same records give the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantbench import answer, claims, figures, gallery, grid, relation, stats
from quantbench.numerals import plain
from quantbench.results import BASELINE, Record, comparable, digests, rank_by, read_all, read_sites
from quantbench.store import atomic_write

BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
HEADLINE_TRACK = "text"
WIDE = 8  # columns of a table of quantizers
RELATED = 3  # recipes, at least, for a relation over recipes to be shown
SIGNATURES = ("residual-peak", "bos-attention", "value-drain")

Table = tuple[list[str], list[list[str]]]  # a header, and rows of as many cells


@dataclass(frozen=True)
class Mean:
    """Over seeds, or the documents of a single one; the interval is Student's, None for a single value."""

    value: float
    interval: stats.Interval | None

    def __str__(self) -> str:
        return _plus_minus(self.value, None if self.interval is None else self.interval.half_width)


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
        return self._over_documents(*keys) or _mean(_dig(r["full-precision"], keys) for r in self.records)

    def quantized(self, quantizer: str, *keys: str) -> Mean | None:
        """The mean of a figure under a quantizer; None unless every run has it."""
        if found := self._over_documents(*keys, quantizer=quantizer):
            return found
        return _mean(_dig(r["quantized"].get(quantizer), keys) for r in self.records)

    def _over_documents(self, *keys: str, quantizer: str | None = None) -> Mean | None:
        """The mean of a loss, damage or KL over the documents of a model that was there already; else None."""
        (key,) = keys if len(keys) == 1 else ("",)
        found = list(self.units(key, quantizer).values())
        return None if len(found) < 2 or None in found else _mean(found)

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
        left = [_dig(r["quantized"].get(quantizer), ("exemption", exempt, "damage")) for r in self.records]
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
    ranked.sort(key=lambda r: (_value(r.quantized(ranking, "damage")), r.name))
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
            row.notes.append("learned less")


def _losses(row: Row) -> dict[int, float]:
    """seed, or document -> full-precision loss."""
    found = row.units("loss") or {r["seed"]: r["full-precision"]["loss"] for r in row.records}
    return {unit: loss for unit, loss in found.items() if loss is not None}


def _log_kl(row: Row, quantizer: str) -> dict[int, float]:
    """seed, or document -> log KL, of those that have one."""
    kls = row.units("kl", quantizer) or {r["seed"]: _dig(r["quantized"].get(quantizer), ("kl",)) for r in row.records}
    return {seed: math.log(kl) for seed, kl in kls.items() if kl is not None and kl > 0}


def _note_front(ranked: list[Row], ranking: str) -> None:
    """Marks rows than which no other has both a lower full-precision loss and a lower damage."""
    lowest = math.inf
    for row in ranked:  # by damage
        loss = _value(row.full("loss"))
        if loss < lowest:
            lowest = loss
            row.notes.insert(0, "Pareto")


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


# --- tables --------------------------------------------------------------------------------------------------------

LEGEND = {
    "rank": "by damage; rows without a rank cannot be ranked, for the reason in their notes",
    "seeds": "finished runs that count",
    "loss": "full precision, nats per token on held-out text; mean ± half of the 95% t interval over seeds",
    "residual peak": "largest / median token norm of the residual stream, at the layer where that is largest",
    "BOS attention": "mean attention weight on the first token",
    "value drain": "value norm of the first token / mean of the others",
    "act-max": "largest input of any Linear of the blocks",
    "damage": "quantized minus full-precision loss under the quantizer named, nats per token",
    "KL ratio": "KL(full ‖ quantized) relative to the baseline, paired over seeds; the intervals of all rows hold "
    "together at 95% (Dunnett)",
    "p": "of that ratio being 1, adjusted for the number of rows",
    "share carried": "of the damage by extreme tokens: what goes away when they stay in full precision; in brackets "
    "when as many random tokens do; undefined where the damage may be 0",
    "notes": "*best*: rank 1. *like the best*: its KL cannot be told from that of rank 1 (Tukey, all pairs, 5%). "
    "*Pareto*: no row has both a lower loss and a lower damage. *learned less*: its full-precision loss is higher "
    "than the baseline's (Dunnett, 5%), so that a smaller damage may only mean that there was less to damage. "
    "*stale*: of another version of the recipe, the track or the data, never pooled. *n of m seeds*: fewer than the "
    "track asks for. *other* or *mixed environments*: threads, CPU capability, device or build differ",
}


def main_table(track: Board) -> Table:
    """The ranked table: signatures, damage, and what may be claimed."""
    header = ["rank", "recipe", "seeds", "loss", "residual peak", "BOS attention", "value drain", "act-max"]
    header += [f"damage {track.ranking}", "KL ratio", "p", "share carried", "notes"]
    rows = []
    for row in track.rows:
        signatures = [_figure(row.full("metrics", name, "value")) for name in (*SIGNATURES, "act-max")]
        cells = [str(row.rank or "–"), row.name, str(len(row.records)), _text(row.full("loss")), *signatures]
        ratio, p = _ratio(row, track.ranking)
        damage = _text(row.quantized(track.ranking, "damage"))
        rows.append([*cells, damage, ratio, p, _share(row, track.ranking), "; ".join(row.notes)])
    return header, rows


def damage_tables(track: Board) -> list[Table]:
    """The damage of the quantizers that have no place on the map, nats per token, `WIDE` of them a table."""
    mapped = set(_placed(track).values())
    names = [name for name in track.quantizers if name not in mapped]
    rows = [row for row in track.rows if row.records]
    return [
        (["recipe", *some], [[row.name, *(_text(row.quantized(name, "damage")) for name in some)] for row in rows])
        for some in (names[i : i + WIDE] for i in range(0, len(names), WIDE))
    ]


def map_tables(track: Board) -> dict[int, Table]:
    """bits -> the map's cells of these bits: damage, and how the recipe's KL compares with the baseline's."""
    placed, rows = _placed(track), [row for row in track.rows if row.records]
    tables = {}
    for bits in dict.fromkeys(cell.bits for cell in placed):
        mine = {cell: name for cell, name in placed.items() if cell.bits == bits}
        header = ["recipe", *(f"{cell}" for cell in mine)]
        tables[bits] = header, [[row.name, *(_cell(row, name) for name in mine.values())] for row in rows]
    return tables


def _placed(track: Board) -> dict[grid.Cell, str]:
    """The cells of the map that the rows have, by the track as the records that count resolve it."""
    counted = next((record for row in track.rows for record in row.records), None)
    found = grid.cells(counted["track"]["resolved"].get("quantizers", {})) if counted else {}
    return {cell: name for cell, name in found.items() if name in track.quantizers}


def _cell(row: Row, quantizer: str) -> str:
    """Mean damage and, but for the baseline, the ratio of KLs, marked where it separates."""
    damage, ratio = row.quantized(quantizer, "damage"), row.comparisons.get(quantizer)
    shown = "–" if damage is None else plain(damage.value)
    if row.name == BASELINE or ratio is None:
        return shown
    times = f"× {plain(math.exp(ratio.difference.mean))}"
    return f"{shown} ({times}{' †' if ratio.separates else ''})"


def _heat(track: Board) -> tuple[list[str], list[tuple[str, list[tuple[float, str, bool]]]]]:
    """What `figures.heat` draws of the map."""
    mine = _placed(track)
    columns = [f"W{cell.bits}A{cell.bits} {cell}" for cell in mine]
    rows = []
    for row in track.rows:
        if row.records:
            boxes = []
            for name in mine.values():
                ratio = row.comparisons.get(name)
                known = ratio is not None and row.name != BASELINE
                text = plain(math.exp(ratio.difference.mean)) if ratio is not None and known else ""
                boxes.append((_value(row.quantized(name, "damage")), text, ratio is not None and ratio.separates))
            rows.append((row.name, boxes))
    return columns, rows


def separating(track: Board) -> str:
    """Which cells of the map tell a recipe from the baseline, in words."""
    found = []
    for cell, name in _placed(track).items():
        apart = [row.name for row in track.rows if name in row.comparisons and row.comparisons[name].separates]
        found.append(f"W{cell.bits}A{cell.bits} {cell}: {', '.join(apart) or 'none'}")
    return "Recipes whose KL differs from the baseline's, cell by cell: " + "; ".join(found) + "."


def quality_table(track: Board) -> Table:
    """What the full-precision models are worth, and what they cost."""
    rows = [row for row in track.rows if row.records]
    columns: dict[str, Callable[[Row], str]] = {
        "perplexity": lambda row: _text(row.full("perplexity")),
        "bits per byte": lambda row: _text(row.full("bits-per-byte")),
    }
    names = sorted({name for row in rows for r in row.records for name in r["full-precision"]["task"] or {}})
    columns |= {name: lambda row, name=name: _text(row.full("task", name)) for name in names}
    base = next((row for row in rows if row.name == BASELINE), None)
    columns["added parameters"] = lambda row: f"{row.records[0]['cost']['added-parameters']:,}"
    columns["FLOPs / token"] = lambda row: _relative(row, base)
    shown = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    shown = {title: cells for title, cells in shown.items() if set(cells) != {"–"}}
    return ["recipe", *shown], [[row.name, *cells] for row, *cells in zip(rows, *shown.values(), strict=True)]


def harness_table(track: Board) -> Table:
    """Accuracy on the last word of passages, as lm-evaluation-harness scores it, before and after quantizing."""
    scored = [q for q in track.quantizers if any(row.quantized(q, "lm-eval", "last-word") for row in track.rows)]
    header = ["recipe", "full precision", *scored]
    rows = []
    for row in track.rows:
        figures = [row.full("lm-eval", "last-word"), *(row.quantized(q, "lm-eval", "last-word") for q in scored)]
        if any(figures):
            rows.append([row.name, *map(_text, figures)])
    return header, rows


def standard_tables(track: Board) -> dict[str, Table]:
    """task of lm-eval -> accuracy in full precision, and what each quantizer changes, paired over items."""
    rows = [row for row in track.rows if row.records and row.records[0]["full-precision"].get("lm-eval-items")]
    tasks = sorted({task for row in rows for task in row.records[0]["full-precision"]["lm-eval-items"]})
    header = ["recipe", "full precision", *track.quantizers]
    return {
        task: (header, [[row.name, *_accuracies(row.records[0], task, track.quantizers)] for row in rows])
        for task in tasks
    }


def _accuracies(record: Record, task: str, quantizers: list[str]) -> list[str]:
    exact = list(map(int, record["full-precision"]["lm-eval-items"].get(task, "")))
    shown = [_text(_mean(exact))]
    for name in quantizers:
        items = (record["quantized"].get(name, {}).get("lm-eval-items") or {}).get(task, "")
        changed = [int(rough) - right for rough, right in zip(items, exact)] if len(items) == len(exact) else []
        shown.append(_text(_mean(changed)))
    return shown


def relation_table(related: dict[str, Any]) -> Table:
    """How log KL goes with the log of a predictor, per quantizer."""
    names = ("rho", "within-rho", "partial-rho", "slope", "within-slope")
    header = ["quantizer", "predictor", "runs", "recipes", "clusters", "ρ", "ρ within", "ρ given loss"]
    header += ["slope", "slope within", "R² of a recipe left out"]
    rows = []
    for quantizer, by_predictor in related.items():
        for predictor, found in by_predictor.items():
            if found["n"] > 2 and predictor in relation.PREDICTORS:
                counts = [str(found[name]) for name in ("n", "recipes", "clusters")]
                r2 = found["leave-one-recipe-out-r2"]
                rows.append([quantizer, predictor, *counts, *(_estimate(found[name]) for name in names), plain(r2)])
    return header, rows


def predictor_table(related: dict[str, Any]) -> Table:
    """Which figure of the full-precision model the error goes with: ρ of every predictor under every quantizer."""
    predictors = list(next(iter(related.values()), {}))
    rows = [
        [quantizer, *(_rank_correlation(by_predictor[name]["rho"]) for name in predictors)]
        for quantizer, by_predictor in related.items()
    ]
    return ["quantizer", *predictors], rows


def _rank_correlation(rho: dict[str, Any] | None) -> str:
    """Two digits, marked where the interval leaves out 0."""
    if rho is None:
        return "–"
    apart = rho["low"] is not None and not rho["low"] <= 0 <= rho["high"]
    return f"{rho['estimate']:.2f}{' †' if apart else ''}".replace("-", "−")


def table(results_root: Path, track: str) -> Table:
    """The main table of a track for the terminal: plain text, not escaped. ValueError where it has no records."""
    records = read_all(results_root)
    mine = [r for r in records if r["track"]["name"] == track]
    if not mine:
        known = ", ".join(sorted({r["track"]["name"] for r in records})) or "none yet"
        raise ValueError(f"no results on track {track!r} in {results_root} (tracks with results: {known})")
    return main_table(board(mine))


# --- which site pays -----------------------------------------------------------------------------------------------

WORST = 3  # places of a recipe that are named
SITES_LEGEND = f"""Damage of rounding one kind of site *alone*, and the damage *spared* by rounding everything else, \
nats per token, mean ± half of the 95% t interval over seeds. *worst places*: the {WORST} without which most of the KL \
is spared. *SQNR there*: of the rounding at the first of them, in dB, over extreme tokens / the others. Below: what \
the squared error R of a block's output consists of, over tokens that are not extreme; *accumulated*: it came in, \
*local*: the block adds it, *interaction*: how the two meet ([arXiv:2509.23500](https://arxiv.org/abs/2509.23500); \
sites.py has the formulas)."""


def paying(sites: list[Record], records: list[Record]) -> dict[str, list[Record]]:
    """quantizer -> its records of `quantbench sites` that may be pooled, of one track.

    They are of the digests that the table of the track's `records` is of, where there are any.
    """
    table = comparable(records)[0]
    versions = {r["recipe"]["name"]: r["recipe"]["digest"] for r in table}
    tables = {digests(r) for r in table}
    fresh = [
        r
        for r in sites
        if (not tables or digests(r) in tables)
        and versions.get(r["recipe"]["name"], r["recipe"]["digest"]) == r["recipe"]["digest"]
        and r["status"] == "finished"
    ]
    quantizers = sorted({r["quantizer"]["name"] for r in fresh})
    return {name: comparable([r for r in fresh if r["quantizer"]["name"] == name])[0] for name in quantizers}


def sites_table(runs: list[Record]) -> Table:
    """What each kind of site pays under one quantizer, a row per recipe, the baseline first."""
    kinds = sorted({kind for r in runs for kind in r["kinds"]})
    header = ["recipe", "seeds", "damage of all", *(f"{kind} {how}" for kind in kinds for how in ("alone", "spared"))]
    rows = []
    for name in sorted({r["recipe"]["name"] for r in runs}, key=lambda name: (name != BASELINE, name)):
        mine = [r for r in runs if r["recipe"]["name"] == name]
        paid = [_text(_paid(mine, "kinds", kind, how, "damage")) for kind in kinds for how in ("alone", "spared")]
        worst = _worst(mine)
        named = "; ".join(f"{_place(kind, at)} {plain(spared)}" for spared, kind, at in worst)
        decibels = "–"
        if worst:
            _, kind, at = worst[0]
            both = [_mean(_dig(r["places"][kind][at]["sqnr"], (side,)) for r in mine) for side in ("sink", "non-sink")]
            decibels = " / ".join(map(_figure, both)) if any(both) else "–"
        rows.append([name, str(len(mine)), _text(_paid(mine, "all", "damage")), *paid, named or "–", decibels])
    return [*header, "worst places: KL spared", "SQNR there, extreme / others"], rows


def _paid(runs: list[Record], *keys: str) -> Mean | None:
    """Over the seeds, of a figure that has an interval over sequences."""

    def mean(record: Any) -> float | None:
        for key in keys:
            record = record.get(key, {})
        return record[0] if record else None

    return _mean(map(mean, runs))


def _worst(runs: list[Record]) -> list[tuple[float, str, str]]:
    """(KL spared, kind of site, place), the largest first."""
    found = {(kind, at) for r in runs for kind, places in r["places"].items() for at in places}
    spared = {place: _paid(runs, "places", *place, "spared", "kl") for place in found}
    ranked = sorted((-mean.value, *place) for place, mean in spared.items() if mean is not None)
    return [(-value, kind, at) for value, kind, at in ranked[:WORST]]


def _place(kind: str, at: str) -> str:
    """`3.mlp.down inputs`, `3.mlp.down weights`; of other sites the place says what it is."""
    return f"{at} {kind}" if kind in ("inputs", "weights") else at


# --- rendering -----------------------------------------------------------------------------------------------------

INTRODUCTION = """# Leaderboard

Rendered by `quantbench leaderboard` from the records in this folder; never edited.
Losses, damage and KL are nats per token. A dash is a figure that is undefined or was not measured.
"""
EMPTY = "No results yet: `quantbench bench RECIPE` makes them."


def render(results_root: Path, readme: Path | None = None) -> dict[Path, bytes]:
    """Every file made from the records, by path: README.md, leaderboard.csv, the figures of each track, and the
    project's README with its block replaced. ResultsError for unsound records, ValueError for a README without it."""
    records, sites = read_all(results_root), read_sites(results_root)
    tracks = sorted({r["track"]["name"] for r in records}, key=lambda name: (name != HEADLINE_TRACK, name))
    boards = [board([r for r in records if r["track"]["name"] == track]) for track in tracks]
    related = {name: _telling(found) for name, found in relation.relate(records).items()}
    files: dict[Path, bytes] = {}
    sections = [INTRODUCTION]
    for track in boards:
        pictures = _pictures(track, related[track.name])
        files |= {results_root / track.name / name: data for name, (data, _) in pictures.items()}
        sections.append(_section(track, related[track.name], {name: what for name, (_, what) in pictures.items()}))
        for quantizer, runs in paying([r for r in sites if r["track"]["name"] == track.name], track.records).items():
            picture = figures.propagation(runs, track.records)
            if picture is not None:
                files[results_root / track.name / f"sites-{quantizer}.svg"] = picture
            sections.append(_sites_section(track, quantizer, runs, picture is not None))
    sections.append(_legend() if boards else f"{EMPTY}\n")
    files[results_root / "README.md"] = "\n".join(sections).encode()
    files[results_root / "leaderboard.csv"] = _csv(boards)
    files |= gallery.render(results_root, _markdown, _escape)
    files |= claims.render(results_root, _markdown, _escape)
    if readme is not None:
        files[readme] = _with_block(readme, results_root, boards, related)
    return files


def write(results_root: Path, readme: Path | None = None) -> list[Path]:
    """Renders, writes what changed, removes figures that no longer are; returns the paths that changed."""
    files = render(results_root, readme)
    old = [*results_root.glob("*/relation-*.svg"), *results_root.glob("*/timeline.svg")]
    old += [*results_root.glob("*/dynamics.svg"), *results_root.glob("claims.md")]
    old += [*results_root.glob("*/map.svg"), *results_root.glob("*/sites-*.svg"), *results_root.glob("models/*/*.svg")]
    gone = [path for path in old if path not in files]
    changed = [path for path, data in files.items() if not path.exists() or path.read_bytes() != data]
    for path in gone:
        path.unlink()
    for path in changed:
        atomic_write(path, files[path])
    return sorted(changed + gone)


def _telling(related: dict[str, Any]) -> dict[str, Any]:
    """The relations under quantizers that saw enough recipes: through one or two, every line is a good one."""
    return {
        quantizer: by_predictor
        for quantizer, by_predictor in related.items()
        if max(found["recipes"] for found in by_predictor.values()) >= RELATED
    }


def _pictures(track: Board, related: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """file name -> (SVG, what it shows)."""
    drawn = {
        f"relation-{track.ranking}.svg": (
            figures.relation(track.records, track.ranking, related[track.ranking]["residual-peak"])
            if track.ranking in related
            else None,
            f"Residual peak against KL under {track.ranking}, log-log",
        ),
        "relation-all.svg": (
            figures.relations(track.records, related),
            "Residual peak against KL under every quantizer, log-log",
        ),
        "map.svg": (
            figures.heat(*_heat(track)),
            "Damage by recipe and cell of the map; numbers are KL ratios to the baseline, framed where they separate",
        ),
        "timeline.svg": (
            figures.timeline(track.records),
            "Residual peak, attention to BOS and value drain over training steps, a line per recipe",
        ),
        "dynamics.svg": (
            figures.dynamics(track.records),
            "Risks, attention to BOS, delta logit, values and norms over training steps, a colour per recipe",
        ),
    }
    return {name: (data, what) for name, (data, what) in drawn.items() if data is not None}


def _section(track: Board, related: dict[str, Any], pictures: dict[str, str]) -> str:
    parts = [f"## {_escape(track.title)} (`{track.name}`)"]
    if documents := len(track.rows[0].units("loss")):
        length = track.rows[0].records[0]["track"]["resolved"]["length"]
        parts.append(DOCUMENTS.format(documents, length))
    parts += [*_answers(track, related), _markdown(main_table(track))]
    if maps := map_tables(track):
        parts += ["### The map: scope of the ranges × residual stream × bits", MAP_LEGEND]
        parts += [separating(track)] if any(row.comparisons for row in track.rows) else []
        parts += [f"W{bits}A{bits}\n\n{_markdown(table)}" for bits, table in maps.items()]
    if others := damage_tables(track):
        parts += [f"### Damage under {'the other quantizers' if maps else 'every quantizer'}", *map(_markdown, others)]
    parts += ["### Full-precision quality and cost", _markdown(quality_table(track))]
    harness = harness_table(track)
    if harness[1]:
        parts += [f"### Last word, by lm-evaluation-harness ({_harness_facts(track)})", _markdown(harness)]
    for task, scored in standard_tables(track).items():
        items = len(track.rows[0].records[0]["full-precision"]["lm-eval-items"][task])
        parts += [f"### {task}, by lm-evaluation-harness ({items:,} items)", STANDARD_LEGEND, _markdown(scored)]
    relations = relation_table(related)
    if relations[1]:
        parts += ["### Does the peak predict the error?", RELATION_LEGEND, _markdown(relations)]
        parts += [PREDICTORS_LEGEND, _markdown(predictor_table(related))]
    parts += [f"![{what}]({track.name}/{name})" for name, what in pictures.items() if name != "timeline.svg"]
    if "timeline.svg" in pictures:
        parts += ["### When the signatures emerge", f"![{pictures['timeline.svg']}]({track.name}/timeline.svg)"]
    return "\n\n".join(parts) + "\n"


def _answers(track: Board, related: dict[str, Any]) -> list[str]:
    return [f"**{question}** {_escape(said)}" for question, said in answer.answers(track, related)]


def _sites_section(track: Board, quantizer: str, runs: list[Record], pictured: bool) -> str:
    parts = [f"### Which site pays (`{quantizer}`)", SITES_LEGEND, _markdown(sites_table(runs))]
    if pictured:
        what = f"Accumulated, local and interacting error of every block under {quantizer}, a line per recipe"
        parts.append(f"![{what}]({track.name}/sites-{quantizer}.svg)")
    return "\n\n".join(parts) + "\n"


MAP_LEGEND = """Damage in nats per token, and in brackets the KL relative to the baseline's, paired over seeds; † \
where its 95% interval leaves out 1 (Dunnett over the recipes of a cell; cells are not adjusted for one another). \
*residual*: the residual stream is rounded after every sublayer, too. W4A4 weights come in groups of 64."""
STANDARD_LEGEND = """Accuracy in full precision, mean ± half of the 95% t interval over items; under each quantizer \
what it changes, paired over the same items."""
DOCUMENTS = """One model that was there already, one seed: intervals are over {} held-out documents, a window of {} \
tokens each, and comparisons are paired over them."""
RELATION_LEGEND = f"""log KL(full ‖ quantized) on the log of the predictor, a point per run of a pretraining recipe \
(the pictures have post-hoc ones, too, hollow). ρ: Spearman, over all \
runs; *within* recipes (their means removed); *given* the full-precision loss (partial). In brackets 95% limits of a \
bootstrap over clusters of recipes that share a mitigation. Below {relation.FEWEST_RECIPES} recipes only ρ and the \
counts are given. R²: how well a line through the other recipes predicts a recipe, against their mean."""
PREDICTORS_LEGEND = """Its rivals, by ρ alone; † where the interval leaves out 0 (each by itself: they are many)."""


def _legend() -> str:
    return "\n".join(["## Columns", "", *(f"- **{name}**: {meaning}." for name, meaning in LEGEND.items())]) + "\n"


def _harness_facts(track: Board) -> str:
    """How many items, and what guessing gives."""
    facts = [
        r["full-precision"]["lm-eval"] for row in track.rows for r in row.records if r["full-precision"]["lm-eval"]
    ]
    items, chance = facts[0].get("last-word-items"), facts[0].get("last-word-chance")
    return f"accuracy, {'–' if items is None else f'{items:,.0f}'} items, chance {plain(chance)}"


def _with_block(readme: Path, results_root: Path, boards: list[Board], related: dict[str, Any]) -> bytes:
    """The README with the answers and a short table of the headline track between the two markers."""
    page = readme.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{readme}: put one line {BEGIN} and one line {END} where the leaderboard belongs")
    track = next((b for b in boards if b.name == HEADLINE_TRACK), None)
    block = EMPTY
    if track is not None:
        header, rows = main_table(track)
        kept = ("rank", "recipe", "seeds", "loss", "residual peak", f"damage {track.ranking}", "KL ratio", "p")
        columns = [header.index(name) for name in (*kept, "share carried", "notes")]
        link = Path(os.path.relpath(results_root / "README.md", readme.parent)).as_posix()
        short = ([header[i] for i in columns], [[row[i] for i in columns] for row in rows])
        block = "\n\n".join([
            *_answers(track, related[track.name]), _markdown(short),
            f"Track `{track.name}`; every column, quantizer and track: [{link}]({link}).",
        ])  # fmt: skip
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    return f"{before}\n{block}\n{after}".encode()


def _csv(boards: Iterable[Board]) -> bytes:
    """One line per track, recipe and quantizer, with six digits; the figures of the recipe repeat."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["track", "recipe", "title", "rank", "seeds", "loss", "loss-low", "loss-high", *SIGNATURES, "act-max"]
    header += ["quantizer", "ranks", "damage", "damage-low", "damage-high", "kl", "kl-ratio", "kl-ratio-low"]
    writer.writerow([*header, "kl-ratio-high", "p", "share-carried", "share-carried-random", "notes"])
    for track in boards:
        for row in track.rows:
            signatures = [_digits(_value(row.full("metrics", name, "value"))) for name in (*SIGNATURES, "act-max")]
            left = [_harmless(text) for text in (track.name, row.name, row.title)]
            left += [str(row.rank or ""), str(len(row.records)), *_limits(row.full("loss")), *signatures]
            for quantizer in track.quantizers if row.records else [""]:
                cells = [_harmless(quantizer), str(int(quantizer == track.ranking))]
                cells += [*_limits(row.quantized(quantizer, "damage")), _digits(_value(row.quantized(quantizer, "kl")))]
                compared = row.comparisons.get(quantizer)
                logs = [compared.difference.mean, compared.difference.low, compared.difference.high] if compared else []
                cells += [_digits(math.exp(value)) for value in logs] or [""] * 3
                shares = [row.share(quantizer, exempt) for exempt in ("extreme", "random")]
                cells += [_digits(compared.p) if compared else ""]
                cells += [share if isinstance(share, str) else _digits(share) for share in shares]
                writer.writerow([*left, *cells, _harmless("; ".join(row.notes))])
    return buffer.getvalue().encode()


# --- cells ---------------------------------------------------------------------------------------------------------


def _dig(value: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        if value is None:
            return None
        value = value.get(key)
    return value if value is None else float(value)


def _mean(values: Iterable[float | None]) -> Mean | None:
    """None unless all are there: a mean over what happens to be defined would compare different seeds."""
    listed = list(values)
    present = [value for value in listed if value is not None]
    if not listed or len(present) < len(listed):
        return None
    return Mean(math.fsum(present) / len(present), stats.t_interval(present))


def _value(mean: Mean | None) -> float:
    return math.nan if mean is None else mean.value


def _text(mean: Mean | None) -> str:
    return "–" if mean is None else str(mean)


def _figure(mean: Mean | None) -> str:
    return "–" if mean is None else plain(mean.value)


def _plus_minus(value: float, half_width: float | None) -> str:
    """The value to the place of the second digit of its half-width: 3.512 ± 0.013."""
    if half_width is None or half_width == 0 or not -7 <= math.floor(math.log10(half_width)) < 9:
        return plain(value)
    places = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{value:,.{places}f} ± {half_width:,.{places}f}".replace("-", "−")


def _estimate(found: dict[str, float | None] | None) -> str:
    if found is None or found["estimate"] is None:
        return "–"
    low, high = found["low"], found["high"]
    limits = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{found['estimate']:.2f}{limits}".replace("-", "−")


def _ratio(row: Row, quantizer: str) -> tuple[str, str]:
    if row.name == BASELINE:
        return "1", ""
    compared = row.comparisons.get(quantizer)
    if compared is None:
        return "–", "–"
    mean, low, high = (
        math.exp(x) for x in (compared.difference.mean, compared.difference.low, compared.difference.high)
    )
    p = "<0.0001" if compared.p < 1e-4 else f"{compared.p:.4f}" if compared.p < 0.1 else f"{compared.p:.2f}"
    return f"{plain(mean)} [{plain(low)}, {plain(high)}]", p


def _share(row: Row, quantizer: str) -> str:
    carried, control = row.share(quantizer, "extreme"), row.share(quantizer, "random")
    if carried is None or isinstance(carried, str):
        return carried or "–"
    shown, limits = f"{carried:.2f}", row.share_interval(quantizer, "extreme")
    if limits is not None:
        shown += f" [{limits.low:.2f}, {limits.high:.2f}]"
    return (f"{shown} ({control:.2f})" if isinstance(control, float) else shown).replace("-", "−")


def _relative(row: Row, base: Row | None) -> str:
    flops = row.records[0]["cost"]["flops-per-token"]
    return f"× {flops / base.records[0]['cost']['flops-per-token']:.3f}" if base else f"{flops:,}"


def _limits(mean: Mean | None) -> list[str]:
    if mean is None:
        return [""] * 3
    ends = [mean.interval.low, mean.interval.high] if mean.interval else [math.nan] * 2
    return [_digits(value) for value in (mean.value, *ends)]


def _digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _escape(text: str) -> str:
    """Text as Markdown shows it: no cell, tag, link or emphasis can be opened by a title or a reason."""
    one_line = " ".join(text.split())
    html = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", html).replace("://", ":&#47;&#47;")


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula (OWASP: CSV injection)."""
    one_line = " ".join(text.split())
    return "'" + one_line if one_line.startswith(("=", "+", "-", "@")) else one_line


def _markdown(shown: Table) -> str:
    header, rows = shown
    numeric = [
        all(not row[i] or row[i][0] in "0123456789−–<×" or row[i] == "undefined" for row in rows)
        and header[i] not in ("recipe", "notes")
        for i in range(len(header))
    ]
    lines = [header, ["--:" if right else "---" for right in numeric]]
    body = [[_escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *body])
