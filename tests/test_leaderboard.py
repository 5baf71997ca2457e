"""The leaderboard: its statistics against published values, its rules, its bytes, and what is committed."""

import csv
import hashlib
import io
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from synthetic_records import Record, diverged, synthetic

from quantbench import leaderboard, numerals, stats, tables
from quantbench.board import Row, board
from quantbench.leaderboard import BEGIN, END
from quantbench.results import ResultsError, read_all, write

ROOT = Path(__file__).parents[1]


def rows_of(records: list[Record]) -> dict[str, Row]:
    return {row.name: row for row in board(records).rows}


def runs(recipe: str, kls: list[float], **changes: Any) -> list[Record]:
    """A run per KL, from seed 0, whose damage is its KL."""
    return [synthetic(recipe, seed, **{"kl": kl, "damage": kl} | changes) for seed, kl in enumerate(kls)]


BASELINE = runs("baseline", [0.10, 0.12, 0.09, 0.11, 0.10])


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "freedom", "table"),  # Dunnett, Biometrics 20:482 (1964), two-sided 5%
    [
        *((1, 10, 2.23), (2, 10, 2.57), (3, 10, 2.76), (4, 10, 2.89), (5, 10, 2.99)),
        *((2, 5, 3.03), (3, 5, 3.29), (2, 20, 2.38), (3, 20, 2.54), (5, 60, 2.58)),
    ],
)
def test_critical_values_are_dunnetts_table(k: int, freedom: int, table: float) -> None:
    assert stats.dunnett_quantile(0.95, k, freedom, 0.5) == pytest.approx(table, abs=0.0051)


@pytest.mark.parametrize("freedom", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 6.0])
def test_one_comparison_is_students_t_and_uncorrelated_normals_factor(freedom: int, t: float) -> None:
    students = 2 * scipy.stats.t.cdf(t, freedom) - 1
    assert stats.dunnett_cdf(t, 1, freedom, 0.5) == pytest.approx(students, abs=1e-10)
    assert stats.dunnett_cdf(t, 4, 10**6, 0.0) == pytest.approx((2 * scipy.stats.norm.cdf(t) - 1) ** 4, abs=1e-5)


@pytest.mark.parametrize(("k", "freedom", "q"), [(2, 1, 3.0), (3, 10, 3.88), (24, 90, 5.2), (25, 3, 9.0)])
def test_studentized_range_is_scipys(k: int, freedom: int, q: float) -> None:
    assert stats.tukey_cdf(q, k, freedom) == pytest.approx(scipy.stats.studentized_range.cdf(q, k, freedom), abs=1e-7)


def test_dunnetts_p_is_scipys_on_a_one_way_layout() -> None:
    """With every group on seeds of its own there is no seed effect, as scipy assumes: its p is by simulation."""
    generator = np.random.default_rng(3)
    groups = [generator.normal(mean, 1.0, 8) for mean in (0.0, 0.8, 1.5, -0.4)]
    scipys = scipy.stats.dunnett(*groups[1:], control=groups[0], rng=np.random.default_rng(0)).pvalue
    spread = math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / 28)
    ts = [abs(g.mean() - groups[0].mean()) / (spread * math.sqrt(2 / 8)) for g in groups[1:]]
    assert [1 - stats.dunnett_cdf(t, 3, 28, 0.5) for t in ts] == pytest.approx(scipys, abs=2e-3)


def test_two_recipes_compared_is_the_paired_t_test() -> None:
    a, b = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.2}, {0: 0.4, 1: 2.2, 2: 1.1, 3: 3.9}
    [compared] = stats.with_control({"baseline": a, "b": b}, "baseline").values()
    expected = scipy.stats.ttest_rel(list(b.values()), list(a.values()))
    limits = expected.confidence_interval()
    assert compared.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert (compared.difference.low, compared.difference.high) == pytest.approx((limits.low, limits.high), abs=1e-7)


