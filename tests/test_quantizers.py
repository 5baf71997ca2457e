"""Quantizers against hand-computed cases, naive float64 references, and bitsandbytes."""

import copy
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODELS, quantizer
from tiny import model as ours
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from quantbench import catalog
from quantbench.anatomy import HEADS, SITES, anatomy
from quantbench.calibration import Calibration, Exemption, places, spans
from quantbench.ops import integers, outlier_stats
from quantbench.ops.integers import dequantize, pack_int4, product, quantize, scale_of, unpack_int4
from quantbench.ops.ranges import Span
from quantbench.quantizers import (
    IntegerEmbedding,
    IntegerLinear,
    LowBitLinear,
    RoundedLinear,
    Rounding,
    nearest,
    round_site,
    swap,
)
from quantbench.quantizers.bnb import Bnb4, Bnb4Linear, BnbInt8, BnbInt8Linear
from quantbench.quantizers.llm_int8 import ElementLinear, LLMInt8, MixedLinear

NF4 = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]  # arXiv:2305.14314


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 64, outputs: int = 48, seed: int = 0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data = gaussian(outputs, inputs, seed=seed)
    if bias:
        layer.bias.data = gaussian(outputs, seed=seed + 1)
    return layer.requires_grad_(False)


def llama(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **shape | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    return model


IDS = torch.randint(1, 128, (4, 24), generator=torch.Generator().manual_seed(3))
IDS[:, 0] = 0
FIRST = torch.zeros(IDS.shape, dtype=torch.bool)
FIRST[:, 0] = True


def calibration(exempt: Tensor | None = None) -> Calibration:
    halves = [None, None] if exempt is None else exempt.split(2)
    return Calibration(list(zip(IDS.split(2), halves, strict=True)))


def decoder() -> nn.Module:
    """Our own, of the same vocabulary."""
    return ours(vocab_size=128)


def with_sink() -> LlamaForCausalLM:
    """Its first token carries one feature of 300 through the whole residual stream."""
    model = llama()
    model.model.embed_tokens.weight.data *= 8
    model.model.embed_tokens.weight.data[0, 5] = 300.0
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


# --- integers -------------------------------------------------------------------------------------------------------


def test_a_row_by_hand():
    x = torch.tensor([-7.0, 3.6, 1.0, 0.4, 0.0])
    scale = scale_of(x.abs().amax(), 4)
    assert scale == 1.0
    assert quantize(x, scale, 4).tolist() == [-7, 4, 1, 0, 0]
    assert dequantize(quantize(x, scale, 4), scale).tolist() == [-7.0, 4.0, 1.0, 0.0, 0.0]


def test_rounding_is_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize(x, torch.tensor(1.0), 8).tolist() == [0, 2, 2, 0, -2, -2]


def test_the_range_is_symmetric_and_clamped():
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan])
    assert quantize(x, torch.tensor(1.0), 8).tolist() == [127, -127, 127, -127, 0]
    assert quantize(x, torch.tensor(1.0), 3).tolist() == [3, -3, 3, -3, 0]


@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_no_range_gives_zeros(value: float):
    scale = scale_of(torch.tensor(value), 8)
    assert scale == 1.0
    assert quantize(torch.full((3,), value), scale, 8).tolist() == [0, 0, 0]


def test_nan_stays_in_the_scale():
    assert scale_of(torch.tensor([1.0, math.nan]).amax(), 8).isnan()


def test_a_constant_row_is_kept():
    x = torch.full((1, 9), -0.3)
    scale = scale_of(x.abs().amax(), 8)
    torch.testing.assert_close(dequantize(quantize(x, scale, 8), scale), x, rtol=2e-7, atol=0)


def test_bf16_is_divided_in_float32():
    x = gaussian(1000).to(torch.bfloat16)
    scale = scale_of(x.abs().amax(), 8)
    assert torch.equal(quantize(x, scale, 8), quantize(x.float(), scale, 8))


def test_nibbles_come_back():
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_int4(q)
    assert packed.shape == (3, 16)
    assert packed.dtype == torch.uint8
    assert packed[0, 0].item() == (-8 & 15) | ((-7 & 15) << 4)
    assert torch.equal(unpack_int4(packed), q)


