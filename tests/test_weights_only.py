"""GPTQ, AWQ, HQQ, FP4 and torchao's INT8 against textbook references, and against the packages themselves."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from tiny import gaussian, ids, model, quantizer
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration, Exemption
from quantbench.ops.integers import quantize
from quantbench.quantizers import Codes, Inputs, IntegerLinear, LowBitLinear, Rounding, inputs_of, nearest
from quantbench.quantizers.ao import TorchaoLinear, torchao
from quantbench.quantizers.awq import AWQ, ScaledLinear
from quantbench.quantizers.bnb import Bnb4, Bnb4Linear, bitsandbytes
from quantbench.quantizers.gptq import GPTQ, compensated
from quantbench.quantizers.hqq import HQQ, codes_of, packaged_quantizer

FITTED = ("w4a16-gptq", "w4a16-awq")
ALL = (*FITTED, "w4a16-hqq", "bnb-fp4", "torchao-int8dyn")

FIRST = torch.zeros(4, 12, dtype=torch.bool)
FIRST[:, 0] = True


def correlated(tokens: int = 512, width: int = 128, rank: int = 12, seed: int = 0) -> Tensor:
    """Inputs that lie near a plane of few dimensions, as activations do."""
    plane = gaussian(tokens, rank, seed=seed) @ gaussian(rank, width, seed=seed + 1)
    return plane + 0.3 * gaussian(tokens, width, seed=seed + 2)


def inputs(x_MK: Tensor) -> Inputs:
    x_MK = x_MK.double()
    return Inputs(x_MK.T @ x_MK, x_MK.abs().sum(0))


def layer_error(x_MK: Tensor, weight_NK: Tensor, got_NK: Tensor) -> float:
    return F.linear(x_MK.double(), got_NK.double() - weight_NK.double()).norm().item()


def linear(inputs: int = 128, outputs: int = 48, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        parameter.data = gaussian(*parameter.shape)
    return layer.requires_grad_(False)


def calibration(exempt: Tensor | None = None) -> Calibration:
    masks = [None, None] if exempt is None else exempt.split(2)
    return Calibration(list(zip(ids(4).split(2), masks, strict=True)))


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    return net(ids(4)).logits


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_are_those_of_the_linear_without_exempt_tokens():
    net, seen = model(), []
    *_, (name, (_, layer)) = anatomy(net).linears().items()
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(net)
    hook.remove()
    x = seen[0].detach().double()
    for mask, kept in ((None, x.flatten(0, 1)), (FIRST, x[~FIRST])):
        found = inputs_of(net, calibration(mask), [1])
        assert set(found) == {other for other, (layer, _) in anatomy(net).linears().items() if layer == 1}
        torch.testing.assert_close(found[name].gram_KK, kept.T @ kept)
        torch.testing.assert_close(found[name].absolute_K, kept.abs().sum(0))


def test_a_pass_ends_where_nobody_needs_the_rest_and_leaves_nothing_behind():
    net, reached = model().train(), []
    hook = net.blocks[1].register_forward_pre_hook(lambda module, args: reached.append(1))
    found = inputs_of(net, calibration(), [0])
    hook.remove()
    assert found
    assert not reached
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_error_is_that_of_the_outputs():
    x, change = correlated(), gaussian(48, 128, seed=5)
    expected_N = F.linear(x.double(), change.double()).square().sum(0)
    torch.testing.assert_close(inputs(x).error_N(change), expected_N)


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def textbook(weight: Tensor, x: Tensor, group: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """One column at a time, with the inverse updated as each is struck out (Optimal Brain Quantization's, in order)."""
    w, h = weight.double().numpy().copy(), 2 * (x.double().T @ x.double()).numpy()
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(len(h)))
    q, scales = np.zeros_like(w), []
    for j in range(w.shape[1]):
        if j % group == 0:
            scales.append((np.abs(w[:, j : j + group]).max(1).astype(np.float32) / np.float32(7)).astype(np.float64))
        q[:, j] = np.clip(np.rint(w[:, j] / scales[-1]), -7, 7)
        error = (w[:, j] - q[:, j] * scales[-1]) / inverse[j, j]
        w[:, j + 1 :] -= np.outer(error, inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q, np.stack(scales, 1)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_gptq_is_the_textbooks(group: int):
    weight, x = gaussian(24, 256), correlated(300, 256)
    q, scale = textbook(weight, x, group, 0.01)
    codes = compensated(weight, inputs(x).gram_KK, 4, group)
    assert np.array_equal(codes.q_NK.numpy(), q)
    np.testing.assert_allclose(codes.scale_NG.numpy(), scale, rtol=1e-6)


def test_one_scale_per_channel_is_taken_before_anything_moves():
    weight, x = gaussian(24, 320), correlated(300, 320)  # more than one block of columns
    whole, nothing = (compensated(weight, inputs(x).gram_KK, 4, group) for group in (320, 0))
    assert torch.equal(whole.q_NK, nothing.q_NK)
    assert torch.equal(whole.scale_NG, nearest(weight, 4).scale_NG)


def test_act_order_rounds_the_largest_inputs_first():
    weight, x = gaussian(24, 128), correlated()
    order = x.double().square().sum(0).argsort(descending=True)
    got = compensated(weight, inputs(x).gram_KK, 4, 0, act_order=True)
    sorted_ = compensated(weight[:, order], inputs(x[:, order]).gram_KK, 4, 0)
    assert torch.equal(got.q_NK[:, order], sorted_.q_NK)
    assert not torch.equal(got.q_NK, compensated(weight, inputs(x).gram_KK, 4, 0).q_NK)
    grouped = compensated(weight, inputs(x).gram_KK, 4, 64, act_order=True)
    assert torch.equal(grouped.scale_NG, nearest(weight, 4, 64).scale_NG)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_on_correlated_inputs(act_order: bool):
    weight, x = gaussian(48, 128), correlated()
    codes, rounded = GPTQ(act_order=act_order).fit(weight, inputs(x))
    before = layer_error(x, weight, nearest(weight, 4, 64).dequantized_NK())
    assert layer_error(x, weight, codes.dequantized_NK()) < 0.55 * before
    assert not rounded.any()


@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_never_worse_than_rounding_in_any_channel(seed: int):
    """With inputs as good as uncorrelated there is little to gain, and the moved weights' scales may be larger."""
    weight, x = gaussian(48, 64, seed=seed), gaussian(4000, 64, seed=seed + 9)
    codes, rounded_N = GPTQ().fit(weight, inputs(x))
    plain = nearest(weight, 4, 64)
    error_N, before_N = (inputs(x).error_N(c.dequantized_NK() - weight) for c in (codes, plain))
    assert (error_N <= before_N).all()
    assert torch.equal(error_N < before_N, ~rounded_N)
    assert 0 < rounded_N.sum() < 48
    assert torch.equal(codes.q_NK[rounded_N], plain.q_NK[rounded_N])


def test_a_feature_that_is_never_seen_keeps_its_rounded_weights():
    weight, x = gaussian(24, 128), correlated()
    x[:, [5, 70]] = 0.0
    codes = compensated(weight, inputs(x).gram_KK, 4, 64)
    scale_NK = codes.scale_NG.repeat_interleave(64, 1)
    assert torch.equal(codes.q_NK[:, [5, 70]], quantize(weight, scale_NK, 4)[:, [5, 70]])


def test_without_inputs_gptq_is_rounding():
    weight = gaussian(24, 128)
    codes = compensated(weight, torch.zeros(128, 128, dtype=torch.float64), 4, 64)
    assert torch.equal(codes.q_NK, nearest(weight, 4, 64).q_NK)


def test_a_block_is_fitted_to_what_the_quantized_blocks_before_it_give():
    net, full = model(), model()
    quantizer("w4a16-gptq").quantize(net, calibration())
    names = [name for name, (layer, _) in anatomy(full).linears().items() if layer == 1]
    weights = {name: linear.weight for name, (_, linear) in anatomy(full).linears().items()}
    half = model()
    half.blocks[0] = copy.deepcopy(net.blocks[0])
    for found, same in ((inputs_of(half, calibration(), [1]), True), (inputs_of(full, calibration(), [1]), False)):
        expected = [GPTQ().fit(weights[name], found[name])[0].q_NK for name in names]
        got = [net.blocks[1].get_submodule(name.partition(".")[2]).q_NK() for name in names]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) is same