def test_missing_cells_are_fitted_by_least_squares() -> None:
    """Seed 2 of b is missing: its difference is that of the shared seeds, not of the raw means (by hand)."""
    model = stats.fit({"baseline": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 2.0, 1: 3.2}}, "baseline")
    assert model is not None
    assert model.difference("b", "baseline")[0] == pytest.approx(1.1)
    assert model.freedom == 1
    assert model.variance == pytest.approx(0.01)  # residuals +-.05 on the four shared cells
    assert model.difference("b", "baseline")[1] == pytest.approx(0.1)


def test_seeds_that_all_recipes_share_do_not_count_as_noise() -> None:
    generator = random.Random(0)
    hard = {seed: 10.0 * seed for seed in range(5)}
    values = {
        name: {seed: hard[seed] + shift + generator.gauss(0, 0.01) for seed in range(5)}
        for name, shift in (("baseline", 0.0), ("same", 0.0), ("lower", -0.1))
    }
    compared = stats.with_control(values, "baseline")
    assert compared["lower"].p < 0.001
    assert compared["same"].p > 0.05


def test_recipes_that_share_no_seed_with_the_baseline_are_not_compared() -> None:
    values = {"baseline": {0: 1.0, 1: 1.1, 2: 1.3}, "a": {0: 2.0, 1: 2.3, 2: 2.2}, "island": {7: 1.0, 8: 1.2}}
    assert set(stats.with_control(values, "baseline")) == {"a"}
    assert stats.like_the_best(values, "baseline") >= {"baseline", "island"}
    assert stats.with_control({"a": {0: 1.0}}, "baseline") == {}
    assert stats.with_control({"baseline": {0: 1.0}, "a": {0: 2.0}}, "baseline") == {}


def test_the_family_holds_its_level_and_fewer_seeds_widen_the_interval() -> None:
    """Under the null 5% of families reject something; of 200 that is 4 to 19 (99.7%)."""
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(200):
        y = generator.normal(size=(6, 5)) + generator.normal(size=5)
        values = {("baseline", *"abcde")[i]: dict(enumerate(y[i])) for i in range(6)}
        rejected += min(c.p for c in stats.with_control(values, "baseline").values()) < 0.05
    assert 4 <= rejected <= 19
    full = stats.with_control(values, "baseline")["a"].difference
    values["a"] = {0: values["a"][0], 1: values["a"][1]}
    assert stats.with_control(values, "baseline")["a"].difference.half_width > full.half_width


def test_t_interval_by_hand() -> None:
    interval = stats.t_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.half_width == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert stats.t_interval([1.0]) is None


# --- rules of the table --------------------------------------------------------------------------------------------


def test_rows_are_ranked_by_damage_and_the_ratio_is_of_kl() -> None:
    better = runs("gated-attn", [0.05, 0.06, 0.045, 0.055, 0.05])
    track = board([*BASELINE, *better, *runs("registers", [0.2, 0.24, 0.18, 0.22, 0.2])])
    assert [(row.rank, row.name) for row in track.rows] == [(1, "gated-attn"), (2, "baseline"), (3, "registers")]
    compared = track.rows[0].comparisons["w8a8-static"]
    assert math.exp(compared.difference.mean) == pytest.approx(0.5)
    header, cells = tables.main_table(track)
    line = dict(zip(header, cells[0], strict=True))
    assert line["damage w8a8-static"] == "0.0520 ± 0.0071"
    assert line["KL ratio"].startswith("0.500 [")
    assert line["residual peak"] == "100"
    assert line["share carried"] == "0.80 (0.02)"


