"""The simplified model of arXiv:2410.13835, exactly: why a sink's logit grows like (1/2) log t, and its value drains.

One head, one token v that needs no help (no trigger): the bigram p_v is known already, and attention can only disturb
it. With e^y the unnormalised weight of BOS, s its value (in logits), W the weights of the others and xi their values,

    z = (e^y s + xi) / (e^y + W),   q_v = softmax(log p_v + z),   L(y, s) = sum_v pi_v KL(p_v || q_v)

What gradient flow dy/dt = -dL/dy, ds/dt = -dL/ds does to it:

- *the logit*: with s = c 1, which softmax does not see, dy/dt -> Var(xi) e^y / (e^y + W)^3, so that with E = e^y

      E^2 / 2 + 3 W E + 3 W^2 log E - W^3 / E = Var(xi) t + const        (small xi / E)

  and y ~ (1/2) log t; the slope dy / dlog t comes down to 1/2 from above, as W / E dies out;
- *no drain, no growth*: with a random fixed s the best weight of BOS is finite, and y stops there;
- *the drain*: with y fixed, L is convex in s with its minimum where z is constant, s* = c 1 - e^-y xi: near it the
  distance dies as exp(-lambda t), lambda the smallest non-zero eigenvalue of
  (e^y / (e^y + W))^2 sum_v pi_v (diag p_v - p_v p_v^T);
- *the norm*: a gradient that dies out exponentially in the norm m of a residual state, L(m) = e^-m, moves SGD hardly at
  all. Adam divides by the root of a mean that forgets by beta2 a step: the gradient cannot die out faster than that
  root, or the step would not be small. So dm/dt -> -(1/2) log beta2 a step, *linear growth at a speed that the
  learning rate does not enter*, until the gradient meets Adam's eps. The authors' surrogate is not in their code; it
  has 27.9, 41.6 and 64.0 after 1, 5 and 10 thousand steps from 10 at lr .3, SGD 10.01.

The paper gives no figures for pi, p, xi and W. Here: V = K = 8, p_v from exponential draws, pi uniform, xi normal and
scaled to sum_v pi_v Var_{p_v}(xi) = 1, W = 7. float64 throughout; fixed steps of Runge and Kutta's fourth order.

Shapes: V tokens, K next tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Value = TypeVar("Value", float, "Floats")

SIZE = 8  # V and K
OTHERS = 7.0  # W
SEED = 2410
LR, START, BETAS = 0.3, 10.0, (0.9, 0.99)  # of the surrogate; the betas are those of the paper's runs


@dataclass(frozen=True)
class Simplified:
    """The model's constants. p_VK rows and pi_V sum to one."""

    p_VK: Floats
    pi_V: Floats
    xi_K: Floats
    others: float  # W

    def loss(self, y: float, s_K: Floats) -> float:
        """L(y, s), nats."""
        z_K = self._z(y, s_K)
        exact = math.fsum(
            float(pi) * (math.log(float(p_K @ _exp(z_K))) - float(p_K @ z_K))
            for pi, p_K in zip(self.pi_V, self.p_VK, strict=True)
        )
        return exact

    def slope_y(self, y: float, s_K: Floats) -> float:
        """dL/dy."""
        weight = math.exp(y)
        moved_K = weight * (self.others * s_K - self.xi_K) / (weight + self.others) ** 2
        return float(self._slope_z(y, s_K) @ moved_K)

    def slope_s(self, y: float, s_K: Floats) -> Floats:
        """dL/ds [K]."""
        return self._slope_z(y, s_K) * self.share(y)

    def share(self, y: float) -> float:
        """The attention to BOS, e^y / (e^y + W)."""
        return math.exp(y) / (math.exp(y) + self.others)

    def curvature(self, y: float) -> Floats:
        """The second derivative of L in s at its minimum, [K, K]; the all-ones vector has eigenvalue 0."""
        import numpy as np

        mean_KK = np.diag(self.pi_V @ self.p_VK) - np.einsum("v,vi,vj->ij", self.pi_V, self.p_VK, self.p_VK)
        found: Floats = self.share(y) ** 2 * mean_KK
        return found

    def _z(self, y: float, s_K: Floats) -> Floats:
        weight = math.exp(y)
        found: Floats = (weight * s_K + self.xi_K) / (weight + self.others)
        return found - found.mean()  # softmax does not see the mean; exp should not

    def _slope_z(self, y: float, s_K: Floats) -> Floats:
        tilted_VK = self.p_VK * _exp(self._z(y, s_K))
        q_VK = tilted_VK / tilted_VK.sum(1, keepdims=True)
        found: Floats = self.pi_V @ (q_VK - self.p_VK)
        return found


def _exp(x: Floats) -> Floats:
    import numpy as np

    found: Floats = np.exp(x)
    return found


@cache
def simplified() -> Simplified:
    """The model with the constants above: the same bits on every machine."""
    import numpy as np

    uniform = _uniform(SIZE * SIZE + 2 * SIZE)
    exponential_VK = -np.log(uniform[: SIZE * SIZE]).reshape(SIZE, SIZE)
    p_VK = exponential_VK / exponential_VK.sum(1, keepdims=True)
    pi_V = np.full(SIZE, 1 / SIZE)
    a_K, b_K = uniform[SIZE * SIZE :].reshape(2, SIZE)
    xi_K = np.sqrt(-2 * np.log(a_K)) * np.cos(2 * np.pi * b_K)  # Box and Muller
    variance = float(pi_V @ (p_VK @ xi_K**2 - (p_VK @ xi_K) ** 2))
    return Simplified(p_VK, pi_V, xi_K / math.sqrt(variance), OTHERS)


