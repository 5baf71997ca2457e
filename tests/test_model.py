"""The decoder against Llama, GPT-2 and the formulas, its paths against one another, each seam by an entry of ours."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import EVERY, MODELS, ROOT, VOCAB, Mitigations, gaussian, ids, model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantbench import attention, catalog
from quantbench.anatomy import anatomy
from quantbench.attention import attend
from quantbench.mitigations import SEAMS, Mitigation, Output, Projection, RMSNorm
from quantbench.mitigations.relu_attention import Relu
from quantbench.model import QuantbenchConfig, QuantbenchModel, cost, initialise, rotate, rotation, visibility
from quantbench.ops.relu import row_factor
from quantbench.ops.sink import causal_bias

mitigated = pytest.mark.parametrize("mitigations", MODELS.values(), ids=MODELS.keys())
positioned = pytest.mark.parametrize("positions", ["rope", "learned"])

IDS = ids()


@torch.no_grad()
def logits(decoder: nn.Module, batch: Tensor = IDS, **kwargs: object) -> Tensor:
    return decoder(batch, **kwargs).logits


@contextmanager
def watched(decoder: QuantbenchModel) -> Iterator[None]:
    """Somebody watches the scores, so that attention is computed by the formula."""
    handles = [heads.scores.register_forward_hook(lambda *_: None) for heads in anatomy(decoder).heads.values()]
    yield
    for handle in handles:
        handle.remove()


def explicit(decoder: QuantbenchModel, batch: Tensor = IDS, **kwargs: object) -> Tensor:
    with watched(decoder):
        return logits(decoder, batch, **kwargs)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# Entries of our own, each of which changes one seam only. Each has an equal in a plain model with other weights.


class Tokens(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.tokens_RD = nn.Parameter(torch.empty(count, width))

    def initial(self, name: str, fresh: Tensor, generator: torch.Generator) -> None:
        fresh.normal_(0, 1, generator=generator)

    def forward(self, batch: int) -> Tensor:
        return self.tokens_RD.expand(batch, -1, -1)


@dataclass(frozen=True)
class Registers(Mitigation):
    count: int = 3

    def inputs(self, config: QuantbenchConfig) -> nn.Module:
        return Tokens(self.count, config.width)


class Between(Projection):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.way_in, self.way_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        return self.way_in(embedded_BTD)

    def leave(self, hidden_BTD: Tensor) -> Tensor:
        return self.way_out(hidden_BTD)

    @torch.no_grad()
    def fold(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        embedding.weight.copy_(embedding.weight @ self.way_in.weight.T)
        head.weight.copy_(head.weight @ self.way_out.weight)


@dataclass(frozen=True)
class EmbeddingProjection(Mitigation):
    def embedding(self, config: QuantbenchConfig) -> Projection:
        return Between(config.width)


class Damped(nn.Module):
    def forward(self, residual_BTD: Tensor, update_BTD: Tensor) -> Tensor:
        return residual_BTD + update_BTD / 2


@dataclass(frozen=True)
class Damping(Mitigation):
    def block(self, config: QuantbenchConfig) -> nn.Module:
        return Damped()


class Doubled(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@dataclass(frozen=True)
class DoubledNorm(Mitigation):
    def norm(self, config: QuantbenchConfig, last: bool = False) -> nn.Module:
        return Doubled(config.width)


class Sharpened(nn.Module):
    def forward(self, q_BTHE: Tensor, k_BTHE: Tensor) -> tuple[Tensor, Tensor]:
        return q_BTHE * 2, k_BTHE * 3


@dataclass(frozen=True)
class Sharpening(Mitigation):
    def query_key(self, config: QuantbenchConfig) -> nn.Module:
        return Sharpened()


class HeadGate(Output):
    """sigmoid(x w_h) * y_h, with the value states added, so that all it is given counts."""

    def __init__(self, config: QuantbenchConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.heads, bias=False)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        return self.gate(x_BTD).sigmoid().transpose(1, 2)[..., None] * y_BHTE + v_BHTE


@dataclass(frozen=True)
class Gating(Mitigation):
    def output(self, config: QuantbenchConfig) -> nn.Module:
        return HeadGate(config)


OURS: dict[str, type[Mitigation]] = {
    "inputs": Registers,
    "embedding": EmbeddingProjection,
    "norm": DoubledNorm,
    "block": Damping,
    "query_key": Sharpening,
    "output": Gating,
}


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them into the catalog, each under the name of its seam."""
    monkeypatch.setitem(sys.modules, "quantbench.mitigations.of_the_tests", sys.modules[__name__])
    for seam, entry in OURS.items():
        monkeypatch.setitem(catalog.AXES["mitigations"], seam, f"of_the_tests:{entry.__name__}")


