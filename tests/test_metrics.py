"""Metrics on tensors whose figures are known, on cases where definitions disagree, and the wiring of the trace."""

import math
from itertools import count
from typing import Any

import pytest
import torch
from tiny import MODELS, ids, model
from torch import Tensor, nn

from quantbench import catalog, trace
from quantbench.anatomy import Anatomy, Heads, Site
from quantbench.metrics import Activations, LayerMean, Metric, Reading, largest, median
from quantbench.metrics.act_max import ActMax
from quantbench.metrics.bos_attention import BosAttention
from quantbench.metrics.delta_logit import DeltaLogit
from quantbench.metrics.inf_norm import InfNorm
from quantbench.metrics.kurtosis import KurtosisHe, KurtosisOSP, KurtosisQualcomm
from quantbench.metrics.massive_count import MassiveCount
from quantbench.metrics.mmr import MMR
from quantbench.metrics.residual_peak import ResidualPeak
from quantbench.metrics.sink_rate import SinkRate, received
from quantbench.metrics.value_drain import ValueDrain

torch.set_num_threads(1)

ON_RESIDUALS = [ResidualPeak, InfNorm, MassiveCount, KurtosisHe, KurtosisOSP, KurtosisQualcomm, MMR]
ON_ATTENTION = [SinkRate, BosAttention, DeltaLogit]


def of_residuals(kind: type[Metric], *blocks_BTD: Tensor) -> Reading:
    metric = kind()
    for layer, hidden_BTD in enumerate(blocks_BTD):
        metric.residual(layer, Activations(hidden_BTD))
    return metric.result()


def of_attention(metric: Metric, weights_BHTT: Tensor, scores_BHTT: Tensor | None = None) -> Reading:
    metric.attention(0, weights_BHTT if scores_BHTT is None else scores_BHTT, weights_BHTT)
    return metric.result()


def numbers(reading: Reading) -> list[float]:
    return [x for x in (reading.value, *reading.per_layer, *reading.extra.values()) if x is not None]


@pytest.fixture
def planted() -> Tensor:
    """One feature of one token = 300 in 256 tokens x 512 features of Gaussian noise."""
    hidden_BTD = torch.randn(1, 256, 512, generator=torch.Generator().manual_seed(0))
    hidden_BTD[0, 0, 7] = 300.0
    return hidden_BTD


def one_hot_rows(length: int, target: list[int]) -> Tensor:
    """Weights [1, 1, T, T] in which query i puts everything on target[i]."""
    return torch.eye(length)[target][None, None]


# --- block outputs ---


@pytest.mark.parametrize(
    ("kind", "expected"), [(KurtosisHe, 85.6), (KurtosisOSP, 2.0), (KurtosisQualcomm, 21710), (MMR, 6.6)]
)
def test_one_planted_sink_token_reads_as_published(planted: Tensor, kind: type[Metric], expected: float) -> None:
    assert of_residuals(kind, planted).value == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("kind", "expected"), [(KurtosisHe, 1.0), (KurtosisOSP, 0.0), (KurtosisQualcomm, 3.0)])
@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-6, 1e4])
def test_kurtosis_of_a_gaussian_of_any_size(kind: type[Metric], expected: float, scale: float) -> None:
    hidden_BTD = scale * torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(1))
    assert of_residuals(kind, hidden_BTD).value == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("kind", "expected"), [(KurtosisOSP, 0.0), (KurtosisQualcomm, 3.0)])
@pytest.mark.parametrize("shift", [1.0, 1000.0])
def test_centred_kurtosis_does_not_see_a_shift(kind: type[Metric], expected: float, shift: float) -> None:
    hidden_BTD = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(1)) + shift
    assert of_residuals(kind, hidden_BTD).value == pytest.approx(expected, abs=0.1)


def test_kurtoses_disagree_about_a_constant_feature_and_a_spike() -> None:
    """A feature that is large at every token is He's case; a spike at one token is Qualcomm's."""
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(2))
    feature, spike = noise.clone(), noise.clone()
    feature[:, :, 3] = 20.0
    spike[:, 5, 3] = 160.0  # the same energy in one place
    he, osp, qualcomm = (
        lambda h, k=kind: of_residuals(k, h).value for kind in (KurtosisHe, KurtosisOSP, KurtosisQualcomm)
    )
    assert he(feature) == pytest.approx(he(spike), rel=0.15)
    assert osp(feature) > 20 * osp(spike)
    assert qualcomm(spike) > 20 * qualcomm(feature)


def test_kurtosis_by_hand() -> None:
    hidden_BTD = torch.tensor([[[0.0, 0.0, 0.0, 4.0], [1.0, -1.0, 1.0, -1.0]]])
    # token 0: mean 1, deviations -1 -1 -1 3: (3 + 81) / 4 / (12 / 4)^2 = 21 / 9; token 1: 1
    assert of_residuals(KurtosisOSP, hidden_BTD).value == pytest.approx((21 / 9 + 1) / 2 - 3)
    # mean squares of features: .5 .5 .5 8.5
    assert of_residuals(KurtosisHe, hidden_BTD).value == pytest.approx((3 * 0.25 + 72.25) / 4 / 2.5**2)
    x = hidden_BTD.flatten() - 0.5
    assert of_residuals(KurtosisQualcomm, hidden_BTD).value == pytest.approx(float((x**4).mean() / (x**2).mean() ** 2))