@pytest.mark.parametrize(("least", "top"), [(-128, 127), (-255, 255), (-7, 7)])
@pytest.mark.parametrize("width", [1, 64, 513, 1024, 1025, 1536, 5000])
@pytest.mark.parametrize("faster", ["int8", "float32"])
def test_the_integer_product_is_exact_up_to_one_rounding_whichever_way_is_faster(
    width: int, least: int, top: int, faster: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(integers, "fastest", lambda question, make: faster)  # of a CPU whose int8 product is exact
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(least, top + 1, (2, 3, width), generator=generator)
    w = torch.randint(-128, 128, (5, width), generator=generator)
    x[0, 0], w[0], w[1] = least, -128, 127  # the extremes of the sum
    x[0, 1, ::2], x[0, 1, 1::2] = top, top - 1  # all bits of the sum in play
    y = product(x.float(), w.float(), -least)
    assert torch.equal(y, (x @ w.T).float())


def test_the_integer_product_is_exact_under_autocast():
    x, w = (torch.full((1, 999), 127.0) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x, w).item() == 999 * 127**2


def test_rows_are_those_of_bitsandbytes():
    """Its x * (127 / absmax) and our x / (absmax / 127) may differ where the quotient is within rounding of a half."""
    from bitsandbytes.functional import int8_vectorwise_quant

    x = gaussian(128, 512).half()
    x[3] = 0.0
    theirs, absmax_M, _ = int8_vectorwise_quant(x.clone(), threshold=0.0)
    ours = quantize(x, scale_of(x.abs().amax(-1, keepdim=True), 8), 8)
    exact = x.double() * 127 / absmax_M.double().clamp(min=1e-30).unsqueeze(-1)
    clear = ((exact - exact.floor()) - 0.5).abs() > 1e-4
    assert clear.double().mean() > 0.999
    assert torch.equal(ours[clear], theirs[clear])
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_sink_token_costs_its_neighbours_only_under_a_shared_range():
    """science.md's planted case: a feature of 300 in a Gaussian [256, 512]."""
    x = gaussian(256, 512)
    x[0, 7] = 300.0

    def sqnr(absmax: Tensor) -> float:
        scale = scale_of(absmax, 8)
        noise = dequantize(quantize(x, scale, 8), scale) - x
        return 10 * math.log10(x[1:].square().sum() / noise[1:].square().sum())

    assert sqnr(x.abs().amax()) == pytest.approx(3.5, abs=0.2)
    assert sqnr(x.abs().amax(-1, keepdim=True)) == pytest.approx(42.6, abs=0.3)
    assert sqnr(x[1:].abs().amax()) > 30  # the sink exempt


# --- IntegerLinear --------------------------------------------------------------------------------------------------


def low_bit(
    layer: nn.Linear,
    weights: int = 8,
    group: int = 0,
    activations: int = 16,
    scope: str = "token",
    span: Tensor | None = None,
    exemption: Exemption | None = None,
) -> IntegerLinear:
    rounding = None
    if activations < 16:
        rounding = Rounding(activations, scope, None if span is None else Span(-span, span))
    return IntegerLinear(layer, exemption or Exemption(), nearest(layer.weight, weights, group), weights, rounding)


def naive(layer: nn.Linear, x: Tensor, weights: int, group: int, activations: int, scope: str, span: float) -> Tensor:
    """Fake quantization in float64 numpy."""
    x_MK, w_NK = x.double().numpy(), layer.weight.double().numpy()

    def fake(a: np.ndarray, largest: np.ndarray | float, bits: int) -> np.ndarray:
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(largest, 1e-300) / top
        return np.clip(np.rint(a / scale), -top, top) * scale

    for start in range(0, w_NK.shape[1], group or w_NK.shape[1]):
        part = slice(start, start + (group or w_NK.shape[1]))
        w_NK[:, part] = fake(w_NK[:, part], np.abs(w_NK[:, part]).max(1, keepdims=True), weights)
    if activations < 16:
        ranges = {"static": span, "token": np.abs(x_MK).max(-1, keepdims=True), "tensor": np.abs(x_MK).max()}
        x_MK = fake(x_MK, ranges[scope], activations)
    return torch.from_numpy(x_MK @ w_NK.T + layer.bias.double().numpy())


@pytest.mark.parametrize("scope", ["static", "token", "tensor"])
@pytest.mark.parametrize(
    ("weights", "group", "activations"), [(8, 0, 8), (8, 32, 6), (4, 64, 8), (4, 32, 4), (3, 0, 2), (4, 64, 16)]
)
def test_integer_linear_equals_a_naive_reference(weights: int, group: int, activations: int, scope: str):
    layer, x = linear(128, 48), gaussian(2, 7, 128, seed=9)
    x[1, 2] = 0.0
    span = torch.tensor(2.5) if scope == "static" and activations < 16 else None
    low = low_bit(layer, weights, group, activations, scope, span)
    expected = naive(layer, x, weights, group, activations, scope, 2.5)
    assert error(low(x).double(), expected) < 1e-6


def test_bits_as_stored():
    plain, grouped = linear(128, 48), linear(128, 48)
    assert low_bit(plain).stored_bits() == 48 * 128 * 8 + 48 * 32
    assert low_bit(grouped, 4, 64).stored_bits() == 48 * 128 * 4 + 48 * 2 * 32


@pytest.mark.parametrize("weights", [4, 8])
def test_the_state_holds_no_float_weights(weights: int):
    state = low_bit(linear(128, 48), weights, 64, 8).state_dict()
    assert state["weight"].dtype == (torch.uint8 if weights == 4 else torch.int8)
    assert {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()} == {
        "bias": (48,),
        "scale_NG": (48, 2),
    }


def test_a_dead_channel_is_its_bias():
    layer = linear()
    layer.weight.data[3] = 0.0
    y = low_bit(layer, 4, 32, 4)(gaussian(2, 5, 64))
    assert torch.equal(y[..., 3], layer.bias[3].expand(2, 5))


def test_a_tokens_result_does_not_depend_on_the_batch():
    low, x = low_bit(linear(), 8, 0, 8), gaussian(8, 5, 64)
    alone = torch.cat([low(sequence[None]) for sequence in x])
    x[0, 0, 0] = 1e4
    assert torch.equal(low(x)[1:], alone[1:])
    assert torch.equal(low(x)[0, 1:], alone[0, 1:])


@pytest.mark.parametrize("scope", ["static", "token", "tensor"])
def test_exempt_positions_meet_the_low_bit_weights_in_full_precision(scope: str):
    exemption, layer, x = Exemption(), linear(), gaussian(3, 5, 64)
    x[:, 0, 7] = 300.0
    span = torch.tensor(4.0) if scope == "static" else None
    low = low_bit(layer, 8, 0, 8, scope, span, exemption)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 0] = True
    with exemption.of(mask):
        y = low(x)
    torch.testing.assert_close(y[:, 0], F.linear(x[:, 0], low.dequantized_NK(), layer.bias))
    assert torch.equal(y[:, 1:], low(x[:, 1:]))  # as if the exempt were not there
    assert exemption.mask_BT is None