def test_the_weights_are_truly_packed():
    net = model()
    report = quantizer("w4a16-gptq").quantize(net, calibration())
    low = [module for module in net.modules() if isinstance(module, IntegerLinear)]
    assert {module.weight.dtype for module in low} == {torch.uint8}
    assert report["bits-per-weight"] == 4.5
    assert 0 <= report["rounded-instead"] < 0.5


# --- AWQ ------------------------------------------------------------------------------------------------------------


def test_scaling_and_unscaling_change_nothing_but_the_rounding():
    """Integers that stand for the scaled weights exactly: what is left is float64's error."""
    layer, x = linear(), gaussian(2, 5, 128, dtype=torch.float64)
    s_K = torch.exp2(torch.arange(128) % 7 - 3.0)
    q_NK = quantize(gaussian(48, 128, seed=3), torch.tensor(0.4), 4)
    q_NK[:, ::64] = 7  # so that every group spans the same range
    layer.weight.data = q_NK * 0.25 / s_K
    codes = nearest(layer.weight * s_K, 4, 64)
    low = ScaledLinear(layer, Exemption(), codes, 4, s_K)
    assert torch.equal(low.dequantized_NK(), layer.weight)
    low.bias = low.bias.double()
    torch.testing.assert_close(low(x), F.linear(x, layer.weight.double(), layer.bias.double()), rtol=1e-12, atol=1e-12)


