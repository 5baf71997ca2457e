"""Learning rates: the sweep's points, its rule, and that every recipe states what its committed sweep found."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantbench.recipe import load_recipe, load_track
from quantbench.results import load
from quantbench.store import Store
from quantbench.tune import SEED, half_decades, tune, write

ROOT = Path(__file__).resolve().parent.parent


def test_points_lie_half_a_decade_apart_to_two_digits() -> None:
    assert [half_decades(4e-3, i) for i in (-2, -1, 0, 1, 2)] == [4e-4, 1.3e-3, 4e-3, 1.3e-2, 4e-2]
    assert half_decades(0.3, 1) == 0.95


def test_a_sweep_takes_the_lowest_training_loss_and_goes_on_at_an_edge(tmp_path: Path) -> None:
    """With 8 steps from a far too low rate, the best of the first three is the highest: the sweep must go on."""
    _, track = load_track("smoke", ROOT)
    track = replace(track, steps=8, warmup=0, timeline=0, lr=1e-6, weight_decay=0.0)
    name, recipe = load_recipe("relu-attn", ROOT)
    said: list[str] = []
    record = tune(name, recipe, track.lr, "smoke", track, Store(tmp_path), workers=2, tell=said.append)
    losses = dict(record["points"])
    assert record["best"] == min(losses, key=lambda lr: losses[lr])
    assert record["at-edge"]
    assert len(losses) == 6  # -1 to 4
    assert len(said) == 6
    assert losses[1e-6] > losses[1e-4]
    path = write(tmp_path / "results", record)
    assert path == tmp_path / "results" / "smoke" / "relu-attn" / "tune.json"
    assert load(path)["best"] == record["best"]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*/tune.json")), ids=lambda p: p.parent.name)
def test_a_recipe_states_the_rate_its_sweep_found(path: Path) -> None:
    record = load(path)
    track_name, name = path.parent.parent.name, path.parent.name
    recipe, track = load_recipe(name, ROOT)[1], load_track(track_name, ROOT)[1]
    assert recipe.lr.get(track_name, track.lr) == record["best"]
    assert record["seed"] == SEED
    assert SEED not in track.seeds
    finite = [(loss, lr) for lr, loss in record["points"] if loss is not None]
    assert record["best"] == min(finite)[1]
    assert not record["at-edge"]
