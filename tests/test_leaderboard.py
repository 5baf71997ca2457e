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

import pytest
from synthetic_records import Record, diverged, synthetic

from quantbench import leaderboard, numerals, tables
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
    assert notes["best"] == ["Pareto 0.93", "best", "learned less"]
    assert notes["close"] == ["Pareto 1.00", "like the best"]
    assert notes["pair"] == ["2 of 5 seeds", "learned less"]
    assert "like the best" not in notes["baseline"]


def test_rounding_puts_no_row_on_the_front() -> None:
    """A post-hoc recipe that leaves the function as it was, and whose damage is larger, has no lower loss."""
    better, worse = runs("better", [0.02] * 5), runs("worse", [0.03] * 5)
    for record in worse:
        record["full-precision"]["loss"] -= 1e-7
    notes = {name: row.notes for name, row in rows_of([*BASELINE, *better, *worse]).items()}
    assert "Pareto 1.00" in notes["better"]
    assert not [note for note in notes["worse"] if note.startswith("Pareto")]


def test_the_front_is_as_sure_as_its_draws_are() -> None:
    """Of two rows of one loss, one loses less at three seeds of five: by hand, over all draws, in .683 of them."""
    one, other = runs("one", [0.01, 0.01, 0.01, 0.03, 0.03]), runs("other", [0.0181] * 5)
    rows = rows_of([*BASELINE, *one, *other])
    ones = sum(math.comb(5, k) * 3**k * 2 ** (5 - k) for k in range(6) if (0.01 * k + 0.03 * (5 - k)) / 5 < 0.0181)
    assert ones / 5**5 == pytest.approx(0.683, abs=1e-3)
    assert rows["one"].front == pytest.approx(ones / 5**5, abs=0.03)
    assert rows["other"].front == pytest.approx(1 - ones / 5**5, abs=0.03)
    assert rows["baseline"].front == 0.0
    assert rows_of([*BASELINE, *runs("once", [0.01])])["once"].front is None


def post_hoc(kls: list[float], lr: float = 0.01, on: tuple[str, ...] = (), **changes: Any) -> list[Record]:
    """Runs of `hadamard` on the checkpoints of the recipe that `on` is the mitigations of."""
    records = runs("rotated", kls, mitigations=("hadamard", *on), **changes)
    for record in records:
        record["recipe"]["resolved"]["lr"] = lr
    return records


def test_a_post_hoc_row_is_paired_on_the_checkpoints_that_it_shares() -> None:
    """Half the KL at every seed: told apart, although the seeds scatter by a factor of four; and by less: it is not."""
    base = runs("baseline", [0.10, 0.40, 0.20, 0.30, 0.15, 0.9, 0.8, 0.7])
    for record in base:
        record["recipe"]["resolved"]["lr"] = 0.01
        record["full-precision"]["loss"] = 3.0 + 0.1 * (record["seed"] > 4)
    after = post_hoc([0.051, 0.199, 0.101, 0.149, 0.0751])
    rows = rows_of([*base, *after])
    compared = rows["rotated"].comparisons["w8a8-static"]
    assert compared.ratio.mean == pytest.approx(0.501, abs=0.003)
    assert compared.p < 1e-5
    assert rows["rotated"].control == "baseline"
    # The three seeds that it lacks are worse: its loss is still that of its checkpoints.
    assert rows["rotated"].loss is not None
    assert rows["rotated"].loss.difference.mean == 0.0
    same = rows_of([*base, *post_hoc([0.10, 0.40, 0.20, 0.30, 0.15])])["rotated"].comparisons["w8a8-static"]
    assert (same.ratio.mean, same.p) == (1.0, 1.0)


def test_a_post_hoc_row_is_compared_with_the_pretraining_that_it_is_on() -> None:
    base, gated = runs("baseline", [0.10, 0.12, 0.09]), runs("gated", [0.01, 0.02, 0.03], mitigations=("gate",))
    for record in (*base, *gated):
        record["recipe"]["resolved"]["lr"] = 0.01
    after = post_hoc([0.02, 0.04, 0.06], on=("gate",))
    row = rows_of([*base, *gated, *after])["rotated"]
    assert row.control == "gated"
    assert "against gated" in row.notes
    assert row.comparisons["w8a8-static"].ratio.mean == pytest.approx(2.0)
    alone = rows_of([*base, *post_hoc([0.02, 0.04, 0.06], lr=0.3)])["rotated"]
    assert (alone.control, alone.comparisons, alone.loss) == ("rotated", {}, None)


def test_losses_are_compared_over_the_seeds_of_both() -> None:
    """The baseline's seeds 3 to 7 are .1 worse; a recipe of seeds 0 to 2 that is .01 better at each is just that."""
    base, better = runs("baseline", [0.1] * 8), runs("better", [0.1] * 3)
    for record in base:
        record["full-precision"]["loss"] = 3.0 + 0.1 * (record["seed"] > 2)
    for record in better:
        record["full-precision"]["loss"] = 2.99 + 1e-4 * record["seed"]
    row = rows_of([*base, *better])["better"]
    assert row.loss is not None
    assert row.loss.difference.mean == pytest.approx(-0.0099)
    assert row.loss.separates
    header, cells = tables.main_table(board([*base, *better]))
    shown = {line[header.index("recipe")]: line[header.index("Δ loss")] for line in cells}
    assert shown == {"better": "−0.00990 ± 0.00025", "baseline": ""}


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
    assert text.startswith(f"# Project\n\n{BEGIN}\n**Which recipes lose less?** ")
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
    assert [len(re.split(r"(?<!\\)\|", line)) for line in tables] == [16]
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