def test_kurtosis_he_pools_tokens_over_batches() -> None:
    hidden_BTD = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3))
    whole, parts = KurtosisHe(), KurtosisHe()
    whole.residual(0, Activations(hidden_BTD))
    parts.residual(0, Activations(hidden_BTD[:1]))
    parts.residual(0, Activations(hidden_BTD[1:]))
    assert parts.result().value == pytest.approx(whole.result().value, rel=1e-12)


@pytest.mark.parametrize("kind", [KurtosisOSP, KurtosisQualcomm])
def test_equal_elements_have_no_kurtosis(kind: type[Metric]) -> None:
    assert of_residuals(kind, torch.full((1, 3, 7), 0.1)).value is None


def test_mmr_by_hand_leaves_out_tokens_without_a_median() -> None:
    hidden_BTD = torch.tensor([[[1.0, -2.0, 3.0, -10.0], [0.0, 0.0, 0.0, 5.0]]])
    assert of_residuals(MMR, hidden_BTD).value == pytest.approx(10 / 2.5)


def test_residual_peak_by_hand() -> None:
    # norms 10 1 2 3 4 and 2 1 1 8 1
    norms_BT = torch.tensor([[10.0, 1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 1.0, 8.0, 1.0]])
    hidden_BTD = torch.stack((0.6 * norms_BT, -0.8 * norms_BT), -1)
    reading = of_residuals(ResidualPeak, torch.ones(2, 5, 2), hidden_BTD)
    assert reading.value == pytest.approx((10 / 3 + 8 / 1) / 2)
    assert reading.per_layer == pytest.approx([1.0, (10 / 3 + 8) / 2])
    assert reading.extra["layer"] == 1
    assert reading.extra["bos"] == pytest.approx((10 / 3 + 2) / 2)
    assert reading.extra["others"] == pytest.approx((4 / 3 + 8) / 2)
    assert reading.extra["others.0"] == pytest.approx(1.0)
    assert reading.extra["excess.1"] == pytest.approx(((10 - 2.5) + (2 - 2.75)) / 2)
    assert reading.extra["embedding"] is None


def test_residual_peak_is_the_mean_over_sequences_not_over_batches() -> None:
    hidden_BTD = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4))
    metric = ResidualPeak()
    metric.residual(0, Activations(hidden_BTD[:2]))
    metric.residual(0, Activations(hidden_BTD[2:]))
    assert metric.result().value == pytest.approx(of_residuals(ResidualPeak, hidden_BTD).value, rel=1e-12)


def test_a_token_that_always_grows_is_no_relative_peak() -> None:
    """In one layer every token's norm grows (science): the peak is relative, the infinity norm is not."""
    hidden_BTD = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(5))
    small, large = of_residuals(ResidualPeak, hidden_BTD), of_residuals(ResidualPeak, 100 * hidden_BTD)
    assert large.value == pytest.approx(small.value, rel=1e-5)
    assert of_residuals(InfNorm, 100 * hidden_BTD).value == pytest.approx(100 * float(hidden_BTD.abs().max()))


def test_inf_norm_is_the_largest_over_batches_and_blocks() -> None:
    metric = InfNorm()
    for layer, numbers_ in [(0, [1.0, -7.0]), (1, [2.0, 3.0]), (0, [4.0, 0.0]), (1, [-5.0, 1.0])]:
        metric.residual(layer, Activations(torch.tensor([[numbers_]])))
    assert metric.result() == Reading(7.0, [7.0, 5.0], {"layer": 0})


def test_massive_activations_need_size_and_ratio() -> None:
    sequence = torch.full((1, 10, 10), 0.2)
    sequence[0, 0, :3] = torch.tensor([201.0, -300.0, 199.0])  # 199 is under 1000 x the median
    small = torch.full((1, 10, 10), 0.001)
    small[0, 0, 0] = 90.0  # 90,000 x the median, under 100
    assert of_residuals(MassiveCount, sequence).value == 2.0
    assert of_residuals(MassiveCount, torch.cat((sequence, small))).value == 1.0


# --- inputs of Linears ---


def test_act_max_names_its_layer_and_counts_the_head() -> None:
    metric = ActMax()
    metric.linear_input("0.a", 0, Activations(torch.tensor([[[1.0, -9.0]]])))
    metric.linear_input("1.a", 1, Activations(torch.tensor([[[5.0, 2.0]]])))
    metric.linear_input("head", None, Activations(torch.tensor([[[3.0, -3.0]]])))
    assert metric.result() == Reading(9.0, [9.0, 5.0], {"layer": 0, "head": 3.0})
    metric.linear_input("head", None, Activations(torch.tensor([[[-11.0, 0.0]]])))
    assert metric.result() == Reading(11.0, [9.0, 5.0], {"layer": None, "head": 11.0})