def test_a_mask_of_other_positions_is_refused():
    exemption = Exemption()
    low = low_bit(linear(), 8, 0, 8, exemption=exemption)
    with exemption.of(torch.zeros(3, 5, dtype=torch.bool)):
        for x in (gaussian(14, 64), gaussian(3, 6, 64), gaussian(5, 3, 64)):
            with pytest.raises(AssertionError, match="marked exempt"):
                low(x)


def test_a_mask_speaks_of_sequences_laid_end_to_end():
    exemption, x = Exemption(), gaussian(3, 5, 64)
    low = low_bit(linear(), 8, 0, 8, exemption=exemption)
    with exemption.of(torch.eye(3, 5, dtype=torch.bool)):
        assert torch.equal(low(x.flatten(0, 1)), low(x).flatten(0, 1))


@pytest.mark.parametrize("scope", ["static", "token", "tensor"])
@pytest.mark.parametrize(
    ("weights", "group", "activations"), [(8, 0, 8), (8, 32, 6), (4, 64, 8), (4, 32, 4), (3, 0, 2), (5, 32, 7)]
)
def test_asymmetric_inputs_equal_a_naive_reference(weights: int, group: int, activations: int, scope: str):
    """y = sum over groups of (q_x - z_x) q_W s_W s_x + bias, each of these made in float64 numpy."""
    layer, x = linear(128, 48), gaussian(2, 7, 128, seed=9) + 0.8
    x[1, 2], x[0, 3], x[0, 4] = 0.0, 1.5, -x[0, 4].abs()  # zeros, a constant, one-sided
    span = Span(torch.tensor(-1.5), torch.tensor(3.0)) if scope == "static" else None
    codes = nearest(layer.weight, weights, group)
    low = IntegerLinear(layer, Exemption(), codes, weights, Rounding(activations, scope, span, symmetric=False))

    x_MK, w_NK = x.double().flatten(0, 1).numpy(), layer.weight.double().numpy()
    ends = {"static": (-1.5, 3.0), "tensor": (x_MK.min(), x_MK.max())}.get(
        scope, (x_MK.min(1, keepdims=True), x_MK.max(1, keepdims=True))
    )
    floor, top = -(2 ** (activations - 1)), 2 ** (activations - 1) - 1
    scale = (np.maximum(ends[1], 0) - np.minimum(ends[0], 0)) / (top - floor)
    scale = np.where(scale == 0, 1.0, scale)
    zero = np.clip(floor - np.rint(np.minimum(ends[0], 0) / scale), floor, top)
    q_MK = np.clip(np.rint(x_MK / scale) + zero, floor, top)
    got_q, got_scale, got_zero = low.rounding.integers(x, x)
    assert np.array_equal(got_q.flatten(0, 1).numpy(), q_MK)
    assert np.array_equal(got_zero.double().numpy().reshape(zero.shape), zero)

    y_MN = np.zeros((14, 48))
    for start in range(0, 128, group or 128):
        part = slice(start, start + (group or 128))
        most = 2 ** (weights - 1) - 1
        w_scale = np.abs(w_NK[:, part]).max(1, keepdims=True) / most
        y_MN += (q_MK - zero)[:, part] @ np.clip(np.rint(w_NK[:, part] / w_scale), -most, most).T * w_scale.T
    expected = torch.from_numpy(y_MN * scale + layer.bias.double().numpy()).view(2, 7, 48)
    assert error(low(x).double(), expected) < 1e-6

    # Of the integers themselves float32 is exact: what is left are the products with the scales, in this order.
    exact = torch.zeros(2, 7, 48)
    for g, w_scale_N in enumerate(codes.scale_NG.unbind(-1)):
        part = slice(g * (group or 128), (g + 1) * (group or 128))
        sums = (got_q.long() - got_zero.long())[..., part] @ codes.q_NK.long()[:, part].T
        exact += sums.float() * w_scale_N
    assert torch.equal(low(x), exact * got_scale + layer.bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [520, 1100, 3000])
def test_wide_sums_are_rounded_once(inputs: int, symmetric: bool):
    layer, x = linear(inputs, 8, bias=False), gaussian(3, inputs, seed=5) + 1
    low = IntegerLinear(layer, Exemption(), nearest(layer.weight, 8), 8, Rounding(8, "token", symmetric=symmetric))
    q, scale, zero = low.rounding.integers(x, x)
    sums = (q.long() - (0 if zero is None else zero.long())) @ low.q_NK().long().T
    assert torch.equal(low(x), sums.float() * low.scale_NG.T * scale)