def test_the_stored_bits_count_the_scales():
    layer = linear()
    low = ScaledLinear(layer, Exemption(), nearest(layer.weight, 4, 64), 4, torch.ones(128))
    assert low.stored_bits() == 48 * 128 * 4 + 48 * 2 * 32 + 128 * 32


def awq(weight: Tensor, x: Tensor, **changes: float) -> tuple[Tensor, float]:
    """What the weights become, and alpha."""
    entry, layer = AWQ(**changes), nn.Linear(weight.shape[1], len(weight), bias=False)
    s_K, alpha = entry.scales(weight, inputs(x))
    codes, _ = entry.clip(weight, inputs(x), s_K)
    return ScaledLinear(layer, Exemption(), codes, 4, s_K).dequantized_NK(), alpha


def test_alpha_is_that_of_a_naive_search():
    weight, x = gaussian(48, 128), gaussian(300, 128)
    x[:, ::16] *= 30
    found = []
    for step in range(20):
        s = x.abs().mean(0).double() ** (step / 20)
        s = (s / (s.max() * s.min()).sqrt()).numpy()
        w_NGK = (weight.double().numpy() * s).reshape(48, 2, 64)
        scale = np.abs(w_NGK).max(-1, keepdims=True) / 7
        got = (np.rint(w_NGK / scale) * scale).reshape(48, 128) / s
        found.append(layer_error(x, weight, torch.from_numpy(got)))
    got, alpha = awq(weight, x, max_shrink=0.0)
    assert alpha == np.argmin(found) / 20 > 0
    assert layer_error(x, weight, got) == pytest.approx(min(found), rel=1e-4)


def test_awq_beats_rounding_where_some_channels_carry_large_inputs():
    weight, x = gaussian(48, 128), gaussian(500, 128)
    x[:, ::16] *= 30
    plain = layer_error(x, weight, nearest(weight, 4, 64).dequantized_NK())
    scaled, alpha = awq(weight, x, max_shrink=0.0)
    assert layer_error(x, weight, scaled) < 0.6 * plain
    assert alpha > 0.2
    clipped, same = awq(weight, x)
    assert same == alpha
    assert layer_error(x, weight, clipped) < layer_error(x, weight, scaled)


def test_without_steps_awq_is_rounding():
    weight, x = gaussian(48, 128), correlated()
    got, alpha = awq(weight, x, grid=1, max_shrink=0.0)
    assert torch.equal(got, nearest(weight, 4, 64).dequantized_NK())
    assert alpha == 0