# --- attention ---


@pytest.mark.parametrize("length", [16, 33, 64])
def test_diagonal_and_previous_token_heads_are_no_sinks(length: int) -> None:
    diagonal = one_hot_rows(length, list(range(length)))
    previous = one_hot_rows(length, [max(0, i - 1) for i in range(length)])
    assert of_attention(SinkRate(), torch.cat((diagonal, previous), 1)).value == 0.0


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
def test_received_attention_is_the_mean_over_later_queries(length: int) -> None:
    weights_TT = torch.rand(length, length, generator=torch.Generator().manual_seed(9)).tril()
    expected_K = [float(weights_TT[k + 1 :, k].mean()) for k in range(length - 1) if k <= length / 2]
    assert received(weights_TT[None, None])[0, 0].tolist() == pytest.approx(expected_K)


def test_sink_rate_finds_one_position_for_the_whole_model() -> None:
    on_zero, on_three = one_hot_rows(16, [0] * 16), one_hot_rows(16, [*range(3), *[3] * 13])
    weights_BHTT = torch.cat((on_zero, on_three, on_three), 1)
    reading = of_attention(SinkRate(), weights_BHTT)
    assert (reading.value, reading.extra["k"]) == (pytest.approx(2 / 3), 3)
    assert reading.extra["bos"] == pytest.approx(1 / 3)


def test_sink_rate_looks_at_each_sequence_and_at_half_the_positions() -> None:
    late = one_hot_rows(16, [*range(12), *[12] * 4])  # k = 12 > T / 2
    assert of_attention(SinkRate(), late).value == 0.0
    uniform = torch.ones(1, 1, 16, 16).tril() / torch.arange(1, 17)[:, None]
    mixed = torch.cat((one_hot_rows(16, [0] * 16), uniform))
    assert of_attention(SinkRate(), mixed).value == 0.5  # not 1, as the mean of the two alphas would give


def test_attention_is_absolute_mass() -> None:
    """A ReLU head that gives BOS all of a total mass of .2 has no sink: a renormalised share would be 1."""
    faint = 0.2 * one_hot_rows(16, [0] * 16)
    assert of_attention(SinkRate(), faint).value == 0.0
    assert of_attention(BosAttention(), faint).value == pytest.approx(0.2)


def test_learned_keys_are_no_position_and_are_counted_apart() -> None:
    weights_BHTS = torch.cat((0.25 * one_hot_rows(8, [0] * 8), torch.full((1, 1, 8, 1), 0.75)), -1)
    reading = of_attention(BosAttention(), weights_BHTS)
    assert reading.value == pytest.approx(0.25)
    assert reading.extra["learned-keys"] == pytest.approx(0.75)
    assert of_attention(SinkRate(), weights_BHTS).value == 0.0
    assert of_attention(DeltaLogit(), weights_BHTS, weights_BHTS).value == pytest.approx(0.25)
    assert of_attention(BosAttention(), one_hot_rows(8, [0] * 8)).extra["learned-keys"] is None


def test_bos_attention_by_hand() -> None:
    weights_BHTT = torch.tensor(
        [[[[1.0, 0, 0], [0.5, 0.5, 0], [0.1, 0.4, 0.5]], [[1.0, 0, 0], [1, 0, 0], [0.8, 0, 0.2]]]]
    )
    reading = of_attention(BosAttention(), weights_BHTT)
    assert reading.value == pytest.approx((0.3 + 0.9) / 2)
    assert reading.extra["largest-head"] == pytest.approx(0.9)
    assert reading.extra["heads-above-half"] == 0.5


def test_bos_attention_without_trigger_queries() -> None:
    weights_BHTT = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.1, 0.4, 0.5]]]])
    metric = BosAttention(triggers=[7])
    metric.tokens(torch.tensor([[65, 4, 7]]))
    assert of_attention(metric, weights_BHTT).value == pytest.approx(0.5)
    nothing_left = BosAttention(triggers=[4, 7])
    nothing_left.tokens(torch.tensor([[65, 4, 7]]))
    assert of_attention(nothing_left, weights_BHTT).value is None


def test_delta_logit_by_hand_whatever_stands_above_the_diagonal() -> None:
    inf = math.inf
    scores_BHTT = torch.tensor(
        [[[[9.0, -inf, -inf, -inf], [8.0, 9.0, -inf, -inf], [5.0, 1.0, 9.0, -inf], [7.0, 2.0, 4.0, 9.0]]]]
    )
    on_zero = one_hot_rows(4, [0] * 4)
    reading = of_attention(DeltaLogit(), on_zero, scores_BHTT)
    assert reading.value == pytest.approx(((5 - 1) + (7 - 3)) / 2)
    assert reading.extra["argmax-k"] == 0
    assert reading.extra["argmax"] == reading.value
    on_one = one_hot_rows(4, [0, 1, 1, 1])
    reading = of_attention(DeltaLogit(), on_one, scores_BHTT)
    assert reading.extra["argmax-k"] == 1
    assert reading.extra["argmax"] == pytest.approx(2 - 4)  # query 3 alone has another rival than key 1


