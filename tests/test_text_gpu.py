"""The track for one GPU keeps what it promises: its size, its tokens, its order, and what it can do without."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny import RECIPES, ROOT

from quantbench.grid import cells
from quantbench.pretrain import build
from quantbench.recipe import load_track
from quantbench.strict import dump
from tests.perf.recipes import GPU

TRACK = load_track("text-gpu", ROOT)[1]
TEXT = load_track("text", ROOT)[1]


def test_it_trains_on_at_least_a_hundred_million_tokens() -> None:
    assert TRACK.steps >= 1600
    assert TRACK.batch * TRACK.length >= 64_000
    assert TRACK.precision == "bf16"
    assert TRACK.evaluate.sequences * TRACK.length >= 65_000


@pytest.mark.parametrize("name", GPU)
def test_every_recipe_has_20_to_60_million_parameters(name: str) -> None:
    data = SimpleNamespace(vocab=TRACK.task.vocab, bos=0)  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = build(RECIPES[name], TRACK, data)  # type: ignore[arg-type]
    assert 20e6 < sum(parameter.numel() for parameter in model.parameters()) < 60e6


def test_its_text_holds_that_of_the_track_text() -> None:
    here, there = TRACK.task, TEXT.task
    assert set(there.packages) <= set(here.packages)  # type: ignore[attr-defined]
    assert here.domain == "code"  # type: ignore[attr-defined] - in which the docstrings are


def test_it_has_the_whole_map_and_weights_of_4_bits() -> None:
    here, there = (dump(track)["quantizers"] for track in (TRACK, TEXT))
    assert cells(here) == cells(there)
    assert {"w4a16-rtn", "w4a16-gptq", "w4a16-awq"} <= here.keys() <= there.keys()


def test_it_needs_no_package_that_a_bare_gpu_machine_lacks() -> None:
    assert not [name for name in TRACK.quantizers if name.startswith(("bnb", "torchao", "w4a16-hqq"))]
    assert TRACK.evaluate.lm_eval_items == 0


def test_make_gpu_runs_the_recipes_whose_steps_are_timed() -> None:
    (listed,) = re.findall(r"^GPU +:= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tuple(listed.split()) == GPU
    assert set(GPU) <= RECIPES.keys()