def twin(decoder: QuantbenchModel) -> QuantbenchModel:
    """The plain model with the same parameters, as far as it has them."""
    plain = model(positions=decoder.config.positions)
    plain.load_state_dict({name: p for name, p in decoder.state_dict().items() if name in plain.state_dict()})
    return plain


# Against other implementations


@torch.no_grad()
def test_the_baseline_is_a_llama() -> None:
    decoder = model()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theta = {"rope_theta": 10_000.0, "rope_type": "default"}
    config = LlamaConfig(vocab_size=VOCAB, rms_norm_eps=1e-6, rope_parameters=theta, tie_word_embeddings=False, **shape)
    llama = LlamaForCausalLM(config).eval()
    halves = torch.arange(16).view(8, 2).T.flatten()  # Llama turns feature i with i + E/2, we turn neighbours
    llama.model.embed_tokens.weight.copy_(decoder.embed.weight)
    llama.model.norm.weight.copy_(decoder.norm.weight)
    llama.lm_head.weight.copy_(decoder.head.weight)
    for theirs, ours in zip(llama.model.layers, decoder.blocks, strict=True):
        q, k, v = ours.attention.qkv.weight.chunk(3)
        theirs.self_attn.q_proj.weight.copy_(q.view(4, 16, 64)[:, halves].reshape(64, 64))
        theirs.self_attn.k_proj.weight.copy_(k.view(4, 16, 64)[:, halves].reshape(64, 64))
        theirs.self_attn.v_proj.weight.copy_(v)
        theirs.self_attn.o_proj.weight.copy_(ours.attention.out.weight)
        gate, up = ours.mlp.up.weight.chunk(2)
        theirs.mlp.gate_proj.weight.copy_(gate)
        theirs.mlp.up_proj.weight.copy_(up)
        theirs.mlp.down_proj.weight.copy_(ours.mlp.down.weight)
    close(logits(decoder), logits(llama))


@torch.no_grad()
@pytest.mark.parametrize("mlp", ["gelu", "relu"])
def test_learned_positions_and_layernorm_are_gpt2s(mlp: str) -> None:
    decoder = model(mlp=mlp, norm="layernorm", positions="learned")
    for name, parameter in decoder.named_parameters():  # gains and biases that count
        if parameter.ndim == 1:
            parameter.add_(gaussian(64, seed=len(name)) / 4)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=64,
            activation_function=mlp,
            tie_word_embeddings=False,
        )
    ).eval()
    gpt2.transformer.wte.weight.copy_(decoder.embed.weight)
    gpt2.transformer.wpe.weight.copy_(decoder.places.weight)
    gpt2.transformer.ln_f.load_state_dict(decoder.norm.state_dict())
    gpt2.lm_head.weight.copy_(decoder.head.weight)
    for theirs, ours in zip(gpt2.transformer.h, decoder.blocks, strict=True):
        theirs.ln_1.load_state_dict(ours.attention_norm.state_dict())
        theirs.ln_2.load_state_dict(ours.mlp_norm.state_dict())
        pairs = [(theirs.attn.c_attn, ours.attention.qkv), (theirs.attn.c_proj, ours.attention.out)]
        for conv, linear in [*pairs, (theirs.mlp.c_fc, ours.mlp.up), (theirs.mlp.c_proj, ours.mlp.down)]:
            conv.weight.copy_(linear.weight.T)
            conv.bias.zero_()
    close(logits(decoder), logits(gpt2))