def test_fixed_notes() -> None:
    """Best, like the best, Pareto, fewer seeds, learned less: each on the rows it is true of."""
    records = [*BASELINE, *runs("best", [0.02, 0.024, 0.018, 0.022, 0.02], loss=3.5)]
    records += runs("close", [0.021, 0.0235, 0.0182, 0.0222, 0.0207])
    records += runs("pair", [0.3, 0.31])
    # Losses must scatter a little for a test to exist.
    for record in records:
        record["full-precision"]["loss"] += 0.001 * ((record["seed"] * 7 + len(record["recipe"]["name"])) % 5)
    notes = {name: row.notes for name, row in rows_of(records).items()}
    assert notes["best"] == ["Pareto", "best", "learned less"]
    assert notes["close"] == ["Pareto", "like the best"]
    assert notes["pair"] == ["2 of 5 seeds"]
    assert "like the best" not in notes["baseline"]


def test_rounding_puts_no_row_on_the_front() -> None:
    """A post-hoc recipe that leaves the function as it was, and whose damage is larger, has no lower loss."""
    better, worse = runs("better", [0.02] * 5), runs("worse", [0.03] * 5)
    for record in worse:
        record["full-precision"]["loss"] -= 1e-7
    notes = {name: row.notes for name, row in rows_of([*BASELINE, *better, *worse]).items()}
    assert "Pareto" in notes["better"]
    assert "Pareto" not in notes["worse"]


def test_diverged_rows_come_last_with_their_reason() -> None:
    lucky = [*runs("lucky", [0.01, 0.01]), diverged("lucky", 2, "loss is NaN at step 7")]
    track = board([*BASELINE, *lucky, diverged("sgd")])
    assert [row.name for row in track.rows] == ["baseline", "lucky", "sgd"]
    assert [row.rank for row in track.rows] == [1, None, None]
    assert track.rows[1].notes == ["diverged: seed 2: loss is NaN at step 7", "2 of 5 seeds"]
    assert track.rows[2].notes == ["diverged: seed 0: loss is NaN at step 120"]
    assert tables.main_table(track)[1][2][2:12] == ["0", *["–"] * 9]


def test_a_track_where_everything_diverged_is_a_table_still() -> None:
    assert [row.rank for row in board([diverged("baseline"), diverged("sgd")]).rows] == [None, None]


def test_stale_records_are_never_pooled() -> None:
    old = [{**r, "data": "old"} for r in runs("gated-attn", [9.0, 9.0])]
    new = [{**r, "seed": r["seed"] + 2} for r in runs("gated-attn", [0.05, 0.06, 0.05])]
    track = rows_of([*BASELINE, *old, *new, *[{**r, "data": "old"} for r in runs("registers", [0.2, 0.3])]])
    damage = track["gated-attn"].quantized("w8a8-static", "damage")
    assert damage is not None
    assert damage.value == pytest.approx(0.16 / 3)
    assert track["gated-attn"].notes[-2:] == ["stale: 2 of 5 runs, of other digests, left out", "3 of 5 seeds"]
    assert track["registers"].rank is None
    assert track["registers"].notes == ["stale: all its runs are of other digests than the table"]


def test_environments_are_noted() -> None:
    other = {**BASELINE[0]["environment"], "threads": 8}
    elsewhere = runs("gated-attn", [0.05] * 5, environment=other)
    mixed = [*runs("registers", [0.2] * 4), {**synthetic("registers", 4), "environment": other}]
    rows = rows_of([*BASELINE, *elsewhere, *mixed])
    assert "other environment" in rows["gated-attn"].notes
    assert "mixed environments" in rows["registers"].notes
    assert not {"other environment", "mixed environments"} & set(rows["baseline"].notes)


def test_kl_without_a_logarithm_is_left_out_and_said() -> None:
    rows = rows_of([*BASELINE, *runs("hadamard", [0.0, 0.05, 0.05, 0.06, 0.05])])
    assert "KL not above 0 in 1 of 5 runs, not compared" in rows["hadamard"].notes
    assert math.exp(rows["hadamard"].comparisons["w8a8-static"].difference.mean) == pytest.approx(0.5, abs=0.03)


