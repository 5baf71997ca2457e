"""Each mitigation's formula on a case by hand, and its limits: where it is the baseline, or another entry."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import LENGTH, Fixed, track
from test_evaluate import VOCAB as WORDS
from tiny import gaussian, ids, model, quantizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from quantbench import packed
from quantbench.attention import Form, Softmax, causal
from quantbench.evaluate import Reference
from quantbench.mitigations import Mitigation, Output, Projection, RMSNorm, by_shape, fold_projection
from quantbench.mitigations.clipped_softmax import ClippedSoftmax
from quantbench.mitigations.context_scale import ContextScale
from quantbench.mitigations.gated_attention import GatedAttention
from quantbench.mitigations.gated_attention_qualcomm import GatedAttentionQualcomm
from quantbench.mitigations.kv_bias import KVBias
from quantbench.mitigations.peak_penalty import PeakPenalty
from quantbench.mitigations.qk_norm import QKNorm
from quantbench.mitigations.registers import Registers
from quantbench.mitigations.sigmoid_attention import SigmoidAttention
from quantbench.mitigations.single_scale_norm import SingleScaleNorm
from quantbench.mitigations.sink_logit import Softmax1
from quantbench.mitigations.softpick import Softpick
from quantbench.mitigations.value_gate import ValueGate
from quantbench.model import QuantbenchConfig, QuantbenchModel

CPU = torch.device("cpu")
IDS = ids()
CONFIG = QuantbenchConfig(width=32, heads=4)  # E = 8


def weights(entry: Mitigation, scores_TS: list[list[float]], visible: Tensor | None = None, **config: Any) -> Tensor:
    """Of one head of one sequence."""
    scores_BHTS = torch.tensor(scores_TS)[None, None]
    form = entry.weights(QuantbenchConfig(**config))
    return form(scores_BHTS, causal(len(scores_TS), CPU) if visible is None else visible)[0, 0]


def drawn(module: Any, seed: int = 0) -> Any:
    """With parameters of N(0, 1)."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = gaussian(*parameter.shape, seed=1000 + 10 * seed + number)
    return module


@torch.no_grad()
def logits(decoder: nn.Module, **kwargs: Any) -> Tensor:
    return decoder(IDS, **kwargs).logits