def test_swiglu_gates_with_the_first_half_by_hand() -> None:
    mlp = model(layers=1).blocks[0].mlp
    x_D = gaussian(64, dtype=torch.float64)
    gate, up = mlp.up.weight.double().chunk(2)
    a = gate @ x_D
    expected = mlp.down.weight.double() @ (a / (1 + (-a).exp()) * (up @ x_D))
    close(mlp(x_D.float()[None, None])[0, 0], expected.float())


# Positions


def test_rotation_by_hand() -> None:
    # Two pairs: speeds 1 and 10000^(-1/2) = 0.01.
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4), rotation(torch.tensor([[3]]), 4))
    expected = torch.tensor([np.cos(3), np.sin(3), -np.sin(0.03), np.cos(0.03)], dtype=torch.float32)
    close(turned.flatten(), expected)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    q, k = gaussian(1, 1, 1, 16), gaussian(1, 1, 1, 16, seed=1)

    def score(i: int, j: int) -> float:
        at = [rotation(torch.tensor([[position]]), 16) for position in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum().item()

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-4)
    assert abs(score(9, 5) - score(9, 4)) > 1e-2
    assert score(7, 7) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_a_rotation_keeps_dtype_and_length() -> None:
    x = gaussian(2, 5, 4, 16).to(torch.bfloat16)
    turned = rotate(x, rotation(torch.arange(5)[None], 16))
    assert turned.dtype == torch.bfloat16
    close(turned.float().norm(dim=-1), x.float().norm(dim=-1), 1e-2)


# Two ways of computing attention