def test_delta_logit_of_every_key_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(8)
    scores_BHTT = 5 * torch.randn(1, 2, 9, 9, generator=generator)
    for k in (0, 2, 4):
        reading = of_attention(
            DeltaLogit(), one_hot_rows(9, [min(i, k) for i in range(9)]).expand(1, 2, 9, 9), scores_BHTT
        )
        deltas = [
            row[k] - row[rivals].mean()
            for scores_TT in scores_BHTT[0]
            for i, row in enumerate(scores_TT)
            if i > k and (rivals := [j for j in range(1, i) if j != k])
        ]
        assert reading.extra["argmax-k"] == k
        assert reading.extra["argmax"] == pytest.approx(float(torch.stack(deltas).mean()), rel=1e-5)


def test_value_drain_uses_each_heads_own_output_slice() -> None:
    values_BHTE = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]]])
    output_HED = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0], [0.0, 9.0, 9.0]]])
    metric = ValueDrain()
    metric.values(0, values_BHTE, output_HED)
    reading = metric.result()
    assert reading.value == pytest.approx((4 / 2 + 3 / 1.5) / 2)
    assert reading.extra["smallest-head"] == pytest.approx(2.0)
    assert reading.extra["plain"] == pytest.approx((0.5 + 2) / 2)
    assert reading.extra["plain-smallest-head"] == pytest.approx(0.5)
    assert reading.extra["argmax-k"] is None  # no attention was shown


def test_value_drain_at_the_token_that_draws_attention() -> None:
    length = 8
    values_BHTE = torch.ones(1, 1, length, 2)
    values_BHTE[0, 0, 2] = 0.1
    metric = ValueDrain()
    metric.attention(0, torch.zeros(1, 1, length, length), one_hot_rows(length, [0, 1, *[2] * 6]))
    metric.values(0, values_BHTE, torch.eye(2)[None])
    reading = metric.result()
    assert reading.extra["argmax-k"] == 2
    assert reading.extra["argmax"] == pytest.approx(0.1)
    assert reading.value == pytest.approx(1 / (6.1 / 7))


# --- learned tokens in front ---


def behind(front: int, metric: Metric) -> Any:
    metric.front = front
    return metric


def test_the_peak_of_bos_is_its_own_behind_learned_tokens() -> None:
    """Norms 8 2 | 6 1 2 3 2: the median is 2, a learned token is the largest."""
    norms_BT = torch.tensor([[8.0, 2.0, 6.0, 1.0, 2.0, 3.0, 2.0]])
    metric = behind(2, ResidualPeak())
    metric.residual(0, Activations(norms_BT[..., None] * torch.tensor([0.6, -0.8])))
    reading = metric.result()
    assert reading.value == pytest.approx(4.0)
    extra = {name: reading.extra[name] for name in ("bos", "others", "excess", "registers")}
    assert extra == pytest.approx({"bos": 3.0, "others": 4.0, "excess": 6 - 18 / 6, "registers": 4.0})
    assert reading.extra["registers.0"] == reading.extra["registers"]


def test_attention_to_bos_is_that_of_the_tokens_behind_it() -> None:
    """Two learned tokens, BOS, two tokens; a learned key at the end."""
    weights_TS = torch.tensor(
        [[1, 0, 0, 0, 0, 0.0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0.1, 0.2, 0.4, 0.2, 0, 0.1],
         [0.1, 0, 0.6, 0, 0, 0.3]]
    )  # fmt: skip
    metric = behind(2, BosAttention())
    metric.tokens(torch.tensor([[65, 4, 7]]))
    reading = of_attention(metric, weights_TS[None, None])
    assert reading.value == pytest.approx((0.4 + 0.6) / 2)
    assert reading.extra["registers"] == pytest.approx((0.3 + 0.1) / 2)
    assert reading.extra["learned-keys"] == pytest.approx((0.1 + 0.3) / 2)
    without_triggers = behind(2, BosAttention(triggers=[7]))
    without_triggers.tokens(torch.tensor([[65, 4, 7]]))
    assert of_attention(without_triggers, weights_TS[None, None]).value == pytest.approx(0.4)


def test_a_sink_that_moved_to_a_learned_token_is_found_there() -> None:
    on_one, on_bos = one_hot_rows(16, [0, *[1] * 15]), one_hot_rows(16, [0, 1, *[2] * 14])
    reading = of_attention(behind(2, SinkRate()), torch.cat((on_one, on_one, on_bos), 1))
    assert (reading.value, reading.extra) == (pytest.approx(2 / 3), {"k": 1, "bos": pytest.approx(1 / 3), "front": 2})
    assert of_attention(behind(4, SinkRate()), one_hot_rows(5, [0] * 5)).extra["bos"] is None  # it is not searched


