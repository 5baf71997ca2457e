"""The claims: rules by hand, figures by hand from imagined records, and a page that is rendered from records alone."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import Record, synthetic

from quantbench import claims, figures, leaderboard, signatures
from quantbench.claims import CLAIMS, FAILS, HOLDS, OPEN, Evidence, Rule, above, below, examine, rows, table
from quantbench.cli import main
from quantbench.results import write

ROOT = Path(__file__).parents[1]
STEPS = (0, 10, 100, 300, 1000, 2000, 3000)
TRACK = "bb-3layer"


def entry(step: int, **changes: Any) -> Record:
    """What a watched timeline says at a step: a sink in layer 1 from step 100 on, a peak after block 0 that grows."""
    late = step >= 100
    figures: Record = {
        "task": {
            "loss": 4.0 - math.log10(1 + step),
            "excess-risk-trigger": 1.0 / (1 + step),
            "excess-risk-bigram": 0.01,
        },
        "bos-attention": [0.1, 0.9 if late else 0.1, None],
        "trigger-attention": [0.1, 0.2 if late else 0.1, None],
        "delta-logit": [0.0, 1.0 + 0.5 * math.log(max(step, 1)), None],
        "value-bos": [1.0, 0.1 if late else 1.0, None],
        "value-others": [1.0, 1.0, None],
        "value-drain": [1.0, 0.1 if late else 1.0, None],
        "residual-bos": [10.0 + step / 100, 10.0, 10.0],
        "residual-others": [10.0, 10.0, 10.0],
        "residual-median": [10.0, 10.0, 10.0],
        "residual-largest": [12.0, 12.0, 12.0],
    }
    return figures | changes


def imagined(recipe: str = "baseline", seed: int = 0, track: str = TRACK, **changes: Any) -> Record:
    """A finished run on the task of the paper; `changes` go into every entry of its timeline."""
    record = synthetic(recipe, seed, track=track, peak=100.0 + seed, kl=0.1 + 0.01 * seed)
    resolved = record["track"]["resolved"]
    resolved |= {"task": {"bigram-backcopy": {"triggers": 3}}, "batch": 32, "length": 32, "steps": 3000}
    resolved["model"] = {"layers": 3, "width": 64}
    record["recipe"]["resolved"]["lr"] = 0.003
    timeline = record["training"]["timeline"]
    timeline[:] = [{**timeline[0], "step": step, "watched": entry(step, **changes)} for step in STEPS]
    last = timeline[-1]["watched"]
    peaks = [a / b for a, b in zip(last["residual-bos"], last["residual-median"], strict=True)]
    extra = {"bos": max(peaks), **{f"bos.{layer}": x for layer, x in enumerate(peaks)}}
    extra |= {f"excess.{n}": last["residual-bos"][n] - last["residual-others"][n] for n in range(3)}
    record["full-precision"]["metrics"]["residual-peak"]["extra"] = extra
    record["full-precision"]["task"] = {"excess-risk-trigger": 0.001, "excess-risk-bigram": 0.01}
    return record


def probed(recipe: str = "baseline", seed: int = 0, **after: Any) -> Record:
    """A record of interventions on such a run: `after` is what block 0 and the peak leave of the sink."""
    head = {
        k: v for k, v in imagined(recipe, seed).items() if k not in ("cost", "training", "full-precision", "quantized")
    }
    untouched = {
        "bos-attention.1": 0.8, "value-drain.1": 0.1, "delta-logit.1": 10.0,
        "excess-risk-trigger": 0.001, "excess-risk-bigram": 0.01,
        **{f"residual-bos.{n}": x for n, x in enumerate((40.0, 30.0, 12.0))},
        **{f"residual-median.{n}": 10.0 for n in range(3)},
    }  # fmt: skip
    gone = {"residual-bos.0": -30.0, "residual-bos.1": -20.0, "residual-bos.2": -2.0, "bos-attention.1": -0.6,
            "value-drain.1": 0.9, "delta-logit.1": -9.0, **{f"residual-median.{n}": 0.0 for n in range(3)}}  # fmt: skip
    changes = {
        "block.0": gone,
        "peak.all": gone | {"bos-attention.1": -0.04, "value-drain.1": 0.0},
        "bos.1": {"excess-risk-trigger": 2.0, "excess-risk-bigram": 0.001},
    } | after

    def spread(found: dict[str, float]) -> Record:
        return {name: [x, x - 0.01, x + 0.01] for name, x in found.items()}

    return {**head, "sequences": 128, "untouched": spread(untouched),
            "interventions": {name: spread(found) for name, found in changes.items()}}  # fmt: skip


def known(*records: Record, probes: tuple[Record, ...] = ()) -> Evidence:
    runs: dict[str, dict[int, Record]] = {}
    for record in records:
        runs.setdefault(record["recipe"]["name"], {})[record["seed"]] = record
    found: dict[str, dict[int, Record]] = {}
    for record in probes:
        found.setdefault(record["recipe"]["name"], {})[record["seed"]] = record
    return Evidence(TRACK, runs, found)


def by_name(evidence: Evidence) -> dict[str, claims.Row]:
    return {row.name: row for row in rows(evidence)}


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "verdict"),
    [
        (above(0.5), [0.8, 0.82, 0.81], HOLDS),
        (above(0.5), [0.1, 0.12, 0.11], FAILS),
        (above(0.5), [0.1, 0.9, 0.6], OPEN),
        (below(0.5), [0.1, 0.12, 0.11], HOLDS),
        (below(0.5), [0.8, 0.82, 0.81], FAILS),
        (Rule(0.7, 1.3), [1.0, 1.02, 0.98], HOLDS),
        (Rule(0.7, 1.3), [2.0, 2.02, 1.98], FAILS),
        (Rule(0.7, 1.3), [1.28, 1.3, 1.26], OPEN),
        (above(0.5), [0.8], f"{HOLDS} (one seed)"),
        (above(0.5), [0.2], f"{FAILS} (one seed)"),
    ],
)
def test_a_verdict_is_that_of_the_whole_interval(rule: Rule, values: list[float], verdict: str) -> None:
    assert rule.judge(values) == verdict


def test_a_rule_reads_as_it_judges() -> None:
    assert [str(rule) for rule in (above(0.5), below(0.05), Rule(0.7, 1.3))] == [
        "above 0.500",
        "below 0.0500",
        "0.700 to 1.30",
    ]


def test_every_claim_has_a_name_of_its_own_and_says_what_was_published() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.published and claim.text for claim in CLAIMS)
    assert not [claim.text for claim in CLAIMS if claim.text.startswith("...")]


# --- figures by hand -------------------------------------------------------------------------------------------------


def test_the_signatures_of_a_run_by_hand() -> None:
    run = imagined()
    assert signatures.sink(run) == 0.9
    assert signatures.drain(run) == 0.1
    assert signatures.peak(run) == signatures.peak_at_first(run) == pytest.approx(4.0)
    assert signatures.deep_peak(run) == pytest.approx(1.0)
    assert signatures.dormancy(run) == pytest.approx(0.7)
    assert signatures.growth(run, 0) == pytest.approx(10.0)  # a hundredth a step
    assert signatures.exponent(run) == pytest.approx(1.0)
    assert signatures.straightness(run) == pytest.approx(1.0)
    assert signatures.logit_slope(run) == pytest.approx(0.5)


def test_the_order_of_the_signatures_by_hand() -> None:
    """The sink is half there between 10 and 100; the peak, linear, at half of 3,000, interpolated in log(1 + step)."""
    run = imagined()
    sink = math.expm1((math.log1p(10) + math.log1p(100)) / 2)
    peak = math.expm1((math.log1p(1000) + math.log1p(2000)) / 2)
    assert signatures.peak_after_sink(run) == pytest.approx(math.log10(peak / sink))
    assert signatures.drain_after_sink(run) == pytest.approx(0.0)
    flat = imagined(**{"residual-bos": [10.0] * 3})
    assert signatures.peak_after_sink(flat) is None  # what is not there comes never
    assert signatures.exponent(flat) is None


def test_equal_loss_is_looked_up_in_the_course_of_the_baseline() -> None:
    """The run ends at the loss that the baseline has at step 100, whose peak is 1.1 there."""
    task = {"loss": 4.0 - math.log10(101), "excess-risk-trigger": 0.1, "excess-risk-bigram": 0.01}
    run = imagined("sgd", task=task, **{"residual-bos": [22.0, 10.0, 10.0]})
    assert signatures.peak_at_equal_loss(run, imagined()) == pytest.approx(2.0)
    ahead = imagined("sgd", task=task | {"loss": -5.0}, **{"residual-bos": [22.0, 10.0, 10.0]})
    assert signatures.peak_at_equal_loss(ahead, imagined()) == pytest.approx(2.2 / 4.0)


def test_growth_is_compared_at_the_peak_of_the_baseline() -> None:
    still = imagined("sgd", **{"residual-bos": [10.0, 10.0, 10.0]})
    assert signatures.relative_growth(still, imagined()) == pytest.approx(0.0)
    assert signatures.relative_growth(imagined(), still) is None


def test_what_goes_with_an_intervention_by_hand() -> None:
    record = probed()
    assert signatures.sink_that_goes("block.0")(record) == pytest.approx(0.75)
    assert signatures.drain_that_goes("block.0")(record) == pytest.approx(1.0)
    assert signatures.logit_that_goes("block.0")(record) == pytest.approx(0.9)
    assert signatures.peak_that_goes("block.0")(record) == pytest.approx(1.0)
    assert signatures.sink_that_goes("peak.all")(record) == pytest.approx(0.05)
    assert signatures.drain_that_goes("peak.all")(record) == pytest.approx(0.0)
    assert signatures.moving_costs("excess-risk-trigger")(record) == 2.0
    assert signatures.sink_that_goes("block.1")(record) is None  # no layer behind it looks at BOS


def test_structures_are_compared_seed_by_seed() -> None:
    base = {seed: imagined(seed=seed) for seed in (0, 1)}
    other = {0: imagined(track="bb-2tf", **{"residual-bos": [13.0, 10.0, 10.0]})}
    evidence = Evidence(TRACK, {"baseline": base}, {}, {"bb-2tf": {"baseline": other}})
    assert evidence.structure("bb-2tf", signatures.excess) == {0: pytest.approx(0.1)}
    assert evidence.structure("bb-2tf-mlp", signatures.excess) == {}


@pytest.mark.parametrize("changed", [{"steps": 10_000}, {"model": {"layers": 3, "width": 256}}])
def test_structures_of_another_budget_are_not_compared(changed: dict[str, Any]) -> None:
    """`bb-paper-3layer` has ten times the steps of the structures at CPU size."""
    base, other = imagined(), imagined(track="bb-2tf")
    base["track"]["resolved"] |= changed
    evidence = Evidence(TRACK, {"baseline": {0: base}}, {}, {"bb-2tf": {"baseline": {0: other}}})
    assert evidence.structure("bb-2tf", signatures.excess) == {}


def test_a_structure_is_not_held_against_a_structure() -> None:
    base, other = imagined(), imagined(track="bb-2tf")
    base["track"]["resolved"]["model"]["sublayers"] = ["mlp", "block", "mlp"]
    evidence = Evidence(TRACK, {"baseline": {0: base}}, {}, {"bb-2tf": {"baseline": {0: other}}})
    assert evidence.structure("bb-2tf", signatures.excess) == {}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_verdicts_of_imagined_runs() -> None:
    runs = [imagined(recipe, seed) for recipe in ("baseline",) for seed in range(3)]
    runs += [imagined("sgd", seed, **{"residual-bos": [10.0] * 3}) for seed in range(3)]
    deep = {"residual-bos": [10.0, 10.0, 500.0], "bos-attention": [0.0, 0.1, None], "value-drain": [1.0, 1.0, None]}
    runs += [imagined("relu-attn", seed, **deep) for seed in range(3)]
    found = by_name(known(*runs, probes=tuple(probed(seed=seed) for seed in range(3))))
    expected = {
        "learned": HOLDS, "sink": HOLDS, "drain": HOLDS, "peak": HOLDS, "peak-later": HOLDS, "dormant": HOLDS,
        "drain-later": OPEN, "block-0-peak": HOLDS, "block-0-sink": HOLDS, "block-0-drain": HOLDS,
        "peak-alone-sink": FAILS, "peak-alone-drain": FAILS, "moved-triggers": HOLDS, "moved-bigrams": HOLDS,
        "relu-sink": HOLDS, "relu-peak-0": HOLDS, "relu-peak-deep": FAILS, "relu-drain": HOLDS,
        "sgd-sink": HOLDS, "sgd-peak": HOLDS, "sgd-drain": HOLDS, "growth": HOLDS, "linear": HOLDS, "flat": HOLDS,
        "logit": HOLDS, "together-sgd": FAILS, "together-relu-attn": FAILS,
    }  # fmt: skip
    assert {name: found[name].verdict for name in expected} == expected
    assert "no-peak" not in found  # of one layer
    assert found["together-sgd"].measured.startswith("sink there (0.900 ")
    assert found["sink"].measured == "0.900 [0.900, 0.900], 3 seeds"


def test_a_lever_cannot_part_what_the_baseline_has_not() -> None:
    """In one layer there is no peak to begin with: that it is gone is no doing of SGD's."""
    flat = {"residual-bos": [10.0] * 3}
    runs = [imagined(recipe, seed, **flat) for recipe in ("baseline", "sgd") for seed in range(3)]
    assert "together-sgd" not in by_name(known(*runs))


