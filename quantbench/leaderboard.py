"""Records -> the leaderboard: Markdown, CSV, figures, and the short table in the project's README.

Nothing here is edited by hand: the same records give the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantbench import answer, claims, figures, gallery, hypotheses, relation, tables
from quantbench.board import SIGNATURES, Board, Mean, board, value_of
from quantbench.markup import escape, harmless, markdown
from quantbench.numerals import plain
from quantbench.results import Record, check_others, read_all, read_probes, read_sites
from quantbench.store import atomic_write

BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
HEADLINE_TRACK = "text"
RELATED = 3  # recipes, at least, for a relation over recipes to be shown
INTRODUCTION = """# Leaderboard

Rendered by `quantbench leaderboard` from the records in this folder; never edited.
Losses, damage and KL are nats per token. A dash is a figure that is undefined or was not measured.
"""
EMPTY = "No results yet: `quantbench bench RECIPE` makes them."


def render(results_root: Path, readme: Path | None = None) -> dict[Path, bytes]:
    """Every file made from the records, by path: README.md, leaderboard.csv, the figures of each track, and the
    project's README with its block replaced. ResultsError for unsound records, ValueError for a README without it."""
    check_others(results_root)
    records, sites = read_all(results_root), read_sites(results_root)
    tracks = sorted({r["track"]["name"] for r in records}, key=lambda name: (name != HEADLINE_TRACK, name))
    boards = [board([r for r in records if r["track"]["name"] == track]) for track in tracks]
    everything, claimed = relation.relate(records), claims.examine(results_root)
    related = {name: _telling(found) for name, found in everything.items()}
    files: dict[Path, bytes] = {}
    sections = [INTRODUCTION]
    for track in boards:
        pictures = _pictures(track, related[track.name])
        files |= {results_root / track.name / name: data for name, (data, _) in pictures.items()}
        shown = {name: what for name, (_, what) in pictures.items()}
        sections.append(
            _section(track, related[track.name], shown, _predicted(results_root, track, everything, claimed))
        )
        mine = [r for r in sites if r["track"]["name"] == track.name]
        for quantizer, runs in tables.paying(mine, track.records).items():
            picture = figures.propagation(runs, track.records)
            if picture is not None:
                files[results_root / track.name / f"sites-{quantizer}.svg"] = picture
            sections.append(_sites_section(track, quantizer, runs, picture is not None))
    sections.append(_legend() if boards else f"{EMPTY}\n")
    files[results_root / "README.md"] = "\n".join(sections).encode()
    files[results_root / "leaderboard.csv"] = _csv(boards)
    files |= gallery.render(results_root)
    files |= claims.render(results_root, claimed)
    if readme is not None:
        files[readme] = _with_block(readme, results_root, boards, related)
    return files


def check(results_root: Path, readme: Path | None = None) -> None:
    """What would keep `render` from its work, told before hours of another: its errors."""
    for read in (read_all, read_sites, read_probes):
        read(results_root)
    if readme is not None:
        _page(readme)


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


def _predicted(
    results_root: Path, track: Board, related: dict[str, Any], claimed: dict[str, list[claims.Row]]
) -> list[hypotheses.Verdict]:
    """What was written before the track's runs, with its verdicts; empty where nothing was."""
    found = hypotheses.read(results_root, track.name)
    if found is None:
        return []
    return hypotheses.judged(found, hypotheses.Facts(track, related[track.name], claimed))


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
            figures.heat(*tables.heat(track)),
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


