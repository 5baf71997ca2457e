"""A training step of every recipe against the baseline's, on the track `text`, on one thread.

Recipe and baseline take turns, two by two, so that a machine that is slower for a while is slower for both; that the
baseline meets itself shows what noise is left. Recipes that come after training are left out. On CUDA it is the track
`text-gpu`, and the recipes that `make gpu` runs on it.
"""

from quantbench.bench import post_hoc
from quantbench.face import root
from quantbench.pretrain import steady_memory
from quantbench.recipe import available, load_recipe
from tests.perf.contest import Row, contest, threads
from tests.perf.training import opened, our_loop

BASELINE = "baseline"
GPU = (BASELINE, "relu-attn", "sgd", "gated-attn", "softmax1", "sink-logit", "softpick", "muon", "osp")
ROUNDS = {"cpu": 15, "cuda": 5}  # of about 0.15 s for each of the two


def rows(device: str) -> list[Row]:
    steady_memory()
    name, track, data = opened(device)
    case = f"{name}: {track.batch} x {track.length} tokens, {track.precision}"
    found = []
    with threads(1):
        base = our_loop(BASELINE, track, data, device)
        for recipe in GPU if device == "cuda" else trained():
            what = f"{recipe}, again" if recipe == BASELINE else recipe
            pair = {BASELINE: base, what: our_loop(recipe, track, data, device)}
            rounds, table = ROUNDS[device], "Training step of each recipe"
            found += contest(table, case, pair, BASELINE, device=device, rounds=rounds)[1:]
    return found


def trained() -> list[str]:
    """The baseline, and the recipes that change pretraining, by name."""
    recipes = {name: load_recipe(name, root())[1] for name in available(root() / "recipes")}
    changing = [name for name, recipe in recipes.items() if recipe.mitigations.keys() - set(post_hoc(recipe))]
    return [BASELINE, *changing]