@mitigated
@positioned
@pytest.mark.parametrize("left", [None, 0, 5], ids=["unpadded", "mask of ones", "padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_the_fast_path_equals_explicit_weights(
    mitigations: Mitigations, positions: str, left: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    decoder = model(mitigations, positions=positions).to(dtype)
    mask = None
    if left is not None:
        mask = torch.ones_like(IDS)
        mask[1, :left] = 0
    close(logits(decoder, attention_mask=mask), explicit(decoder, attention_mask=mask), tolerance)


@mitigated
@pytest.mark.parametrize("features", [8, 16])
def test_bf16_on_a_cpu_is_the_formula_within_its_precision(mitigations: Mitigations, features: int) -> None:
    config = QuantbenchConfig(mitigations=mitigations, width=3 * features, heads=3)
    form = config.mitigation().weights(config)
    q, k, v = (gaussian(2, 3, 24, features, seed=seed).to(torch.bfloat16) for seed in range(3))
    exact = attend(form, q.double(), k.double(), v.double(), None)
    got = form.attend(q, k, v, None)
    assert got.dtype == torch.bfloat16
    close(got.double(), exact, 2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form.attend(q, k, v, None), got)


@mitigated
def test_masks_first_made_under_inference_mode_serve_training(mitigations: Mitigations) -> None:
    for cached in (attention.causal, causal_bias, row_factor):
        cached.cache_clear()
    decoder = model(mitigations).to(torch.bfloat16).train()
    with torch.inference_mode():
        decoder(IDS)
        explicit(decoder)
    decoder(IDS, labels=IDS).loss.backward()
    assert decoder.blocks[0].attention.qkv.weight.grad.isfinite().all()


def test_explicit_weights_are_computed_only_where_somebody_looks() -> None:
    decoder, calls = model(), []
    heads = decoder.blocks[1].attention
    heads.form.register_forward_hook(lambda *_: calls.append("formula"))
    for site in (heads.scores, heads.probabilities):
        site.register_forward_hook(lambda _, __, out: calls.append(tuple(out.shape)))
        logits(decoder)
        site._forward_hooks.clear()
        assert sorted(calls, key=str) == [(3, 4, 12, 12), "formula"]
        calls.clear()
        logits(decoder)
        assert calls == []


def test_sites_see_scores_before_the_mask_and_weights_that_sum_to_one() -> None:
    decoder, seen = model(), {}
    heads = anatomy(decoder).heads[0]
    handles = [
        getattr(heads, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in ("scores", "weights", "values")
    ]
    logits(decoder)
    for handle in handles:
        handle.remove()
    assert seen["scores"].isfinite().all()
    close(seen["weights"].sum(-1), torch.ones(3, 4, 12))
    assert not seen["weights"].triu(1).any()
    v_BTD = decoder.blocks[0].attention_norm(decoder.embed(IDS)) @ decoder.blocks[0].attention.qkv.weight[128:].T
    close(seen["values"], v_BTD.view(3, 12, 4, 16).transpose(1, 2))


def test_replaced_values_are_used_and_cached() -> None:
    decoder = model(layers=1)
    anatomy(decoder).heads[0].values.register_forward_hook(lambda _, __, v: torch.zeros_like(v))
    cache = DynamicCache()
    found = logits(decoder, past_key_values=cache)
    assert not cache.layers[0].values.any()
    x = decoder.embed(IDS)
    with torch.no_grad():
        expected = decoder.head(decoder.norm(x + decoder.blocks[0].mlp(decoder.blocks[0].mlp_norm(x))))
    close(found, expected)


@pytest.mark.usefixtures("ours")
def test_replaced_values_are_those_that_a_gate_sees() -> None:
    decoder = model({"output": {}}, layers=1)
    seen = {}
    decoder.blocks[0].attention.values.register_forward_hook(lambda _, __, v: v + 7)
    decoder.blocks[0].attention.output.register_forward_hook(lambda _, args, __: seen.update(v=args[2]))
    plain = model({"output": {}}, layers=1)
    plain.blocks[0].attention.output.register_forward_hook(lambda _, args, __: seen.update(before=args[2]))
    logits(decoder)
    logits(plain)
    close(seen["v"], seen["before"] + 7)


def test_visibility_by_hand() -> None:
    none = torch.device("cpu")
    assert visibility(None, 0, 3, none) is None
    assert visibility(torch.ones(2, 3), 0, 3, none) is None
    left = visibility(torch.tensor([[0, 1, 1]]), 0, 3, none)
    assert left[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # the padding sees itself, nobody sees it
    later = visibility(torch.tensor([[0, 1, 1]]), 1, 2, none)
    assert later[0, 0].int().tolist() == [[0, 1, 0], [0, 1, 1]]
    assert visibility(None, 1, 2, none)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]


# Padding, cache, generation: for every mitigation, and for those of our own


def _padding_changes_nothing(decoder: QuantbenchModel, side: str) -> None:
    short = IDS[:, :7]
    mask = torch.zeros_like(IDS)
    where = slice(5, 12) if side == "left" else slice(0, 7)
    mask[:, where] = 1
    batch = IDS.flip(1).clone()  # the padding holds anything
    batch[:, where] = short
    close(logits(decoder, batch, attention_mask=mask)[:, where], logits(decoder, short))


def _cache_equals_full_forward(decoder: QuantbenchModel) -> None:
    expected = logits(decoder)
    for chunks in ([1] * 12, [5, 4, 3]):
        cache, found = DynamicCache(), []
        for chunk in IDS.split(chunks, 1):
            found.append(logits(decoder, chunk, past_key_values=cache, use_cache=True))
        close(torch.cat(found, 1), expected)


def _cache_with_padding(decoder: QuantbenchModel) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected = logits(decoder, attention_mask=mask)[:, 8:]
    cache = DynamicCache()
    logits(decoder, IDS[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    close(logits(decoder, IDS[:, 8:], attention_mask=mask, past_key_values=cache), expected)


def _generates_what_is_likeliest(decoder: QuantbenchModel) -> None:
    by_hand = IDS[:, :5]
    for _ in range(6):
        by_hand = torch.cat((by_hand, logits(decoder, by_hand)[:, -1:].argmax(-1)), 1)
    greedy = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    prompt = IDS[:, :5]
    plain = torch.ones_like(prompt)
    for use_cache in (True, False):
        found = decoder.generate(prompt, attention_mask=plain, use_cache=use_cache, **greedy)
        assert torch.equal(found, by_hand)
    padded = decoder.generate(F.pad(prompt, (3, 0)), attention_mask=F.pad(plain, (3, 0)), **greedy)
    assert torch.equal(padded[:, 3:], by_hand)
    cache = DynamicCache()  # of a turn, from which the next one goes on
    for known in (5, 8):
        ids_BT = by_hand[:, :known]
        turn = decoder.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), past_key_values=cache, **greedy | {"max_new_tokens": 3}
        )
        assert torch.equal(turn, by_hand[:, : known + 3])


PROPERTIES: list[Callable[[QuantbenchModel], None]] = [
    _cache_equals_full_forward,
    _cache_with_padding,
    _generates_what_is_likeliest,
]
serves = pytest.mark.parametrize("property_of", PROPERTIES, ids=lambda f: f.__name__.strip("_"))


@mitigated
@positioned
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mitigations: Mitigations, positions: str, side: str) -> None:
    _padding_changes_nothing(model(mitigations, positions=positions), side)


@mitigated
@positioned
@serves
def test_inference(mitigations: Mitigations, positions: str, property_of: Callable[[QuantbenchModel], None]) -> None:
    property_of(model(mitigations, positions=positions))


@pytest.mark.usefixtures("ours")
@positioned
@serves
@pytest.mark.parametrize("seam", OURS)
def test_inference_with_a_seam_changed(
    seam: str, positions: str, property_of: Callable[[QuantbenchModel], None]
) -> None:
    property_of(model({seam: {}}, positions=positions))


@pytest.mark.usefixtures("ours")
@positioned
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seam", OURS)
def test_padding_changes_nothing_with_a_seam_changed(seam: str, positions: str, side: str) -> None:
    _padding_changes_nothing(model({seam: {}}, positions=positions), side)


@mitigated
@pytest.mark.parametrize("by_formula", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_no_gradient_flows_from_the_future(mitigations: Mitigations, by_formula: bool, padding: int) -> None:
    decoder = model(mitigations)
    x = decoder.embed(IDS[:1]).detach().requires_grad_()
    with watched(decoder) if by_formula else nullcontext():
        out = decoder(inputs_embeds=x, attention_mask=torch.tensor([[0] * padding + [1] * (12 - padding)])).logits
    (gradient,) = torch.autograd.grad(out[0, 6].square().sum(), x)
    reached_T, seen_T = gradient[0].abs().sum(-1) > 0, torch.tensor([padding <= t <= 6 for t in range(12)])
    assert not (reached_T & ~seen_T).any()
    assert reached_T[6]
    assert "clipped-softmax" in mitigations or reached_T[seen_T].all()  # a weight that is clipped has no gradient


# Embeddings in, logits kept, loss


def test_embeddings_may_be_given_instead_of_ids() -> None:
    decoder = model()
    assert torch.equal(logits(decoder, None, inputs_embeds=decoder.embed(IDS).detach()), logits(decoder))


def test_only_the_last_logits_where_only_they_are_asked_for() -> None:
    decoder = model()
    close(logits(decoder, logits_to_keep=2), logits(decoder)[:, -2:])


def test_the_loss_is_the_cross_entropy_of_the_next_token() -> None:
    decoder, labels = model(), IDS.clone()
    labels[0, 3] = -100  # left out
    z = logits(decoder).double().numpy()
    nll = [
        np.log(np.exp(z[b, t]).sum()) - z[b, t, labels[b, t + 1]]
        for b in range(3)
        for t in range(11)
        if labels[b, t + 1] >= 0
    ]
    assert len(nll) == 32
    assert decoder(IDS, labels=labels).loss.item() == pytest.approx(np.mean(nll), abs=1e-5)


# Initialisation


def test_parameters_start_in_their_ranges() -> None:
    decoder = model(width=128, embedding_std=0.5, norm="layernorm", positions="learned")
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.startswith(("embed.", "places.")):
            assert parameter.std().item() == pytest.approx(0.5, rel=0.05), name
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.99 * bound < parameter.abs().max().item() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_parameters_depend_on_seed_and_name() -> None:
    first, again, other = (model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name, p in first.items() if p.ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert not torch.equal(first["blocks.0.attention.qkv.weight"], first["blocks.1.attention.qkv.weight"])
    # A figure of the first model ever trained with this code: a change moves every trained number.
    assert first["embed.weight"][0, 0].item() == pytest.approx(0.5347999930381775, abs=1e-6)


def test_what_has_no_start_of_its_own_is_refused() -> None:
    decoder = model()
    decoder.blocks[0].gate = nn.ParameterList([torch.zeros(3)])
    with pytest.raises(AssertionError, match=r"blocks\.0\.gate\.0: its module must say how it starts"):
        initialise(decoder, 0)


@pytest.mark.usefixtures("ours")
@positioned
@pytest.mark.parametrize("seam", OURS)
def test_added_parameters_leave_the_others_values_alone(seam: str, positions: str) -> None:
    changed = model({seam: {}}, positions=positions).state_dict()
    plain = model(positions=positions).state_dict()
    assert plain.keys() <= changed.keys()
    for name, parameter in plain.items():
        same = changed[name][: len(parameter)] if name == "places.weight" else changed[name]
        assert torch.equal(same, parameter) or name == "places.weight", name
    added = {"inputs": 1, "embedding": 2, "output": 2}.get(seam, 0)
    assert len(changed) == len(plain) + added


# Seams: what an entry of ours changes equals a plain model with other weights


@pytest.mark.usefixtures("ours")
@positioned
@torch.no_grad()
def test_seam_inputs_puts_tokens_in_front(positions: str) -> None:
    decoder = model({"inputs": {"count": 3}}, positions=positions)
    plain = model(positions=positions, max_position_embeddings=35)
    plain.load_state_dict({name: p for name, p in decoder.state_dict().items() if not name.startswith("front.")})
    whole = torch.cat((decoder.front.tokens_RD.expand(3, -1, -1), decoder.embed(IDS)), 1)
    close(logits(decoder), logits(plain, None, inputs_embeds=whole)[:, 3:])
    assert logits(decoder).shape == (3, 12, VOCAB)
    assert (logits(decoder) - logits(model(positions=positions))).abs().max() > 0.1
    full = ids(length=32)  # learned positions reach the track's length in spite of the tokens in front
    assert logits(decoder, full).isfinite().all()


@pytest.mark.usefixtures("ours")
def test_seam_inputs_gets_gradients_and_keeps_labels_in_place() -> None:
    decoder = model({"inputs": {}})
    out = decoder(IDS, labels=IDS)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    close(out.loss, expected)
    out.loss.backward()
    assert (decoder.front.tokens_RD.grad.abs().sum(-1) > 0).all()


@pytest.mark.usefixtures("ours")
def test_seam_embedding_folds_away() -> None:
    decoder = model({"embedding": {}})
    plain = twin(decoder)
    assert (logits(decoder) - logits(plain)).abs().max() > 0.1
    decoder.projection.fold(plain.embed, plain.head)
    close(logits(plain), logits(decoder))


@pytest.mark.usefixtures("ours")
@torch.no_grad()
def test_seam_norm_is_every_norm() -> None:
    decoder = model({"norm": {}})
    plain = twin(decoder)
    norms = [m for m in plain.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 5
    for norm in norms:
        norm.weight.mul_(2)
    close(logits(decoder), logits(plain))


@pytest.mark.usefixtures("ours")
@torch.no_grad()
def test_seam_block_joins_both_sublayers() -> None:
    decoder = model({"block": {}})
    plain = twin(decoder)
    for block in plain.blocks:
        block.attention.out.weight.div_(2)
        block.mlp.down.weight.div_(2)
    close(logits(decoder), logits(plain))


@pytest.mark.usefixtures("ours")
@torch.no_grad()
def test_seam_query_key_meets_queries_and_keys_apart() -> None:
    decoder = model({"query_key": {}})
    plain = twin(decoder)
    for block in plain.blocks:
        block.attention.qkv.weight[:64].mul_(2)
        block.attention.qkv.weight[64:128].mul_(3)
    close(logits(decoder), logits(plain))


@pytest.mark.usefixtures("ours")
@torch.no_grad()
def test_seam_output_meets_heads_inputs_and_values() -> None:
    decoder = model({"output": {}}, layers=1)
    x_BTD = decoder.blocks[0].attention_norm(decoder.embed(IDS))
    plain = model(layers=1).blocks[0].attention
    read = {}
    plain.out.register_forward_hook(lambda _, args, __: read.update(y=args[0].view(3, 12, 4, 16)))
    plain(x_BTD, rotation(torch.arange(12)[None], 16), None, None)
    gate_BTH = (x_BTD @ decoder.blocks[0].attention.output.gate.weight.T).sigmoid()
    v_BTHE = (x_BTD @ plain.qkv.weight[128:].T).view(3, 12, 4, 16)
    expected = (gate_BTH[..., None] * read["y"] + v_BTHE).flatten(2) @ plain.out.weight.T
    got = decoder.blocks[0].attention(x_BTD, rotation(torch.arange(12)[None], 16), None, None)
    close(got, expected)


@pytest.mark.usefixtures("ours")
def test_seams_combine() -> None:
    decoder = model({**{seam: {} for seam in OURS}, "relu-attention": {}})
    assert isinstance(decoder.blocks[0].attention.form, Relu)
    assert isinstance(decoder.blocks[0].attention.output, HeadGate)
    close(logits(decoder), explicit(decoder))
    _cache_equals_full_forward(decoder)


def test_every_seam_that_builds_a_part_is_tried_here() -> None:
    elsewhere = {"weights", "optimizer", "penalty", "prepare"}
    assert set(OURS) == set(SEAMS) - elsewhere


# Cost


def test_cost_by_hand() -> None:
    decoder = model(layers=1, mlp_width=128, vocab_size=11)
    blocks = 64 * 192 + 64 * 64 + 64 * 256 + 128 * 64
    paid = cost(decoder, length=16)
    assert paid["parameters"] == 11 * 64 + blocks + 3 * 64 + 64 * 11
    # Causal q.k and weights.v: T x width multiply-adds a token together, 2 FLOPs each, thrice with the backward pass.
    assert paid["flops-per-token"] == 6 * (blocks + 64 * 11) + 6 * 16 * 64


# Saving and loading

RELOAD = """
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantbench.model

torch.set_num_threads(1)
ids = torch.from_numpy(np.load(Path(sys.argv[1]) / "ids.npy"))
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    assert AutoConfig.from_pretrained(folder).model_type == "quantbench"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        np.save(folder / "logits.npy", model(ids).logits.numpy())
"""


def test_a_checkpoint_reloads_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.numpy())
    variants = [(m, {}) for m in EVERY.values()] + [({}, {"positions": "learned", "norm": "layernorm", "mlp": "gelu"})]
    expected = []
    for number, (mitigations, changes) in enumerate(variants):
        decoder = model(mitigations, seed=number, **changes)
        decoder.save_pretrained(tmp_path / f"{number:03}")
        expected.append(logits(decoder).numpy())
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", RELOAD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    for number, found in enumerate(expected):
        assert np.array_equal(np.load(tmp_path / f"{number:03}" / "logits.npy"), found), variants[number]


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("seam", OURS)
def test_a_changed_seam_reloads_through_the_auto_classes(seam: str, tmp_path: Path) -> None:
    decoder = model({seam: {}})
    decoder.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, QuantbenchConfig)
    assert config.mitigations == {seam: {}}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(reloaded, QuantbenchModel)
    assert torch.equal(logits(reloaded), logits(decoder))


@mitigated
def test_a_config_round_trips(mitigations: Mitigations) -> None:
    config = QuantbenchConfig(mitigations=mitigations, layers=3, positions="learned")
    again = QuantbenchConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (again.num_hidden_layers, again.hidden_size, again.num_attention_heads) == (3, 64, 8)
    assert AutoConfig.for_model("quantbench", mitigations=mitigations).mitigations == mitigations


def test_a_mitigation_of_another_version_is_an_error() -> None:
    with pytest.raises(KeyError, match="of-tomorrow"):
        model({"of-tomorrow": {}})
    with pytest.raises(TypeError, match="strength"):
        model({"relu-attention": {"strength": 2}})
