"""The answers in words say what the figures say, and nothing that they do not."""

from typing import Any

import pytest
from synthetic_records import Record, synthetic

from quantbench import relation
from quantbench.answer import answers
from quantbench.board import board

KLS = (0.10, 0.12, 0.09, 0.11, 0.10)


def runs(recipe: str, times: float, **changes: Any) -> list[Record]:
    """A run a seed, whose KL, damage and peak are so many times the baseline's."""
    made = [{"kl": kl * times, "damage": kl * times, "peak": 100.0 * times + seed} for seed, kl in enumerate(KLS)]
    return [synthetic(recipe, seed, mitigations=(recipe,), **one | changes) for seed, one in enumerate(made)]


def said(*rows: list[Record]) -> dict[str, str]:
    records = [*runs("baseline", 1.0), *(record for row in rows for record in row)]
    return dict(answers(board(records), relation.relate(records)["text"]))


def test_the_three_questions_are_answered_from_the_figures_of_the_tables() -> None:
    rows = {"gated": 0.25, "sink": 0.5, "like": 1.0, "clipped": 4.0}
    found = said(*(runs(name, times) for name, times in rows.items()), runs("slow", 0.125, loss=3.5))
    assert found["Which recipes lose less?"] == (
        "w8a8-static costs the baseline 0.104 nats per token; 3 of 5 lose less than it: slow (× 0.125), "
        "gated (× 0.250), sink (× 0.500). 1 loses more: clipped (× 4.00). 1 cannot be told from it. "
        "Factors are of the KL; the chance that any of a family is told apart wrongly is at most 5%."
    )
    assert found["Which survive?"] == "Damage surely below 0.01 nats (95%): none."
    assert found["What do they cost?"] == (
        "Of those that lose less, slow learned less than the baseline in full precision; the loss of the others cannot "
        "be told to be higher. "
        "On the Pareto front of loss and damage in 80% of bootstrap draws or more: slow and gated."
    )
    assert found["Is it the peak?"] == (
        "The few extreme tokens carry 0.80 of the baseline's damage (as many random ones: 0.02), "
        "and 0.80 to 0.80 of what is left in those that lose less."
    )


def test_the_relation_is_told_where_it_has_intervals() -> None:
    found = said(*(runs(f"r{n}", 0.5 + n / 8) for n in range(8)))["Is it the peak?"]
    assert found.startswith("KL goes with the residual peak at ρ = ")
    assert " over 45 runs of 9 recipes (within a recipe " in found
    assert "It goes better with" not in found


def test_a_rival_that_the_error_goes_with_better_is_named_with_what_each_adds() -> None:
    records = [*runs("baseline", 1.0), *(r for n in range(8) for r in runs(f"r{n}", 0.5 + n / 8))]
    for index, record in enumerate(records):
        kl = record["quantized"]["w8a8-static"]["kl"]
        record["full-precision"]["metrics"]["act-max"]["value"] = 10 * kl * (1 + 0.01 * (index % 3))
    found = dict(answers(board(records), relation.relate(records)["text"]))["Is it the peak?"]
    assert "It goes better with act-max, the largest input of a Linear: ρ = 1.00 [" in found
    assert "the largest in 1.00 of bootstrap draws; given it, the peak adds " in found


@pytest.mark.parametrize("carried", [None, "undefined"])
def test_what_is_not_known_is_not_said(carried: str | None) -> None:
    records = runs("baseline", 1.0)
    for record in records:
        if carried is None:
            record["quantized"]["w8a8-static"]["exemption"] = None
        else:
            record["quantized"]["w8a8-static"]["damage"] *= (-1) ** record["seed"]
    assert answers(board(records), relation.relate(records)["text"]) == []


def test_none_loses_less() -> None:
    found = said(runs("like", 1.0))
    assert found["Which recipes lose less?"].startswith(
        "w8a8-static costs the baseline 0.104 nats per token; 0 of 1 lose less than it. 1 cannot be"
    )
    assert "What do they cost?" not in found


def test_what_survives_is_below_a_stated_level_with_its_interval() -> None:
    """Means .0052 and .0093; the interval of the second, of .00076 to either side, reaches above .01."""
    found = said(runs("firm", 0.05), runs("nearly", 0.09))
    assert found["Which survive?"] == "Damage surely below 0.01 nats (95%): firm (0.00520)."


def test_the_level_is_the_tracks_where_it_states_one() -> None:
    records = [*runs("baseline", 1.0), *runs("firm", 0.05), *runs("nearly", 0.09)]
    for record in records:
        record["track"]["resolved"]["survives"] = 0.02
    found = dict(answers(board(records), relation.relate(records)["text"]))["Which survive?"]
    assert found == "Damage surely below 0.02 nats (95%): firm (0.00520), nearly (0.00936)."


def test_bos_is_named_where_the_extreme_tokens_are_bos_alone() -> None:
    records = runs("baseline", 1.0)
    for record in records:
        record["track"]["resolved"]["evaluate"] = {"sequences": 512}
    found = dict(answers(board(records), relation.relate(records)["text"]))
    assert found["Is it the peak?"].startswith("BOS alone carries 0.80 ")
    records[0]["quantized"]["w8a8-static"]["exemption"]["tokens"] += 1
    found = dict(answers(board(records), relation.relate(records)["text"]))
    assert found["Is it the peak?"].startswith("The few extreme tokens carry 0.80 ")


def test_where_all_that_lose_less_learned_less_there_are_no_others() -> None:
    found = said(runs("slow", 0.125, loss=3.5))["What do they cost?"]
    assert found == (
        "Of those that lose less, slow learned less than the baseline in full precision. "
        "On the Pareto front of loss and damage in 80% of bootstrap draws or more: slow."
    )