def test_a_quantized_loss_that_is_not_finite_is_not_ranked() -> None:
    row = rows_of([*BASELINE, *runs("registers", [0.2] * 4), synthetic("registers", 4, damage=None)])["registers"]
    assert row.rank is None
    assert row.notes[0] == "quantized loss not finite in 1 of 5 runs"
    assert row.quantized("w8a8-static", "damage") is None


def test_the_share_is_undefined_where_the_damage_may_be_nothing() -> None:
    rows = rows_of([*BASELINE, *runs("hadamard", [0.001, -0.001, 0.002, 0.0005, 0.0001], kl=0.01)])
    assert rows["hadamard"].share("w8a8-static", "extreme") == "undefined"
    assert rows["baseline"].share("w8a8-static", "extreme") == pytest.approx(0.8)
    assert rows["baseline"].share("bnb-nf4", "extreme") is None


def test_numbers_are_printed_to_the_place_their_interval_allows() -> None:
    plus_minus, plain = numerals.plus_minus, numerals.plain
    assert plus_minus(3.51234, 0.01345) == "3.512 ± 0.013"
    assert plus_minus(-0.00012, 0.00034) == "−0.00012 ± 0.00034"
    assert plus_minus(1294.0, 1046.0) == "1,294 ± 1,046"
    assert plus_minus(3.5, None) == "3.50"
    cases = {0.0: "0", 25105.0: "25,105", 0.04873: "0.0487", 188.2: "188", 1.5: "1.50", 2.5e-07: "2.50e−07"}
    assert {value: plain(value) for value in cases} == cases


# --- bytes ---------------------------------------------------------------------------------------------------------


def some_results(root: Path, hostile: bool = False) -> None:
    generator = random.Random(0)
    for recipe, peak in (("baseline", 200.0), ("relu-attn", 5.0), ("sgd", 20.0), ("gated-attn", 8.0)):
        for seed in range(3):
            kl = 0.001 * peak * math.exp(generator.gauss(0, 0.2))
            record = synthetic(recipe, seed, kl=kl, damage=kl, peak=peak * math.exp(generator.gauss(0, 0.1)))
            record["full-precision"]["lm-eval"] = {"last-word": 0.4, "last-word-items": 500, "last-word-chance": 0.25}
            if hostile:
                record["recipe"]["title"] = '=HYPERLINK("http://evil")'
                record["track"]["title"] = "$x$ | <img src=x onerror=alert(1)> [a](http://evil) `b` ![c](d)"
            write(root, record, {})
    bad = diverged("muon", reason="<script>alert(1)</script> | a\n# b")
    write(root, {**bad, "track": record["track"]}, {})


def page(folder: Path) -> Path:
    readme = folder / "README.md"
    readme.write_text(f"# Project\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n")
    return readme


def test_the_same_records_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    some_results(tmp_path / "results")
    readme = page(tmp_path)
    files = leaderboard.render(tmp_path / "results", readme)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in files) == [
        "README.md",
        "results/README.md",
        "results/leaderboard.csv",
        "results/text/relation-all.svg",
        "results/text/relation-w8a8-static.svg",
        "results/text/timeline.svg",
    ]
    code = (
        "import sys, hashlib; from pathlib import Path; from quantbench import leaderboard\n"
        "for p, d in leaderboard.render(Path(sys.argv[1]), Path(sys.argv[2])).items():"
        " print(p, hashlib.sha256(d).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results"), str(readme)]
    outputs = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True).stdout
        for seed in ("1", "2")
    }
    here = "".join(f"{path} {hashlib.sha256(data).hexdigest()}\n" for path, data in files.items())
    assert outputs == {here.encode()}