def _section(
    track: Board, related: dict[str, Any], pictures: dict[str, str], predicted: list[hypotheses.Verdict]
) -> str:
    parts = [f"## {escape(track.title)} (`{track.name}`)"]
    if documents := len(track.rows[0].units("loss")):
        length = track.rows[0].records[0]["track"]["resolved"]["length"]
        parts.append(DOCUMENTS.format(documents, length))
    parts += [*_answers(track, related), markdown(tables.main_table(track))]
    if track.seeds:
        parts.append(
            SEEDS.format("; ".join(f"{what}: F = {F:.2f}, p = {p:.2f}" for what, (F, p) in track.seeds.items()))
        )
    if maps := tables.map_tables(track):
        parts += ["### The map: scope of the ranges × residual stream × bits", MAP_LEGEND]
        parts += [tables.separating(track)] if any(row.comparisons for row in track.rows) else []
        parts += [f"W{bits}A{bits}\n\n{markdown(table)}" for bits, table in maps.items()]
    if others := tables.damage_tables(track):
        parts += [f"### Damage under {'the other quantizers' if maps else 'every quantizer'}", *map(markdown, others)]
    parts += ["### Full-precision quality and cost", markdown(tables.quality_table(track))]
    harness = tables.harness_table(track)
    if harness[1]:
        parts += [f"### Last word, by lm-evaluation-harness ({_harness_facts(track)})", markdown(harness)]
    for task, scored in tables.standard_tables(track).items():
        items = len(track.rows[0].records[0]["full-precision"]["lm-eval-items"][task])
        parts += [f"### {task}, by lm-evaluation-harness ({items:,} items)", STANDARD_LEGEND, markdown(scored)]
    if track.ranking in related and (relations := tables.relation_table(related[track.ranking]))[1]:
        parts += [f"### What does the error go with? (`{track.ranking}`)", RELATION_LEGEND, markdown(relations)]
        best = relation.winner(related[track.ranking])
        after = tables.post_hoc_table(track, list(dict.fromkeys(name for name in (relation.PEAK, best) if name)))
        parts += [POST_HOC_LEGEND, markdown(after)] if after[1] else []
        parts += ["### The same under every quantizer", WINNERS_LEGEND, markdown(tables.winners_table(related))]
        parts += [FAMILY_LEGEND, markdown(tables.family_table(track, related))]
        parts += [PREDICTORS_LEGEND, markdown(tables.predictor_table(related))]
    if predicted:
        verdicts = markdown(hypotheses.table(predicted))
        parts += [f"### Predictions: {hypotheses.score(predicted)}", HYPOTHESES_LEGEND.format(track.name), verdicts]
    parts += [f"![{what}]({track.name}/{name})" for name, what in pictures.items() if name != "timeline.svg"]
    if "timeline.svg" in pictures:
        parts += ["### When the signatures emerge", f"![{pictures['timeline.svg']}]({track.name}/timeline.svg)"]
    return "\n\n".join(parts) + "\n"


def _answers(track: Board, related: dict[str, Any]) -> list[str]:
    return [f"**{question}** {escape(said)}" for question, said in answer.answers(track, related)]


def _sites_section(track: Board, quantizer: str, runs: list[Record], pictured: bool) -> str:
    parts = [f"### Which site pays (`{quantizer}`)", tables.SITES_LEGEND, markdown(tables.sites_table(runs))]
    if pictured:
        what = f"Accumulated, local and interacting error of every block under {quantizer}, a line per recipe"
        parts.append(f"![{what}]({track.name}/sites-{quantizer}.svg)")
    return "\n\n".join(parts) + "\n"


MAP_LEGEND = """Damage in nats per token, and in brackets the KL relative to the baseline's; † where it is told from 1 \
at 5% (Holm over the recipes of a cell; cells are not adjusted for one another). \
*residual*: the residual stream is rounded after every sublayer, too. W4A4 weights come in groups of 64."""
STANDARD_LEGEND = """Accuracy in full precision, mean ± half of the 95% t interval over items; under each quantizer \
what it changes, paired over the same items."""
DOCUMENTS = """One model that was there already, one seed: intervals are over {} held-out documents, a window of {} \
tokens each, and comparisons are paired over them."""
SEEDS = """Does a seed make every recipe better or worse? {}. Where it explains nothing, pairing by it buys nothing: \
log KL is compared unpaired, the loss paired."""
HYPOTHESES_LEGEND = """Written before the runs, in [hypotheses.yaml]({}/hypotheses.yaml), with the rules by which they \
are judged here. A prediction holds where all its conditions do; *measured* has their figures, in the rule's order."""
RELATION_LEGEND = f"""Spearman's ρ of KL(full ‖ quantized) with figures of the full-precision model, a point per run \
of a pretraining recipe (the pictures have post-hoc ones, too, hollow). *within*: deviations from the recipe's mean, \
in standard deviations. *given*: partial. *extremes exempt*: with the KL that is left where extreme tokens stay in \
full precision. *draws won*: in which this ρ is the largest. In brackets 95% limits of a bootstrap over clusters of \
recipes that share a mitigation, be it by way of others. R²: how well a line through the other recipes predicts a \
recipe, against their mean. Below {relation.FEWEST_RECIPES} recipes only ρ and the counts are given. Every figure: \
`quantbench relation --json`."""
POST_HOC_LEGEND = """Post-hoc recipes are no points of it. Do they lie on its line (log KL on the logarithm of the \
predictor, least squares over the pretraining runs)? Geometric means over seeds."""
WINNERS_LEGEND = """The predictor with the largest ρ under each quantizer, beside the residual peak."""
FAMILY_LEGEND = """Mean ρ over the quantizers of a kind; ← the largest."""
PREDICTORS_LEGEND = """ρ of every predictor; † where the interval leaves out 0 (each by itself: they are many)."""


