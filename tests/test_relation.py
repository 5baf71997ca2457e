"""The relation of peak and error: known relations are found, with scipy's numbers, and no more is claimed."""

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

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
            mitigations = () if index == 0 else (f"mitigation-{index // relatives}", "sgd-too")
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
    assert found["partial-rho"]["estimate"] == pytest.approx(partial, abs=1e-4)
    assert (found["n"], found["recipes"], found["clusters"], found["excluded"]) == (50, 10, 10, 0)
    for name in ("rho", "slope", "within-rho", "within-slope", "partial-rho"):
        assert found[name]["low"] <= found[name]["estimate"] <= found[name]["high"]
    assert found["slope"]["low"] < 0.7 < found["slope"]["high"]
    assert found["leave-one-recipe-out-r2"] > 0.9


def test_within_a_recipe_the_relation_may_be_the_other_way_round() -> None:
    """Simpson's paradox, built in: the pooled slope is +.7, that of the seeds of one recipe -1."""
    found = relate(made(10, within=-1.0, noise=0.02))["text"]["w8a8-static"]["residual-peak"]
    assert found["slope"]["estimate"] == pytest.approx(0.7, abs=0.1)
    assert found["within-slope"]["estimate"] == pytest.approx(-1.0, abs=0.05)
    assert found["rho"]["low"] > 0.3
    assert found["within-rho"]["high"] < -0.5


def test_no_relation_is_not_found() -> None:
    found = relate(made(24, slope=0.0, noise=1.0))["text"]["w8a8-static"]["residual-peak"]
    assert found["rho"]["low"] < 0 < found["rho"]["high"]
    assert found["leave-one-recipe-out-r2"] < 0.1


def test_below_eight_recipes_no_interval_is_given() -> None:
    found = relate(made(7))["text"]["w8a8-static"]["residual-peak"]
    assert found["n"] == 35
    assert found["rho"]["estimate"] > 0.9
    assert found["rho"]["low"] is None
    assert [found[name] for name in ("slope", "within-rho", "partial-rho", "leave-one-recipe-out-r2")] == [None] * 4


def test_relatives_are_one_cluster_and_widen_the_interval() -> None:
    alone = relate(made(17, noise=1.0))["text"]["w8a8-static"]["residual-peak"]
    related = relate(made(17, noise=1.0, relatives=4))["text"]["w8a8-static"]["residual-peak"]
    assert (alone["clusters"], related["clusters"]) == (17, 6)
    assert alone["rho"]["estimate"] == related["rho"]["estimate"]
    assert relation.cluster(synthetic("relu-attn-sgd", mitigations=("sgd", "relu-attention"))) == "relu-attention"
    assert relation.cluster(synthetic("baseline-low-lr", mitigations=("adamw",))) == "baseline"


def test_what_comes_after_training_is_no_point() -> None:
    records = made(9)
    later = [synthetic(name, s, mitigations=(name,)) for name in ("hadamard", "prefix-kv") for s in range(5)]
    assert relate([*records, *later]) == relate(records)


def test_weights_are_repetitions() -> None:
    """A bootstrap draw computed by weights equals the figure of the sample in which runs really occur repeatedly."""
    generator = np.random.default_rng(1)
    x, y, loss = generator.normal(size=(3, 12)).round(1)  # rounded: ties
    recipes = [f"recipe-{i // 3}" for i in range(12)]
    counts = np.repeat([2, 0, 1, 3], 3)
    weighted = relation._statistics(counts[None, :].astype(float), x, y, loss, recipes)
    again = np.repeat(np.arange(12), counts)
    repeated = relation._statistics(
        np.ones((1, len(again))), x[again], y[again], loss[again], [recipes[i] for i in again]
    )
    assert {k: v[0] for k, v in weighted.items()} == pytest.approx({k: v[0] for k, v in repeated.items()}, abs=1e-12)
    assert weighted["rho"][0] == pytest.approx(scipy.stats.spearmanr(x[again], y[again]).statistic)


def test_what_has_no_logarithm_or_is_stale_or_diverged_is_left_out() -> None:
    records = made(8)
    records[3]["quantized"]["w8a8-static"]["kl"] = 0.0
    records[4]["quantized"]["w8a8-static"]["kl"] = None
    records[5]["full-precision"]["metrics"]["residual-peak"]["value"] = None
    records[6]["data"] = "old"
    found = relate([*records, diverged("sgd")])["text"]["w8a8-static"]
    assert (found["residual-peak"]["n"], found["residual-peak"]["excluded"]) == (36, 3)
    assert found["act-max"]["n"] == 37


def test_constant_figures_and_too_few_runs_are_undefined_without_a_warning() -> None:
    same = [synthetic(f"recipe-{i}", s, mitigations=(f"m-{i}",)) for i in range(9) for s in range(2)]
    found = relate(same)["text"]["w8a8-static"]["residual-peak"]
    assert (found["rho"], found["slope"], found["leave-one-recipe-out-r2"]) == (None, None, None)
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