@pytest.mark.parametrize("seed", range(4))
def test_awq_is_never_worse_than_rounding(seed: int):
    weight, x = gaussian(48, 128, seed=seed), gaussian(500, 128, seed=seed + 9)
    got, _ = awq(weight, x)
    assert layer_error(x, weight, got) <= layer_error(x, weight, nearest(weight, 4, 64).dequantized_NK())


def test_a_clipped_range_is_the_best_of_the_grid_for_its_group():
    weight, x = gaussian(8, 64), gaussian(300, 64)
    weight[:, 7] = 6.0  # worth clipping, as its input is small
    x[:, 7] *= 0.01
    codes, clipped = AWQ().clip(weight, inputs(x), torch.ones(64))
    assert clipped.all()
    full = weight.abs().amax(1, keepdim=True)
    tried = [full * (1 - step / 20) / 7 for step in range(10)]
    errors = [inputs(x).error_N((weight / s).round().clamp(-7, 7) * s - weight) for s in tried]
    best = torch.stack(errors).argmin(0)
    torch.testing.assert_close(codes.scale_NG, torch.stack(tried)[best, torch.arange(8)])
    assert (best > 3).all()


@pytest.mark.parametrize("dead", [[3], list(range(128))])
def test_a_feature_that_is_never_seen_does_not_upset_awq(dead: list[int]):
    weight, x = gaussian(48, 128), correlated()
    x[:, dead] = 0.0
    got, _ = awq(weight, x)
    assert got.isfinite().all()
    if len(dead) == 128:
        assert torch.equal(got, nearest(weight, 4, 64).dequantized_NK())


def test_awq_is_fitted_to_the_model_in_full_precision():
    net, full = model(), model()
    report = quantizer("w4a16-awq").quantize(net, calibration())
    for name, found in inputs_of(full, calibration(), [0, 1]).items():
        layer = anatomy(full).linears()[name][1]
        s_K, _ = AWQ().scales(layer.weight, found)
        low = anatomy(net).blocks[int(name[0])].get_submodule(name.partition(".")[2])
        assert torch.equal(low.inverse_K, 1 / s_K)
    assert 0 < report["alpha"] < 1
    assert 0 < report["clipped"] < 1