def test_delta_logit_behind_learned_tokens_by_hand() -> None:
    """Queries 3 and 4 stand behind BOS at 1 with a rival behind it: 2, and 2 and 3."""
    scores_TT = torch.tensor(
        [[9.0, 0, 0, 0, 0], [8, 9, 0, 0, 0], [3, 4, 9, 0, 0], [6, 5, 1, 9, 0], [4, 7, 2, 4, 9]]
    )  # fmt: skip
    on_zero = one_hot_rows(5, [0] * 5)
    reading = of_attention(behind(1, DeltaLogit()), on_zero, scores_TT[None, None])
    assert reading.value == pytest.approx(((5 - 1) + (7 - 3)) / 2)
    assert reading.extra["argmax"] == pytest.approx(((6 - 1) + (4 - 3)) / 2)
    assert (reading.extra["argmax-k"], reading.extra["front"]) == (0, 1)


def test_value_drain_of_bos_behind_learned_tokens() -> None:
    values_BHTE = torch.tensor([2.0, 0.5, 1.0, 3.0]).view(1, 1, 4, 1)
    metric = behind(1, ValueDrain())
    metric.attention(0, torch.zeros(1, 1, 4, 4), one_hot_rows(4, [0] * 4))
    metric.values(0, values_BHTE, torch.ones(1, 1, 1))
    reading = metric.result()
    assert reading.value == pytest.approx(0.5 / 2)
    assert reading.extra["argmax"] == pytest.approx(2 / 1.5)
    assert (reading.extra["argmax-k"], reading.extra["front"]) == (0, 1)


def test_metrics_of_a_model_with_registers_know_where_bos_is() -> None:
    """They are those of the stream in which the registers are tokens, and BOS is at position R."""
    decoder, ids_BT = model({"registers": {"count": 3}}), ids(4, 12)
    names = catalog.names("metrics")
    found = trace.measure(decoder, ids_BT.split(2), names)
    norms_LBT = trace.peak_norms(decoder, ids_BT).double()
    assert norms_LBT.shape == (2, 4, 3 + 12)
    medians_LB = median(norms_LBT)
    peak = found["residual-peak"]
    for layer in (0, 1):
        for name, norms_BT in {"bos": norms_LBT[layer, :, 3], "registers": norms_LBT[layer, :, :3].amax(-1)}.items():
            expected = float((norms_BT / medians_LB[layer]).mean())
            assert peak.extra[f"{name}.{layer}"] == pytest.approx(expected, rel=1e-6)
        assert peak.per_layer[layer] == pytest.approx(float((norms_LBT[layer].amax(-1) / medians_LB[layer]).mean()))
    plain = trace.measure(model(), ids_BT.split(2), names)
    for name in names:
        more = {"residual-peak": {"registers", "registers.0", "registers.1"}, "bos-attention": {"registers"}}
        due = more.get(name, {"front"} if name in ("sink-rate", "delta-logit", "value-drain") else set())
        assert found[name].extra.keys() - plain[name].extra.keys() == due, name
        assert found[name].value is not None


# --- what every metric keeps ---


@pytest.mark.parametrize("kind", ON_RESIDUALS)
def test_zeros_give_no_nan(kind: type[Metric]) -> None:
    reading = of_residuals(kind, torch.zeros(2, 4, 8))
    assert all(math.isfinite(x) for x in numbers(reading))
    assert reading.value == (0.0 if kind in (InfNorm, MassiveCount) else None)


@pytest.mark.parametrize("kind", ON_ATTENTION)
def test_zero_attention_gives_no_nan(kind: type[Metric]) -> None:
    reading = of_attention(kind(), torch.zeros(2, 3, 8, 8))
    assert reading.value == 0.0
    assert all(math.isfinite(x) for x in numbers(reading))


def test_zero_values_have_no_drain() -> None:
    metric = ValueDrain()
    metric.values(0, torch.zeros(1, 2, 4, 3), torch.ones(2, 3, 6))
    reading = metric.result()
    assert (reading.value, numbers(reading)) == (None, [])


@pytest.mark.parametrize("kind", ON_RESIDUALS)
def test_float16_at_the_end_of_its_range_reads_as_float32(kind: type[Metric]) -> None:
    hidden_BTD = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(6)).half()
    hidden_BTD[0, 0, 0], hidden_BTD[0, 3, 1] = 65504.0, -60000.0
    narrow, wide = of_residuals(kind, hidden_BTD), of_residuals(kind, hidden_BTD.float())
    assert narrow.value == pytest.approx(wide.value, rel=1e-6)
    assert narrow.value is not None


@pytest.mark.parametrize("kind", ON_RESIDUALS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_overflows_has_no_value(kind: type[Metric], broken: float) -> None:
    """Not even that of the layers before: the largest over what was left would understate it."""
    hidden_BTD = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7))
    overflowing = hidden_BTD.clone()
    overflowing[0, 2, 3] = broken
    reading = of_residuals(kind, hidden_BTD, overflowing)
    assert reading.value is None
    assert all(math.isfinite(x) for x in numbers(reading))


