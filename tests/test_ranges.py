"""Ranges and codes of activations: by hand, against numpy and torch, and over the sites of whole models."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import gaussian, ids
from tiny import model as ours
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import Site, anatomy
from quantbench.calibration import Calibration, Exemption, spans, uncounted, what_counts
from quantbench.ops.integers import dequantize, limits, offsets, quantize, steps
from quantbench.ops.ranges import Histogram, Span
from quantbench.quantizers import Rounding, nearest, round_site

BITS = range(2, 9)


def span(low: float, high: float) -> Span:
    return Span(torch.tensor(low), torch.tensor(high))


def histogram(*parts: Tensor) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def heavy(count: int = 20_011, seed: int = 0) -> Tensor:
    """Student's t with two degrees of freedom: a few values are a hundred times the others."""
    draws = np.random.default_rng(seed).standard_t(2, count)
    return torch.from_numpy(draws).float()


# --- asymmetric codes -----------------------------------------------------------------------------------------------


def test_an_asymmetric_code_by_hand():
    scale, zero = steps(torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric=False)
    assert (scale, zero) == (1.0, -1.0)  # -2..1 stand for -1, 0, 1, 2
    x = torch.tensor([-9.0, -1.0, -0.4, 0.0, 0.5, 1.5, 2.0, 9.0])
    q = quantize(x, scale, 2, zero)
    assert q.tolist() == [-2, -2, -1, -1, -1, 1, 1, 1]  # half to even of x / scale
    assert dequantize(q, scale, zero).tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    assert torch.equal(offsets(x, scale, 2, zero), q.float() - zero)