def test_portions_of_the_model_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch):
    whole, parts = model(), model()
    quantizer("w4a16-awq").quantize(whole, calibration())
    monkeypatch.setattr("quantbench.quantizers.awq.PORTION", 1)
    quantizer("w4a16-awq").quantize(parts, calibration())
    assert all(torch.equal(parts.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


# --- HQQ ------------------------------------------------------------------------------------------------------------


def packaged(weight: Tensor, group: int = 64) -> Tensor:
    """What the package makes of it, through its own packing."""
    package = packaged_quantizer()
    q, found = package.quantize(weight, 4, group_size=group, axis=1, device="cpu")
    return package.dequantize(q, found | {"compute_dtype": torch.float32})


@pytest.fixture
def hqq() -> None:
    quantizer("w4a16-hqq")  # or skip


@pytest.mark.usefixtures("hqq")
@pytest.mark.parametrize("group", [32, 64])
def test_hqq_is_the_package(group: int):
    layer, x = linear(256), gaussian(2, 5, 256)
    codes = codes_of(packaged_quantizer(), layer.weight, group)
    low = IntegerLinear(layer, Exemption(), codes, 4)
    expected = packaged(layer.weight, group)
    torch.testing.assert_close(low.dequantized_NK(), expected, rtol=0, atol=1e-6)
    assert (low.weight.dtype, low.stored_bits() / layer.weight.numel()) == (torch.uint8, 4 + 64 / group)
    assert {int(q) for q in codes.q_NK.unique()} == set(range(-8, 8))
    torch.testing.assert_close(low(x), F.linear(x, expected, layer.bias), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("hqq")
def test_hqq_has_its_known_error():
    """Of weights drawn evenly, as nn.Linear starts with, 6.1%; of Gaussian ones, whose groups reach further, 8.6%."""
    bell = gaussian(256, 512)
    even = torch.erf(bell / math.sqrt(2))

    def error(weight: Tensor, codes: Codes) -> float:
        return ((codes.dequantized_NK() - weight).norm() / weight.norm()).item()

    for weight, expected in ((bell, 0.086), (even, 0.061)):
        got = error(weight, codes_of(packaged_quantizer(), weight, 64))
        assert got == pytest.approx(expected, abs=0.002)
        assert got < error(weight, nearest(weight, 4, 64, symmetric=False))


@pytest.mark.usefixtures("hqq")
def test_hqq_leaves_the_weights_alone_and_its_codes_can_be_trained_upon():
    """The package works under inference mode; its tensors must not leak into ours."""
    weight = gaussian(32, 64)
    before = weight.clone()
    codes = codes_of(packaged_quantizer(), weight, 64)
    assert torch.equal(weight, before)
    assert not any(tensor.is_inference() for tensor in codes)


@pytest.mark.parametrize(
    ("name", "module"), [("w4a16-hqq", "hqq.core.quantize"), ("torchao-int8dyn", "torchao.quantization")]
)
def test_a_missing_package_is_named_in_a_line(name: str, module: str, monkeypatch: pytest.MonkeyPatch):
    entry = quantizer(name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install quantbench\[peers\]$"):
        entry.quantize(model(), calibration())
    assert not any(isinstance(module, LowBitLinear) for module in model().modules())


# --- bitsandbytes' FP4 ----------------------------------------------------------------------------------------------


def test_fp4_is_nearest_of_its_levels_with_the_known_error():
    layer = linear(256, 128)
    low = Bnb4Linear(layer, Exemption(), "fp4")
    got, scale = low.dequantized_NK().unflatten(1, (-1, 64)), layer.weight.unflatten(1, (-1, 64)).abs().amax(-1)
    levels = torch.tensor([1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 192, 0.0])
    levels = torch.cat((-levels, levels))
    assert torch.equal(low.inner.weight.quant_state.code.sort().values.unique(), levels.sort().values.unique())
    assert len(low.inner.weight.quant_state.code) == 16  # two of them zeros
    ratio = layer.weight.unflatten(1, (-1, 64)) / scale.unsqueeze(-1)
    best = levels[(ratio.unsqueeze(-1) - levels).abs().argmin(-1)] * scale.unsqueeze(-1)
    wrong = (got - best).abs() > 1e-6
    assert wrong.double().mean() < 0.001
    assert ((got - layer.weight.view_as(got)).norm() / layer.weight.norm()).item() == pytest.approx(0.122, abs=0.003)
    assert low.stored_bits() / layer.weight.numel() == 4.5


def test_nf4_is_what_bitsandbytes_makes():
    layer = linear(256, 128)
    functional = bitsandbytes().functional
    packed, state = functional.quantize_4bit(layer.weight, blocksize=64, quant_type="nf4")
    low = Bnb4Linear(layer, Exemption(), "nf4")
    assert torch.equal(low.inner.weight.data, packed)
    assert torch.equal(low.dequantized_NK(), functional.dequantize_4bit(packed, state))
    assert (Bnb4(), Bnb4().title) == (
        quantizer("bnb-nf4"),
        "bitsandbytes Linear4bit: NF4 weights in blocks of 64, activations in full precision",
    )
    assert Bnb4.version == 1


# --- torchao --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ao():
    quantizer("torchao-int8dyn")  # or skip
    torchao()
    from torchao.quantization import quant_primitives

    return quant_primitives


def clear_of_ties(x: Tensor) -> Tensor:
    """Where no half is so near that x / scale and x * (1 / scale), which torchao computes, round apart."""
    return ((x - x.floor()) - 0.5).abs() > 1e-4


@pytest.mark.parametrize("scope", ["weights", "inputs"])
def test_torchaos_symmetric_range_has_half_a_step_more(ao, scope: str):
    """absmax / 127.5 with -128 in use, where ours is absmax / 127 and mirrors itself: not the same definition."""
    x = gaussian(64, 256)
    if scope == "weights":
        layer = nn.Linear(256, 64, bias=False)
        layer.weight.data = x.clone()
        found = TorchaoLinear(layer, Exemption()).inner.weight
        q, scale = found.qdata, found.scale
    else:
        from torchao.quantization.granularity import PerRow
        from torchao.quantization.quantize_.workflows import Int8Tensor

        found = Int8Tensor.from_hp(x, granularity=PerRow())
        q, scale = found.qdata, found.scale
    absmax = x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, absmax / 127.5, rtol=1e-7, atol=0)
    expected = (x / scale).round().clamp(-128, 127)
    clear = clear_of_ties(x / scale)  # leaves out the ends of the ranges, at 127.5
    assert torch.equal(q[clear].float(), expected[clear])
    assert clear.double().mean() > 0.99
    assert (q.amin(), q.amax()) == (-128, 127)
    assert not torch.equal(q, nearest(x, 8).q_NK)


def test_in_our_range_torchaos_integers_are_ours(ao):
    x = gaussian(64, 256)
    scale, zero = ao.choose_qparams_affine(
        x, ao.MappingType.SYMMETRIC, (1, 256), torch.int8, -127, 127, scale_dtype=torch.float32
    )
    theirs, ours = ao.quantize_affine(x, (1, 256), scale, zero, torch.int8, -127, 127), nearest(x, 8)
    assert torch.equal(scale, ours.scale_NG.flatten())
    assert not zero.any()
    clear = clear_of_ties(x / ours.scale_NG)
    assert torch.equal(theirs[clear], ours.q_NK[clear])
    assert clear.double().mean() > 0.999


@pytest.mark.parametrize("group", [32, 64])
def test_asymmetric_groups_of_4_bits_are_torchaos(ao, group: int):
    x = gaussian(64, 256) + 0.3
    x[3], x[4, :group], x[5] = 0.0, 2.0, -x[5].abs()
    scale, zero = ao.choose_qparams_affine(
        x, ao.MappingType.ASYMMETRIC, (1, group), torch.int8, -8, 7, scale_dtype=torch.float32
    )
    theirs, ours = ao.quantize_affine(x, (1, group), scale, zero, torch.int8, -8, 7), nearest(x, 4, group, False)
    scale, zero = scale.view(64, -1), zero.view(64, -1)
    nothing = (x.unflatten(1, (-1, group)) == 0).all(-1)  # scale 1 with us, the least normal number with them
    assert torch.equal(scale[~nothing], ours.scale_NG[~nothing])
    assert torch.equal(zero.float(), ours.zero_NG)
    clear = clear_of_ties(x / ours.scale_NG.repeat_interleave(group, 1))
    assert torch.equal(theirs[clear], ours.q_NK[clear])
    assert clear.double().mean() > 0.99


def test_torchaos_linear_is_as_near_to_full_precision_as_ours(ao):
    layer, x = linear(256, 64), gaussian(4, 16, 256)
    theirs, full = TorchaoLinear(layer, Exemption()), layer(x)
    ours = IntegerLinear(layer, Exemption(), nearest(layer.weight, 8), 8, Rounding(8, "token"))
    errors = [((y - full).norm() / full.norm()).item() for y in (theirs(x), ours(x))]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert max(errors) < 0.02
    assert (theirs(x) - ours(x)).norm() < 1.5 * max(errors) * full.norm()  # their roundings are as good as independent


def test_torchaos_integer_product_is_exact(ao):
    layer, x = linear(256, 64), gaussian(4, 16, 256)
    low = TorchaoLinear(layer, Exemption())
    weight, scale = low.inner.weight, x.abs().amax(-1, keepdim=True) / 127.5
    q = (x * (1 / scale)).round().clamp(-128, 127)
    expected = (q.double() @ weight.qdata.double().T) * scale.double() * weight.scale.double().T + layer.bias
    torch.testing.assert_close(low(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_torchao_changes_nothing_else_in_the_process(ao):
    from torch._inductor import config

    before = config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    TorchaoLinear(linear(), Exemption())
    assert (config.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_exempt_positions_meet_the_low_bit_weights_in_full_precision(name: str):
    entry, net, data = quantizer(name), model(), calibration()
    full = {name: linear for name, (_, linear) in anatomy(model()).linears().items()}
    entry.quantize(net, data)
    place = next(iter(full))
    low = net.blocks[0].get_submodule(place.partition(".")[2])
    x = gaussian(4, 12, low.in_features)
    x[:, 0, 3] = 300.0
    with data.exemption.of(FIRST):
        y = low(x)
    torch.testing.assert_close(y[:, 0], F.linear(x[:, 0], low.dequantized_NK(), low.bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y[:, 1:], low(x[:, 1:]))


@pytest.mark.parametrize("name", FITTED)
def test_exempt_tokens_have_no_say_in_the_fit(name: str):
    entry, states = quantizer(name), []
    for token in (7, 8):  # what stands at the exempt positions; nothing before it that it could change
        net = model()
        batch = ids(4)
        batch[:, -1] = token
        last = torch.zeros_like(batch, dtype=torch.bool)
        last[:, -1] = True
        entry.quantize(net, Calibration([(batch, last)]))
        states.append(net.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ALL)
def test_a_copy_computes_the_same(name: str):
    net = model()
    quantizer(name).quantize(net, calibration())
    assert torch.equal(logits(copy.deepcopy(net)), logits(net))


@pytest.mark.parametrize(
    ("entry", "widths", "says"),
    [
        (GPTQ(), [64, 100], "group: 64 .* 100"),
        (GPTQ(group=0), [33], "33 is odd"),
        (GPTQ(weights=9), [], "weights: 9"),
        (GPTQ(damping=0.0), [], "damping: 0"),
        (GPTQ(damping=math.nan), [], "damping: nan"),
        (AWQ(), [64, 100], "group: 64 .* 100"),
        (AWQ(grid=0), [], "grid: 0"),
        (AWQ(max_shrink=1.0), [], "max-shrink: 1"),
        (HQQ(), [64, 100], "group: 64 .* 100"),
        (HQQ(group=0), [64], "group: 0"),
        (Bnb4("fp4"), [96], "bnb-fp4: .*64 .* 96"),
    ],
)
def test_what_cannot_be_done_is_named(entry, widths: list[int], says: str):
    with pytest.raises(ValueError, match=says):
        entry.check(widths)


@pytest.mark.parametrize("name", FITTED)
def test_a_model_that_overflows_is_refused(name: str):
    net = model()
    net.embed.weight.data[:] = math.inf
    with pytest.raises(ValueError, match=r"site 0\..*overflow"):
        quantizer(name).quantize(net, calibration())


def rows() -> Tensor:
    """Row 0: zeros; 1: a constant; 2: a NaN in the second group; 3: a subnormal; the rest Gaussian."""
    weight = gaussian(16, 128)
    weight[0], weight[1], weight[3] = 0.0, -0.3, 1e-42
    weight[2, 100] = math.nan
    return weight


def gptq_codes(weight: Tensor) -> Tensor:
    return GPTQ().fit(weight, inputs(correlated()))[0].dequantized_NK()


def hqq_codes(weight: Tensor) -> Tensor:
    quantizer("w4a16-hqq")  # or skip
    return codes_of(packaged_quantizer(), weight, 64).dequantized_NK()


def ao_codes(weight: Tensor) -> Tensor:
    quantizer("torchao-int8dyn")  # or skip
    layer = nn.Linear(128, 16, bias=False)
    layer.weight.data = weight
    return TorchaoLinear(layer, Exemption()).dequantized_NK()


@pytest.mark.parametrize(
    "make",
    [
        gptq_codes,
        lambda w: awq(w, correlated())[0],
        hqq_codes,
        ao_codes,
        lambda w: nearest(w, 4, 64, False).dequantized_NK(),
    ],
)
def test_odd_rows(make):
    weight = rows()
    got = make(weight)
    assert not got[0].any()
    assert got[1].isfinite().all()
    assert got[2].isnan().any()  # its group at least
    assert not got[3].abs().gt(1e-3).any()
    finite = [0, 1, 3, *range(4, 16)]
    assert got[finite].isfinite().all()
    calm = rows()
    calm[2, 100] = 0.0
    if make is not hqq_codes:  # its groups stop together
        torch.testing.assert_close(got[4:], make(calm)[4:], rtol=0, atol=0)


def test_a_constant_row_is_kept_where_nothing_moves_it():
    weight = rows()
    for got in (nearest(weight, 4, 64).dequantized_NK(), nearest(weight, 4, 64, False).dequantized_NK()):
        torch.testing.assert_close(got[1], weight[1], rtol=1e-6, atol=0)