def plain(decoder: QuantbenchModel) -> QuantbenchModel:
    """The baseline with the parameters that it shares with a model."""
    other = model()
    shared = {name: p for name, p in decoder.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(other.state_dict() | shared)
    return other


ln = math.log


# --- clipped-softmax ---


def test_clipped_softmax_by_hand() -> None:
    """gamma = -4 / 40 = -.1; softmax of the rows: 1; 1/4, 3/4; 1/20, 1/20, 18/20."""
    entry = ClippedSoftmax(zeta=1.1, alpha=4.0)
    got = weights(entry, [[0, 9, 9], [0, ln(3), 9], [0, 0, ln(18)]], max_position_embeddings=40)
    expected = [[1, 0, 0], [1.2 / 4 - 0.1, 1.2 * 3 / 4 - 0.1, 0], [0, 0, 1.2 * 0.9 - 0.1]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_clipped_softmax_with_gamma_0_is_softmax() -> None:
    scores_BHTS = gaussian(2, 3, 8, 8)
    clipped = ClippedSoftmax(zeta=1.0, alpha=0.0).weights(CONFIG)
    assert torch.equal(clipped(scores_BHTS, causal(8, CPU)), Softmax()(scores_BHTS, causal(8, CPU)))


def test_a_row_of_equal_scores_is_clipped_to_nothing() -> None:
    """alpha 12 and T = 64: a weight below 3/19 is nothing, and so has no gradient."""
    form = ClippedSoftmax().weights(QuantbenchConfig(max_position_embeddings=64))
    scores_BHTS = torch.zeros(1, 1, 7, 7, requires_grad=True)
    got = form(scores_BHTS, causal(7, CPU))
    assert (got[0, 0, 6] == 0).all()
    assert (got[0, 0, 5, :6] > 0).all()  # 1/6
    (gradient,) = torch.autograd.grad(got[0, 0, 6].sum(), scores_BHTS)
    assert not gradient.any()


@pytest.mark.parametrize("kw", [{"zeta": 0.9}, {"alpha": -1.0}])
def test_clipped_softmax_says_what_it_takes(kw: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="zeta is at least 1, alpha at least 0"):
        ClippedSoftmax(**kw)


# --- sigmoid-attention ---


def test_sigmoid_attention_by_hand() -> None:
    scores_TS = [[0, 9], [ln(3), -ln(3)]]
    torch.testing.assert_close(weights(SigmoidAttention(), scores_TS), torch.tensor([[1 / 2, 0], [3 / 4, 1 / 4]]))
    # sigmoid(z - log 2): e^z / 2 over one more
    torch.testing.assert_close(weights(SigmoidAttention("log"), scores_TS), torch.tensor([[1 / 2, 0], [3 / 5, 1 / 7]]))


def test_sigmoid_attention_starts_at_half_the_keys_or_near_one() -> None:
    zeros, keys = torch.zeros(1, 1, 9, 9), torch.arange(1.0, 10)
    plain, log = (SigmoidAttention(bias).weights(CONFIG)(zeros, causal(9, CPU)) for bias in ("none", "log"))
    torch.testing.assert_close(plain.sum(-1)[0, 0], keys / 2)
    torch.testing.assert_close(log.sum(-1)[0, 0], keys / (keys + 1))


def test_sigmoid_attention_counts_the_keys_that_are_seen_not_the_positions() -> None:
    visible = torch.tensor([[True, False, False], [False, True, False], [False, True, True]])  # position 0 is padding
    got = weights(SigmoidAttention("log"), [[0.0] * 3] * 3, visible)
    torch.testing.assert_close(got, torch.tensor([[1 / 2, 0, 0], [0, 1 / 2, 0], [0, 1 / 3, 1 / 3]]))


# --- softpick ---


def rectified(scores_BHTS: Tensor, visible: Tensor, eps: float) -> Tensor:
    """relu(e^z - 1) / (sum |e^z - 1| + eps) as it is written, float64."""
    z = scores_BHTS.double().masked_fill(~visible, 0.0)  # e^0 - 1 is nothing
    return (z.exp() - 1).relu() / ((z.exp() - 1).abs().sum(-1, keepdim=True) + eps)


def test_softpick_by_hand() -> None:
    """e^z - 1 is 1, 2, -1/2: the last gets nothing, and takes from the others."""
    got = weights(Softpick(eps=0.0), [[ln(2), 9, 9], [ln(2), ln(3), 9], [ln(2), ln(3), ln(0.5)]])
    torch.testing.assert_close(got, torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [2 / 7, 4 / 7, 0]]))
    one = weights(Softpick(eps=1.0), [[ln(2)]])
    torch.testing.assert_close(one, torch.tensor([[1 / 2]]))


@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0, 300.0])
def test_softpick_is_its_formula_whatever_the_size(scale: float, eps: float) -> None:
    scores_BHTS = (gaussian(2, 2, 9, 9, dtype=torch.float64).clamp(-1, 1) * scale).float()
    hole = causal(9, CPU).clone()
    hole[5:, 2] = False
    got = Softpick(eps).weights(CONFIG)(scores_BHTS, hole)
    lost = 5e-8 / scale  # of fp32, where e^z - 1 is the difference of two nearly equal numbers
    torch.testing.assert_close(got.double(), rectified(scores_BHTS, hole, eps), rtol=1e-4, atol=1e-7 + lost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [-1.0, -89.0, -300.0, -1e4])
