"""The relation of peak and error: known relations are found, with scipy's numbers, and no more is claimed."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from synthetic_records import Record, diverged, synthetic

from quantbench import figures, relation
from quantbench.relation import relate


def made(
    recipes: int,
    seeds: int = 5,
    slope: float = 0.7,
    within: float | None = None,
    noise: float = 0.1,
    relatives: int = 1,
) -> list[Record]:
    """KL = peak^slope over recipes and peak^within over the seeds of one; `relatives` recipes share a mitigation."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(recipes):
        name = "baseline" if index == 0 else f"recipe-{index}"
        log_peak = generator.uniform(0, 6)
        loss = 3.0 + 0.1 * generator.normal()
        for seed in range(seeds):
            jitter = 0.3 * generator.normal()
            log_kl = slope * log_peak + (slope if within is None else within) * jitter + noise * generator.normal() - 5
            mitigations = () if index == 0 else (f"mitigation-{index // relatives}",)
            records.append(
                synthetic(
                    name,
                    seed,
                    kl=math.exp(log_kl),
                    damage=math.exp(log_kl),
                    peak=math.exp(log_peak + jitter),
                    loss=loss + 0.01 * generator.normal(),
                    mitigations=mitigations,
                )
            )
    return records


def points(records: list[Record]) -> tuple[list[float], list[float], list[float]]:
    found = [relation.point(r, "w8a8-static", "residual-peak") for r in records]
    pairs = [at for at in found if at is not None]
    return (
        [math.log(x) for x, _ in pairs],
        [math.log(y) for _, y in pairs],
        [r["full-precision"]["loss"] for r in records],
    )


def test_estimates_are_scipys() -> None:
    records = made(10)
    x, y, loss = points(records)
    found = relate(records)["text"]["w8a8-static"]["residual-peak"]
    rho = scipy.stats.spearmanr(x, y).statistic
    rho_x, rho_y = scipy.stats.spearmanr(x, loss).statistic, scipy.stats.spearmanr(y, loss).statistic
    partial = (rho - rho_x * rho_y) / math.sqrt((1 - rho_x**2) * (1 - rho_y**2))
    assert found["rho"]["estimate"] == pytest.approx(rho, abs=1e-4)
    assert found["slope"]["estimate"] == pytest.approx(scipy.stats.linregress(x, y).slope, abs=1e-4)
    assert found["given-loss"]["estimate"] == pytest.approx(partial, abs=1e-4)
    assert found["given-rate"] is None  # no record says its rate
    assert (found["n"], found["recipes"], found["clusters"], found["excluded"]) == (50, 10, 10, 0)
    for name in ("rho", "slope", "within-rho", "given-loss"):
        assert found[name]["low"] <= found[name]["estimate"] <= found[name]["high"]
    assert found["slope"]["low"] < 0.7 < found["slope"]["high"]
    assert found["r2"] > 0.9


def test_within_a_recipe_the_relation_may_be_the_other_way_round() -> None:
    """Simpson's paradox, built in: pooled the KL rises with the peak, over the seeds of one recipe it falls."""
    found = relate(made(10, within=-1.0, noise=0.02))["text"]["w8a8-static"]["residual-peak"]
    assert found["slope"]["estimate"] == pytest.approx(0.7, abs=0.1)
    assert found["rho"]["low"] > 0.3
    assert found["within-rho"]["high"] < -0.5


def test_no_relation_is_not_found() -> None:
    found = relate(made(24, slope=0.0, noise=1.0))["text"]["w8a8-static"]["residual-peak"]
    assert found["rho"]["low"] < 0 < found["rho"]["high"]
    assert found["r2"] < 0.1


def test_below_eight_recipes_no_interval_is_given() -> None:
    found = relate(made(7))["text"]["w8a8-static"]["residual-peak"]
    assert found["n"] == 35
    assert found["rho"]["estimate"] > 0.9
    assert found["rho"]["low"] is None
    assert [found[name] for name in ("slope", "within-rho", "given-loss", "given", "won", "r2")] == [None] * 6


def test_relatives_are_one_cluster_and_widen_the_interval() -> None:
    alone = relate(made(17, noise=1.0))["text"]["w8a8-static"]["residual-peak"]
    related = relate(made(17, noise=1.0, relatives=4))["text"]["w8a8-static"]["residual-peak"]
    assert (alone["clusters"], related["clusters"]) == (17, 6)
    assert alone["rho"]["estimate"] == related["rho"]["estimate"]


def test_relatives_are_found_by_way_of_others() -> None:
    """relu and sgd share no mitigation; both are relatives of their combination. Controls are the baseline's."""
    recipes = {
        "baseline": (), "low-lr": ("adamw",), "relu": ("relu-attention",), "relu-sgd": ("relu-attention", "sgd"),
        "sgd": ("sgd",), "muon": ("muon",),
    }  # fmt: skip
    found = relation.clusters([synthetic(name, mitigations=of) for name, of in recipes.items()])
    assert found == ["baseline", "baseline", "relu", "relu", "relu", "muon"]