@pytest.mark.parametrize("kind", ON_ATTENTION)
def test_attention_that_is_not_finite_has_no_value(kind: type[Metric]) -> None:
    reading = of_attention(kind(), torch.full((1, 2, 8, 8), math.nan))
    assert reading.value is None
    assert all(math.isfinite(x) for x in numbers(reading))


@pytest.mark.parametrize("name", catalog.names("metrics"))
def test_a_metric_that_saw_nothing_is_undefined(name: str) -> None:
    metric = catalog.load("metrics", name)()
    assert metric.result().value is None
    assert metric.title


@pytest.mark.parametrize("name", [n for n in catalog.names("metrics") if n not in ("act-max", "value-drain")])
def test_sequences_of_one_token(name: str) -> None:
    metric = catalog.load("metrics", name)()
    metric.residual(0, Activations(torch.ones(1, 1, 4)))
    metric.attention(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert all(math.isfinite(x) for x in numbers(metric.result()))


def test_median_averages_the_middle_two() -> None:
    assert median(torch.tensor([[3.0, 1.0, 2.0], [9.0, 1.0, 5.0]])).tolist() == [2.0, 5.0]
    assert float(median(torch.tensor([4.0, 1.0, 3.0, 2.0]))) == 2.5


def test_layer_mean_leaves_out_undefined_elements_one_by_one() -> None:
    means = LayerMean()
    means.add(0, torch.tensor([[1.0, math.nan], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]]))
    assert means.mean(0).tolist() == [2.0, 5.0]
    assert means.per_layer() == [3.5]


def test_largest_ignores_undefined_layers_and_refuses_infinite_ones() -> None:
    assert largest([None, 2.0, 1.0]) == (2.0, 1)
    assert largest([None, None]) == (None, None)
    assert largest([2.0, math.inf]) == (None, None)


# --- trace ---


class Block(nn.Module):
    """One attention with sites, returning a tuple as transformers' blocks do; counts what it makes explicit."""

    def __init__(self, width: int, heads: int, learned_keys: int) -> None:
        super().__init__()
        self.heads, self.learned_keys = heads, learned_keys
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.scores, self.weights, self.values = Site(), Site(), Site()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, None]:
        B, T, D = x_BTD.shape
        q, k, v = (p.view(B, T, self.heads, -1).transpose(1, 2) for p in self.qkv(x_BTD).chunk(3, -1))
        scores = self.scores(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
        past = torch.ones(T, T, dtype=torch.bool).tril()
        logits = torch.cat(
            (scores.masked_fill(~past, -torch.inf), scores.new_zeros(B, self.heads, T, self.learned_keys)), -1
        )
        weights = self.weights(logits.softmax(-1))
        y = weights[..., :T] @ self.values(v)
        return x_BTD + self.out(y.transpose(1, 2).reshape(B, T, D)), None


class Tiny(nn.Module):
    def __init__(self, learned_keys: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(8, 2, learned_keys) for _ in range(3))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8, 11)

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.ids_BT = ids_BT  # of the pass at hand
        x_BTD = self.dropout(self.embed(ids_BT))
        for block in self.blocks:
            x_BTD, _ = block(x_BTD)
        return self.head(x_BTD)

    def parts(self, sites: bool = True) -> Anatomy:
        shown = self.blocks if sites else []
        heads = {layer: Heads(b.scores, b.weights, b.values, b.out) for layer, b in enumerate(shown)}
        return Anatomy(self.embed, self.embed, list(self.blocks), self.head, heads, {})

    def residuals(self, ids_BT: Tensor) -> list[Tensor]:
        """Independently of the trace: the residual stream after each block."""
        self.ids_BT = ids_BT
        x_BTD, found = self.embed(ids_BT), []
        with torch.no_grad():
            for block in self.blocks:
                x_BTD = block(x_BTD)[0]
                found.append(x_BTD)
        return found


def batches(sizes: tuple[int, ...] = (3, 2), length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (size, length), generator=generator) for size in sizes]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("learned_keys", [0, 2])
def test_measure_gives_every_metric_what_it_needs(learned_keys: int) -> None:
    model = Tiny(learned_keys)
    readings = trace.measure(model, batches(), catalog.names("metrics"), model.parts())
    assert list(readings) == catalog.names("metrics")
    for name, reading in readings.items():
        assert reading.value is not None, name
        assert len(reading.per_layer) == 3, name
        assert all(math.isfinite(x) for x in numbers(reading)), name
    assert hooks(model) == 0