def test_writing_twice_changes_nothing_and_old_figures_go(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", page(tmp_path)
    some_results(results)
    (results / "text/relation-gone.svg").write_text("old")
    changed = leaderboard.write(results, readme)
    assert results / "text/relation-gone.svg" in changed
    assert not (results / "text/relation-gone.svg").exists()
    assert leaderboard.write(results, readme) == []
    text = readme.read_text()
    assert text.startswith(f"# Project\n\n{BEGIN}\n**Which recipes survive?** ")
    assert text.endswith(f"[results/README.md](results/README.md).\n{END}\n\nThe rest.\n")


def test_a_readme_without_the_block_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for content in ("", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"):
        readme.write_text(content)
        with pytest.raises(ValueError, match="leaderboard:begin"):
            leaderboard.render(tmp_path / "results", readme)


def test_nothing_yet_is_said(tmp_path: Path) -> None:
    files = leaderboard.render(tmp_path / "results", page(tmp_path))
    assert [path.name for path in files] == ["README.md", "leaderboard.csv", "README.md"]
    assert "No results yet" in files[tmp_path / "results/README.md"].decode()
    assert files[tmp_path / "results/leaderboard.csv"].count(b"\n") == 1
    with pytest.raises(ValueError, match="none yet"):
        tables.table(tmp_path / "results", "text")


def test_the_terminal_gets_the_same_rows(tmp_path: Path) -> None:
    some_results(tmp_path)
    header, rows = tables.table(tmp_path, "text")
    assert [row[header.index("recipe")] for row in rows] == ["relu-attn", "gated-attn", "sgd", "baseline", "muon"]
    assert {len(row) for row in rows} == {len(header)}
    with pytest.raises(ValueError, match="with results: text"):
        tables.table(tmp_path, "code")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    some_results(tmp_path, hostile=True)
    files = leaderboard.render(tmp_path)
    markdown = files[tmp_path / "README.md"].decode()
    assert not re.search(r"<(script|img)|(?<!\\)\]\(http|\nb\n|\n# b", markdown)
    assert r"\| a \# b" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("| ") and "muon" in line]
    assert [len(re.split(r"(?<!\\)\|", line)) for line in tables] == [15]
    for line in csv.reader(io.StringIO(files[tmp_path / "leaderboard.csv"].decode())):
        assert not any(cell.startswith(("=", "+", "@")) for cell in line)
    for path, data in files.items():
        if path.suffix == ".svg":
            assert b"<script" not in data
            assert b"<img" not in data


def test_the_csv_has_a_line_per_recipe_and_quantizer(tmp_path: Path) -> None:
    some_results(tmp_path)
    lines = list(csv.DictReader(io.StringIO(leaderboard.render(tmp_path)[tmp_path / "leaderboard.csv"].decode())))
    assert len(lines) == 4 * 2 + 1
    first = lines[0]
    assert (first["recipe"], first["rank"], first["quantizer"], first["ranks"]) == (
        "relu-attn",
        "1",
        "w8a8-static",
        "1",
    )
    assert float(first["damage-low"]) < float(first["damage"]) < float(first["damage-high"])
    assert float(first["kl-ratio-low"]) < float(first["kl-ratio"]) < 1 < 1 / float(first["kl-ratio-high"])
    assert lines[-1]["notes"].startswith("diverged: ")


def test_unsound_records_stop_the_rendering(tmp_path: Path) -> None:
    some_results(tmp_path)
    path = tmp_path / "text/sgd/seed-0.json"
    path.write_bytes(path.read_bytes().replace(b'"threads": 1', b'"threads": 1.5'))
    with pytest.raises(ResultsError, match=r"sgd/seed-0\.json"):
        leaderboard.render(tmp_path)


# --- what is committed ---------------------------------------------------------------------------------------------


def test_what_is_committed_is_what_the_records_render() -> None:
    results, readme = ROOT / "results", ROOT / "README.md"
    if not (results / "README.md").exists():
        assert read_all(results) == [], "records without a rendered leaderboard: run `quantbench leaderboard`"
        assert not (results / "leaderboard.csv").exists()
        return
    files = leaderboard.render(results, readme)
    stale = [str(path.relative_to(ROOT)) for path, data in files.items() if path.read_bytes() != data]
    assert stale == [], "run `quantbench leaderboard`"
    assert set(results.rglob("*.svg")) == {path for path in files if path.suffix == ".svg"}
