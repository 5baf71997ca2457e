"""How the residual peak relates to quantization error: log KL on the log of a predictor, per track and quantizer.

    log KL(full || quantized) = slope * log(predictor) + constant

A point is a finished run (recipe, seed) of its own pretraining: what comes after training has the figures of the
checkpoint that it shares, and asks another question. Pooled over recipes, the relation mixes what the recipes change
otherwise; *within* recipes (means of the recipe removed) only seeds differ; *partial* is given the full-precision loss.
Rank correlations are Spearman's, slopes least squares. Runs are no independent evidence: recipes that share a
mitigation are relatives, so that intervals are percentiles of a bootstrap over clusters of relatives (2,000 draws
from a fixed generator, computed as weights). R2 is of predicting a whole recipe from a line through the others,
against the mean of the others. Below 8 recipes only rho and n are given: an interval would pretend.

Shapes: N runs, B bootstrap draws, C clusters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quantbench.catalog import POST_HOC
from quantbench.results import BASELINE, Record, comparable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PREDICTORS = ("residual-peak", "act-max")
# Rivals of the two, each with a literature that has it predict the error.
RIVALS = ("inf-norm", "kurtosis-he", "kurtosis-osp", "kurtosis-qualcomm", "mmr", "bos-attention")
FEWEST_RECIPES = 8  # for intervals, slopes and R2
DRAWS = 2000


def relate(records: list[Record]) -> dict[str, Any]:
    """{track: {quantizer: {predictor: figures}}}, fit for JSON; undefined figures are None.

    Figures: n, recipes, clusters, excluded (runs whose KL or predictor is not above 0), rho, and, None for RIVALS,
    slope, within-rho, within-slope, partial-rho (each {estimate, low, high}) and leave-one-recipe-out-r2.
    """
    tracks = sorted({r["track"]["name"] for r in records})
    return {track: _track([r for r in records if r["track"]["name"] == track]) for track in tracks}


def _track(records: list[Record]) -> dict[str, Any]:
    runs = [r for r in finished(records) if not post_hoc(r)]
    measured = {name for r in runs for name in r["full-precision"]["metrics"]}
    predictors = [*PREDICTORS, *(name for name in RIVALS if name in measured)]
    return {
        quantizer: {predictor: _figures(runs, quantizer, predictor) for predictor in predictors}
        for quantizer in sorted({name for r in runs for name in r["quantized"]})
    }


def finished(records: list[Record]) -> list[Record]:
    """The finished runs of one track that may be pooled."""
    return [r for r in comparable(records)[0] if r["status"] == "finished"]


def post_hoc(record: Record) -> bool:
    """Whether the run shares the checkpoint of another recipe."""
    return any(name in POST_HOC for name in record["recipe"]["resolved"].get("mitigations") or {})


def point(record: Record, quantizer: str, predictor: str) -> tuple[float, float] | None:
    """(predictor, KL) of a run; None where one of them is undefined or has no logarithm."""
    x = record["full-precision"]["metrics"].get(predictor, {}).get("value")
    y = record["quantized"].get(quantizer, {}).get("kl")
    return (x, y) if x is not None and y is not None and x > 0 and y > 0 else None


def cluster(record: Record) -> str:
    """The mitigation by which recipes are relatives: the first of its names (records sort them), or the baseline.

    Controls are of the baseline's family.
    """
    named = set(record["recipe"]["resolved"].get("mitigations") or {}) - {"adamw"}
    return min(named, default=BASELINE)


def _figures(runs: list[Record], quantizer: str, predictor: str) -> dict[str, Any]:
    import numpy as np

    points = [(r, at) for r in runs if quantizer in r["quantized"] and (at := point(r, quantizer, predictor))]
    recipes = [r["recipe"]["name"] for r, _ in points]
    clusters = [cluster(r) for r, _ in points]
    figures: dict[str, Any] = {
        "n": len(points),
        "recipes": len(set(recipes)),
        "clusters": len(set(clusters)),
        "excluded": sum(quantizer in r["quantized"] for r in runs) - len(points),
    }
    every = ("rho", "slope", "within-rho", "within-slope", "partial-rho")
    names = every if predictor in PREDICTORS else every[:1]
    figures |= dict.fromkeys((*every, "leave-one-recipe-out-r2"))
    if len(points) < 3:
        return figures
    x_N, y_N = (np.log([at[axis] for _, at in points]) for axis in (0, 1))
    loss_N = np.array([r["full-precision"]["loss"] for r, _ in points])
    enough = figures["recipes"] >= FEWEST_RECIPES
    compute = _statistics if predictor in PREDICTORS else _rho_alone
    estimates = compute(np.ones((1, len(points))), x_N, y_N, loss_N, recipes)
    drawn = compute(_draws(clusters), x_N, y_N, loss_N, recipes) if enough else {}
    for name in names if enough else ("rho",):
        estimate = float(estimates[name][0])
        if math.isfinite(estimate):
            low, high = _limits(drawn[name]) if enough else (None, None)
            figures[name] = {"estimate": round(estimate, 4), "low": low, "high": high}
    if enough and predictor in PREDICTORS:
        figures["leave-one-recipe-out-r2"] = _leave_one_recipe_out(x_N, y_N, recipes)
    return figures


def _draws(clusters: list[str]) -> Floats:
    """How often each run is in each bootstrap draw of the clusters, [B, N]."""
    import numpy as np

    names = sorted(set(clusters))
    counts_BC = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=DRAWS)
    return counts_BC[:, [names.index(name) for name in clusters]].astype(np.float64)


def _limits(values_B: Floats) -> tuple[float | None, float | None]:
    """The percentiles 2.5 and 97.5 of the draws in which the figure is defined; None where hardly any is."""
    import numpy as np

    defined = values_B[np.isfinite(values_B)]
    if len(defined) < len(values_B) / 2:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def _statistics(weights_BN: Floats, x_N: Floats, y_N: Floats, loss_N: Floats, recipes: list[str]) -> dict[str, Floats]:
    """Every figure for every row of weights, [B]; not finite where it is undefined."""
    import numpy as np

    w = weights_BN
    repeated_BN = w * [recipes.count(name) > 1 for name in recipes]  # one seed says nothing within its recipe
    within_x_N, within_y_N = _within(x_N, recipes), _within(y_N, recipes)
    with np.errstate(divide="ignore", invalid="ignore"):
        ranks_x, ranks_y, ranks_loss = (_ranks(w, values_N) for values_N in (x_N, y_N, loss_N))
        rho = _correlation(w, ranks_x, ranks_y)
        rho_x, rho_y = _correlation(w, ranks_x, ranks_loss), _correlation(w, ranks_y, ranks_loss)
        return {
            "rho": rho,
            "slope": _covariance(w, x_N, y_N) / _covariance(w, x_N, x_N),
            "within-rho": _correlation(repeated_BN, _ranks(repeated_BN, within_x_N), _ranks(repeated_BN, within_y_N)),
            "within-slope": _covariance(repeated_BN, within_x_N, within_y_N)
            / _covariance(repeated_BN, within_x_N, within_x_N),
            "partial-rho": (rho - rho_x * rho_y) / np.sqrt((1 - rho_x**2) * (1 - rho_y**2)),
        }


def _rho_alone(weights_BN: Floats, x_N: Floats, y_N: Floats, loss_N: Floats, recipes: list[str]) -> dict[str, Floats]:
    """As `_statistics`, of a rival predictor."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return {"rho": _correlation(weights_BN, _ranks(weights_BN, x_N), _ranks(weights_BN, y_N))}