def test_what_nobody_has_run_is_no_row() -> None:
    found = by_name(known(imagined()))
    assert not [name for name in found if name.startswith(("sgd", "relu", "block-0", "together"))]
    assert found["sink"].verdict == f"{HOLDS} (one seed)"
    assert rows(known()) == []


def test_a_run_without_a_watched_timeline_answers_little() -> None:
    plain = synthetic()
    plain["full-precision"]["metrics"]["residual-peak"]["extra"] = {"bos": 3.0, "bos.0": 3.0}
    assert [row.name for row in rows(known(plain))] == ["peak"]


# --- the page and the verb --------------------------------------------------------------------------------------------


def results(folder: Path) -> Path:
    for seed in range(2):
        write(folder, imagined(seed=seed), {})
        write(folder, imagined("sgd", seed, **{"residual-bos": [10.0] * 3}), {})
        write(folder, probed(seed=seed), {})
    return folder


def test_the_page_is_rendered_from_records_and_goes_with_them(tmp_path: Path) -> None:
    assert tmp_path / "claims.md" not in leaderboard.render(tmp_path)
    leaderboard.write(results(tmp_path))
    page = (tmp_path / "claims.md").read_text()
    assert page.count("\n| ") > 30
    assert "| Softmax and Adam form a sink | .811 after 10k steps (1 layer) | above 0.500 | 0.900" in page
    assert "3 layers, width 64, batch 32, 32 tokens, 3,000 steps. Learning rates: baseline 0.003, sgd 0.003." in page
    assert f"]({TRACK}/dynamics.svg)" in page
    assert (tmp_path / TRACK / "dynamics.svg").read_bytes().startswith(b"<?xml")
    assert leaderboard.write(tmp_path) == []  # the same records, the same bytes
    for path in tmp_path.glob("*/*/*.json"):
        path.unlink()
    leaderboard.write(tmp_path)
    assert not (tmp_path / "claims.md").exists()
    assert not (tmp_path / TRACK / "dynamics.svg").exists()