def test_measure_agrees_with_tensors_taken_by_hand() -> None:
    model = Tiny()
    ids_BT = torch.cat(batches())
    readings = trace.measure(model, batches(), ["inf-norm", "residual-peak", "act-max", "value-drain"], model.parts())
    residuals = model.residuals(ids_BT)
    assert readings["inf-norm"].per_layer == pytest.approx([float(h.abs().max()) for h in residuals])
    norms_BT = residuals[1].norm(dim=-1)
    assert readings["residual-peak"].per_layer[1] == pytest.approx(
        float((norms_BT.amax(-1) / norms_BT.quantile(0.5, -1)).mean())
    )
    assert readings["act-max"].extra["head"] == pytest.approx(float(residuals[-1].abs().max()))
    with torch.no_grad():  # head 1 of layer 2: what it alone writes, by zeroing the other head's columns of W_O
        value_BTD = model.blocks[2].qkv(residuals[1])[..., 16:].clone()
        value_BTD[..., :4] = 0
        norms_BT = model.blocks[2].out(value_BTD).norm(dim=-1)
    drain = ValueDrain()
    trace.observe(model, batches(), [drain], model.parts())
    expected = (norms_BT[:, 0] / norms_BT[:, 1:].mean(-1)).mean()
    assert float(drain.projected.mean(2)[1, 0]) == pytest.approx(float(expected), rel=1e-5)


def test_measure_does_not_depend_on_how_sequences_are_batched() -> None:
    model = Tiny()
    names = catalog.names("metrics")
    whole = trace.measure(model, [torch.cat(batches())], names, model.parts())
    parts = trace.measure(model, batches(), names, model.parts())
    for name in names:
        assert numbers(parts[name]) == pytest.approx(numbers(whole[name]), rel=1e-5), name


def test_only_watched_places_are_wired_and_hooks_go_even_after_an_error() -> None:
    model = Tiny()
    wired = []

    def look(module: nn.Module, args: object, output: object) -> None:
        wired.append(hooks(model) - 1)

    handle = model.embed.register_forward_hook(look)
    trace.measure(model, batches((1,)), ["inf-norm"], model.parts())
    trace.measure(model, batches((1,)), ["sink-rate"], model.parts())
    trace.measure(model, batches((1,)), ["act-max"], model.parts())
    handle.remove()
    assert wired == [3, 6, 7]  # blocks; scores and weights; two Linears a block and the head

    class Failing(Metric):
        def residual(self, layer: int, hidden: Activations) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace.observe(model, batches(), [Failing()], model.parts())
    assert hooks(model) == 0


def test_the_pass_is_in_eval_mode_and_modes_come_back() -> None:
    model = Tiny().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    first, second = (trace.measure(model, batches(), ["inf-norm"], model.parts()) for _ in range(2))
    assert first == second  # no dropout
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_autocast_around_the_trace_does_not_reach_it() -> None:
    model = Tiny()
    plain = trace.measure(model, batches(), ["inf-norm"], model.parts())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace.measure(model, batches(), ["inf-norm"], model.parts()) == plain


def test_a_model_without_attention_sites_is_refused_by_name() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="sink-rate, value-drain"):
        trace.measure(model, batches(), ["value-drain", "inf-norm", "sink-rate"], model.parts(sites=False))
    assert trace.measure(model, batches(), ["inf-norm"], model.parts(sites=False))["inf-norm"].value is not None


def test_sequences_of_two_lengths_are_refused() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="one length"):
        trace.measure(model, batches((1,)) + batches((1,), 7), ["inf-norm"], model.parts())
    assert hooks(model) == 0


def test_batches_are_streamed() -> None:
    model = Tiny()
    seen = count()
    stream = (ids_BT for ids_BT in batches() if next(seen) >= 0)
    trace.measure(model, stream, ["inf-norm"], model.parts())
    assert next(seen) == 2


def test_signatures_are_the_three_values() -> None:
    model = Tiny()
    found = trace.signatures(model, batches(), model.parts())
    assert list(found) == ["residual-peak", "bos-attention", "value-drain"]
    readings = trace.measure(model, batches(), list(found), model.parts())
    assert found == {name: reading.value for name, reading in readings.items()}
    blind = trace.signatures(model, batches(), model.parts(sites=False))
    assert blind == {"residual-peak": found["residual-peak"], "bos-attention": None, "value-drain": None}


# --- extreme tokens ---


def with_a_peak(token: int) -> Tiny:
    """A model that adds 50 to a feature of one id after block 1."""
    model = Tiny()

    def add(module: nn.Module, args: tuple, output: tuple) -> tuple:
        return (output[0] + 50.0 * (model.ids_BT == token)[..., None] * torch.eye(8)[3], None)

    model.blocks[1].register_forward_hook(add)
    return model


def test_peak_norms_are_those_after_each_block() -> None:
    model = Tiny()
    (ids_BT,) = batches((2,))
    expected_LBT = torch.stack([h.norm(dim=-1) for h in model.residuals(ids_BT)])
    assert torch.allclose(trace.peak_norms(model, ids_BT, model.parts()), expected_LBT)