def rivals(kl_of: Callable[[float, float], float]) -> list[Record]:
    """Runs whose peak and act-max are drawn apart from each other; their log KL is a function of both logarithms."""
    records = made(20, seeds=3)
    generator = np.random.default_rng(7)
    for record in records:
        metrics = record["full-precision"]["metrics"]
        metrics["act-max"]["value"] = math.exp(generator.normal())
        x = math.log(metrics["residual-peak"]["value"]), math.log(metrics["act-max"]["value"])
        record["quantized"]["w8a8-static"]["kl"] = math.exp(kl_of(*x) - 5)
        record["quantized"]["w8a8-static"]["exemption"]["extreme"]["kl"] = math.exp(x[1] - 9)
        record["recipe"]["resolved"]["lr"] = math.exp(x[0])
    return records


def test_of_two_predictors_the_one_that_decides_is_named_and_the_other_adds_nothing() -> None:
    found = relate(rivals(lambda peak, act: act + 0.1 * peak))["text"]["w8a8-static"]
    peak, act = found["residual-peak"], found["act-max"]
    assert relation.winner(found) == "act-max"
    assert act["won"] + peak["won"] == pytest.approx(1, abs=1e-3)
    assert found["bos-attention"]["rho"] is None  # the same in every run
    assert act["won"] > 0.95
    assert act["given"]["residual-peak"]["low"] > 0.7
    # What stays when extremes are exempt goes with act-max by construction, and with the peak not at all.
    assert act["exempt-rho"]["estimate"] == pytest.approx(1.0)
    assert peak["exempt-rho"]["low"] < 0 < peak["exempt-rho"]["high"]
    # The rate is the peak: given it, nothing of the peak is left to be told.
    assert act["given-rate"]["low"] > 0.7
    assert peak["given-rate"] is None


def test_a_partial_correlation_given_another_predictor_is_that_of_the_residuals_of_ranks() -> None:
    records = rivals(lambda peak, act: act + 0.5 * peak)
    found = relate(records)["text"]["w8a8-static"]["residual-peak"]["given"]["act-max"]["estimate"]
    x, y, _ = points(records)
    z = [math.log(r["full-precision"]["metrics"]["act-max"]["value"]) for r in records]
    ranks = [scipy.stats.rankdata(of) for of in (x, y, z)]
    left = [of - np.polyval(np.polyfit(ranks[2], of, 1), ranks[2]) for of in ranks[:2]]
    assert found == pytest.approx(scipy.stats.pearsonr(*left).statistic, abs=1e-4)


def test_within_is_in_standard_deviations_so_that_noisy_recipes_weigh_no_more() -> None:
    """By hand: (1, 3) and (10, 30) are both one below and one above; a recipe of equal values has no deviation."""
    found = relation._within(np.array([1.0, 3.0, 10.0, 30.0, 5.0, 5.0]), ["a", "a", "b", "b", "c", "c"])
    assert found.tolist() == [-1, 1, -1, 1, 0, 0]


def test_a_predictor_below_0_has_a_rank_and_no_logarithm() -> None:
    """An excess kurtosis may be: the run counts for every rho, and not for lines."""
    records = made(9)
    before = relate(records)["text"]["w8a8-static"]["act-max"]
    smallest = min(records, key=lambda r: r["full-precision"]["metrics"]["act-max"]["value"])
    smallest["full-precision"]["metrics"]["act-max"]["value"] = -3.0
    after = relate(records)["text"]["w8a8-static"]["act-max"]
    assert (after["n"], after["rho"]) == (before["n"], before["rho"])
    assert after["slope"] != before["slope"]
    assert after["r2"] is not None


def test_a_post_hoc_recipe_is_held_against_the_line_of_the_others() -> None:
    """KL = e^-5 peak^.7 exactly; rotated by a third of it at a peak of 20."""
    records = made(9, noise=0.0)
    after = [
        synthetic("rotated", s, mitigations=("hadamard",), peak=20.0, kl=math.exp(-5) * 20**0.7 / 3) for s in range(3)
    ]
    peak, line, kl = relation.post_hoc_against([*records, *after], "w8a8-static", "residual-peak")["rotated"]
    assert peak == pytest.approx(20.0)
    assert line == pytest.approx(math.exp(-5) * 20**0.7)
    assert kl == pytest.approx(line / 3)
    assert relation.post_hoc_against([*made(7), *after], "w8a8-static", "residual-peak") == {}


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("bnb-nf4", {"kind": "nf4"}, "weights alone"),
        ("w4a16-rtn", {"sites": ["inputs"], "activations": 16, "range": "static"}, "weights alone"),
        ("llm-int8", {"threshold": 6.0}, "outlier columns in full precision"),
        (
            "w8a8-static",
            {"sites": ["inputs"], "activations": 8, "range": "static"},
            "one range for all tokens, Linear inputs",
        ),
        (
            "w6a6-tensor-residual",
            {"sites": ["inputs", "residual"], "activations": 6, "range": "tensor"},
            "one range for all tokens, residual stream too",
        ),
        (
            "w4a4kv4",
            {"sites": ["keys"], "activations": 4, "range": "token"},
            "a range per token, Linear inputs, 4 bits",
        ),
    ],
)
def test_kinds_of_rounding(name: str, fields: dict[str, Any], kind: str) -> None:
    assert relation.family(name, fields) == kind


