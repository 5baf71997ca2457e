"""The learning rate of a recipe on a track: the one with the lowest full-precision loss, never a quantized figure.

Points lie half a decade apart around the baseline's best (around what its YAML says for a recipe with an optimizer of
its own, whose scale is another); while the best is at an edge, the sweep goes on. Every
point is a whole run of the track on a seed outside the track's. What is compared is the training loss over the last
fiftieth of the steps: fresh sequences, the same for every point, and none of the held-out split.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantbench import bench, catalog, sweep
from quantbench.bench import Job
from quantbench.recipe import Recipe, Track
from quantbench.results import sealed
from quantbench.store import Store, atomic_write, digest

SEED = 100  # no track's
FURTHEST = 4  # steps of half a decade from the start


def tune(
    name: str,
    recipe: Recipe,
    baseline_lr: float,
    track_name: str,
    track: Track,
    store: Store,
    workers: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The sweep as a record: every point's loss (None: diverged or failed), and the best learning rate.

    Three points around `baseline_lr`; five around its own where it has another optimizer.
    ValueError for a recipe that trains nothing of its own.
    """
    check(name, recipe, track_name, track)
    other = any("optimizer" in catalog.seams(mitigation) for mitigation in recipe.mitigations)
    start, reach = (recipe.lr.get(track_name, track.lr), 2) if other else (baseline_lr, 1)
    low, high = -reach, reach
    before = partial(sweep.begin, workers=workers, can_set=False)
    losses: dict[int, float | None] = {}
    while True:
        todo = {}
        for index in range(low, high + 1):
            if index not in losses:
                lr = half_decades(start, index)
                todo[lr] = index
        jobs = [Job(f"{name} lr {lr:g}", replace(recipe, lr={track_name: lr}), track_name, track, SEED) for lr in todo]
        for job, found in sweep.each(bench.training, jobs, store, workers, before):
            diverged = isinstance(found, str) or found["reason"] is not None
            losses[todo[job.lr]] = None if diverged else found["final-loss"]
            tell(f"{name} lr {job.lr:g}: " + ("diverged" if diverged else f"loss {found['final-loss']:.4f}"))
        usable = {index: loss for index, loss in losses.items() if loss is not None}
        best = min(usable, key=lambda index: (usable[index], index)) if usable else None
        if best is None or low < best < high or abs(best) == FURTHEST:
            break
        low, high = (low - 1, high) if best == low else (low, high + 1)  # on that side alone
    return {
        "recipe": {"name": name, "mitigations": Job(name, recipe, track_name, track, SEED).resolved["mitigations"]},
        "track": {"name": track_name, "digest": digest(bench.pretraining_part(track))},
        "seed": SEED,
        "points": [[half_decades(start, index), losses[index]] for index in sorted(losses)],
        "best": None if best is None else half_decades(start, best),
        "at-edge": best is not None and not low < best < high,
        "environment": bench.environment(),
    }


def check(name: str, recipe: Recipe, track_name: str, track: Track) -> None:
    """ValueError where there is nothing to tune."""
    if track.pretrained:
        raise ValueError(f"track {track_name} pretrains nothing, so that there is no learning rate to tune")
    if SEED in track.seeds + track.extra_seeds:
        raise ValueError(f"track {track_name}: seed {SEED} is the one that is tuned on: give the track another")
    if recipe.mitigations and len(bench.post_hoc(recipe)) == len(recipe.mitigations):
        raise ValueError(f"{name}: all it changes comes after pretraining; it states the learning rate of the baseline")


def half_decades(start: float, index: int) -> float:
    """start * 10^(index/2) to two significant digits."""
    return float(f"{start * 10 ** (index / 2):.2g}") if index else start


def write(results: Path, record: dict[str, Any]) -> Path:
    """Puts the sweep beside the recipe's records, results/<track>/<recipe>/tune.json."""
    path = results / record["track"]["name"] / record["recipe"]["name"] / "tune.json"
    atomic_write(path, sealed(record | {"source": bench.source()}))
    return path