def _within(values_N: Floats, recipes: list[str]) -> Floats:
    """Deviations from the mean of the recipe."""
    import numpy as np

    _, index_N = np.unique(recipes, return_inverse=True)
    means = np.bincount(index_N, values_N) / np.bincount(index_N)
    # To 12 digits: what is equal but for rounding shares its rank.
    deviations: Floats = np.round(values_N - means[index_N], 12)
    return deviations


def _ranks(weights_BN: Floats, values_N: Floats) -> Floats:
    """Mid-ranks of a sample in which value i occurs weights[i] times."""
    import numpy as np

    distinct, index_N = np.unique(values_N, return_inverse=True)
    counts = weights_BN @ (index_N[:, None] == np.arange(len(distinct)))
    ranks: Floats = (np.cumsum(counts, axis=1) - counts + (counts + 1) / 2)[:, index_N]
    return ranks


def _covariance(weights_BN: Floats, a: Floats, b: Floats) -> Floats:
    """Weighted covariance of each row; a and b are [N] or [B, N]."""
    import numpy as np

    total = weights_BN.sum(1, keepdims=True)
    a_centred = a - (weights_BN * a).sum(1, keepdims=True) / total
    b_centred = b - (weights_BN * b).sum(1, keepdims=True) / total
    covariance: Floats = (weights_BN * a_centred * b_centred).sum(1) / total[:, 0]
    return np.where(np.abs(covariance) > 1e-20, covariance, 0.0)  # of constants: 0, not rounding


def _correlation(weights_BN: Floats, a: Floats, b: Floats) -> Floats:
    import numpy as np

    scale = np.sqrt(_covariance(weights_BN, a, a) * _covariance(weights_BN, b, b))
    correlation: Floats = _covariance(weights_BN, a, b) / scale
    return correlation


def _leave_one_recipe_out(x_N: Floats, y_N: Floats, recipes: list[str]) -> float | None:
    """1 - squared error of the others' line / squared error of the others' mean, over all runs."""
    import numpy as np

    names, line, mean = np.array(recipes), 0.0, 0.0
    for name in sorted(set(recipes)):
        held, rest = names == name, names != name
        x, y = x_N[rest] - x_N[rest].mean(), y_N[rest] - y_N[rest].mean()
        if not float(x @ x) > 0.0:
            return None
        slope = float(x @ y) / float(x @ x)
        miss = y_N[held] - y_N[rest].mean()
        line += float(((miss - slope * (x_N[held] - x_N[rest].mean())) ** 2).sum())
        mean += float((miss**2).sum())
    return round(1 - line / mean, 4) if mean > 0.0 else None
