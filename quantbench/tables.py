"""A track's rows as tables, headers and cells of plain text: what Markdown and the terminal show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantbench import grid, relation
from quantbench.board import (
    DRAWS,
    FRONT,
    SAME,
    SIGNATURES,
    Board,
    Mean,
    Row,
    board,
    dig,
    mean_of,
    value_of,
)
from quantbench.markup import Table
from quantbench.numerals import estimate, hundredths, plain, plus_minus
from quantbench.results import BASELINE, Record, comparable, digests, read_all

WIDE = 8  # columns of a table of quantizers
LEGEND = {
    "rank": "by damage; rows without a rank cannot be ranked, for the reason in their notes",
    "seeds": "finished runs that count",
    "loss": "full precision, nats per token on held-out text; mean ± half of the 95% t interval over seeds",
    "Δ loss": "loss minus the baseline's over the seeds that both have, with its interval at the level at which Holm "
    "judged it",
    "residual peak": "largest / median token norm of the residual stream, at the layer where that is largest",
    "BOS attention": "mean attention weight on the first token",
    "value drain": "value norm of the first token / mean of the others",
    "act-max": "largest input of any Linear of the blocks",
    "damage": "quantized minus full-precision loss under the quantizer named, nats per token",
    "KL ratio": "KL(full ‖ quantized) relative to the baseline's, of geometric means over seeds (a post-hoc recipe: "
    "paired over the checkpoints that both have); variances moderated over recipes; the interval is at the level at "
    "which Holm's procedure judged the row, so that it leaves out 1 just where p is below .05",
    "p": "of that ratio being 1, adjusted by Holm over the pretraining recipes, or over the post-hoc ones: the chance "
    "that any row of a family is told apart wrongly is at most 5%",
    "at its rate": "the same against the baseline trained at the recipe's own learning rate; in brackets 95% limits of "
    "a bootstrap over seeds. A dash: the baseline was not trained near it, or the optimizer is another",
    "at its loss": "the same against the baseline where, on its curve over learning rates, it has the recipe's loss; "
    "*not reachable*: it has it nowhere, or not surely",
    "share carried": "of the damage by extreme tokens: what goes away when they stay in full precision; in brackets "
    "when as many random tokens do; undefined where the damage may be 0",
    "notes": "*best*: rank 1. *like the best*: its KL cannot be told from that of rank 1 (Games and Howell, all "
    f"pairs, 5%). *Pareto* and a number: the share of {DRAWS:,} bootstrap draws of the seeds in which no row has both "
    f"a lower loss and a lower damage; said from {FRONT} on. *survives*: the upper limit of its damage is below "
    "the level that the track states (in the answers above). *learned less*: its full-precision loss is higher than "
    "the baseline's (paired, Holm, 5%), so that a smaller damage may only mean that there was less to damage. "
    "*against*: the recipe whose checkpoints a post-hoc one shares. "
    "*stale*: of another version of the recipe, the track or the data, never pooled. *n of m seeds*: fewer than the "
    "track asks for. *other* or *mixed environments*: threads, CPU capability, device or build differ",
}


def main_table(track: Board) -> Table:
    """The ranked table: signatures, damage, and what may be claimed."""
    header = ["rank", "recipe", "seeds", "loss", "Δ loss", "residual peak", "BOS attention", "value drain", "act-max"]
    curve = ["at its rate", "at its loss"] if any(row.matched for row in track.rows) else []
    header += [f"damage {track.ranking}", "KL ratio", "p", *curve, "share carried", "notes"]
    rows = []
    for row in track.rows:
        signatures = [_figure(row.full("metrics", name, "value")) for name in (*SIGNATURES, "act-max")]
        cells = [
            str(row.rank or "–"),
            row.name,
            str(len(row.records)),
            _text(row.full("loss")),
            _loss(row),
            *signatures,
        ]
        ratio, p = _ratio(row, track.ranking)
        damage = _text(row.quantized(track.ranking, "damage"))
        at = _matched(row) if curve else []
        rows.append([*cells, damage, ratio, p, *at, _share(row, track.ranking), "; ".join(row.notes)])
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
    damage, compared = row.quantized(quantizer, "damage"), row.comparisons.get(quantizer)
    shown = "–" if damage is None else plain(damage.value)
    if row.name == BASELINE or compared is None:
        return shown
    times = f"× {plain(compared.ratio.mean)}"
    return f"{shown} ({times}{' †' if compared.separates else ''})"


def heat(track: Board) -> tuple[list[str], list[tuple[str, list[tuple[float, str, bool]]]]]:
    """What `figures.heat` draws of the map."""
    mine = _placed(track)
    columns = [f"W{cell.bits}A{cell.bits} {cell}" for cell in mine]
    rows = []
    for row in track.rows:
        if row.records:
            boxes = []
            for name in mine.values():
                damage, compared = value_of(row.quantized(name, "damage")), row.comparisons.get(name)
                known = compared is not None and row.name != BASELINE
                text = plain(compared.ratio.mean) if compared is not None and known else ""
                boxes.append((damage, text, compared is not None and compared.separates))
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
        task: (header, [[row.name, *accuracies(row.records[0], task, track.quantizers)] for row in rows])
        for task in tasks
    }


def accuracies(record: Record, task: str, quantizers: list[str]) -> list[str]:
    """Of one model on one task: in full precision, and what each quantizer changes."""
    exact = map(int, record["full-precision"]["lm-eval-items"].get(task, ""))
    return [_text(mean_of(exact)), *(_text(changed(record, task, name)) for name in quantizers)]


def changed(record: Record, task: str, quantizer: str) -> Mean | None:
    """What a quantizer changes in the accuracy on a task, over its items."""
    exact = (record["full-precision"].get("lm-eval-items") or {}).get(task, "")
    items = (record["quantized"].get(quantizer, {}).get("lm-eval-items") or {}).get(task, "")
    return mean_of(int(a) - int(b) for a, b in zip(items, exact)) if len(items) == len(exact) else None


def relation_table(by_predictor: dict[str, Any]) -> Table:
    """Every predictor under the quantizer that ranks, the best first: what it says alone and given the others."""
    told = {name: found for name, found in by_predictor.items() if found["rho"]}
    ordered = sorted(told, key=lambda name: -told[name]["rho"]["estimate"])
    header = ["predictor", "looks at", "runs", "recipes", "clusters", "ρ", "ρ within", "ρ given loss", "ρ given rate"]
    header += [
        *(f"ρ given {name}" for name in ordered[:2]),
        "ρ, extremes exempt",
        "draws won",
        "R² of a recipe left out",
    ]
    rows = []
    for name in ordered:
        found = told[name]
        cells = [str(found[key]) for key in ("n", "recipes", "clusters")]
        cells += [estimate(found[key]) for key in ("rho", "within-rho", "given-loss", "given-rate")]
        cells += [estimate((found["given"] or {}).get(other)) for other in ordered[:2]]
        won = "–" if found["won"] is None else hundredths(found["won"])
        rows.append([name, relation.PREDICTORS[name], *cells, estimate(found["exempt-rho"]), won, plain(found["r2"])])
    return header, rows


def winners_table(related: dict[str, Any]) -> Table:
    """Per quantizer the predictor with the largest ρ, beside the residual peak."""
    header = [
        "quantizer",
        "predictor",
        "draws won",
        "ρ",
        "ρ given the peak",
        "R²",
        "ρ of the peak",
        "the peak given it",
    ]
    rows = []
    for quantizer, by_predictor in related.items():
        name, peak = relation.winner(by_predictor), by_predictor.get(relation.PEAK)
        if name is None or peak is None:
            continue
        best = by_predictor[name]
        given = [estimate((one["given"] or {}).get(other)) for one, other in ((best, relation.PEAK), (peak, name))]
        won = "–" if best["won"] is None else hundredths(best["won"])
        cells = [name, won, estimate(best["rho"]), given[0], plain(best["r2"]), estimate(peak["rho"]), given[1]]
        rows.append([quantizer, *cells])
    return [*header, "R² of the peak"], [[*row, plain(related[row[0]][relation.PEAK]["r2"])] for row in rows]


def family_table(track: Board, related: dict[str, Any]) -> Table:
    """Mean ρ of every predictor over the quantizers of one kind; the largest in bold letters."""
    counted = next(record for row in track.rows for record in row.records)
    resolved = counted["track"]["resolved"].get("quantizers", {})
    kinds: dict[str, list[str]] = {}
    for quantizer in related:
        kinds.setdefault(relation.family(quantizer, resolved.get(quantizer, {})), []).append(quantizer)
    predictors = list(next(iter(related.values()), {}))
    rows = []
    for kind in sorted(kinds):
        rhos = [[related[q][name]["rho"] for q in kinds[kind]] for name in predictors]
        means = [None if None in of else math.fsum(x["estimate"] for x in of) / len(of) for of in rhos]
        top = max((mean for mean in means if mean is not None), default=None)
        shown = ["–" if mean is None else hundredths(mean) + (" ←" if mean == top else "") for mean in means]
        rows.append([kind, str(len(kinds[kind])), *shown])
    return ["kind of rounding", "quantizers", *predictors], rows


def post_hoc_table(track: Board, predictors: list[str]) -> Table:
    """Whether post-hoc recipes lie on the line through the pretraining recipes."""
    found = {name: relation.post_hoc_against(track.records, track.ranking, name) for name in predictors}
    recipes = sorted({recipe for by_recipe in found.values() for recipe in by_recipe})
    header = ["recipe", "KL"]
    header += [part for name in predictors for part in (name, "KL by its line", "KL / that")]
    rows = []
    for recipe in recipes:
        cells = []
        for name in predictors:
            x, line, kl = found[name].get(recipe, (math.nan,) * 3)
            cells += [plain(x), plain(line), plain(kl / line)]
        rows.append([recipe, plain(kl), *cells])
    return header, rows


def predictor_table(related: dict[str, Any]) -> Table:
    """ρ of every predictor under every quantizer."""
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
    return f"{hundredths(rho['estimate'])}{' †' if apart else ''}"


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
            both = [mean_of(dig(r["places"][kind][at]["sqnr"], (side,)) for r in mine) for side in ("sink", "non-sink")]
            decibels = " / ".join(map(_figure, both)) if any(both) else "–"
        rows.append([name, str(len(mine)), _text(_paid(mine, "all", "damage")), *paid, named or "–", decibels])
    return [*header, "worst places: KL spared", "SQNR there, extreme / others"], rows


def _paid(runs: list[Record], *keys: str) -> Mean | None:
    """Over the seeds, of a figure that has an interval over sequences."""

    def mean(record: Any) -> float | None:
        for key in keys:
            record = record.get(key, {})
        return record[0] if record else None

    return mean_of(map(mean, runs))


def _worst(runs: list[Record]) -> list[tuple[float, str, str]]:
    """(KL spared, kind of site, place), the largest first."""
    found = {(kind, at) for r in runs for kind, places in r["places"].items() for at in places}
    spared = {place: _paid(runs, "places", *place, "spared", "kl") for place in found}
    ranked = sorted((-mean.value, *place) for place, mean in spared.items() if mean is not None)
    return [(-value, kind, at) for value, kind, at in ranked[:WORST]]


def _place(kind: str, at: str) -> str:
    """`3.mlp.down inputs`, `3.mlp.down weights`; of other sites the place says what it is."""
    return f"{at} {kind}" if kind in ("inputs", "weights") else at


# --- cells ---------------------------------------------------------------------------------------------------------


def _text(mean: Mean | None) -> str:
    return "–" if mean is None else str(mean)


def _figure(mean: Mean | None) -> str:
    return "–" if mean is None else plain(mean.value)


def _ratio(row: Row, quantizer: str) -> tuple[str, str]:
    if row.name == BASELINE:
        return "1", ""
    compared = row.comparisons.get(quantizer)
    if compared is None:
        return "–", "–"
    ratio = compared.ratio
    p = "<0.0001" if compared.p < 1e-4 else f"{compared.p:.4f}" if compared.p < 0.1 else f"{compared.p:.2f}"
    return f"{plain(ratio.mean)} [{plain(ratio.low)}, {plain(ratio.high)}]", p


def _matched(row: Row) -> list[str]:
    if row.matched is None:
        return ["", ""] if row.name == BASELINE else ["–", "–"]
    return [
        without if at is None else f"{plain(at.mean)} [{plain(at.low)}, {plain(at.high)}]"
        for at, without in ((row.matched.at_rate, "–"), (row.matched.at_loss, "not reachable"))
    ]


def _loss(row: Row) -> str:
    """What the row costs or gains in full precision, over the seeds that it shares with its control."""
    if row.loss is None:
        return "" if row.name == BASELINE else "–"
    mean, half = row.loss.difference.mean, row.loss.difference.half_width
    if abs(mean) < SAME and half < SAME:
        return "0"
    return ("+" if mean > 0 else "") + plus_minus(mean, half)


def _share(row: Row, quantizer: str) -> str:
    carried, control = row.share(quantizer, "extreme"), row.share(quantizer, "random")
    if carried is None or isinstance(carried, str):
        return carried or "–"
    shown, limits = hundredths(carried), row.share_interval(quantizer, "extreme")
    if limits is not None:
        shown += f" [{hundredths(limits.low)}, {hundredths(limits.high)}]"
    return f"{shown} ({hundredths(control)})" if isinstance(control, float) else shown


def _relative(row: Row, base: Row | None) -> str:
    flops = row.records[0]["cost"]["flops-per-token"]
    return f"× {flops / base.records[0]['cost']['flops-per-token']:.3f}" if base else f"{flops:,}"