@pytest.mark.parametrize("bits", BITS)
def test_zero_stands_for_zero_whatever_the_range(bits: int):
    low, high = -gaussian(500).abs(), gaussian(500, seed=1).abs() * 10
    low[:9], high[5:20] = 0, 0  # one-sided, and empty
    scale, zero = steps(low, high, bits, symmetric=False)
    lowest, top = limits(bits, symmetric=False)
    assert bool(((zero >= lowest) & (zero <= top) & (zero == zero.round())).all())
    x = torch.zeros(500)
    assert torch.equal(dequantize(quantize(x, scale, bits, zero), scale, zero), x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_what_lies_in_the_range_is_off_by_half_a_step_at_most(bits: int, symmetric: bool):
    x = gaussian(7, 300)
    x = x * 3 + 2 if not symmetric else x
    rounding = Rounding(bits, "static", span(float(x.min()), float(x.max())), symmetric)
    y = rounding(x, x)
    assert len(y.unique()) <= 2**bits - symmetric
    # A step more at the ends: the zero point is rounded, too.
    steps_off = (y - x).abs() / rounding.static_scale
    assert steps_off.max() <= (0.5 if symmetric else 1.0) + 1e-4
    assert steps_off.double().mean() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(y, rounding(y, y))


@pytest.mark.parametrize("scope", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_dynamic_ranges_are_those_of_the_tokens(bits: int, symmetric: bool, scope: str):
    x = gaussian(3, 5, 64) + 1
    x[1, 2] *= 100
    x[0, 0], x[0, 1] = 0.0, -0.7  # a row of zeros, a constant one
    y = Rounding(bits, scope, symmetric=symmetric)(x, x)
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if scope == "token" else (x.min(), x.max())
    scale, zero = steps(low.clamp(max=0), high.clamp(min=0), bits, symmetric)
    expected = dequantize(quantize(x, scale, bits, None if symmetric else zero), scale, zero)
    assert torch.equal(y, expected)
    assert not y[0, 0].any()
    if scope == "token":
        torch.testing.assert_close(y[0, 1], x[0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite(symmetric: bool):
    x = gaussian(4, 8)
    x[1, 3], x[2, 3], x[3, 3] = math.nan, math.inf, -math.inf
    static = Rounding(8, "static", span(-2.0, 2.0), symmetric)(x, x)
    assert static[1, 3] == 0.0  # int8 has no NaN
    assert static[2, 3] == static.max() > 1.9
    assert static[3, 3] == static.min() < -1.9
    token = Rounding(8, "token", symmetric=symmetric)(x, x)
    assert token[0].isfinite().all()
    assert token[1:].isnan().any(-1).all()  # the row says so
    q, scale, _ = Rounding(8, "token", symmetric=symmetric).integers(x, x)
    assert q.dtype == torch.int8
    assert not scale[1:].isfinite().any()
    assert Rounding(8, "tensor", symmetric=symmetric)(x, x).isnan().any()


def test_bf16_is_rounded_in_float32():
    x = gaussian(4, 64).bfloat16()
    for rounding in (Rounding(8, "token"), Rounding(8, "static", span(-3.0, 4.0), symmetric=False)):
        y = rounding(x, x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, rounding(x.float(), x.float()).bfloat16())


# --- torch's own fake quantization ----------------------------------------------------------------------------------
# It multiplies by the reciprocal of the scale: the same where the scale is a power of two.


@pytest.mark.parametrize("bits", BITS)
def test_it_is_torchs_fake_quantization_per_tensor(bits: int):
    x, top = gaussian(1000) * 3, 2 ** (bits - 1) - 1
    symmetric = Rounding(bits, "static", span(-top / 4, top / 4))
    assert symmetric.static_scale == 0.25
    assert torch.equal(symmetric(x, x), torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -top, top))
    low, high = -0.25, (2**bits - 2) / 4
    asymmetric = Rounding(bits, "static", span(low, high), symmetric=False)
    zero = int(asymmetric.static_zero)
    assert (asymmetric.static_scale, zero) == (0.25, -top)
    assert torch.equal(asymmetric(x, x), torch.fake_quantize_per_tensor_affine(x, 0.25, zero, -top - 1, top))


@pytest.mark.parametrize("bits", BITS)
def test_it_is_torchs_fake_quantization_per_channel(bits: int):
    top = 2 ** (bits - 1) - 1
    scale_N = torch.tensor([0.5, 0.125, 4.0])
    w_NK = gaussian(3, 64).clamp(-1, 1) * scale_N.unsqueeze(1) * top
    w_NK[:, 0] = scale_N * top
    codes = nearest(w_NK, bits)
    assert torch.equal(codes.scale_NG.flatten(), scale_N)
    zero_N = torch.zeros(3, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(w_NK, scale_N, zero_N, 0, -top, top)
    assert torch.equal(dequantize(codes.q_NK, codes.scale_NG), expected)


def test_elsewhere_the_two_differ_only_next_to_a_half():
    x = gaussian(100_000)
    rounding = Rounding(8, "static", span(-3.3, 3.3))
    theirs = torch.fake_quantize_per_tensor_affine(x, float(rounding.static_scale), 0, -127, 127)
    apart = rounding(x, x) != theirs
    steps_N = x.double() / rounding.static_scale.double()
    assert apart.double().mean() < 1e-4
    assert (((steps_N - steps_N.floor()) - 0.5).abs()[apart] < 1e-4).all()


# --- histograms -----------------------------------------------------------------------------------------------------

SAMPLES = {
    "gaussian": gaussian(20_001) * 1e-3 + 2e-3,
    "heavy": heavy(),
    "rectified": heavy(seed=1).relu(),
    "one": torch.tensor([3.7]),
    "constant": torch.full((99,), -0.3),
}


@pytest.mark.parametrize("percent", [50.5, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_percentiles_are_numpys(name: str, percent: float):
    x = SAMPLES[name]
    found = histogram(x)

    def of(values: Tensor, share: float) -> float:
        return float(np.percentile(values.double().numpy(), share, method="inverted_cdf"))

    both = found.percentile(percent, symmetric=True)
    assert float(both.high) == pytest.approx(of(x.abs(), percent), rel=1e-3)
    assert both.low == -both.high
    tails = found.percentile(percent, symmetric=False)
    share = 100 - (100 - percent) / 2
    assert float(tails.high) == pytest.approx(max(0.0, of(x, share)), rel=1e-3)
    assert float(tails.low) == pytest.approx(min(0.0, -of(-x, share)), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_least_error_is_that_of_brute_force(bits: int, symmetric: bool):
    x = heavy(4000)
    if not symmetric:
        x = x.where(x > 0, x / 10)
    x_N = x.double().numpy()

    def error(low: float, high: float) -> float:
        lowest, top = limits(bits, symmetric)
        if symmetric:
            scale, zero = high / top, 0.0
        else:
            scale = (high - low) / (top - lowest)
            zero = np.clip(lowest - np.rint(low / scale), lowest, top)
        stands_for = (np.clip(np.rint(x_N / scale) + zero, lowest, top) - zero) * scale
        return float(np.square(stands_for - x_N).sum())

    low, high = (x_N.min(), x_N.max()) if not symmetric else (-np.abs(x_N).max(), np.abs(x_N).max())
    least = min(error(low * share, high * share) for share in np.arange(1, 201) / 200)
    found = histogram(x).least_error(bits, symmetric)
    assert error(float(found.low), float(found.high)) <= least * 1.01
    if bits < 6:
        assert least < error(low, high)  # or there is nothing to find


def test_histograms_of_batches_add_up():
    x = heavy(5000)
    whole, parts = histogram(x), histogram(*x.view(5, 10, 100))
    for a, b in zip(whole.values(), parts.values(), strict=True):
        assert torch.equal(a, b)
    values, counts = whole.values()
    assert counts.sum() == 5000
    assert torch.equal(values, values.sort().values)
    x = x.sort().values.double()
    assert (values.repeat_interleave(counts) / x - 1).abs().max() < 2**-11 + 1e-9


def test_what_is_not_finite_is_not_counted():
    found = histogram(torch.tensor([1.0, math.nan, math.inf, -math.inf, -0.0, 0.0, -2.0]))
    values, counts = found.values()
    assert counts.sum() == 4
    assert values.tolist() == pytest.approx([-2.0, 0.0, 0.0, 1.0], rel=1e-3)
    with pytest.raises(AssertionError, match="nothing was counted"):
        histogram(torch.tensor([math.nan])).values()


@pytest.mark.parametrize("rule", [lambda h: h.percentile(99.9, True), lambda h: h.least_error(8, False)])
def test_nothing_but_zeros_has_an_empty_range(rule: Callable[[Histogram], Span]):
    found = rule(histogram(torch.zeros(9)))
    assert (found.low, found.high) == (0.0, 0.0)
    x = torch.zeros(3)
    assert not Rounding(8, "static", found)(x, x).any()


# --- what counts among the sites of a model -------------------------------------------------------------------------

IDS = ids(4, 12)
FIRST = torch.zeros(IDS.shape, dtype=torch.bool)
FIRST[:, 0] = True
CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()


def loud() -> nn.Module:
    model = ours()
    model.embed.weight.data[IDS[:, 0]] *= 40
    return model


def seen(model: nn.Module, site: str, place: str) -> Tensor:
    """What passes there in full precision, over all sequences."""
    kept: list[Tensor] = []
    hook = anatomy(model).sites(site)[place].register_forward_hook(lambda m, args, output: kept.append(output))
    with torch.no_grad():
        for half in IDS.split(2):  # the batches of the calibration: others may differ in the last bit
            model(half)
    hook.remove()
    return torch.cat(kept)


def calibration(exempt: bool) -> Calibration:
    return Calibration(list(zip(IDS.split(2), FIRST.split(2) if exempt else (None, None), strict=True)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", ["absmax", "percentile"])
@pytest.mark.parametrize("exempt", [False, True])
@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("residual", "0.residual"),
        ("norms", "1.mlp.norm"),
        ("keys", "1.attention.keys"),
        ("values", "0.attention.values"),
        ("scores", "0.attention.scores"),
        ("probabilities", "0.attention.probabilities"),
        ("products", "0.attention.products"),
    ],
)
def test_a_range_is_that_of_what_counts(site: str, place: str, exempt: bool, rule: str, symmetric: bool):
    """Neither exempt positions, as queries or as keys, nor keys that a query does not see."""
    model = loud()
    x = seen(model, site, place)
    counts = torch.ones_like(x, dtype=torch.bool)
    if site in ("scores", "probabilities"):
        counts &= CAUSAL
    if exempt:
        counts &= ~(FIRST[:, None, :, None] if x.ndim == 4 else FIRST[:, :, None])
        if site in ("scores", "probabilities"):
            counts &= ~FIRST[:, None, None, :]
    values = x[counts].double().numpy()
    found = spans(model, calibration(exempt), (site,), 8, symmetric, rule, 99.0)[place]
    assert found.low.dtype == found.high.dtype == torch.float32
    if rule == "absmax":
        low, high = min(0.0, values.min()), max(0.0, values.max())
        if symmetric:
            low, high = -np.abs(values).max(), np.abs(values).max()
        assert (float(found.low), float(found.high)) == (low, high)
    else:
        share = 99.0 if symmetric else 99.5
        top = np.percentile(np.abs(values) if symmetric else values, share, method="inverted_cdf")
        assert float(found.high) == pytest.approx(max(0.0, top), rel=1e-3)


@pytest.mark.parametrize("rule", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_site_that_overflows_is_named(rule: str, value: float):
    model = ours()
    model.embed.weight.data[IDS[1, 3]] = value
    with pytest.raises(ValueError, match=r"^site 0\.attention\.qkv: activations overflow [^\n]*$"):
        spans(model, calibration(False), ("inputs",), 8, rule=rule)


def test_a_calibration_without_a_token_is_refused():
    nothing = Calibration([(IDS, torch.ones_like(FIRST))])
    for rule in ("absmax", "percentile"):
        with pytest.raises(AssertionError, match="every calibration position is exempt"):
            spans(ours(), nothing, ("inputs",), 8, rule=rule)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scope", ["token", "tensor"])
@pytest.mark.parametrize("exempt", [False, True])
def test_a_key_that_comes_later_changes_no_score_that_is_seen(scope: str, symmetric: bool, exempt: bool):
    site, exemption = Site(), Exemption()
    round_site(site, "scores", Rounding(4, scope, symmetric=symmetric), exemption)
    x = gaussian(4, 2, 12, 12)
    changed = x + 1000 * gaussian(4, 2, 12, 12, seed=1) * ~CAUSAL
    with exemption.of(FIRST if exempt else None):
        before, after = site(x), site(changed)
    assert torch.equal(before[..., CAUSAL], after[..., CAUSAL])
    assert not torch.equal(before[..., CAUSAL], x[..., CAUSAL])


def test_of_pairs_the_first_keys_are_cached_and_the_last_are_learned():
    """Two queries; columns: one cached key, the two queries' own, one learned key. Position 0 is exempt."""
    exemption, x = Exemption(), torch.arange(1.0, 9.0).view(1, 1, 2, 4)
    assert what_counts(x, "scores", exemption, appended=1)[0, 0].tolist() == [[1, 2, 0, 4], [5, 6, 7, 8]]
    assert what_counts(x, "scores", exemption)[0, 0].tolist() == [[1, 2, 3, 0], [5, 6, 7, 8]]  # two cached ones
    future = uncounted(x, "probabilities", exemption, appended=1)
    assert future.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    with exemption.of(torch.tensor([[True, False]])):
        exempt = exemption.spread(x, "scores", appended=1)
        assert exempt.expand_as(x)[0, 0].int().tolist() == [[1, 1, 1, 1], [0, 1, 0, 0]]
        assert what_counts(x, "scores", exemption, appended=1)[0, 0].tolist() == [[0] * 4, [5, 0, 7, 8]]


def test_the_range_of_scores_holds_those_of_a_learned_key_and_of_no_later_one():
    model = ours({"kv-bias": {}})
    for block in model.blocks:
        block.attention.form.key_D.data *= 1000
    for site in ("scores", "probabilities"):
        x = seen(model, site, f"1.attention.{site}")
        assert x.shape[-1] == x.shape[-2] + 1
        counts = F.pad(CAUSAL, (0, 1), value=True).expand_as(x)
        if site == "scores":
            assert x[..., -1].abs().max() > x[..., :-1].abs().max()
        found = spans(model, calibration(False), (site,), 8)[f"1.attention.{site}"]
        assert float(found.high) == pytest.approx(float(x[counts].abs().max()), rel=1e-5)


@pytest.mark.parametrize("scope", ["static", "token", "tensor"])
@pytest.mark.parametrize("kind", ["keys", "values", "products", "scores", "probabilities", "residual"])
def test_exempt_positions_stay_as_they_are_and_count_for_no_range(kind: str, scope: str):
    site, exemption = Site(), Exemption()
    round_site(site, kind, Rounding(4, scope, span(-2.0, 2.0) if scope == "static" else None), exemption)
    pairs = kind in ("scores", "probabilities")
    x = gaussian(4, 12, 8) if kind == "residual" else gaussian(4, 2, 12, 12 if pairs else 8)
    at = FIRST[:, :, None].expand_as(x) if x.ndim == 3 else FIRST[:, None, :, None].expand_as(x)
    if pairs:
        at = at | FIRST[:, None, None, :]
    loud = x.where(~at, 1000.0)
    with exemption.of(FIRST):
        y = site(loud)
        assert torch.equal(y[at], loud[at])
        assert torch.equal(y[~at], site(x)[~at])  # whatever the exempt ones are
    rest = y[~at & (CAUSAL if pairs else torch.ones_like(at))]
    assert not torch.equal(rest, loud[~at & (CAUSAL if pairs else torch.ones_like(at))])
    if scope != "token":
        assert len(rest.unique()) <= 15
    assert torch.equal(what_counts(x, kind, exemption), x.tril() if pairs else x)
