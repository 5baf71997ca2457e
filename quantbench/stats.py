"""The statistics of a table: recipes compared over the seeds that they share.

    y[recipe, seed] = recipe + seed + noise,    one noise variance, pooled over recipes, by least squares

Pooling is what gives five seeds power: a paired t-test per recipe has 4 degrees of freedom, this has about 4 per
recipe. Missing cells are allowed. All comparisons of one family hold together at 95%:

- with the baseline: Dunnett's test (JASA 50:1096, 1955), the two-sided equicorrelated multivariate t, whose
  distribution is a double integral done by quadrature, so that the same records give the same bytes. Where seeds
  are missing, correlations differ; the smallest is used, which makes the test conservative;
- with the best, which was chosen after looking: Tukey and Kramer's studentized range over all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate between two limits, at 95%."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """A recipe's difference from the control, with a simultaneous interval, and p adjusted for the family."""

    difference: Interval
    p: float

    @property
    def separates(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.difference.low <= 0 <= self.difference.high

    @property
    def ratio(self) -> Interval:
        """Of a difference of logarithms: the ratio, and its limits."""
        return Interval(*(math.exp(x) for x in (self.difference.mean, self.difference.low, self.difference.high)))


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean; None below two values."""
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def share_spared(left: Sequence[float | None], whole: Sequence[float | None]) -> Interval | None:
    """1 - sum(left) / sum(whole) over paired units, and its interval: jackknife, Student's t of n - 1 degrees.

    None where a unit is undefined, there are fewer than two, or `whole` does not sum to more than 0.
    """
    from scipy.special import stdtrit

    pairs = [(a, b) for a, b in zip(left, whole, strict=True) if a is not None and b is not None]
    n = len(pairs)
    tops, bottoms = math.fsum(a for a, _ in pairs), math.fsum(b for _, b in pairs)
    if n < 2 or n < len(whole) or bottoms <= 0.0:
        return None
    without = [1 - (tops - a) / (bottoms - b) for a, b in pairs if bottoms != b]
    mean = math.fsum(without) / len(without)
    variance = (n - 1) / n * math.fsum((value - mean) ** 2 for value in without)
    estimate, half = 1 - tops / bottoms, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


@dataclass(frozen=True)
class Additive:
    """The fitted model: effects relative to the first recipe, whose own is 0."""

    recipes: list[str]
    effects: Floats  # [R]
    covariance: Floats  # [R, R] of the effects, in units of the noise variance
    variance: float  # of the noise
    freedom: int  # degrees of freedom of `variance`

    def difference(self, recipe: str, other: str) -> tuple[float, float]:
        """(effect of a recipe minus that of another, its standard error)."""
        i, j = self.recipes.index(recipe), self.recipes.index(other)
        c = self.covariance
        spread = self.variance * float(c[i, i] + c[j, j] - 2 * c[i, j])
        return float(self.effects[i] - self.effects[j]), math.sqrt(max(spread, 0.0))


def fit(values: Mapping[str, Mapping[int, float]], control: str) -> Additive | None:
    """Fits {recipe: {seed: value}}. Recipes that share no seed with the control, not even by way of others, cannot
    be compared and are left out. None where the control is missing or no degree of freedom is left."""
    import numpy as np

    if control not in values:
        return None
    recipes, seeds = {control}, set(values[control])
    while True:
        linked = {recipe for recipe, by_seed in values.items() if seeds & by_seed.keys()}
        if linked == recipes:
            break
        recipes, seeds = linked, {seed for recipe in linked for seed in values[recipe]}
    rows = [control, *sorted(recipes - {control})]
    columns = sorted(seeds)
    cells = [(rows.index(recipe), columns.index(seed)) for recipe in rows for seed in sorted(values[recipe])]
    y = np.array([values[recipe][seed] for recipe in rows for seed in sorted(values[recipe])])
    freedom = len(cells) - (len(rows) + len(columns) - 1)
    if len(rows) < 2 or freedom < 1:
        return None
    design = np.zeros((len(cells), len(rows) - 1 + len(columns)))  # the control's column is left out
    for index, (row, column) in enumerate(cells):
        if row:
            design[index, row - 1] = 1.0
        design[index, len(rows) - 1 + column] = 1.0
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ (design.T @ y)
    residual = y - design @ solution
    effects, covariance = np.zeros(len(rows)), np.zeros((len(rows), len(rows)))
    effects[1:] = solution[: len(rows) - 1]
    covariance[1:, 1:] = inverse[: len(rows) - 1, : len(rows) - 1]
    return Additive(rows, effects, covariance, float(residual @ residual) / freedom, freedom)


def with_control(values: Mapping[str, Mapping[int, float]], control: str) -> dict[str, Comparison]:
    """Every recipe minus the control, by Dunnett's test; without those that cannot be compared."""
    model = fit(values, control)
    if model is None or model.variance <= 0.0:
        return {}
    others = model.recipes[1:]
    rho = _smallest_correlation(model)
    critical = dunnett_quantile(CONFIDENCE, len(others), model.freedom, rho)
    comparisons = {}
    for recipe in others:
        difference, error = model.difference(recipe, control)
        # Beyond ten decimals p is rounding of the quadrature.
        p = round(1.0 - dunnett_cdf(abs(difference) / error, len(others), model.freedom, rho), 10)
        half = critical * error
        comparisons[recipe] = Comparison(Interval(difference, difference - half, difference + half), p)
    return comparisons


def like_the_best(values: Mapping[str, Mapping[int, float]], best: str) -> set[str]:
    """The recipes that cannot be told from the best at 5% over all pairs: itself, and those nothing is known about."""
    model = fit(values, best)
    if model is None or model.variance <= 0.0:
        return {best, *values}
    alike = {best, *values} - set(model.recipes[1:])
    for recipe in model.recipes[1:]:
        difference, error = model.difference(recipe, best)
        if tukey_cdf(abs(difference) / error * math.sqrt(2), len(model.recipes), model.freedom) <= CONFIDENCE:
            alike.add(recipe)
    return alike


def _smallest_correlation(model: Additive) -> float:
    """Of the differences from the control: 1/2 where every recipe has every seed."""
    import numpy as np

    covariance = model.covariance[1:, 1:]
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    return float(np.clip(correlation.min(), 0.0, 0.5))


def dunnett_cdf(t: float, k: int, freedom: int, rho: float) -> float:
    """P(max of |T_1|, ..., |T_k| <= t) of a k-variate t with common correlation rho.

    T_i = (sqrt(1-rho) Z_i - sqrt(rho) Z_0) / S with S = chi / sqrt(freedom): given Z_0 and S the T_i are independent,
    so that the integrand is a k-th power; it is summed over both by `_nodes`.
    """
    import numpy as np
    from scipy.special import ndtr

    scale_S, weight_S, shift_Z, weight_Z = _nodes(freedom)
    limit_S1 = t * scale_S[:, None]
    shift_1Z = math.sqrt(rho) * shift_Z[None, :]
    inside_SZ = ndtr((limit_S1 + shift_1Z) / math.sqrt(1 - rho)) - ndtr((shift_1Z - limit_S1) / math.sqrt(1 - rho))
    return float(np.clip(weight_S @ inside_SZ**k @ weight_Z, 0.0, 1.0))


def tukey_cdf(q: float, k: int, freedom: int) -> float:
    """P(range of k standard normals / S <= q), the studentized range: k times the chance that one of them, at Z, is
    the largest and the others lie within q S below it."""
    import numpy as np
    from scipy.special import ndtr

    scale_S, weight_S, largest_Z, weight_Z = _nodes(freedom)
    within_SZ = ndtr(largest_Z)[None, :] - ndtr(largest_Z[None, :] - q * scale_S[:, None])
    return float(np.clip(k * (weight_S @ within_SZ ** (k - 1) @ weight_Z), 0.0, 1.0))


@cache
def _nodes(freedom: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Nodes and weights for S = chi/sqrt(freedom), Gauss-Legendre in log S over all but 1e-13 of its mass, and for
    a normal Z_0, the trapezoid rule, which converges faster than any power of the step for such an integrand."""
    import numpy as np
    from scipy.special import chdtri, gammaln

    low, high = (0.5 * math.log(float(chdtri(freedom, tail)) / freedom) for tail in (1 - 1e-13, 1e-13))
    x, w = np.polynomial.legendre.leggauss(160)
    u = (high - low) / 2 * x + (high + low) / 2
    half = freedom / 2
    density = np.exp(math.log(2) + half * math.log(half) - gammaln(half) + freedom * u - half * np.exp(2 * u))
    z = np.linspace(-8.5, 8.5, 171)
    return np.exp(u), w * (high - low) / 2 * density, z, np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])


@cache
def dunnett_quantile(probability: float, k: int, freedom: int, rho: float) -> float:
    """The critical value t at which `dunnett_cdf` reaches a probability."""
    from scipy.special import stdtrit

    # Between one comparison and Bonferroni's bound on k.
    low, high = (float(stdtrit(freedom, 1 - (1 - probability) / 2 / count)) for count in (1, k))
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if dunnett_cdf(middle, k, freedom, rho) < probability else (low, middle)
    return high
