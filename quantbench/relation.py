"""What quantization error goes with: log KL on figures of the full-precision model, per track and quantizer.

    log KL(full || quantized) = slope * log(predictor) + constant

The residual peak is one of several predictors, each with a literature that has it predict the error. All get the same
treatment, over the same runs. A point is a finished run (recipe, seed) of its own pretraining: what comes after
training shares a checkpoint and asks another question, which `post_hoc_against` answers. Rank correlations are
Spearman's, slopes least squares.

    rho          pooled over recipes: mixes what the recipes change otherwise
    within-rho   deviations from the mean of the recipe, in units of its standard deviation: only seeds differ
    given-loss   partial, given the full-precision loss; given-rate: given the learning rate
    given        partial, given each of the other predictors: what it adds to them
    won          share of bootstrap draws in which its rho is the largest
    exempt-rho   with the KL that is left where extreme tokens stay in full precision
    r2           of predicting a whole recipe from a line through the others, against the mean of the others

Runs are no independent evidence. Recipes that share a mitigation, be it by way of a third recipe, are relatives: limits
are percentiles of a bootstrap over clusters of relatives (2,000 draws from a fixed generator, computed as weights).
Below 8 recipes only rho and n are given: limits would pretend.

Shapes: N runs, B bootstrap draws (the first is the sample itself), C clusters, P predictors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantbench.catalog import POST_HOC
from quantbench.results import Record, comparable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PREDICTORS = {  # name of the metric -> what it looks at
    "residual-peak": "the norm of one token against the others",
    "act-max": "the largest input of a Linear",
    "inf-norm": "the largest element of the residual stream",
    "kurtosis-he": "features that are large throughout",
    "kurtosis-osp": "large elements within a usual token",
    "kurtosis-qualcomm": "large elements within a sequence, of whatever token",
    "mmr": "the largest element of a token against its others",
    "bos-attention": "attention to the first token",
}
PEAK = "residual-peak"
FEWEST_RECIPES = 8  # for limits, slopes and R2
DRAWS = 2000


def relate(records: list[Record]) -> dict[str, Any]:
    """{track: {quantizer: {predictor: figures}}}, fit for JSON; undefined figures are None.

    Figures: n, recipes, clusters, excluded (runs whose KL is not above 0, or that lack a predictor), rho, within-rho,
    given-loss, given-rate, exempt-rho, slope (each {estimate, low, high}), given ({predictor: such}), won and r2.
    """
    tracks = sorted({r["track"]["name"] for r in records})
    return {track: _track([r for r in records if r["track"]["name"] == track]) for track in tracks}


def _track(records: list[Record]) -> dict[str, Any]:
    runs = [r for r in finished(records) if not post_hoc(r)]
    measured = {name for r in runs for name in r["full-precision"]["metrics"]}
    predictors = [name for name in PREDICTORS if name in measured]
    samples: dict[tuple[int, ...], Sample] = {}
    found = {}
    for quantizer in sorted({name for r in runs for name in r["quantized"]}):
        saw = [i for i, r in enumerate(runs) if quantizer in r["quantized"]]
        kept = tuple(i for i in saw if all(point(runs[i], quantizer, name) for name in predictors))
        sample = samples.setdefault(kept, Sample([runs[i] for i in kept], predictors))
        found[quantizer] = _figures(sample, quantizer, len(saw) - len(kept))
    return found


def finished(records: list[Record]) -> list[Record]:
    """The finished runs of one track that may be pooled."""
    return [r for r in comparable(records)[0] if r["status"] == "finished"]


def post_hoc(record: Record) -> bool:
    """Whether the run shares the checkpoint of another recipe."""
    return any(name in POST_HOC for name in _mitigations(record))


def _mitigations(record: Record) -> set[str]:
    return set(record["recipe"]["resolved"].get("mitigations") or {})


def point(record: Record, quantizer: str, predictor: str) -> tuple[float, float] | None:
    """(predictor, KL) of a run; None where one of them is undefined, or the KL has no logarithm."""
    x = record["full-precision"]["metrics"].get(predictor, {}).get("value")
    y = record["quantized"].get(quantizer, {}).get("kl")
    return (x, y) if x is not None and y is not None and y > 0 else None


def clusters(records: Sequence[Record]) -> list[str]:
    """Of every run the first recipe of its relatives: those that share a mitigation, by way of others, too.

    The settings of AdamW make no relatives: controls are of the family of what they control, the baseline.
    """
    of = {r["recipe"]["name"]: _mitigations(r) - {"adamw"} for r in records}
    first: dict[str, str] = {}
    for name in sorted(of):
        if name in first:
            continue
        reached, shared = {name}, of[name]
        while True:
            relatives = {other for other in of if of[other] & shared or of[other] == of[name]}
            if relatives <= reached:
                break
            reached |= relatives
            shared = set().union(*(of[other] for other in reached))
        first |= dict.fromkeys(reached, name)
    return [first[r["recipe"]["name"]] for r in records]


def family(name: str, fields: Mapping[str, Any]) -> str:
    """What kind of rounding a quantizer of a resolved track is."""
    if "sites" not in fields:
        return "outlier columns in full precision" if "threshold" in fields else "weights alone"
    if fields["activations"] == 16:
        return "weights alone"
    scope = "a range per token" if fields["range"] == "token" else "one range for all tokens"
    where = "residual stream too" if "residual" in fields["sites"] else "Linear inputs"
    return f"{scope}, {where}" + (", 4 bits" if fields["activations"] == 4 else "")


@dataclass
class Sample:
    """Runs, what is known of them before quantizing, and how often each is in every bootstrap draw."""

    runs: list[Record]
    predictors: list[str]

    def __post_init__(self) -> None:
        self.recipes = [r["recipe"]["name"] for r in self.runs]
        self.clusters = clusters(self.runs)
        self.enough = len(set(self.recipes)) >= FEWEST_RECIPES

    @cached_property
    def weights_BN(self) -> Floats:
        import numpy as np

        whole = np.ones((1, len(self.runs)))
        return np.vstack([whole, _draws(self.clusters)]) if self.enough else whole

    @cached_property
    def repeated_BN(self) -> Floats:
        """Without runs whose recipe has no other seed: one says nothing within its recipe."""
        return self.weights_BN * [self.recipes.count(name) > 1 for name in self.recipes]

    def values(self, name: str) -> Floats:
        """[N]"""
        import numpy as np

        return np.array([r["full-precision"]["metrics"][name]["value"] for r in self.runs], dtype=np.float64)

    def ranked(self, values_N: Floats) -> Floats:
        """Standardised ranks in every draw, [B, N]."""
        return _standard(self.weights_BN, _ranks(self.weights_BN, values_N))

    def ranked_within(self, values_N: Floats) -> Floats:
        """As `ranked`, of the deviations within recipes."""
        return _standard(self.repeated_BN, _ranks(self.repeated_BN, _within(values_N, self.recipes)))

    @cached_property
    def ranks(self) -> Floats:
        """Of every predictor, times the weights as shares, [P, B, N]: summed with `ranked` values, a correlation."""
        return self._shares(self.weights_BN, [self.ranked(self.values(name)) for name in self.predictors])

    @cached_property
    def ranks_within(self) -> Floats:
        """As `ranks`, of deviations within recipes."""
        found = [self.ranked_within(_log(self.values(name))) for name in self.predictors]
        return self._shares(self.repeated_BN, found)

    @staticmethod
    def _shares(weights_BN: Floats, ranks: list[Floats]) -> Floats:
        import numpy as np

        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = np.stack(ranks) * (weights_BN / weights_BN.sum(1, keepdims=True))
        return found

    @cached_property
    def controls(self) -> dict[str, tuple[Floats, Floats]]:
        """given-loss, given-rate -> as a row of `ranks`, [B, N], and the correlation with every predictor, [P, B]."""
        import numpy as np

        listed = {
            "given-loss": [r["full-precision"]["loss"] for r in self.runs],
            "given-rate": [r["recipe"]["resolved"].get("lr") for r in self.runs],
        }
        ranked = {key: self.ranked(np.array(x, dtype=np.float64)) for key, x in listed.items() if None not in x}
        return {
            key: (self._shares(self.weights_BN, [ranks_BN])[0], _correlation(self.ranks, ranks_BN))
            for key, ranks_BN in ranked.items()
        }

    @cached_property
    def between(self) -> Floats:
        """Correlation of every predictor with every other, [P, P, B]."""
        import numpy as np

        return np.stack([_correlation(self.ranks, self.ranked(self.values(name))) for name in self.predictors])


def _figures(sample: Sample, quantizer: str, excluded: int) -> dict[str, Any]:
    """{predictor: figures} under one quantizer."""
    import numpy as np

    n = len(sample.runs)
    counts = {"n": n, "recipes": len(set(sample.recipes)), "clusters": len(set(sample.clusters)), "excluded": excluded}
    names = ("rho", "within-rho", "given-loss", "given-rate", "exempt-rho", "slope", "given", "won", "r2")
    found: dict[str, Any] = {name: {**counts, **dict.fromkeys(names)} for name in sample.predictors}
    if n < 3:
        return found
    quantized = [r["quantized"][quantizer] for r in sample.runs]
    log_kl_N = np.log([figures["kl"] for figures in quantized])
    left = [((figures["exemption"] or {}).get("extreme") or {}).get("kl") for figures in quantized]
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_BN = sample.ranked(log_kl_N)
        rho_PB = _correlation(sample.ranks, kl_BN)
        spared_PB = None if None in left else _correlation(sample.ranks, sample.ranked(np.array(left, dtype=float)))
        for index, figures in enumerate(found.values()):
            figures["rho"] = _estimate(rho_PB[index])
            figures["exempt-rho"] = None if spared_PB is None else _estimate(spared_PB[index])
        if not sample.enough:
            return found
        within_PB = _correlation(sample.ranks_within, sample.ranked_within(log_kl_N))
        best_B = np.nan_to_num(rho_PB, nan=-2.0).argmax(0)
        controls = {
            key: _partial(rho_PB, with_PB, _correlation(share_BN, kl_BN))
            for key, (share_BN, with_PB) in sample.controls.items()
        }
        for index, (name, figures) in enumerate(found.items()):
            if figures["rho"] is None:
                continue
            figures["within-rho"] = _estimate(within_PB[index])
            figures |= {key: _estimate(partial_PB[index]) for key, partial_PB in controls.items()}
            figures["given"] = {
                rival: _estimate(_partial(rho_PB[index], sample.between[other, index], rho_PB[other]))
                for other, rival in enumerate(sample.predictors)
                if rival != name
            }
            figures["won"] = round(float((best_B[1:] == index).mean()), 4)
            log_N = _log(sample.values(name))
            figures["slope"] = _estimate(_slope(sample.weights_BN, log_N, log_kl_N))
            figures["r2"] = _leave_one_recipe_out(log_N, log_kl_N, sample.recipes)
    return found


def winner(by_predictor: Mapping[str, Any]) -> str | None:
    """The predictor with the largest rho; None where none has one."""
    told = {name: found["rho"]["estimate"] for name, found in by_predictor.items() if found["rho"]}
    return max(told, key=lambda name: (told[name], name), default=None)


def post_hoc_against(records: list[Record], quantizer: str, predictor: str) -> dict[str, tuple[float, float, float]]:
    """{post-hoc recipe: (predictor, KL that the line through the pretraining recipes has there, KL)}, geometric means.

    Whether what changes the model after training moves along the relation or leaves it.
    """
    import numpy as np

    runs = finished(records)
    points = {
        name: np.log([
            at for r in runs if r["recipe"]["name"] == name and (at := point(r, quantizer, predictor)) and at[0] > 0
        ])
        for name in dict.fromkeys(r["recipe"]["name"] for r in runs)
    }  # fmt: skip
    after = {r["recipe"]["name"] for r in runs if post_hoc(r)}
    own = [xy for name, xy in points.items() if name not in after and len(xy)]
    if len(own) < FEWEST_RECIPES:
        return {}
    x, y = np.concatenate(own).T
    slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
    found = {}
    for name in sorted(after):
        if len(points[name]):
            mine, kl = points[name].mean(0)
            found[name] = (math.exp(mine), math.exp(y.mean() + slope * (mine - x.mean())), math.exp(kl))
    return found


# --- weighted statistics: every row of weights is a sample ------------------------------------------------------------


def _draws(clusters: Sequence[str]) -> Floats:
    """How often each run is in each bootstrap draw of the clusters, [B, N]."""
    import numpy as np

    names = sorted(set(clusters))
    counts_BC = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=DRAWS)
    return counts_BC[:, [names.index(name) for name in clusters]].astype(np.float64)


def _estimate(values_B: Floats) -> dict[str, float | None] | None:
    """The sample's own figure, and the percentiles 2.5 and 97.5 of the draws in which it is defined.

    Without limits where there are no draws, or hardly any has it; None where the sample has none itself.
    """
    import numpy as np

    own, drawn = float(values_B[0]), values_B[1:]
    if not math.isfinite(own):
        return None
    defined = drawn[np.isfinite(drawn)]
    if not len(drawn) or len(defined) < len(drawn) / 2:
        return {"estimate": round(own, 4), "low": None, "high": None}
    low, high = np.percentile(defined, [2.5, 97.5])
    return {"estimate": round(own, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def _log(values_N: Floats) -> Floats:
    """NaN where there is none: an excess kurtosis may be below 0."""
    import numpy as np

    return np.where(values_N > 0, np.log(np.where(values_N > 0, values_N, 1.0)), np.nan)


def _within(values_N: Floats, recipes: Sequence[str]) -> Floats:
    """Deviations from the mean of the recipe over its standard deviation; 0 where it has none."""
    import numpy as np

    found = np.zeros(len(values_N))
    for name in sorted(set(recipes)):
        mine = np.array(recipes) == name
        deviations = values_N[mine] - values_N[mine].mean()
        spread = float(np.sqrt((deviations**2).mean()))
        if spread > 1e-12:
            found[mine] = deviations / spread
    # To 9 digits: what is equal but for rounding shares its rank.
    rounded: Floats = np.nan_to_num(found).round(9)
    return rounded


def _ranks(weights_BN: Floats, values_N: Floats) -> Floats:
    """Mid-ranks of a sample in which value i occurs weights[i] times."""
    import numpy as np

    distinct, index_N = np.unique(values_N, return_inverse=True)
    counts = weights_BN @ (index_N[:, None] == np.arange(len(distinct)))
    ranks: Floats = (np.cumsum(counts, axis=1) - counts + (counts + 1) / 2)[:, index_N]
    return ranks


def _standard(weights_BN: Floats, values_BN: Floats) -> Floats:
    """Of mean 0 and variance 1 in every row; NaN where all are equal."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        total = weights_BN.sum(1, keepdims=True)
        centred = values_BN - (weights_BN * values_BN).sum(1, keepdims=True) / total
        variance = (weights_BN * centred**2).sum(1, keepdims=True) / total
        return np.where(variance > 1e-20, centred / np.sqrt(variance), np.nan)


