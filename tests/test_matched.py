"""A recipe against the baseline at its own rate, and at its loss: by hand, on curves of few points."""

import math
from typing import Any

import pytest
from synthetic_records import Record, synthetic

from quantbench import tables
from quantbench.board import board
from quantbench.matched import matched, rate_of

Q = "w8a8-static"


def runs(name: str, lr: float, kl: float, loss: float, seeds: int = 4, **mitigations: dict[str, Any]) -> list[Record]:
    """Runs whose log KL and loss scatter a little around those given, alike in every recipe."""
    found = []
    for seed in range(seeds):
        wobble = 0.01 * (seed - (seeds - 1) / 2)
        record = synthetic(name, seed, kl=kl * math.exp(wobble), damage=kl, loss=loss + wobble / 10)
        record["recipe"]["resolved"] = {"lr": lr, "mitigations": mitigations}
        found.append(record)
    return found


# log KL and loss are straight in the log of the rate: KL 8, 4, 2, 1 and loss 3.3, 3.2, 3.1, 3.2 at rates 1, 2, 4, 8 e-3
CURVE = [
    *runs("low", 1e-3, 8.0, 3.3), *runs("baseline", 4e-3, 2.0, 3.1), *runs("high", 8e-3, 1.0, 3.2),
    *runs("middle", 4e-3, 4.0, 3.2, **{"adamw": {"lr-scale": 0.5, "shrink-scale": 1.0}}),
]  # fmt: skip


def test_the_rate_of_a_control_is_what_its_steps_are_scaled_to() -> None:
    assert {rate_of(r) for r in CURVE} == {1e-3, 2e-3, 4e-3, 8e-3}
    assert rate_of(runs("wd0", 1e-3, 1.0, 3.0, **{"adamw": {"lr-scale": 1.0, "shrink-scale": 0.0}})[0]) is None
    assert rate_of(runs("gate", 1e-3, 1.0, 3.0, **{"gated-attention": {}})[0]) is None


@pytest.mark.parametrize(
    ("lr", "loss", "at_rate", "at_loss"),
    [
        (4e-3, 3.15, 1 / 2.0, 1 / math.sqrt(2 * 4)),  # at the rate of the lowest loss, the lower rates are looked at
        (1e-3, 3.25, 1 / 8.0, 1 / math.sqrt(8 * 4)),  # half-way between 3.3 and 3.2
        (2e-3 * math.sqrt(2), 3.15, 1 / math.sqrt(4 * 2), 1 / math.sqrt(4 * 2)),
        (8e-3, 3.15, 1 / 1.0, 1 / math.sqrt(2 * 1)),  # on the other side of the best
        (8e-3, 3.25, 1 / 1.0, None),  # which does not go on so far
        (1e-3, 3.05, 1 / 8.0, None),  # better than the baseline is anywhere
        (0.92e-3, 3.25, 1 / 8.0, 1 / math.sqrt(8 * 4)),  # near enough to 1e-3
        (0.5e-3, 3.25, None, 1 / math.sqrt(8 * 4)),
    ],
)
def test_a_recipe_is_held_against_the_curve(
    lr: float, loss: float, at_rate: float | None, at_loss: float | None
) -> None:
    found = matched(runs("gate", lr, 1.0, loss, **{"gated-attention": {}}), CURVE, Q)
    assert found is not None
    for interval, expected in ((found.at_rate, at_rate), (found.at_loss, at_loss)):
        assert (interval is None) == (expected is None)
        if interval is not None and expected is not None:
            assert interval.mean == pytest.approx(expected, rel=0.02)
            assert interval.low < interval.mean < interval.high


def test_a_loss_at_the_very_end_of_the_curve_is_not_surely_reached() -> None:
    """Half of the draws lie beyond it."""
    found = matched(runs("gate", 1e-3, 1.0, 3.3, **{"gated-attention": {}}), CURVE, Q)
    assert found is not None
    assert found.at_loss is None


def test_another_optimizers_rate_is_not_compared() -> None:
    found = matched(runs("sgd", 4e-3, 1.0, 3.25, **{"sgd": {}}), CURVE, Q)
    assert found is not None
    assert found.at_rate is None
    assert found.at_loss is not None


def test_without_a_curve_there_is_nothing_to_hold_it_against() -> None:
    gate = runs("gate", 4e-3, 1.0, 3.1, **{"gated-attention": {}})
    assert matched(gate, [r for r in CURVE if r["recipe"]["name"] == "baseline"], Q) is None
    assert "at its rate" not in tables.main_table(board([*runs("baseline", 4e-3, 2.0, 3.1), *gate]))[0]


def test_the_table_shows_both() -> None:
    gate = runs("gate", 1e-3, 1.0, 3.05, **{"gated-attention": {}})
    header, cells = tables.main_table(board([*CURVE, *gate]))
    line = {row[header.index("recipe")]: dict(zip(header, row, strict=True)) for row in cells}
    assert line["gate"]["at its rate"].startswith("0.125 [0.12")
    assert line["gate"]["at its loss"] == "not reachable"
    assert (line["baseline"]["at its rate"], line["baseline"]["at its loss"]) == ("", "")