def test_what_comes_after_training_is_no_point() -> None:
    records = made(9)
    later = [synthetic(name, s, mitigations=(name,)) for name in ("hadamard", "prefix-kv") for s in range(5)]
    assert relate([*records, *later]) == relate(records)


def test_weights_are_repetitions() -> None:
    """A bootstrap draw computed by weights equals the figure of the sample in which runs really occur repeatedly."""
    generator = np.random.default_rng(1)
    x, y, loss = generator.normal(size=(3, 12)).round(1)  # rounded: ties
    counts = np.repeat([2, 0, 1, 3], 3)
    again = np.repeat(np.arange(12), counts)

    def rho(weights_N: np.ndarray, *both: np.ndarray) -> float:
        w = weights_N[None, :].astype(float)
        a, b = (relation._standard(w, relation._ranks(w, values)) for values in both)
        return float(relation._correlation(a * (w / w.sum()), b)[0])

    assert rho(counts, x, y) == pytest.approx(scipy.stats.spearmanr(x[again], y[again]).statistic)
    assert rho(counts, x, loss) == pytest.approx(scipy.stats.spearmanr(x[again], loss[again]).statistic)
    slopes = [
        relation._slope(w[None, :].astype(float), a, b)[0]
        for w, a, b in ((counts, x, y), (np.ones(len(again)), x[again], y[again]))
    ]
    assert slopes[0] == pytest.approx(slopes[1])
    assert slopes[1] == pytest.approx(scipy.stats.linregress(x[again], y[again]).slope)


def test_what_has_no_logarithm_or_is_stale_or_diverged_is_left_out() -> None:
    records = made(8)
    records[3]["quantized"]["w8a8-static"]["kl"] = 0.0
    records[4]["quantized"]["w8a8-static"]["kl"] = None
    records[5]["full-precision"]["metrics"]["residual-peak"]["value"] = None
    records[6]["data"] = "old"
    found = relate([*records, diverged("sgd")])["text"]["w8a8-static"]
    # All predictors see the same runs, so that their figures can be compared.
    assert {(one["n"], one["excluded"]) for one in found.values()} == {(36, 3)}


def test_constant_figures_and_too_few_runs_are_undefined_without_a_warning() -> None:
    same = [synthetic(f"recipe-{i}", s, mitigations=(f"m-{i}",)) for i in range(9) for s in range(2)]
    found = relate(same)["text"]["w8a8-static"]["residual-peak"]
    assert (found["rho"], found["slope"], found["r2"]) == (None, None, None)
    assert relate(made(1, seeds=2))["text"]["w8a8-static"]["residual-peak"]["rho"] is None
    assert relate([]) == {}
    assert relate([diverged("sgd")]) == {"text": {}}


def test_the_same_records_in_any_order_give_the_same_json() -> None:
    records = made(9)
    assert json.dumps(relate(records), allow_nan=False) == json.dumps(relate(records[::-1]), allow_nan=False)
    tracks = [{**r, "track": {**r["track"], "name": "code"}} for r in made(3)]
    assert list(relate([*records, *tracks])) == ["code", "text"]


# --- pictures ------------------------------------------------------------------------------------------------------


def pictures(records: list[Record]) -> list[bytes | None]:
    found = relate(records)["text"]
    rho = found.get("w8a8-static", {}).get("residual-peak")
    return [
        figures.relation(records, "w8a8-static", rho),
        figures.relations(records, found),
        figures.timeline(records),
    ]


def test_pictures_are_svg_without_date_or_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = made(9, seeds=2)
    drawn = pictures(records)
    for data in drawn:
        assert data is not None
        assert ElementTree.fromstring(data).tag.endswith("svg")
        assert b"<dc:date>" not in data
        assert b"Matplotlib" not in data
    (tmp_path / "matplotlibrc").write_text("font.size: 40\nlines.linewidth: 9\n")
    monkeypatch.chdir(tmp_path)
    assert pictures(records) == drawn


def test_every_recipe_is_named_in_the_pictures_that_name_recipes() -> None:
    records = made(24, seeds=1)
    texts = {f"<!-- {r['recipe']['name']} -->".encode() for r in records}
    for data in pictures(records):
        assert data is not None
        assert {text for text in texts if text not in data} == set()


def test_nothing_to_draw_is_no_picture() -> None:
    assert pictures([diverged("sgd")]) == [None, None, None]
    [one, all_quantizers, course] = pictures([synthetic()])
    assert (one, all_quantizers) == (None, None)
    assert course is not None