def _legend() -> str:
    return (
        "\n".join(["## Columns", "", *(f"- **{name}**: {meaning}." for name, meaning in tables.LEGEND.items())]) + "\n"
    )


def _harness_facts(track: Board) -> str:
    """How many items, and what guessing gives."""
    facts = [
        r["full-precision"]["lm-eval"] for row in track.rows for r in row.records if r["full-precision"]["lm-eval"]
    ]
    items, chance = facts[0].get("last-word-items"), facts[0].get("last-word-chance")
    return f"accuracy, {'–' if items is None else f'{items:,.0f}'} items, chance {plain(chance)}"


def _with_block(readme: Path, results_root: Path, boards: list[Board], related: dict[str, Any]) -> bytes:
    """The README with the answers and a short table of the headline track between the two markers."""
    page = _page(readme)
    track = next((b for b in boards if b.name == HEADLINE_TRACK), None)
    block = EMPTY
    if track is not None:
        header, rows = tables.main_table(track)
        kept = (
            "rank",
            "recipe",
            "seeds",
            "loss",
            "Δ loss",
            "residual peak",
            f"damage {track.ranking}",
            "KL ratio",
            "p",
        )
        columns = [header.index(name) for name in (*kept, "share carried", "notes")]
        link = Path(os.path.relpath(results_root / "README.md", readme.parent)).as_posix()
        short = ([header[i] for i in columns], [[row[i] for i in columns] for row in rows])
        block = "\n\n".join([
            *_answers(track, related[track.name]), markdown(short),
            f"Track `{track.name}`; every column, quantizer and track: [{link}]({link}).",
        ])  # fmt: skip
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    return f"{before}\n{block}\n{after}".encode()


def _page(readme: Path) -> str:
    """The text of a README that has the two markers; ValueError for one that has not."""
    page = readme.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{readme}: put one line {BEGIN} and one line {END} where the leaderboard belongs")
    return page


def _csv(boards: Iterable[Board]) -> bytes:
    """One line per track, recipe and quantizer, with six digits; the figures of the recipe repeat."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["track", "recipe", "title", "rank", "seeds", "loss", "loss-low", "loss-high", *SIGNATURES, "act-max"]
    header += ["loss-difference", "loss-difference-low", "loss-difference-high", "loss-p", "front"]
    header += ["quantizer", "ranks", "damage", "damage-low", "damage-high", "kl", "kl-ratio", "kl-ratio-low"]
    writer.writerow([*header, "kl-ratio-high", "p", "share-carried", "share-carried-random", "notes"])
    for track in boards:
        for row in track.rows:
            signatures = [_digits(value_of(row.full("metrics", name, "value"))) for name in (*SIGNATURES, "act-max")]
            left = [harmless(text) for text in (track.name, row.name, row.title)]
            left += [str(row.rank or ""), str(len(row.records)), *_limits(row.full("loss")), *signatures]
            difference = row.loss and row.loss.difference
            left += [_digits(x) for x in (difference.mean, difference.low, difference.high)] if difference else [""] * 3
            left += [_digits(row.loss.p if row.loss else None), _digits(row.front)]
            for quantizer in track.quantizers if row.records else [""]:
                cells = [harmless(quantizer), str(int(quantizer == track.ranking))]
                cells += [
                    *_limits(row.quantized(quantizer, "damage")),
                    _digits(value_of(row.quantized(quantizer, "kl"))),
                ]
                compared = row.comparisons.get(quantizer)
                ratio = compared and compared.ratio
                cells += [_digits(value) for value in (ratio.mean, ratio.low, ratio.high)] if ratio else [""] * 3
                shares = [row.share(quantizer, exempt) for exempt in ("extreme", "random")]
                cells += [_digits(compared.p) if compared else ""]
                cells += [share if isinstance(share, str) else _digits(share) for share in shares]
                writer.writerow([*left, *cells, harmless("; ".join(row.notes))])
    return buffer.getvalue().encode()


def _limits(mean: Mean | None) -> list[str]:
    if mean is None:
        return [""] * 3
    ends = [mean.interval.low, mean.interval.high] if mean.interval else [math.nan] * 2
    return [_digits(value) for value in (mean.value, *ends)]


def _digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
