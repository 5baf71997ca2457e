"""The simplified model: the figures published of it, closed forms, and an integrator of another make."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from quantbench import theory
from quantbench.theory import adam_speed, drain, drain_rate, figures, logit, norm, resting, simplified, slope

ONE = np.ones(theory.SIZE)


def test_the_logit_of_a_drained_sink_grows_like_half_of_log_t() -> None:
    """Measured before: .54 for t from 1e4 to 1e6, .503 from 1e6 to 1e8."""
    assert slope(1e4, 1e6) == pytest.approx(0.54, abs=0.005)
    assert slope(1e6, 1e8) == pytest.approx(0.503, abs=0.001)


def test_the_logit_follows_its_closed_form() -> None:
    """E^2/2 + 3WE + 3W^2 log E - W^3/E - Var(xi) t is constant, for small xi / E: its derivative in t is 0."""
    w, times = theory.OTHERS, [1e5, 1e6, 1e7, 1e8]

    def left(y: float) -> float:
        e = math.exp(y)
        return e**2 / 2 + 3 * w * e + 3 * w**2 * y - w**3 / e

    weights = [left(y) for y in logit(times)]
    for (t0, a), (t1, b) in zip(
        zip(times, weights, strict=True), list(zip(times, weights, strict=True))[1:], strict=False
    ):
        assert (b - a) / (t1 - t0) == pytest.approx(1.0, rel=0.01)  # Var(xi)


def test_another_integrator_gives_the_same_logit_and_the_same_drain() -> None:
    model = simplified()
    late = solve_ivp(
        lambda tau, y: [-math.exp(tau) * model.slope_y(float(y[0]), ONE)], (0, math.log(1e6)), [0.0], "LSODA",
        rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    assert logit([1e6])[0] == pytest.approx(float(late.y[0, -1]), abs=1e-6)
    flown = solve_ivp(
        lambda _, s: -model.slope_s(2.0, s), (0, 300), theory._random_s(), "DOP853", rtol=1e-11, atol=1e-13
    )
    gap_K = flown.y[:, -1] + math.exp(-2.0) * model.xi_K
    assert drain(2.0, [300.0])[0] == pytest.approx(float(np.linalg.norm(gap_K - gap_K.mean())), rel=1e-6)


def test_slopes_are_derivatives_of_the_loss() -> None:
    model, s_K, small = simplified(), theory._random_s(), 1e-6
    for y in (-1.0, 0.5, 3.0):
        by_hand = (model.loss(y + small, s_K) - model.loss(y - small, s_K)) / (2 * small)
        assert model.slope_y(y, s_K) == pytest.approx(by_hand, rel=1e-6, abs=1e-9)
        found_K = model.slope_s(y, s_K)
        for k in range(theory.SIZE):
            step_K = small * np.eye(theory.SIZE)[k]
            by_hand = (model.loss(y, s_K + step_K) - model.loss(y, s_K - step_K)) / (2 * small)
            assert found_K[k] == pytest.approx(by_hand, rel=1e-5, abs=1e-9)


def test_the_loss_is_never_negative_and_zero_where_attention_disturbs_nothing() -> None:
    model = simplified()
    assert model.loss(1.0, theory._random_s()) > 0.01
    assert model.loss(2.0, -math.exp(-2.0) * model.xi_K) == pytest.approx(0.0, abs=1e-14)
    assert model.loss(30.0, 5 * ONE) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_without_a_drain_the_logit_stops_at_the_minimum(scale: float) -> None:
    y, best = resting(scale)
    assert y == pytest.approx(best, abs=1e-8)
    model, s_K = simplified(), scale * theory._random_s()
    assert model.loss(best, s_K) < min(model.loss(best - 0.1, s_K), model.loss(best + 0.1, s_K))


def test_smaller_values_are_worth_more_attention() -> None:
    assert resting(0.3)[0] > resting(1.0)[0] > resting(3.0)[0]


@pytest.mark.parametrize("y", [0.0, 2.0, 4.0])
def test_the_drain_is_exponential_at_the_smallest_eigenvalue(y: float) -> None:
    rate = drain_rate(y)
    distances = drain(y, [16 / rate, 19 / rate, 22 / rate])
    for early, late in ((0, 1), (1, 2)):
        assert math.log(distances[early] / distances[late]) == pytest.approx(3.0, rel=0.02)


def test_attention_on_the_sink_speeds_its_drain() -> None:
    """Mutual reinforcement: the rate goes with the square of the attention."""
    model = simplified()
    for y in (0.0, 2.0):
        ratio = (model.share(y + 1) / model.share(y)) ** 2
        assert drain_rate(y + 1) / drain_rate(y) == pytest.approx(ratio, rel=1e-9)


def test_adam_grows_the_norm_linearly_and_sgd_does_not() -> None:
    """Published of the authors' surrogate, whose formula is not: 27.9, 41.6, 64.0; SGD 10.01."""
    found = norm("adam", [1_000, 5_000, 10_000])
    assert found == pytest.approx([27.9, 41.6, 64.0], rel=0.26)
    assert found[1:] == pytest.approx([41.6, 64.0], rel=0.05)
    (still,) = norm("sgd", [10_000])
    assert still == pytest.approx(10.01, abs=0.13)
    steps = [(b - a) / 2_500 for a, b in zip(norm("adam", [2_500, 5_000]), norm("adam", [5_000, 7_500]), strict=True)]
    assert steps == pytest.approx([adam_speed()] * 2, rel=0.01)


@pytest.mark.parametrize("lr", [0.1, 1.0, 3.0])
def test_the_speed_does_not_depend_on_the_learning_rate(lr: float) -> None:
    early, late = norm("adam", [5_000, 10_000], lr=lr)
    assert (late - early) / 5_000 == pytest.approx(adam_speed(), rel=0.01)


def test_eps_ends_the_growth() -> None:
    plain, stopped = (norm("adam", [10_000], eps=eps)[0] for eps in (0.0, 1e-8))
    assert stopped < plain / 2


def test_all_of_it_takes_two_seconds() -> None:
    """Of the processor, in a process of its own, so that nothing is remembered; a slow machine may take thrice that."""
    code = (
        "import time, numpy, quantbench.tasks; from quantbench import theory; start = time.process_time(); "
        "print(len(theory.figures()), time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(done[0]) == len(figures()) == 12
    assert float(done[1]) < 6
