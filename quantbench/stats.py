"""The statistics of a table: recipes compared over seeds, documents or checkpoints.

Recipes differ in how far their seeds scatter: standard deviations of log KL run from .05 to .95. One variance pooled
over all of them would give the quiet recipes intervals several times too wide, and the noisy ones errors several times
too many. So each recipe has a variance of its own, moderated towards a common one (Smyth, Stat. Appl. Genet. Mol. Biol.
3:3, 2004):

    s2[r] ~ s0^2 chi^2(d0) prior        moderated s2[r] = (d0 s0^2 + d[r] s2[r]) / (d0 + d[r]),  d[r] = n[r] - 1

d0 and s0^2 come from the mean and variance of log s2 over the recipes. With fewer than `FEWEST` recipes they would be
noise themselves: there each recipe keeps its own variance (Welch's test).

- Against a control (`against`): t = difference of means / its standard error, of d0 + the smaller d degrees of freedom.
- Paired (`paired`): Student's t of the differences within a seed, a document or a checkpoint, with the same moderation.
- A family of comparisons: Holm's procedure (Scand. J. Stat. 6:65, 1979). The chance that it declares any difference
  that is none is at most 5%. An interval is drawn at the level at which Holm judged its row, so that it leaves out 0
  just where the row separates.
- With the best, chosen after looking (`like_the_best`): Tukey's studentized range over all pairs, in the form for
  unequal variances of Games and Howell (J. Educ. Stat. 1:113, 1976).

A simulation in the tests holds the level to 5% with the variances and the numbers of seeds of the table.
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
FEWEST = 15  # recipes with two values or more, from which on variances are moderated


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
    """A difference, its interval at the level at which Holm judged it, and its p, adjusted for the family."""

    difference: Interval
    p: float

    @property
    def separates(self) -> bool:
        """Whether the difference is told from 0 within the family."""
        return self.p < 1 - CONFIDENCE

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
class Spread:
    """How far the values of one recipe scatter: the mean's standard error, and what is behind it."""

    mean: float
    count: int
    variance: float  # of a value
    freedom: float  # degrees of freedom of the variance
    moderated: bool

    @property
    def of_mean(self) -> float:
        return self.variance / self.count


def spreads(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Mean and variance of every recipe, moderated where there are enough of them; without those that have neither."""
    import numpy as np

    own = {name: float(np.var(x, ddof=1)) for name, x in values.items() if len(x) > 1}
    prior = _prior({name: (own[name], len(values[name]) - 1) for name in own})
    most = float(sum(len(values[name]) - 1 for name in own))
    found = {}
    for name, x in values.items():
        d = len(x) - 1
        if prior is not None and x:
            d0, s0 = prior
            variance = s0 if math.isinf(d0) else (d0 * s0 + d * own.get(name, 0.0)) / (d0 + d)
            found[name] = Spread(math.fsum(x) / len(x), len(x), variance, min(d0 + d, most), True)
        elif d:
            found[name] = Spread(math.fsum(x) / len(x), len(x), own[name], d, False)
    return found


def _prior(own: Mapping[str, tuple[float, int]]) -> tuple[float, float] | None:
    """(d0, s0^2) of the variances and their degrees of freedom, by moments of the logarithms; None where they are few.

    Smyth (2004), section 6.2. d0 is infinite where the variances scatter no more than equal ones would.
    """
    import numpy as np
    from scipy.special import digamma, polygamma

    known = [(variance, d) for variance, d in own.values() if variance > 0.0]
    if len(known) < FEWEST:
        return None
    s2, d = np.array([v for v, _ in known]), np.array([float(d) for _, d in known])
    e = np.log(s2) - digamma(d / 2) + np.log(d / 2)
    excess = float(np.var(e, ddof=1) - np.mean(polygamma(1, d / 2)))
    if excess <= 0.0:
        return math.inf, math.exp(float(e.mean()))
    d0 = 2 * _trigamma_inverse(excess)
    return d0, math.exp(float(e.mean() + digamma(d0 / 2)) - math.log(d0 / 2))


def _trigamma_inverse(x: float) -> float:
    """The y of trigamma(y) = x > 0, by Newton's method on 1 / trigamma, which is nearly straight."""
    from scipy.special import polygamma

    y = 0.5 + 1 / x
    for _ in range(50):
        trigamma = float(polygamma(1, y))
        step = trigamma * (1 - trigamma / x) / float(polygamma(2, y))
        y += step
        if abs(step) < 1e-10 * y:
            break
    return y


def against(values: Mapping[str, Mapping[int, float]], control: str) -> dict[str, Comparison]:
    """Every recipe's {seed: value} minus the control's, unpaired; without those whose scatter is not known."""
    found = spreads({name: list(by_seed.values()) for name, by_seed in values.items()})
    if control not in found:
        return {}
    base = found.pop(control)
    tests = {}
    for name, mine in found.items():
        error = math.sqrt(mine.of_mean + base.of_mean)
        tests[name] = (mine.mean - base.mean, error, _freedom(mine, base))
    return _holm(tests)


def _freedom(a: Spread, b: Spread) -> float:
    """Degrees of freedom of a difference: the smaller ones of moderated variances, else Welch's.

    Welch's of moderated variances would count the prior twice: the level would be .12 in the tests' simulation.
    """
    parts = a.of_mean**2 / a.freedom + b.of_mean**2 / b.freedom
    if a.moderated or not parts:
        return min(a.freedom, b.freedom)
    return (a.of_mean + b.of_mean) ** 2 / parts


def paired(differences: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """Every recipe's mean difference from its control within a unit; without those whose scatter is not known."""
    return _holm({
        name: (one.mean, math.sqrt(one.of_mean), one.freedom) for name, one in spreads(differences).items()
    })  # fmt: skip


def _holm(tests: Mapping[str, tuple[float, float, float]]) -> dict[str, Comparison]:
    """Comparisons of a family, of {name: (difference, standard error, degrees of freedom)}."""
    from scipy.special import stdtr, stdtrit

    def p(difference: float, error: float, freedom: float) -> float:
        if error == 0.0:  # the same in every unit
            return 1.0 if difference == 0.0 else 0.0
        return 2 * float(stdtr(freedom, -abs(difference) / error))

    ordered = sorted(tests, key=lambda name: (p(*tests[name]), name))
    found, adjusted, stopped = {}, 0.0, 0
    for index, name in enumerate(ordered):
        difference, error, freedom = tests[name]
        adjusted = max(adjusted, min(1.0, (len(ordered) - index) * p(*tests[name])))
        left = stopped or len(ordered) - index  # hypotheses among which this one was judged
        if adjusted >= 1 - CONFIDENCE:
            stopped = left  # what comes after the first that stays is not judged any more
        half = float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * left))) * error
        found[name] = Comparison(Interval(difference, difference - half, difference + half), round(adjusted, 10))
    return {name: found[name] for name in tests}