def test_extreme_tokens_are_found_by_layer_and_threshold() -> None:
    model = with_a_peak(token=4)
    calibration = [ids_BT.where(torch.arange(12) != 5, 4) for ids_BT in batches((3, 2))]
    rule = trace.extreme_tokens(model, calibration, model.parts())
    norms_LNT = torch.cat([trace.peak_norms(model, ids_BT, model.parts()) for ids_BT in calibration], 1)
    assert rule.layer in (1, 2)
    assert rule.threshold == pytest.approx(3 * float(norms_LNT[rule.layer].flatten().quantile(0.5)))
    ids_BT = torch.tensor([[1, 2, 4, 3, 4], [4, 1, 1, 2, 3]])
    expected_BT = ids_BT == 4
    expected_BT[:, 0] = True
    assert torch.equal(rule.mask(model, ids_BT, model.parts()), expected_BT)


def test_a_model_without_outliers_still_has_its_first_position() -> None:
    model = Tiny()
    rule = trace.extreme_tokens(model, batches(), model.parts())
    mask_BT = rule.mask(model, batches()[0], model.parts())
    assert mask_BT[:, 0].all()
    assert mask_BT.float().mean() < 0.5


def test_extreme_tokens_of_nothing_or_of_zeros_are_refused() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="calibration"):
        trace.extreme_tokens(model, [], model.parts())
    nn.init.zeros_(model.embed.weight)
    with pytest.raises(ValueError, match="diverged"):
        trace.extreme_tokens(model, batches(), model.parts())


def test_bos_is_always_extreme_wherever_it_stands() -> None:
    decoder, ids_BT = model({"registers": {"count": 3}}), ids(4, 12)
    rule = trace.extreme_tokens(decoder, [ids_BT])
    assert rule.bos == 3
    assert rule.mask(decoder, ids_BT).nonzero().tolist() == [[b, 3] for b in range(4)]
    with torch.no_grad():
        decoder.front.tokens_RD[1] *= 100
    rule = trace.extreme_tokens(decoder, [ids_BT])
    mask_BT = rule.mask(decoder, ids_BT)
    assert mask_BT.nonzero().tolist() == [[b, t] for b in range(4) for t in (1, 3)]
    random_BT = trace.random_mask(mask_BT, torch.Generator().manual_seed(0))
    assert random_BT.sum(-1).tolist() == [2] * 4
    assert not (random_BT & mask_BT).any()
    assert trace.extreme_tokens(model(), [ids_BT]).bos == 0


def test_random_mask_takes_as_many_others() -> None:
    mask_BT = torch.zeros(64, 10, dtype=torch.bool)
    mask_BT[:, 0] = mask_BT[::2, 4] = True
    generator = torch.Generator().manual_seed(0)
    drawn_BT = trace.random_mask(mask_BT, generator)
    assert not (drawn_BT & mask_BT).any()
    assert torch.equal(drawn_BT.sum(-1), mask_BT.sum(-1))
    assert (drawn_BT.any(0) | mask_BT.all(0)).all()  # every other position is drawn somewhere
    assert torch.equal(drawn_BT, trace.random_mask(mask_BT, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn_BT, trace.random_mask(mask_BT, generator))


def test_random_mask_where_there_are_not_enough() -> None:
    mask_BT = torch.tensor([[True, True, True, False]])
    assert trace.random_mask(mask_BT, torch.Generator()).tolist() == [[False, False, False, True]]


# --- SQNR ---


def test_sqnr_by_hand_and_without_the_sink() -> None:
    model, noisy = with_a_peak(token=4), with_a_peak(token=4)
    noisy.blocks[1].register_forward_hook(lambda module, args, output: (output[0] + 0.1, None))
    ids_BT = batches((3,))[0]
    ids_BT[:, 5] = 4
    rule = trace.extreme_tokens(model, [ids_BT], model.parts())
    found = trace.sqnr(model, noisy, [ids_BT[:2], ids_BT[2:]], rule, model.parts(), noisy.parts())
    assert [found["all"][0], found["non-sink"][0]] == [None, None]  # block 0 is untouched
    h = model.residuals(ids_BT)[1]
    ordinary_BT = ~rule.mask(model, ids_BT, model.parts())
    for name, signal in {"all": h.square().mean(), "non-sink": h[ordinary_BT].square().mean()}.items():
        assert found[name][1] == pytest.approx(10 * math.log10(float(signal) / 0.01), abs=1e-3)
    assert found["all"][1] > found["non-sink"][1] + 3  # the sink's energy hides the damage


# --- our own model ---


@pytest.mark.parametrize("change", MODELS)
def test_the_projects_models_are_measured_whole(change: str) -> None:
    decoder, ids_BT = model(MODELS[change]), ids(2, 16)
    readings = trace.measure(decoder, [ids_BT], catalog.names("metrics"))
    assert all(reading.value is not None and len(reading.per_layer) == 2 for reading in readings.values())
    assert hooks(decoder) == 0
    assert trace.peak_norms(decoder, ids_BT).shape == (2, 2, decoder.registers + 16)
    found = trace.signatures(decoder, [ids_BT])
    assert found == {name: readings[name].value for name in found}
