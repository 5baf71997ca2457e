"""Predictions: rules say what they say and nothing else, verdicts follow the figures, and the words came first."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import Record, synthetic

from quantbench import hypotheses, relation
from quantbench.board import board
from quantbench.hypotheses import FAILS, HOLDS, OPEN, ByHand, Facts, Hypothesis
from quantbench.strict import StrictError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "results").glob("*/hypotheses.yaml"))
KLS = (0.10, 0.12, 0.09, 0.11, 0.10)


def runs(recipe: str, times: float, **changes: Any) -> list[Record]:
    return [
        synthetic(recipe, seed, kl=kl * times, damage=kl * times, mitigations=(recipe,), **changes)
        for seed, kl in enumerate(KLS)
    ]


@pytest.fixture(scope="module")
def facts() -> Facts:
    """`half` loses half as much as the baseline, `same` as much; their peaks are 50 and 100."""
    records = [*runs("baseline", 1.0), *runs("half", 0.5, peak=50.0), *runs("same", 1.0)]
    return Facts(board(records), relation.relate(records)["text"])


def verdict(facts: Facts, *rule: str) -> tuple[str, str]:
    [found] = hypotheses.judged(
        hypotheses.Hypotheses((hypotheses.Part("abc", (), "", (Hypothesis(1, "so it is", rule),)),)), facts
    )
    return found.verdict, found.measured


@pytest.mark.parametrize(
    ("rule", "expected", "measured"),
    [
        ("metric('half', 'residual-peak') < metric('baseline', 'residual-peak')", HOLDS, "50.0 < 100"),
        ("metric('half', 'residual-peak') > metric('baseline', 'residual-peak') / 2", FAILS, "50.0 > 50.0"),
        ("better('half', 'w8a8-static')", HOLDS, "half × 0.500"),
        ("not better('same', 'w8a8-static')", HOLDS, "same × 1.00 (not told from 1)"),
        ("worse('half', 'w8a8-static')", FAILS, "half × 0.500"),
        ("all(better(r, 'w8a8-static') for r in ['half', 'same'])", FAILS, "1 of 2; not same"),
        ("any(better(r, q) for r in ['half', 'same'] for q in ['w8a8-static'])", HOLDS, "1 of 2: half w8a8-static"),
        ("count(better(r, 'w8a8-static') for r in pretraining) >= 1", OPEN, "unknown: baseline is not compared"),
        ("count(better(r, 'w8a8-static') for r in ['half', 'same']) >= 1", HOLDS, "1 ≥ 1"),
        ("least('w8a8-static', ['baseline', 'half']) == 'half'", HOLDS, "half = half"),
        ("0.4 < share('half', 'w8a8-static') < 0.9", HOLDS, "0.40 < 0.80 < 0.90"),
        ("share_undefined('half', 'w8a8-static') or control('half', 'w8a8-static') < 0.1", HOLDS, "no or 0.02 < 0.10"),
        ("damage('half', 'w8a8-static') < -1 + 2 * 0.6", HOLDS, "0.05 < 0.20"),
        ("rho('w8a8-static', 'residual-peak') > 0.5", HOLDS, "0.83 > 0.50"),
        ("metric('gone', 'residual-peak') > 1", OPEN, "unknown: no runs of gone"),
        ("claim('bb-3layer', 'sink') > 0.5", OPEN, "unknown: no row sink on bb-3layer"),
    ],
)
def test_a_condition_is_what_the_figures_say(facts: Facts, rule: str, expected: str, measured: str) -> None:
    found, shown = verdict(facts, rule)
    assert found == expected
    assert shown.startswith(measured)


def test_a_hypothesis_holds_where_all_its_conditions_do(facts: Facts) -> None:
    holds, fails, unknown = "1 < 2", "2 < 1", "metric('gone', 'residual-peak') > 1"
    assert verdict(facts, holds, holds)[0] == HOLDS
    assert verdict(facts, holds, fails, unknown)[0] == FAILS  # whatever the missing figure is
    assert verdict(facts, holds, unknown)[0] == OPEN


@pytest.mark.parametrize(
    "rule",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "facts.board",
        "metric('half', 'residual-peak').real",
        "metric('half', name='residual-peak') > 1",
        "(lambda: 1)()",
        "[r for r in ['half']] == []",
        "all(better(r, 'w8a8-static') for r in ['half'] if r)",
        "'a' * 9 ** 9 ** 9",
        "unknown_name > 1",
        "_rho('w8a8-static', 'residual-peak', 'low') > 1",
        "1 <",
    ],
)
def test_what_is_no_rule_is_refused_when_it_is_read(rule: str) -> None:
    with pytest.raises(ValueError, match="'rule'"):
        Hypothesis(1, "so it is", (rule,))


def test_what_no_rule_says_is_judged_by_hand_and_says_so(facts: Facts) -> None:
    by_hand = Hypothesis(1, "it looks so", by_hand=ByHand("fails", "it does not"))
    [found] = hypotheses.judged(hypotheses.Hypotheses((hypotheses.Part("abc", (), "", (by_hand,)),)), facts)
    assert (found.verdict, found.measured) == (FAILS, "by hand: it does not")
    for wrong in ({}, {"rule": ("1 < 2",), "by_hand": ByHand("holds", "")}):
        with pytest.raises(ValueError, match="and not both"):
            Hypothesis(1, "so it is", **wrong)


def test_a_file_that_is_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text/hypotheses.yaml"
    path.write_text("parts:\n  - written: abc\n    judges: []\n    about: a\n    hypotheses:\n"
                    "      - {id: 1, text: so it is, rule: ['open(1) > 2']}\n")  # fmt: skip
    with pytest.raises(StrictError, match=r"hypotheses\.yaml:6:\d+: .*'open\(1\) > 2'"):
        hypotheses.read(tmp_path, "text")
    assert hypotheses.read(tmp_path, "other") is None


# --- what is committed ---------------------------------------------------------------------------------------------


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_the_words_are_older_than_the_runs_that_they_judge(path: Path) -> None:
    """Every run of a recipe that a part judges is at a commit that has the words in its history."""
    found = hypotheses.read(ROOT / "results", path.parent.name)
    assert found is not None
    for part in found.parts:
        if git("cat-file", "-e", f"{part.written}^{{commit}}").returncode:
            pytest.skip("no history here")
        runs = [run for recipe in part.judges for run in path.parent.glob(f"{recipe}/seed-*.run.json")]
        assert len(runs) >= len(part.judges)
        for commit in {json.loads(run.read_bytes())["commit"] for run in runs}:
            assert git("merge-base", "--is-ancestor", part.written, commit).returncode == 0, (part.written, commit)


def test_there_are_predictions_and_their_numbers_are_their_own() -> None:
    assert {path.parent.name for path in FILES} >= {"text", "smollm2", "bb-3layer"}
    for path in FILES:
        found = hypotheses.read(ROOT / "results", path.parent.name)
        assert found is not None
        ids = [one.id for part in found.parts for one in part.hypotheses]
        assert sorted(ids) == list(range(1, len(ids) + 1))