def _uniform(count: int) -> Floats:
    """Numbers in (0, 1), from counters: a generator of numpy's may change."""
    import numpy as np

    from quantbench.tasks import random_bits

    bits = random_bits(SEED, np.arange(count)) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) / 2.0**53


# --- what gradient flow does ------------------------------------------------------------------------------------------


def logit(times: list[float], model: Simplified | None = None, step: float = 0.02) -> list[float]:
    """y at ascending times >= 1, of y(1) = 0 under gradient flow with s = 1: steps are even in log t."""
    import numpy as np

    model = simplified() if model is None else model
    one_K = np.ones_like(model.xi_K)
    found, y, at = [], 0.0, 0.0
    for time in times:
        end = math.log(time)
        count = max(1, math.ceil((end - at) / step))
        y = float(_runge_kutta(lambda tau, y: -math.exp(tau) * model.slope_y(y, one_K), y, at, end, count))
        found.append(y)
        at = end
    return found


def slope(low: float, high: float, model: Simplified | None = None) -> float:
    """The mean of dy / dlog t between two times, with s = 1."""
    before, after = logit([low, high], model)
    return (after - before) / math.log(high / low)


def resting(scale: float = 1.0, model: Simplified | None = None) -> tuple[float, float]:
    """(y after a long flow from 0, the y at which it stops) with a random fixed s of this standard deviation."""
    model = simplified() if model is None else model
    s_K = scale * _random_s()
    y = float(_runge_kutta(lambda _, y: -model.slope_y(y, s_K), 0.0, 0.0, 20_000.0, 4_000))
    low, high = -30.0, 30.0
    direction = model.slope_y(0.0, s_K)
    low, high = (low, 0.0) if direction > 0 else (0.0, high)
    for _ in range(200):  # the first zero from 0 on, where there is one below the limits: L has one well
        middle = (low + high) / 2
        low, high = (middle, high) if model.slope_y(middle, s_K) < 0 else (low, middle)
    return y, (low + high) / 2


def _random_s() -> Floats:
    import numpy as np

    a_K, b_K = _uniform(SIZE * SIZE + 4 * SIZE)[-2 * SIZE :].reshape(2, SIZE)
    found: Floats = np.sqrt(-2 * np.log(a_K)) * np.cos(2 * np.pi * b_K)
    return found


def drain(y: float, times: list[float], model: Simplified | None = None, step: float = 1.0) -> list[float]:
    """||s - s*|| at ascending times, of s flowing from a random one with y held; s and s* without their means."""
    import numpy as np

    model = simplified() if model is None else model
    s_K = _random_s()
    rest_K = -math.exp(-y) * model.xi_K
    found, at = [], 0.0
    for time in times:
        count = max(1, math.ceil((time - at) / step))
        s_K = _runge_kutta(lambda _, s: -model.slope_s(y, s), s_K, at, time, count)
        gap_K = s_K - rest_K
        found.append(float(np.linalg.norm(gap_K - gap_K.mean())))
        at = time
    return found


def drain_rate(y: float, model: Simplified | None = None) -> float:
    """lambda: the rate at which the distance dies in the end."""
    import numpy as np

    model = simplified() if model is None else model
    return float(np.linalg.eigvalsh(model.curvature(y))[1])


def _runge_kutta(change: Callable[[float, Value], Value], x: Value, start: float, end: float, count: int) -> Value:
    """x at `end`; a number or an array."""
    h = (end - start) / count
    for index in range(count):
        t = start + index * h
        a = change(t, x)
        b = change(t + h / 2, x + h / 2 * a)
        c = change(t + h / 2, x + h / 2 * b)
        d = change(t + h, x + h * c)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


# --- the norm --------------------------------------------------------------------------------------------------------


def norm(optimizer: str, steps: list[int], lr: float = LR, eps: float = 0.0) -> list[float]:
    """m at ascending numbers of steps on L(m) = e^-m from START, under `adam` (with its bias corrections) or `sgd`."""
    beta1, beta2 = BETAS
    m, first, second, found = START, 0.0, 0.0, []
    for step in range(1, max(steps) + 1):
        gradient = -math.exp(-m)
        if optimizer == "adam":
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            root = math.sqrt(second / (1 - beta2**step)) + eps
            m -= lr * first / (1 - beta1**step) / root
        else:
            m -= lr * gradient
        if step in steps:
            found.append(m)
    return found


def adam_speed() -> float:
    """What Adam adds to m a step in the end, -(1/2) log beta2: from e^-m ~ root of the second moment ~ beta2^(t/2)."""
    return -0.5 * math.log(BETAS[1])


@cache
def figures() -> dict[str, float]:
    """What the table of claims shows of all this."""
    held = 2.0
    rate = drain_rate(held)
    early, late = 16 / rate, 22 / rate
    before, after = drain(held, [early, late])
    stopped, best = resting()
    adam, sgd = norm("adam", [1_000, 5_000, 10_000]), norm("sgd", [10_000])
    return {
        "slope 1e4 to 1e6": slope(1e4, 1e6),
        "slope 1e6 to 1e8": slope(1e6, 1e8),
        "y at rest": stopped,
        "y of the minimum": best,
        "drain rate": -math.log(after / before) / (late - early),
        "drain rate, eigenvalue": rate,
        "adam 1000": adam[0],
        "adam 5000": adam[1],
        "adam 10000": adam[2],
        "adam a step": (adam[2] - adam[1]) / 5_000,
        "adam a step, in the end": adam_speed(),
        "sgd 10000": sgd[0],
    }