def test_softpick_of_logits_far_below_0_is_nothing_with_a_finite_gradient(size: float, dtype: torch.dtype) -> None:
    scores_BHTS = torch.full((1, 1, 4, 4), size, dtype=dtype, requires_grad=True)
    got = Softpick().weights(CONFIG)(scores_BHTS, causal(4, CPU))
    assert not got.any()
    (gradient,) = torch.autograd.grad(got.sum(), scores_BHTS)
    assert gradient.isfinite().all()
    mixed = torch.tensor([[[[300.0, 0.0], [size, 2.0]]]], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(Softpick().weights(CONFIG)(mixed, causal(2, CPU)).sum(), mixed)
    assert gradient.isfinite().all()
    assert gradient[0, 0, 1].any() or size < -10  # a key far below 0 takes e^-m - e^(z - m): all it can


def test_softpick_is_softmax_where_logits_are_large() -> None:
    scores_BHTS, visible = gaussian(1, 2, 6, 6), causal(6, CPU)
    got = Softpick().weights(CONFIG)(scores_BHTS + 30, visible)
    torch.testing.assert_close(got, Softmax()(scores_BHTS, visible))


# --- kv-bias ---


@pytest.mark.parametrize("value", [True, False])
@torch.no_grad()
def test_kv_bias_is_one_more_key_and_value_in_the_softmax(value: bool) -> None:
    form = drawn(KVBias(value=value).weights(CONFIG))
    q, k, v = (gaussian(2, 4, 5, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    got = form.attend(q, k, v, None)
    key_HE = form.key_D.double().view(4, 8)
    value_HE = form.value_D.double().view(4, 8) if value else torch.zeros(4, 8, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        logit = [float(q[b, h, i] @ k[b, h, j]) / 8**0.5 for j in range(i + 1)]
        sizes = [math.exp(z) for z in [*logit, float(q[b, h, i] @ key_HE[h]) / 8**0.5]]
        mixed = sum(size * x for size, x in zip(sizes, [*v[b, h, : i + 1], value_HE[h]], strict=True))
        torch.testing.assert_close(got[b, h, i], mixed / sum(sizes))


def test_a_learned_key_that_nobody_likes_leaves_softmax_and_one_at_0_is_softmax1() -> None:
    form, visible = KVBias(value=False).weights(CONFIG), causal(6, CPU)
    scores_BHTS = gaussian(1, 4, 6, 6)
    extended = [torch.cat((scores_BHTS, torch.full((1, 4, 6, 1), z)), -1) for z in (-300.0, 0.0)]
    seen = torch.cat((visible, torch.ones(6, 1, dtype=torch.bool)), -1)
    torch.testing.assert_close(form(extended[0], seen)[..., :6], Softmax()(scores_BHTS, visible))
    softmax1: Form = Softmax1().weights(CONFIG)
    torch.testing.assert_close(form(extended[1], seen)[..., :6], softmax1(scores_BHTS, visible))
    q, k, v = (gaussian(2, 4, 6, 8, seed=seed) for seed in range(3))
    form.key_D.data.zero_()
    torch.testing.assert_close(form.attend(q, k, v, None), softmax1.attend(q, k, v, None))


def test_a_learned_key_is_in_no_cache_and_is_no_matrix() -> None:
    decoder, cache = drawn(model({"kv-bias": {}})), DynamicCache()
    logits(decoder, past_key_values=cache)
    assert cache.get_seq_length() == cache.layers[0].keys.shape[2] == IDS.shape[1]
    others = {id(p) for p in by_shape(decoder)[1]}
    assert all({id(b.attention.form.key_D), id(b.attention.form.value_D)} <= others for b in decoder.blocks)
    start = model({"kv-bias": {"std": 0.5}}).blocks[0].attention.form
    assert all(p.std().item() == pytest.approx(0.5, rel=0.3) for p in (start.key_D, start.value_D))


# --- what gates the heads' outputs ---


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, H, T, E], x [B, T, D], v [B, H, T, E]."""
    return gaussian(2, 4, 5, 8, seed=seed), gaussian(2, 5, 32, seed=seed + 1), gaussian(2, 4, 5, 8, seed=seed + 2)


def sigmoid(x: Tensor | float) -> float:
    return 1 / (1 + math.exp(-float(x)))


Factor = Callable[[Any, Tensor, Tensor, int, int, int, int], float]
FACTORS: dict[str, tuple[Mitigation, Factor]] = {
    "elementwise": (GatedAttention(), lambda m, x, v, b, h, i, e: sigmoid(m.gate.weight[8 * h + e] @ x[b, i])),
    "head": (GatedAttention("head"), lambda m, x, v, b, h, i, e: sigmoid(m.gate.weight[h] @ x[b, i])),
    "slice": (
        GatedAttentionQualcomm(),
        lambda m, x, v, b, h, i, e: sigmoid(m.weight_HE[h] @ x[b, i, 8 * h : 8 * h + 8] + m.bias_H[h]),
    ),
    "own value": (ValueGate(), lambda m, x, v, b, h, i, e: sigmoid(m.weight_HE[h] @ v[b, h, i])),
    "source": (ValueGate("source"), lambda m, x, v, b, h, i, e: 1.0),
    "context": (ContextScale(), lambda m, x, v, b, h, i, e: 2 * sigmoid(m.scale.weight[h] @ x[b, i])),
}


@pytest.mark.parametrize("name", FACTORS)
@torch.no_grad()
def test_a_gate_by_its_formula(name: str) -> None:
    entry, factor = FACTORS[name]
    module = drawn(entry.output(CONFIG))
    y, x, v = states()
    got = module(y, x, v)
    for at in itertools.product(range(2), range(4), range(5), range(8)):
        assert float(got[at]) == pytest.approx(factor(module, x, v, *at) * float(y[at]), rel=1e-4, abs=1e-6)
    if name == "source":  # the values themselves are gated, before they are mixed
        for b, h, j in itertools.product(range(2), range(4), range(5)):
            expected = sigmoid(module.weight_HE[h] @ v[b, h, j]) * v[b, h, j]
            torch.testing.assert_close(module.source(v)[b, h, j], expected)
    else:
        assert module.source(v) is v


@contextmanager
def gates_at(decoder: QuantbenchModel, logit: float) -> Iterator[None]:
    """Within it every Linear of a gate gives this, whatever it reads."""
    linears = [m for block in decoder.blocks for m in block.attention.output.modules() if isinstance(m, nn.Linear)]
    assert linears
    handles = [linear.register_forward_hook(lambda _, __, out: torch.full_like(out, logit)) for linear in linears]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("gates", ["elementwise", "head"])
def test_an_open_gate_is_the_baseline_and_a_shut_one_says_nothing(gates: str) -> None:
    decoder = model({"gated-attention": {"gates": gates}})
    with gates_at(decoder, 40.0):
        assert torch.equal(logits(decoder), logits(plain(decoder)))
    with gates_at(decoder, -40.0):
        silent = plain(decoder)
        for block in silent.blocks:
            block.attention.out.weight.data.zero_()
        torch.testing.assert_close(logits(decoder), logits(silent))


def test_a_gate_by_slice_starts_a_quarter_open_and_open_is_the_baseline() -> None:
    decoder = model({"gated-attention-qualcomm": {}})
    for block in decoder.blocks:
        gate = block.attention.output
        torch.testing.assert_close(gate.bias_H.sigmoid(), torch.full((4,), 0.25))
        assert 0 < gate.weight_HE.abs().max() <= 16**-0.5
        gate.bias_H.data.fill_(40.0)
    assert torch.equal(logits(decoder), logits(plain(decoder)))
    for block in decoder.blocks:
        block.attention.output.bias_H.data.fill_(math.log(0.25 / 0.75))
        block.attention.output.weight_HE.data.zero_()
    quarter = plain(decoder)
    for block in quarter.blocks:
        block.attention.out.weight.data.mul_(0.25)
    torch.testing.assert_close(logits(decoder), logits(quarter), rtol=1e-5, atol=1e-5)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="no share between 0 and 1"):
            GatedAttentionQualcomm(share)


@pytest.mark.parametrize("gates", ["output", "source"])
def test_a_value_gate_that_is_blind_is_half_open(gates: str) -> None:
    decoder = model({"value-gate": {"gates": gates}})
    half = plain(decoder)
    for block, other in zip(decoder.blocks, half.blocks, strict=True):
        assert 0 < block.attention.output.weight_HE.abs().max() <= 16**-0.5
        block.attention.output.weight_HE.data.zero_()
        other.attention.out.weight.data.mul_(0.5)
    torch.testing.assert_close(logits(decoder), logits(half), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_value_gates_differ_in_whose_token_they_see() -> None:
    """Query 1 reads position 0, whose gate is shut, or its own is."""
    A = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    v = torch.tensor([[[[-40.0, 1.0], [40.0, 1.0]]]])
    own, source = (ValueGate(gates).output(QuantbenchConfig(width=2, heads=1)) for gates in ("output", "source"))
    for module in (own, source):
        module.weight_HE.copy_(torch.tensor([[1.0, 0.0]]))
    x = torch.zeros(1, 2, 2)
    torch.testing.assert_close(own(A @ own.source(v), x, v)[0, 0], torch.tensor([[0.0, 0.0], [-40.0, 1.0]]))
    torch.testing.assert_close(source(A @ source.source(v), x, v)[0, 0], torch.zeros(2, 2))


def test_gated_values_are_what_is_cached() -> None:
    decoder, cache, seen = model({"value-gate": {"gates": "source"}}), DynamicCache(), list[Tensor]()
    attention = decoder.blocks[0].attention
    attention.qkv.register_forward_hook(lambda _, __, out: seen.append(out[..., 128:].unflatten(-1, (4, 16))))
    logits(decoder, past_key_values=cache)
    with torch.no_grad():
        torch.testing.assert_close(cache.layers[0].values, attention.output.source(seen[0].transpose(1, 2)))


def test_a_context_scale_that_is_blind_is_the_baseline() -> None:
    decoder = model({"context-scale": {}})
    with gates_at(decoder, 0.0):
        assert torch.equal(logits(decoder), logits(plain(decoder)))
    assert isinstance(decoder.blocks[0].attention.output, Output)


# --- qk-norm ---


@torch.no_grad()
def test_qk_norm_by_hand() -> None:
    module = drawn(QKNorm().query_key(CONFIG))
    q, k = (gaussian(2, 5, 4, 8, seed=seed, dtype=torch.float64) for seed in range(2))
    for got, x, norm in zip(module(q, k), (q, k), (module.query, module.key), strict=True):
        assert norm.weight.shape == (8,)  # one gain a feature, for all heads
        expected = norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(got, expected)
    low = module(q.to(torch.bfloat16), k.to(torch.bfloat16))
    assert all(x.dtype == torch.bfloat16 for x in low)
    torch.testing.assert_close(low[0].double(), module(q, k)[0], rtol=2e-2, atol=2e-2)


def test_qk_norm_makes_the_size_of_queries_and_keys_mean_nothing() -> None:
    decoder = model({"qk-norm": {}})
    before = logits(decoder)
    for block in decoder.blocks:
        block.attention.qkv.weight.data[:64] *= 30
        block.attention.qkv.weight.data[64:128] *= 5
    torch.testing.assert_close(logits(decoder), before, rtol=1e-4, atol=1e-4)
    assert (logits(plain(decoder)) - logits(decoder)).abs().max() > 0.1


# --- single-scale-norm ---


def test_a_single_scale_is_rmsnorm_with_equal_gains() -> None:
    x = gaussian(2, 5, 32)
    norm, other = SingleScaleNorm().norm(CONFIG), RMSNorm(32)
    norm.weight.data.fill_(1.7)
    other.weight.data.fill_(1.7)
    torch.testing.assert_close(norm(x), other(x))
    torch.testing.assert_close(norm(x), 1.7 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_every_norm_has_a_single_scale_that_starts_at_one() -> None:
    decoder = model({"single-scale-norm": {}})
    gains = [p for name, p in decoder.named_parameters() if "norm" in name]
    assert [gain.tolist() for gain in gains] == [[1.0]] * 5
    torch.testing.assert_close(logits(decoder), logits(model()))


# --- outlier-protected-block ---


def protected() -> QuantbenchModel:
    decoder = model({"outlier-protected-block": {}})
    for number, block in enumerate(decoder.blocks):
        block.attention_join.beta.data.fill_(0.3 + number)
        block.mlp_join.beta.data.fill_(0.2 + number)
    return decoder


def test_an_outlier_protected_block_has_no_norm_and_starts_at_1_over_the_root_of_its_sublayers() -> None:
    for layers in (2, 8):
        decoder = model({"outlier-protected-block": {}}, layers=layers)
        assert {name for name, _ in decoder.named_parameters() if "norm" in name} == {"norm.weight"}
        assert isinstance(decoder.norm, RMSNorm)
        betas = [p.item() for name, p in decoder.named_parameters() if name.endswith("beta")]
        assert betas == pytest.approx([1 / (2 * layers) ** 0.5] * 2 * layers)


def test_the_sublayers_of_an_outlier_protected_block_read_the_stream_itself() -> None:
    decoder, seen = protected(), dict[str, Tensor]()
    block = decoder.blocks[1]
    for name in ("attention", "mlp"):
        getattr(block, name).register_forward_hook(lambda _, args, out, n=name: seen.update({n: args[0], f"{n}'": out}))
    block.register_forward_hook(lambda _, args, out: seen.update(enters=args[0], leaves=out))
    logits(decoder)
    assert torch.equal(seen["attention"], seen["enters"])
    torch.testing.assert_close(seen["mlp"], seen["enters"] + 1.3 * seen["attention'"])
    torch.testing.assert_close(seen["leaves"], seen["mlp"] + 1.2 * seen["mlp'"])


@torch.no_grad()
def test_beta_folds_into_what_writes_the_stream_and_0_leaves_the_embedding() -> None:
    decoder, folded = protected(), model({"qk-norm": {}})
    shared = {name: p for name, p in decoder.state_dict().items() if name in folded.state_dict()}
    folded.load_state_dict(folded.state_dict() | shared)
    for block, own in zip(folded.blocks, decoder.blocks, strict=True):
        block.attention_norm, block.mlp_norm = nn.Identity(), nn.Identity()
        block.attention.out.weight.mul_(own.attention_join.beta)
        block.mlp.down.weight.mul_(own.mlp_join.beta)
    torch.testing.assert_close(logits(decoder), logits(folded), rtol=1e-5, atol=1e-5)
    for block in decoder.blocks:
        block.attention_join.beta.zero_()
        block.mlp_join.beta.zero_()
    assert torch.equal(logits(decoder), decoder.head(decoder.norm(decoder.embed(IDS))))


# --- embedding-projection ---


def projected(trained: bool, **changes: Any) -> QuantbenchModel:
    decoder = model({"embedding-projection": {}}, **changes).requires_grad_(False)
    if trained:
        drawn(decoder.projection)
    return decoder


def test_projections_start_orthogonal_each_of_its_own() -> None:
    projection = projected(trained=False).projection
    matrices = [projection.way_in.weight, projection.way_out.weight]
    for P in matrices:
        torch.testing.assert_close(P @ P.T, torch.eye(64), rtol=0, atol=1e-5)
        assert P.diagonal().abs().max() < 0.6  # it turns
    assert (matrices[0] - matrices[1]).abs().max() > 0.1


def test_projections_of_1_are_the_baseline() -> None:
    decoder = projected(trained=False)
    for P in (decoder.projection.way_in.weight, decoder.projection.way_out.weight):
        P.copy_(torch.eye(64))
    torch.testing.assert_close(logits(decoder), logits(plain(decoder)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_folded_projections_leave_the_logits_as_they_are(trained: bool, tmp_path: Path) -> None:
    decoder = projected(trained)
    before, table, head = logits(decoder), decoder.embed.weight.clone(), decoder.head.weight.clone()
    P_in, P_out = (m.weight.double() for m in (decoder.projection.way_in, decoder.projection.way_out))
    fold_projection(decoder)
    assert type(decoder.projection) is Projection
    torch.testing.assert_close(decoder.embed.weight.double(), table.double() @ P_in.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoder.head.weight.double(), head.double() @ P_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(decoder), before, rtol=1e-4, atol=1e-4)
    once = logits(decoder)
    fold_projection(decoder)
    assert torch.equal(logits(decoder), once)
    decoder.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.mitigations == {"embedding-projection": {}}
    assert torch.equal(logits(again), once)


def test_a_projection_is_folded_before_anything_is_judged(tmp_path: Path) -> None:
    changes = {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
    decoder = projected(True, **changes)
    ids_NT = ids(8, LENGTH + 1) % WORDS
    before = decoder(ids_NT[:, :-1]).logits
    reference = Reference(decoder, Fixed(ids_NT, WORDS), track(quantizer("w8a8-token"), LENGTH, 8))
    assert type(reference.model.projection) is Projection
    assert {name.partition(".")[0] for name, _ in reference.model.named_parameters()} == {
        "embed", "blocks", "norm", "head"
    }  # fmt: skip
    torch.testing.assert_close(reference.model(ids_NT[:, :-1]).logits, before, rtol=1e-4, atol=1e-4)
    entry = quantizer("w8a8-token")
    report = entry.quantize(reference.model, reference.calibrate())
    packed.save(reference.model, "w8a8-token", entry, tmp_path, report)
    assert torch.equal(packed.load(tmp_path)(ids_NT).logits, reference.model(ids_NT).logits)
    bare = model(**changes).requires_grad_(False)
    kept = {name: p.clone() for name, p in bare.state_dict().items()}
    Reference(bare, Fixed(ids_NT, WORDS), track(quantizer("w8a8-token"), LENGTH, 8))
    assert not bare.config.folded
    assert all(torch.equal(p, kept[name]) for name, p in bare.state_dict().items())


def test_the_stream_stays_in_fp32_behind_a_projection() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert projected(trained=True).projection.enter(gaussian(1, 2, 64)).dtype == torch.float32


# --- registers ---


@torch.no_grad()
def test_registers_are_tokens_in_front_without_an_id() -> None:
    decoder = model({"registers": {"count": 3}}, embedding_std=0.5)
    tokens_RD = decoder.front.tokens_RD
    assert tokens_RD.shape == (3, 64)
    assert tokens_RD.std().item() == pytest.approx(0.5, rel=0.2)
    assert (decoder.registers, model().registers) == (3, 0)
    other = plain(decoder)
    whole_BTD = torch.cat((tokens_RD.expand(3, -1, -1), decoder.embed(IDS)), 1)
    torch.testing.assert_close(logits(decoder), other(inputs_embeds=whole_BTD).logits[:, 3:])
    cache = DynamicCache()
    logits(decoder, past_key_values=cache)
    assert cache.get_seq_length() == 3 + IDS.shape[1]
    with pytest.raises(ValueError, match="0 registers; give 1 or more"):
        Registers(count=0)


# --- peak-penalty ---


def test_the_peak_penalty_by_hand() -> None:
    """tau 3, power 4: 3 and -6 are 1 and 16; 0 and 9 are 0 and 81."""
    blocks = [torch.tensor([[[3.0, -6.0]]]), torch.tensor([[[0.0, 9.0]]])]
    assert float(PeakPenalty().penalty(blocks)) == pytest.approx(0.01 * (17 / 2 + 81 / 2) / 2, rel=1e-5)
    assert float(PeakPenalty(weight=2.0, tau=1.0, power=1.0).penalty(blocks)) == pytest.approx(2 * 4.5, rel=1e-5)


def test_the_relative_peak_penalty_by_hand_and_whatever_the_scale() -> None:
    """Mean squares 9 and 16: in units of their roots 1, -1 and 7/4, ..., over tau = 1/2."""
    blocks = [torch.tensor([[[3.0, -3.0]]]), torch.tensor([[[4.0, -4.0]], [[0.0, 32**0.5]]])]
    entry = PeakPenalty(weight=1.0, tau=0.5, power=2.0, relative=True)
    assert float(entry.penalty(blocks)) == pytest.approx(4.0, rel=1e-5)
    entry = PeakPenalty(relative=True)
    fourth = [1.0, (1 + 1 + 4) / 4]  # means of (h / rms)^4
    assert float(entry.penalty(blocks)) == pytest.approx(0.01 * sum(fourth) / 2 / 3**4, rel=1e-5)
    larger = [1000 * block for block in blocks]
    assert float(entry.penalty(larger)) == pytest.approx(float(entry.penalty(blocks)), rel=1e-4)


def test_the_unit_of_the_relative_peak_penalty_has_no_gradient() -> None:
    h = gaussian(2, 3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(PeakPenalty(relative=True).penalty([h]), h)
    unit = float(h.detach().square().mean().sqrt())
    torch.testing.assert_close(gradient, 0.01 * 4 * h.detach() ** 3 / (3 * unit) ** 4 / h.numel(), rtol=1e-4, atol=1e-9)


def test_the_peak_penalty_is_finite_in_bf16_at_extreme_states() -> None:
    h = torch.full((1, 2, 4), 3e4, dtype=torch.bfloat16, requires_grad=True)
    penalty = PeakPenalty().penalty([h])
    (gradient,) = torch.autograd.grad(penalty, h)
    assert penalty.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kw", [{"weight": 0.0}, {"tau": 0.0}, {"power": 0.5}])
def test_the_peak_penalty_says_what_it_takes(kw: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0, power"):
        PeakPenalty(**kw)