def test_interventions_on_another_model_than_the_tables_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, imagined(), {})
    record = probed()
    record["recipe"]["digest"] = "another"
    write(tmp_path, record, {})
    assert not [row for row in examine(tmp_path)[TRACK] if row.name.startswith("block-0")]


def test_the_picture_needs_a_watched_timeline() -> None:
    assert figures.dynamics([synthetic()]) is None
    drawn = figures.dynamics([imagined(), imagined("sgd")])
    assert drawn is not None
    for words in (b"excess risk, triggers", b"delta logit", b"residual norm after block 2"):
        assert words in drawn or re.sub(rb"\s", b"", words) in drawn or b"<!-- " + words in drawn


def test_the_verb_prints_a_table_or_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    results(tmp_path)
    assert main(["claims", "--results", str(tmp_path), "--track", TRACK]) == 0
    assert f"claims of arXiv:2410.13835 on {TRACK}" in capsys.readouterr().out
    assert main(["claims", "--results", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {TRACK, "theory"}
    sink = next(row for row in found[TRACK] if row["name"] == "sink")
    assert (sink["seeds"], sink["verdict"]) == ({"0": 0.9, "1": 0.9}, HOLDS)
    assert all(row["verdict"] == HOLDS for row in found["theory"])
    assert main(["claims", "--results", str(tmp_path), "--track", "smoke"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no records of track smoke that answer a claim" in err
    assert "run `quantbench bench baseline sgd relu-attn --track smoke`" in err


def test_seeds_that_obey_are_counted_where_an_interval_over_powers_of_ten_hides_them() -> None:
    rule, values = below(1.5), [1.6, 86.0, 100.0, 336.0, 719.0]
    assert rule.judge(values) == OPEN
    assert rule.obeyed(values) == 0
    assert rule.obeyed([1.0, *values]) == 1
    found = {line[0]: line[4] for line in table(rows(known(imagined(), imagined(seed=1))))[1]}
    assert found["Softmax and Adam form a sink"] == "2 of 2"


def test_the_rate_of_a_control_is_what_it_was_trained_at(tmp_path: Path) -> None:
    control = imagined("baseline-low-lr")
    control["recipe"]["resolved"]["mitigations"] = {"adamw": {"lr-scale": 0.5}}
    for record in (imagined(), control):
        write(tmp_path, record, {})
    leaderboard.write(tmp_path)
    assert "Learning rates: baseline 0.003, baseline-low-lr 0.0015." in (tmp_path / "claims.md").read_text()


def test_a_table_has_a_cell_for_every_column() -> None:
    header, lines = table(rows(known(imagined())) + claims.theory_rows())
    assert {len(line) for line in lines} == {len(header)}
    assert all(cell for line in lines for cell in line)
