"""The benchmarks themselves: what a contest gives, and what is in the page. Not a word about how fast anything is."""

from pathlib import Path

from tiny import RECIPES

from quantbench import catalog
from quantbench.results import sealed
from tests.perf.contest import Goal, contest, quartiles, ratio
from tests.perf.recipes import trained
from tests.perf.table import missed, render


def test_ratios_are_those_of_the_same_round() -> None:
    times = {"ours": [1.0, 4.0, 9.0, 4.0, 25.0], "theirs": [1.0, 2.0, 3.0, 1.0, 5.0]}
    assert ratio(times, "ours", "theirs") == 3.0
    assert quartiles(times, "ours", "theirs") == [2.0, 4.0]


def test_a_contest_gives_a_row_to_each() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in ("one", "two")}
    rows = contest("T", "c", contestants, "one", rounds=2)
    assert [(row["what"], row["anchor"]) for row in rows] == [("one", "one"), ("two", "one")]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["quartiles"] == [1.0, 1.0]
    assert set(calls) == {"one", "two"}


def test_a_goal_that_was_not_reached_is_a_line() -> None:
    goals = {"two": [Goal("one", 1e-9), Goal("one", 1e9)]}
    rows = contest("T", "c", {"one": lambda: None, "two": lambda: None}, "one", rounds=2, goals=goals)
    (line,) = missed(rows)
    assert line.startswith("T, c: two 1e+09 × faster than one (")


def test_every_recipe_that_pretrains_is_timed() -> None:
    after = {name for name, mitigations in RECIPES.items() if mitigations.keys() & set(catalog.POST_HOC)}
    assert set(trained()) == RECIPES.keys() - after
    assert trained()[0] == "baseline"


def test_the_page_shows_quartiles_where_there_are_some(tmp_path: Path) -> None:
    row = {"table": "T", "case": "c", "what": "w", "ms": 1.0, "anchor": "a", "ratio": 1.07, "goals": []}
    here = {"cpu": "Some", "device": "cpu", "torch": "2"}
    record = {"recipes": {"rows": [row, row | {"quartiles": [1.05, 1.1]}], "environment": here}}
    (tmp_path / "some.json").write_bytes(sealed(record))
    page = render(tmp_path)
    assert "| c | w | 1 | 1.07 |  |" in page
    assert "| c | w | 1 | 1.07 (1.05 to 1.1) |  |" in page