def test_weights_in_full_precision_meet_rounded_inputs():
    layer, x = linear(), gaussian(3, 5, 64)
    rounding = Rounding(4, "token")
    low = RoundedLinear(layer, Exemption(), rounding)
    assert torch.equal(low(x), F.linear(rounding(x, x), layer.weight, layer.bias))
    assert torch.equal(low.dequantized_NK(), layer.weight)
    assert low.stored_bits() == layer.weight.numel() * 32
    model = llama()
    report = quantizer("w8a8-token", weights=16).quantize(model, calibration())
    assert report["bits-per-weight"] == 32
    assert isinstance(model.model.layers[0].mlp.up_proj, RoundedLinear)
    assert 0 < error(logits(model), logits(llama())) < 0.03


@pytest.mark.parametrize("weights", [4, 8])
def test_what_is_kept_for_speed_is_neither_saved_nor_stale(weights: int):
    low, other, x = low_bit(linear(), weights, 32, 8), low_bit(linear(seed=7), weights, 32, 8), gaussian(2, 5, 64)
    before, bits = set(low.state_dict()), low.stored_bits()
    with torch.inference_mode():
        first = low(x)
    assert torch.equal(low(x), first)
    assert set(low.state_dict()) == before
    assert low.stored_bits() == bits
    twin = copy.deepcopy(low)
    assert torch.equal(twin(x), first)
    low.load_state_dict(other.state_dict())
    assert torch.equal(low(x), other(x))
    assert torch.equal(copy.deepcopy(low)(x), other(x))
    assert torch.equal(twin(x), first)
    low.weight.zero_()
    assert torch.equal(low(x), low.bias.expand(2, 5, -1))
    assert twin.to("meta").float_NK().device.type == "meta"
    assert torch.equal(other.double().float()(x), low_bit(linear(seed=7), weights, 32, 8)(x))


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.names("quantizers"))
def test_every_entry_quantizes_a_model(name: str):
    entry, model = quantizer(name), llama()
    full, before = logits(model), copy.deepcopy(model.state_dict())
    parts = anatomy(model)
    modules = [(layer, name.partition(".")[2]) for name, (layer, _) in parts.linears().items()]
    entry.check([64, 128])
    report = entry.quantize(model, calibration())
    got = logits(model)
    most = {"w8": 0.06, "w6": 0.25, "w4": 0.8}.get(name[:2], 0.6 if "4" in name else 0.06)
    assert 0 < error(got, full) < most
    assert got.dtype == torch.float32
    assert report["share-of-weights"] == 1.0
    assert 4 < report["bits-per-weight"] < (41 if name == "llm-int8-elementwise" else 9)
    assert all(type(value) is float for value in report.values())
    assert all(isinstance(parts.blocks[layer].get_submodule(path), LowBitLinear) for layer, path in modules)
    assert not model.training
    kept = [name for name in before if not name.startswith(("model.layers", "blocks"))]
    assert len(kept) == 3
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    assert torch.equal(logits(model), got)  # nothing adapts as it runs
    assert entry.title


# One of each kind, with what it may cost a model that was not trained.
KINDS = {"w8a8-static-qualcomm": 0.4, "w4a4kv4": 1.2, "w4a16-gptq": 0.8, "w4a16-awq": 0.8, "llm-int8": 0.2}
KINDS |= {"llm-int8-elementwise": 0.2, "bnb-int8": 0.2, "bnb-nf4": 0.8}


@pytest.mark.parametrize("change", MODELS)
def test_one_of_each_kind_quantizes_a_model_with_every_part(change: str):
    def build() -> Any:
        return ours(MODELS[change], vocab_size=128).requires_grad_(False)

    full, linears = logits(build()), len(anatomy(build()).linears())
    for name, most in KINDS.items():
        model = build()
        report = quantizer(name).quantize(model, calibration())
        assert 0 < error(logits(model), full) < most, name
        assert report["share-of-weights"] == 1.0
        assert sum(isinstance(module, LowBitLinear) for block in model.blocks for module in block.modules()) >= linears


@pytest.mark.parametrize("change", MODELS)
def test_where_every_position_is_exempt_no_site_of_any_part_is_rounded(change: str):
    model, data = ours(MODELS[change], vocab_size=128).requires_grad_(False), calibration()
    full = logits(model)
    quantizer("w8a8-static", weights=16, activations=3, sites=SITES, symmetric=False).quantize(model, data)
    assert error(logits(model), full) > 0.05
    with data.exemption.of(torch.ones(len(IDS), model.registers + IDS.shape[1], dtype=torch.bool)):
        torch.testing.assert_close(logits(model), full, rtol=1e-4, atol=1e-4)


def test_more_bits_hurt_less():
    full, damage = logits(llama()), []
    for entry in (
        quantizer("w4a4-token"),
        quantizer("w4a16-rtn"),
        quantizer("w8a8-token"),
        quantizer("w8a8-token", activations=6),
    ):
        model = llama()
        entry.quantize(model, calibration())
        damage.append(error(logits(model), full))
    w4a4, w4a16, w8a8, w8a6 = damage
    assert w4a4 > w4a16 > w8a6 > w8a8