def _correlation(shares: Floats, ranks_BN: Floats) -> Floats:
    """Of `Sample.ranks`, [..., B, N], with standardised ranks: [..., B]."""
    import numpy as np

    found: Floats = np.einsum("...bn,bn->...b", shares, ranks_BN)
    return found


def _partial(rho: Floats, with_x: Floats, with_y: Floats) -> Floats:
    """The correlation of x and y, given a third that they correlate with so; NaN where it is one of them."""
    import numpy as np

    left = (1 - with_x**2) * (1 - with_y**2)
    return np.where(left > 1e-9, (rho - with_x * with_y) / np.sqrt(np.maximum(left, 1e-9)), np.nan)


def _slope(weights_BN: Floats, x_N: Floats, y_N: Floats) -> Floats:
    """Least squares, over the runs whose x is defined."""
    import numpy as np

    w, x = weights_BN * np.isfinite(x_N), np.nan_to_num(x_N)
    total = w.sum(1, keepdims=True)
    x_BN, y_BN = x - (w * x).sum(1, keepdims=True) / total, y_N - (w * y_N).sum(1, keepdims=True) / total
    variance = (w * x_BN**2).sum(1)
    return np.where(variance > 1e-20, (w * x_BN * y_BN).sum(1) / variance, np.nan)


def _leave_one_recipe_out(x_N: Floats, y_N: Floats, recipes: Sequence[str]) -> float | None:
    """1 - squared error of the others' line / squared error of the others' mean, over the runs whose x is defined."""
    import numpy as np

    defined = np.isfinite(x_N)
    names, x_N, y_N = np.array(recipes)[defined], x_N[defined], y_N[defined]
    line, mean = 0.0, 0.0
    for name in sorted(set(names)):
        held, rest = names == name, names != name
        x, y = x_N[rest] - x_N[rest].mean(), y_N[rest] - y_N[rest].mean()
        if not float(x @ x) > 1e-20:
            return None
        slope = float(x @ y) / float(x @ x)
        miss = y_N[held] - y_N[rest].mean()
        line += float(((miss - slope * (x_N[held] - x_N[rest].mean())) ** 2).sum())
        mean += float((miss**2).sum())
    return round(1 - line / mean, 4) if mean > 0.0 else None