def like_the_best(values: Mapping[str, Mapping[int, float]], best: str) -> set[str]:
    """The recipes that cannot be told from the best at 5% over all pairs: itself, and those nothing is known about."""
    found = spreads({name: list(by_seed.values()) for name, by_seed in values.items()})
    alike = {best, *values.keys() - found.keys()}
    if best not in found:
        return {best, *values}
    for name in found.keys() - {best}:
        mine, top = found[name], found[best]
        error = math.sqrt(mine.of_mean + top.of_mean)
        if error == 0.0:
            inside = 0.0 if mine.mean == top.mean else 1.0
        else:
            q = abs(mine.mean - top.mean) / error * math.sqrt(2)
            inside = tukey_cdf(q, len(found), _freedom(mine, top))
        if inside <= CONFIDENCE:
            alike.add(name)
    return alike


def unit_effect(values: Mapping[str, Mapping[int, float]]) -> tuple[float, float] | None:
    """(F, p) of the units (seeds) in value = recipe + unit + noise: whether pairing by them buys anything.

    Least squares, cells may be missing; None where no degree of freedom is left.
    """
    import numpy as np
    from scipy.special import fdtrc

    names, units = sorted(values), sorted({unit for by_unit in values.values() for unit in by_unit})
    cells = [(names.index(name), units.index(unit)) for name in names for unit in sorted(values[name])]
    y = np.array([values[name][unit] for name in names for unit in sorted(values[name])])
    recipe, unit = (np.zeros((len(cells), len(of))) for of in (names, units))
    for index, (row, column) in enumerate(cells):
        recipe[index, row], unit[index, column] = 1.0, 1.0

    def left(design: Floats) -> tuple[float, int]:
        solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        residual = y - design @ solution
        return float(residual @ residual), len(y) - int(rank)

    if not cells:
        return None
    (alone, d_alone), (both, d_both) = left(recipe), left(np.hstack([recipe, unit]))
    if d_both < 1 or d_alone == d_both or both <= 0.0:
        return None
    F = (alone - both) / (d_alone - d_both) / (both / d_both)
    return F, float(fdtrc(d_alone - d_both, d_both, F))


def tukey_cdf(q: float, k: int, freedom: float) -> float:
    """P(range of k standard normals / S <= q), the studentized range: k times the chance that one of them, at Z, is
    the largest and the others lie within q S below it."""
    import numpy as np
    from scipy.special import ndtr

    scale_S, weight_S, largest_Z, weight_Z = _nodes(freedom)
    within_SZ = ndtr(largest_Z)[None, :] - ndtr(largest_Z[None, :] - q * scale_S[:, None])
    return float(np.clip(k * (weight_S @ within_SZ ** (k - 1) @ weight_Z), 0.0, 1.0))


@cache
def _nodes(freedom: float) -> tuple[Floats, Floats, Floats, Floats]:
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