def test_ranges_by_hand_and_exempt_positions_do_not_count():
    model = with_sink()
    seen: list[Tensor] = []
    first_block = anatomy(model).blocks[0]
    hook = first_block.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    logits(model)
    hook.remove()
    both = ("inputs", "residual")
    assert spans(model, calibration(), both, 8)["0.residual"].high == seen[0].abs().max()
    ranges = spans(model, calibration(FIRST), both, 8)
    assert ranges["0.residual"].high == -ranges["0.residual"].low == seen[0][:, 1:].abs().max()
    assert ranges["0.residual"].high < 100 < seen[0].abs().max()
    assert set(ranges) == {"0.residual", "1.residual", *anatomy(model).linears()}
    assert not first_block._forward_hooks


def test_a_model_that_overflows_is_refused():
    model = llama()
    model.model.embed_tokens.weight.data[0] = math.inf
    with pytest.raises(ValueError, match=r"site 0\.self_attn\.q_proj"):
        quantizer("w8a8-static").quantize(model, calibration())


def test_exempting_the_sink_undoes_the_damage_and_exempting_another_does_not():
    full = logits(with_sink())[:, 1:]

    def damage(mask: Tensor | None) -> float:
        model, data = with_sink(), calibration(mask)
        quantizer("w8a8-static-residual").quantize(model, data)
        with data.exemption.of(mask):
            return error(logits(model)[:, 1:], full)

    plain, without_sink, without_other = damage(None), damage(FIRST), damage(FIRST.roll(9, 1))
    assert without_sink < plain / 10
    assert without_other > plain / 2


def test_the_residual_is_rounded_but_for_exempt_positions():
    model, data = with_sink(), calibration()
    quantizer("w8a8-static-residual").quantize(model, data)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    logits(model)
    with data.exemption.of(FIRST):
        logits(model)
    rounded, exempt = seen
    assert len(rounded.unique()) <= 255
    assert len(exempt[:, 1:].unique()) <= 255
    assert len(exempt[:, 0].unique()) > 50  # of the 64 values of the one token id there


def pass_by(model: nn.Module, modules: dict[str, nn.Module], inputs: bool = False) -> dict[str, Tensor]:
    """What passes these places, after whatever rounds it there."""
    seen: dict[str, Tensor] = {}

    def watch(place: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            seen[place] = args[0] if inputs else output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(place)) if inputs else module.register_forward_hook(watch(place))
        for place, module in modules.items()
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("scope", ["static", "token", "tensor"])
@pytest.mark.parametrize("build", [decoder, llama])
def test_every_site_is_rounded_where_it_passes(build: Any, scope: str, bits: int):
    for site in SITES[1:]:
        model = build()
        before = pass_by(model, places(anatomy(model), site))
        quantizer(f"w8a8-{scope}", weights=16, activations=bits, sites=(site,), symmetric=False).quantize(
            model, calibration()
        )
        assert not any(isinstance(module, LowBitLinear) for module in model.modules())
        after = pass_by(model, places(anatomy(model), site))
        assert before.keys() == after.keys()
        for place, x in after.items():
            rows = x.flatten(0, -2) if scope == "token" else x.flatten().unsqueeze(0)
            if site in ("scores", "probabilities") and scope != "static":
                rows = x.tril().flatten(0, -2) if scope == "token" else x.tril().flatten().unsqueeze(0)
            assert max(len(row.unique()) for row in rows) <= 2**bits, place
            if before[place].unique().numel() > 256:
                assert not torch.equal(x, before[place])


@pytest.mark.parametrize("site", HEADS)
def test_a_site_that_a_model_does_not_show_is_refused_in_a_line(site: str):
    model, before = llama(), logits(llama())
    model.set_attn_implementation("flex_attention")  # whose masks are no tensors
    for scope in ("static", "token"):
        with pytest.raises(ValueError, match=rf"^this model does not show its {site}: leave the site out [^\n]*$"):
            quantizer(f"w8a8-{scope}", sites=("inputs", site)).quantize(model, calibration())
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), before)  # nothing was changed before


@pytest.mark.parametrize("build", [decoder, llama])
@pytest.mark.parametrize("bits", [3, 8])
def test_embeddings_and_head_at_the_bits_of_the_weights(build: Any, bits: int):
    model, exact = build(), build()
    plain = copy.deepcopy(model)
    quantizer("w8a8-token", weights=bits).quantize(plain, calibration())
    quantizer("w8a8-token", weights=bits, sites=("inputs", "embeddings", "head")).quantize(model, calibration())
    parts = anatomy(model)
    assert isinstance(parts.table, IntegerEmbedding)
    assert isinstance(parts.head, IntegerLinear)
    assert parts.head.rounding is None
    rows = anatomy(exact).table.weight
    codes = nearest(rows, bits)
    assert torch.equal(parts.table(IDS), dequantize(codes.q_NK, codes.scale_NG)[IDS])
    assert torch.equal(parts.head.dequantized_NK(), nearest(anatomy(exact).head.weight, bits).dequantized_NK())
    assert 0 < error(logits(model), logits(plain)) < (0.05 if bits == 8 else 0.8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_bits_of_everything_hurt_less(bits: int):
    everything = ("inputs", *SITES[1:], "embeddings", "head")

    def damage(bits: int) -> float:
        model = decoder()
        full = logits(model)
        quantizer("w8a8-static", weights=bits, activations=bits, sites=everything).quantize(model, calibration())
        return error(logits(model), full)

    assert 0 < damage(bits) < (1.2 * damage(bits - 1) if bits > 3 else 3)


@pytest.mark.parametrize("name", [n for n in catalog.names("quantizers") if n[:3] in ("w8a", "w6a", "w4a", "llm")])
def test_a_model_that_carries_nothing_is_quantized(name: str):
    """Zero embeddings: every range is empty, no site has an outlier."""
    model = decoder()
    model.embed.weight.data.zero_()
    report = quantizer(name).quantize(model, calibration())
    assert not logits(model).any()
    assert all(math.isfinite(value) for value in report.values())


def test_a_copy_of_a_quantized_model_is_one():
    model, data = decoder(), calibration()
    everything = ("inputs", "residual", "norms", *HEADS)
    quantizer("w8a8-static", sites=everything, symmetric=False).quantize(model, data)
    before, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    with data.exemption.of(FIRST):
        assert torch.equal(logits(twin), logits(model))
        assert not torch.equal(logits(twin), before)
    for module in twin.modules():
        if isinstance(module, Rounding):
            module.static_scale *= 30
    assert torch.equal(logits(model), before)
    assert error(logits(twin), before) > 0.2


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "weights"


def test_a_block_may_return_a_tuple():
    block, seven = Pair(), torch.tensor(7.0)
    round_site(block, "residual", Rounding(4, "static", Span(-seven, seven)), Exemption())
    hidden, other = block(torch.tensor([[[6.6, 0.4, 9.0]]]))
    assert hidden.tolist() == [[[7.0, 0.0, 7.0]]]
    assert other == "weights"


def test_a_batch_range_is_the_batchs():
    model = llama()
    quantizer("w8a8-tensor").quantize(model, Calibration([]))
    assert not torch.allclose(logits(model)[:1], logits(model, IDS[:1]), atol=1e-6)


def test_weights_outside_linears_are_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj = Conv1D(128, 64)
    with pytest.raises(ValueError, match=r"only 90% .* Conv1D"):
        quantizer("w8a8-token").quantize(model, calibration())


def test_a_quantized_model_is_not_quantized_again():
    model = llama()
    quantizer("w8a8-token").quantize(model, calibration())
    for again in (quantizer("w8a8-token"), BnbInt8()):
        with pytest.raises(AssertionError, match="quantized already"):
            again.quantize(model, calibration())


@pytest.mark.parametrize(
    ("entry", "widths", "says"),
    [
        (quantizer("w4a16-rtn"), [64, 100], "group: 64 .* 100"),
        (quantizer("w4a4-token", group=0), [64, 33], "33 is odd"),
        (Bnb4(), [64, 96], "bnb-nf4: .*64 .* 96"),
        (quantizer("w8a8-token", weights=9), [], "weights: 9"),
        (quantizer("w8a8-token", weights=16, activations=16), [], "nothing is quantized"),
        (quantizer("w4a16-rtn", sites=("inputs", "residual")), [], "sites: inputs, residual need activations"),
        (quantizer("w8a8-token", weights=16, sites=("head",)), [], "embeddings, head need weights"),
        (quantizer("w8a8-token", sites=("keys", "keys")), [], "sites: one is named twice"),
        (quantizer("w8a8-token", symmetric_weights=False), [], "symmetric-weights: false needs inputs"),
        (quantizer("w8a8-token", rule="mse"), [], "rule: mse sets static ranges"),
        (quantizer("w8a8-static", rule="percentile", percent=30.0), [], "percent: 30"),
        (LLMInt8(threshold=-1.0), [], "threshold: -1"),
        (LLMInt8(threshold=math.nan), [], "threshold: nan"),
        (LLMInt8(share=2.0), [], "share: 2"),
        (BnbInt8(threshold=math.nan), [], "threshold"),
    ],
)
def test_what_cannot_be_done_is_named(entry, widths: list[int], says: str):
    with pytest.raises(ValueError, match=says):
        entry.check(widths)


# --- LLM.int8() -----------------------------------------------------------------------------------------------------


def test_outlier_columns_are_those_that_enough_tokens_reach():
    model = llama()
    for block in model.model.layers:
        block.input_layernorm.weight.data[5] = 100.0  # nearly every token
    report = LLMInt8().quantize(model, calibration())
    mixed = [module for module in model.modules() if isinstance(module, MixedLinear)]
    for block in model.model.layers:
        assert block.self_attn.q_proj.columns_J.tolist() == block.self_attn.v_proj.columns_J.tolist() == [5]
        assert not len(block.mlp.up_proj.columns_J)
    kept = sum(len(module.columns_J) for module in mixed) / sum(module.in_features for module in mixed)
    assert report["columns-kept"] == pytest.approx(kept)


def test_one_token_is_no_outlier_feature_unless_share_is_zero():
    model, sink = with_sink(), with_sink()
    assert LLMInt8(share=0.06).quantize(model, calibration())["columns-kept"] == 0
    assert LLMInt8(share=0.0).quantize(sink, calibration())["columns-kept"] > 0  # 7.9 after the norm: column 5
    assert sink.model.layers[0].self_attn.q_proj.columns_J.tolist() == [5]


def test_kept_columns_are_exact_and_the_rest_is_per_token():
    layer, x = linear(), gaussian(2, 5, 64)
    x[..., 9] *= 50
    outlier = torch.zeros(64, dtype=torch.bool)
    outlier[9] = True
    mixed = MixedLinear(layer, Exemption(), outlier)
    rest = linear()
    rest.weight.data[:, 9] = 0.0
    x_rest = x.clone()
    x_rest[..., 9] = 0.0
    expected = naive(rest, x_rest, 8, 0, 8, "token", 0.0) + (x[..., 9:10] @ layer.weight[:, 9:10].T).double()
    assert error(mixed(x).double(), expected) < 1e-6
    assert torch.equal(mixed.dequantized_NK()[:, 9], layer.weight[:, 9])
    assert error(mixed(x), layer(x)) < error(low_bit(layer, 8, 0, 8)(x), layer(x)) / 2


def test_its_integers_do_not_depend_on_the_batch():
    outlier = torch.zeros(64, dtype=torch.bool)
    outlier[9] = True
    mixed, x = MixedLinear(linear(bias=False), Exemption(), outlier), gaussian(4, 5, 64)
    alone = torch.cat([mixed.rest(sequence[None]) for sequence in x])
    x[0, 0] *= 100  # outliers in every column of one token
    assert torch.equal(mixed.rest(x)[1:], alone[1:])
    torch.testing.assert_close(mixed(x)[1:], torch.cat([mixed(s[None]) for s in x])[1:], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["columns", "elements", "off"])
def test_a_token_is_the_same_in_any_company(kind: str, seed: int):
    generator, layer = torch.Generator().manual_seed(seed), linear(seed=seed)
    x = gaussian(40, 64, seed=seed) * 2
    x[7] *= 1000  # a loud neighbour
    x[9, 3] = math.inf
    x[11, 3] = math.nan
    skip = torch.rand(64, generator=generator) < 0.2 if kind == "columns" else None
    threshold = 0.0 if kind == "off" else 3.0
    low: LowBitLinear = MixedLinear(layer, Exemption(), torch.zeros(64, dtype=torch.bool) if skip is None else skip)
    if kind == "elements":
        low = ElementLinear(layer, Exemption(), threshold)
    every = outlier_stats(x, threshold, skip_columns=skip, quantize=True)
    y = low(x[None])[0]
    for _ in range(8):
        some = torch.randperm(40, generator=generator)[: int(torch.randint(1, 40, (), generator=generator))]
        found = outlier_stats(x[some], threshold, skip_columns=skip, quantize=True)
        assert torch.equal(found.q, every.q[some])
        assert torch.equal(found.row_scale.nan_to_num(-1), every.row_scale[some].nan_to_num(-1))
        got = low(x[some][None])[0]
        torch.testing.assert_close(got, y[some], rtol=1e-6, atol=1e-4, equal_nan=True)
        if kind == "off":
            assert torch.equal(got.nan_to_num(-1), y[some].nan_to_num(-1))
    assert y[11].isnan().all()
    assert y[[i for i in range(40) if i not in (9, 11)]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_elements_are_exact_and_the_rest_is_per_token(dtype: torch.dtype):
    layer, x = linear(), (gaussian(2, 5, 64) * 2).to(dtype)
    x[0, 0, :3] = torch.tensor([50.0, -80.0, 6.1875], dtype=dtype)  # bf16 holds 6.1875; 6.2 would become that
    threshold = 6.2
    out = x.float().abs() >= threshold
    assert not out[0, 0, 2]
    assert 2 <= out.sum() < 40
    low = ElementLinear(layer, Exemption(), threshold)
    kept, rest = x.double().where(out, 0.0), x.double().masked_fill(out, 0.0)
    expected = naive(layer, rest, 8, 0, 8, "token", 0.0) + kept @ layer.weight.double().T
    assert error(low(x).double(), expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert low.stored_bits() == low.rest.stored_bits() + 32 * 64 * 48
    nothing = ElementLinear(layer, Exemption(), 0.0)
    torch.testing.assert_close(nothing(x.float()), low_bit(layer, 8, 0, 8)(x.float()), rtol=1e-5, atol=1e-5)


def test_the_report_counts_what_is_kept():
    def loud() -> LlamaForCausalLM:
        model = llama()
        for block in model.model.layers:
            block.input_layernorm.weight.data[5] = 100.0
            for quiet in (block.self_attn.v_proj, block.mlp.up_proj):  # whose outputs are inputs, too
                quiet.weight.data *= 0.01
        return model

    reports = {n: quantizer(n).quantize(loud(), calibration()) for n in catalog.names("quantizers") if "llm-" in n}
    assert len(reports) == 5
    inputs, weights = 2 * (4 * 64 + 2 * 64 + 128), 2 * (4 * 64 * 64 + 3 * 64 * 128)
    plain = reports["llm-int8"]
    assert plain["columns-kept"] == pytest.approx(6 / inputs)  # q, k and v of two blocks
    assert plain["weights-kept"] == pytest.approx(6 * 64 / weights)
    assert plain["tokens-with-outliers"] == pytest.approx(6 / 14, abs=0.02)
    off = reports["llm-int8-off"]
    assert off["columns-kept"] == off["weights-kept"] == off["tokens-with-outliers"] == 0
    for name in ("columns-kept", "weights-kept", "tokens-with-outliers"):
        assert reports["llm-int8-3"][name] >= plain[name] >= reports["llm-int8-10"][name] > 0
    by_element = reports["llm-int8-elementwise"]
    assert by_element["columns-kept"] == 0
    assert by_element["weights-kept"] == 1
    assert by_element["tokens-with-outliers"] == plain["tokens-with-outliers"]
    assert by_element["elements-kept"] == pytest.approx(6 / inputs, abs=0.001)
    assert by_element["bits-per-weight"] > 40
    assert "elements-kept" not in plain


def test_off_is_int8_per_token():
    off, token = llama(), llama()
    quantizer("llm-int8-off").quantize(off, calibration())
    quantizer("w8a8-token").quantize(token, calibration())
    assert error(logits(off), logits(token)) < error(logits(token), logits(llama())) / 10  # x (127 / s), x / (s / 127)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def nf4(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    return (levels[(blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale).reshape(weight.shape)


def test_nf4_is_nearest_of_16_levels_with_the_known_error():
    layer = linear(256, 128)
    low = Bnb4Linear(layer, Exemption(), "nf4")
    assert error(low.dequantized_NK(), layer.weight) == pytest.approx(0.092, abs=0.003)
    torch.testing.assert_close(low.dequantized_NK(), nf4(layer.weight), rtol=0, atol=1e-6)
    assert low.stored_bits() / layer.weight.numel() == 4.5


@pytest.mark.parametrize("outputs", [8, 33, 64])
def test_nf4_computes_in_float32_and_leaves_its_weights_alone(outputs: int):
    """The in-place repacking for AVX512-BF16, which needs outputs in multiples of 32, is off."""
    layer, x = linear(64, outputs), gaussian(2, 5, 64)
    low = Bnb4Linear(layer, Exemption(), "nf4")
    before = low.inner.weight.data.clone()
    assert error(low(x), F.linear(x, low.dequantized_NK(), layer.bias)) < 1e-6
    assert torch.equal(low.inner.weight.data, before)
    assert not low.inner.support_avx512bf16_for_cpu


def test_nf4_names_the_layer_it_cannot_take():
    with pytest.raises(ValueError, match=r"0\.mlp\.down_proj: .*96"):
        Bnb4().quantize(llama(intermediate_size=96), calibration())


def test_bnb_int8_is_close_to_ours_without_outliers():
    """The same scheme but for its pass through fp16."""
    layer, x = linear(256, 64), gaussian(4, 16, 256)
    theirs = BnbInt8Linear(layer, Exemption(), 0.0)
    ours = low_bit(layer, 8, 0, 8)
    assert error(theirs(x), ours(x)) < error(ours(x), layer(x)) / 2
    assert error(theirs.dequantized_NK(), layer.weight) == pytest.approx(
        error(ours.dequantized_NK(), layer.weight), 0.1
    )


def test_bnb_int8_quantizes_inputs_in_train_mode_too_and_keeps_quiet(caplog: pytest.LogCaptureFixture):
    model = llama()
    BnbInt8().quantize(model, calibration())
    with caplog.at_level(logging.DEBUG):
        before = logits(model)
        assert torch.equal(logits(model.train()), before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_bnb_int8_takes_any_leading_axes():
    low, x = BnbInt8Linear(linear(), Exemption(), 6.0), gaussian(2, 3, 5, 64)
    assert torch.equal(low(x), low(x.flatten(0, 2)).view(2, 3, 5, 48))


def test_bnb_int8_depends_on_the_batch_unless_the_sink_is_exempt():
    exemption, x = Exemption(), gaussian(2, 9, 64)
    low = BnbInt8Linear(linear(), exemption, 6.0)
    calm = low(x)
    x[:, 0] *= 100
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 0] = True
    assert not torch.equal(low(x)[:, 1:], calm[:, 1:])
    with exemption.of(mask):
        y = low(x)
    assert torch.equal(y[:, 1:], calm[:, 1:])
    torch.testing.assert_close(y[:, 0], F.linear(x[:, 0], low.dequantized_NK(), low.bias))


def test_activations_beyond_fp16_are_reported():
    def loud() -> LlamaForCausalLM:
        model = llama()
        model.model.layers[0].input_layernorm.weight.data[:] = 1e6
        return model

    assert BnbInt8().quantize(llama(), calibration())["above-fp16"] == 0.0
    model, safe = loud(), loud()
    assert BnbInt8(threshold=0.0).quantize(model, calibration())["above-fp16"] == pytest.approx(3 / 14, abs=0.1)
    assert not logits(model).isfinite().all()
    BnbInt8(threshold=6.0).quantize(safe, calibration())
    assert logits(safe).isfinite().all()


def test_swap_reaches_every_linear_by_its_name():
    model, seen = llama(), []

    def make(name: str, layer: nn.Linear) -> IntegerLinear:
        seen.append((name, layer.weight.shape))
        return low_bit(layer)

    expected = [(name, layer.weight.shape) for name, (_, layer) in anatomy(model).linears().items()]
    swap(model, make)
    assert seen == expected
    assert isinstance(model.model.layers[1].mlp.down_proj, IntegerLinear)
