"""Post-hoc mitigations: the same function in another form, the damage that goes, and checkpoints that are shared."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import TINY, project_in
from test_evaluate import LENGTH, VOCAB, Fixed, sampled, track, with_sink
from tiny import ENTRIES, RECIPES, ROOT, gaussian, ids, model, quantizer
from tiny import MODELS as PARTS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantbench import catalog
from quantbench.anatomy import anatomy
from quantbench.bench import Job, experiment, post_hoc
from quantbench.calibration import Calibration, spans
from quantbench.evaluate import Reference, full_precision, quantized
from quantbench.harness import harness
from quantbench.mitigations import Mitigation, Output, Projection, seams
from quantbench.mitigations.hadamard import Hadamard, hadamard, rotation
from quantbench.mitigations.percentile_clip import PercentileClip
from quantbench.mitigations.prefix_kv import Behind, PrefixKV
from quantbench.mitigations.smoothquant import SmoothQuant, largest_inputs, scales
from quantbench.recipe import load_recipe, load_track
from quantbench.store import Store
from quantbench.strict import StrictError
from quantbench.trace import measure
from quantbench.tune import tune

BOS = 66
POST_HOC = [name for name, entry in ENTRIES.items() if seams(entry()) == ["prepare"]]


def test_the_catalog_knows_which_come_after_pretraining() -> None:
    assert sorted(catalog.POST_HOC) == sorted(POST_HOC)


IDS = ids(6, 20)
IDS[:, 0] = BOS
CALIBRATION = Calibration([(IDS[:2], None), (IDS[2:], None)])


# --- models that have something to fold ------------------------------------------------------------------------------


def drawn(decoder: Any) -> Any:
    """With gains, biases and learned logits that are not 0 or 1."""
    for index, parameter in enumerate(decoder.parameters()):
        if parameter.ndim == 1:
            parameter.data = 1 + gaussian(len(parameter), seed=index) / 3
    return decoder.eval().requires_grad_(False)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 67, "max_position_embeddings": 64}
    decoder = LlamaForCausalLM(LlamaConfig(**shape | changes))
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    return drawn(decoder)


class Gate(Output):
    """A gate on the heads' outputs that reads what the attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.Linear(64, 64)

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        return y_BHTE * self.reader(x_BTD).sigmoid().unflatten(-1, (4, 16)).transpose(1, 2)


class Scalar(nn.RMSNorm):
    """One gain for all features."""

    def __init__(self) -> None:
        super().__init__(64, eps=1e-6)
        self.weight = nn.Parameter(torch.tensor([1.7]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (64,), eps=self.eps) * self.weight


class Turned(Projection):
    """A square matrix behind the embedding, and its like before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        return self.first(embedded_BTD)

    def leave(self, hidden_BTD: Tensor) -> Tensor:
        return self.second(hidden_BTD)

    def fold(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        embedding.weight.copy_(embedding.weight @ self.first.weight.T)
        head.weight.copy_(head.weight @ self.second.weight)


class Front(nn.Module):
    """Learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_RD = nn.Parameter(gaussian(3, 64, seed=5))

    def forward(self, batch: int) -> Tensor:
        return self.tokens_RD.expand(batch, -1, -1)


def ours(**changes: Any) -> Any:
    return drawn(model(**changes))


def with_gates() -> Any:
    decoder = ours()
    for block in decoder.blocks:
        block.attention.output = Gate()
    return decoder.requires_grad_(False)


def with_scalars() -> Any:
    decoder = ours()
    for block in decoder.blocks:
        block.attention_norm, block.mlp_norm = Scalar(), Scalar()
    decoder.norm = Scalar()
    return decoder.requires_grad_(False)


def with_projection() -> Any:
    decoder = ours()
    decoder.projection = Turned()
    return decoder.requires_grad_(False)


def with_front() -> Any:
    decoder = ours()
    decoder.front = Front()
    return decoder.requires_grad_(False)


MODELS: dict[str, Callable[[], Any]] = {
    "ours": lambda: ours(mlp_width=192),
    "layernorm, learned positions": lambda: ours(norm="layernorm", positions="learned", mlp="relu"),
    "relu-attention": lambda: ours(mitigations={"relu-attention": {}}),
    "sink-logit": lambda: ours(mitigations={"sink-logit": {}}),
    "no Hadamard matrix of the MLP's width": lambda: ours(mlp_width=76),
    "gates": with_gates,
    "scalar gains": with_scalars,
    "projection": with_projection,
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
}
kinds = pytest.mark.parametrize("kind", MODELS)


@torch.no_grad()
def logits(decoder: nn.Module, ids_BT: Tensor = IDS) -> Tensor:
    return decoder(ids_BT).logits


# --- the same function -----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "entry",
    [SmoothQuant(), SmoothQuant(alpha=0.75), Hadamard(), Hadamard(seed=1), PrefixKV(), PercentileClip()],
    ids=str,
)
def test_a_prepared_model_computes_what_it_did(entry: Mitigation, kind: str) -> None:
    """In float64, but for the rotary positions and Llama's norms, which are float32's."""
    decoder = MODELS[kind]().double()
    before = logits(decoder)
    prepared = entry.prepare(decoder, CALIBRATION).model
    torch.testing.assert_close(logits(prepared), before, rtol=0, atol=1e-5)


@kinds
def test_smoothing_shares_the_largest_between_input_and_weights(kind: str) -> None:
    """With a = 1/2 both are sqrt(max|x| max|W|)."""
    decoder = MODELS[kind]()
    (norm, readers), inputs = anatomy(decoder).stream.norms[1], []  # type: ignore[union-attr]

    def largest() -> tuple[Tensor, Tensor]:
        inputs.clear()
        with torch.no_grad():
            hook = norm.register_forward_hook(lambda module, args, output: inputs.append(output.flatten(0, 1)))
            decoder(IDS)
            hook.remove()
        return inputs[0].abs().amax(0), torch.cat([reader.weight for reader in readers]).abs().amax(0)

    x_K, w_K = largest()
    SmoothQuant().prepare(decoder, CALIBRATION)
    for now_K in largest():
        torch.testing.assert_close(now_K, (x_K * w_K).sqrt())
    assert len(norm.weight) == 64


@kinds
def test_a_rotation_leaves_no_gains_and_no_mean_to_take_out(kind: str) -> None:
    decoder = MODELS[kind]()
    Hadamard().prepare(decoder, CALIBRATION)
    parts = anatomy(decoder)
    norms = [norm for norm, _ in parts.stream.norms] + [parts.stream.last]  # type: ignore[union-attr]
    assert all((norm.weight == 1).all() for norm in norms)
    assert not any(isinstance(norm, nn.LayerNorm) for norm in norms)
    assert parts.head.weight is not parts.table.weight


# What a rewriting cannot reach: who refuses which part of a model. All else keeps its function.
REFUSED = {
    "registers": ("hadamard",),  # learned tokens enter the stream where no rotation reaches them
    "gated-attention-qualcomm": ("hadamard", "smoothquant"),  # its gate is no Linear
    "outlier-protected-block": ("smoothquant",),  # no norm in front, no gain
}


@pytest.mark.parametrize("change", PARTS)
def test_a_prepared_model_computes_what_it_did_or_is_refused_in_a_line(change: str) -> None:
    entries = [SmoothQuant(), Hadamard(), PrefixKV(tokens=3), PercentileClip()]
    refusing = {name for part in PARTS[change] for name in REFUSED.get(part, ())}
    for entry in entries:
        decoder = drawn(model(PARTS[change], mlp_width=192)).double()
        before, name = logits(decoder), catalog.entry_name("mitigations", entry)
        if name in refusing:
            with pytest.raises(ValueError, match=rf"^{name}: not applicable: [^\n]*$"):
                entry.prepare(decoder, CALIBRATION)
            continue
        prepared = entry.prepare(decoder, CALIBRATION)
        assert (prepared.model is decoder) == (name != "prefix-kv")
        if name == "prefix-kv":
            assert prepared.model.keys_LHRE.shape[2] == decoder.registers + 1  # no token but BOS is extreme
        torch.testing.assert_close(logits(prepared.model), before, rtol=0, atol=1e-4)


def test_a_part_of_its_own_is_refused_and_not_broken() -> None:
    """Learned tokens enter the stream where no rotation reaches them."""
    decoder = with_front()
    with pytest.raises(ValueError, match=r"^hadamard: not applicable: rewritten, .* \(logits change by \d+\.\d%\)"):
        Hadamard().prepare(decoder, CALIBRATION)
    smooth = with_front()
    before = logits(smooth)
    torch.testing.assert_close(logits(SmoothQuant().prepare(smooth, CALIBRATION).model), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["smoothquant", "hadamard"])
def test_a_model_whose_norms_follow_its_sublayers_is_refused(name: str) -> None:
    decoder = llama()
    decoder.config.model_type = "olmo2"
    for layer in decoder.model.layers:
        layer.post_feedforward_layernorm = layer.input_layernorm
        layer.input_layernorm = None
    with pytest.raises(ValueError, match=f"^{name}: not applicable: "):
        ENTRIES[name]().prepare(decoder, CALIBRATION)


def test_norms_without_a_gain_cannot_be_smoothed() -> None:
    decoder = ours()
    decoder.blocks[1].mlp_norm = nn.Identity()
    with pytest.raises(ValueError, match=r"^smoothquant: not applicable: .* no norm with a gain"):
        SmoothQuant().prepare(decoder, CALIBRATION)


@pytest.mark.parametrize("name", POST_HOC)
@pytest.mark.parametrize("quantize", catalog.names("quantizers"))
def test_every_quantizer_takes_a_copy_of_a_prepared_model(name: str, quantize: str) -> None:
    prepared = ENTRIES[name]().prepare(ours(), CALIBRATION)
    before = logits(prepared.model)
    low = copy.deepcopy(prepared.model)
    report = quantizer(quantize).quantize(low, replace(CALIBRATION, rule=prepared.rule, percent=prepared.percent))
    got = logits(low)
    assert report["share-of-weights"] == 1.0
    assert 0 < float((got - before).norm() / before.norm()) < 1
    assert torch.equal(logits(prepared.model), before)
    assert torch.equal(logits(low), got)


# --- SmoothQuant, by hand --------------------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    largest_K = torch.tensor([4.0, 1.0, 0.0, 5.0])
    readers = [torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.5, 1.0, 1.0, 0.0]]), torch.tensor([[-16.0, 9.0, 1.0, 0.0]])]
    s_K = scales(largest_K, readers, 0.5)  # columns reach 16, 9, 3, 0; the last two features have no ratio
    torch.testing.assert_close(s_K, torch.tensor([2 / 4, 1 / 3, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(
        scales(largest_K, readers, 0.75)[:2], torch.tensor([4**0.75 / 2, 1 / 9**0.25], dtype=torch.float64)
    )


# --- Hadamard matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 64, 192, 576])
def test_a_hadamard_matrix_is_of_ones_and_orthogonal(order: int) -> None:
    found = hadamard(order)
    assert found is not None
    assert torch.equal(found.abs(), torch.ones_like(found))
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 36, 76])
def test_where_none_is_made_a_random_orthogonal_one_stands_in(order: int) -> None:
    assert hadamard(order) is None
    q = rotation(order, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.T, torch.eye(order, dtype=torch.float64))
    assert torch.equal(q, rotation(order, torch.Generator().manual_seed(0)))


def test_a_rotation_spreads_one_feature_over_all_and_its_signs_are_seeded() -> None:
    q, again, other = (rotation(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(q, again)
    assert not torch.equal(q, other)
    torch.testing.assert_close((300 * q[7]).abs(), torch.full((64,), 300 / 8, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(64, dtype=torch.float64))


# --- a channel offset ------------------------------------------------------------------------------------------------


def judged(decoder: nn.Module, mitigation: Mitigation | None = None, count: int = 32) -> Reference:
    data = Fixed(sampled(decoder, count), VOCAB)
    return Reference(decoder, data, track(quantizer("w8a8-static"), LENGTH, count), mitigation or Mitigation())


def damage(reference: Reference, name: str) -> float:
    return quantized(reference, quantizer(name), exemption=False)[1]["kl"]


def act_max(reference: Reference) -> float:
    found = measure(reference.model, reference.traced, ["act-max"])["act-max"].value
    assert found is not None
    return found


def with_offset() -> Any:
    """A channel that stands off in all tokens alike, which no range of a token avoids (science.md, 5)."""
    decoder = with_sink()
    decoder.embed.weight[0] = decoder.embed.weight[1]
    decoder.embed.weight[:, 7] += 40
    for block in decoder.blocks:
        block.attention_norm.weight.fill_(4.0)
        block.mlp_norm.weight.fill_(4.0)
    return decoder


@pytest.mark.parametrize("entry", [SmoothQuant(), Hadamard()], ids=str)
def test_a_channel_offset_goes_and_its_damage_with_it(entry: Mitigation) -> None:
    plain, prepared = judged(with_offset()), judged(with_offset(), entry)
    largest = [largest_inputs(reference.model, reference.calibrate()) for reference in (plain, prepared)]
    for place in [f"{layer}.{reader}" for layer in (0, 1) for reader in ("attention.qkv", "mlp.up")]:
        assert largest[0][place].max() > 25
        assert largest[1][place].max() < 2.5
    assert act_max(prepared) < act_max(plain) * 0.6
    for name in ("w8a8-static", "w8a8-token", "w4a4-token"):
        assert damage(prepared, name) < damage(plain, name) * 0.5, name
    exact = [full_precision(reference)["loss"] for reference in (plain, prepared)]
    assert exact[0] == pytest.approx(exact[1], abs=1e-5)


# --- a prefix in the cache -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("prefix", [[BOS], [BOS, 5, 9]])
def test_behind_a_prefix_the_model_is_the_whole_ones(kind: str, prefix: list[int]) -> None:
    decoder = MODELS[kind]()
    behind = Behind(decoder, torch.tensor(prefix))
    whole = behind.whole(IDS)
    assert whole[0].tolist() == prefix + IDS[0, 1:].tolist()
    torch.testing.assert_close(logits(behind), logits(decoder, whole)[:, len(prefix) - 1 :], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(behind, IDS[:, :1]), logits(behind)[:, :1])
    for kept in (1, IDS.shape[1] - 1, IDS.shape[1]):
        with torch.no_grad():
            last_BKV = behind(IDS, logits_to_keep=kept).logits
        torch.testing.assert_close(last_BKV, logits(behind)[:, -kept:])
    assert torch.equal(logits(copy.deepcopy(behind)), logits(behind))


def test_registers_stand_in_the_cache_before_bos() -> None:
    decoder = with_front()
    before = logits(decoder)
    prepared = PrefixKV().prepare(decoder, CALIBRATION).model
    assert prepared.keys_LHRE.shape[2] == 3 + 1
    torch.testing.assert_close(logits(prepared), before, rtol=0, atol=1e-5)


def test_a_block_may_be_run_twice_behind_a_prefix() -> None:
    """As quantizers do that go block by block: the cache keeps nothing of what it has seen."""
    prepared = PrefixKV().prepare(ours(), CALIBRATION).model
    calls: list[Any] = []
    block = prepared.inner.blocks[0]
    block.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    logits(prepared)
    args, output = calls[0]
    assert torch.equal(block(*args), output)


def test_the_prefix_takes_the_most_frequent_extreme_tokens_where_there_are_any() -> None:
    assert PrefixKV(tokens=4).prepare(ours(layers=1), CALIBRATION).model.prefix_R.tolist() == [BOS]
    peaked = ours(layers=1)
    peaked.embed.weight[[BOS, 5, 9, 11]] *= 100
    batch = IDS.clone()
    batch[:, 1:] = 1
    batch[0, 3], batch[:, 7], batch[0:3, 8] = 11, 9, 5  # once, six times, three times
    counted = Calibration([(batch[:1], None), (batch[1:], None)])
    found = [PrefixKV(tokens=n).prepare(copy.deepcopy(peaked), counted).model.prefix_R.tolist() for n in (1, 3, 9)]
    assert found == [[BOS], [BOS, 9, 5], [BOS, 9, 5, 11]]


@pytest.mark.parametrize("mitigations", [{}, {"registers": {}}], ids=["", "registers"])
def test_a_prefix_that_learned_positions_have_no_room_for_is_refused(mitigations: dict[str, Any]) -> None:
    decoder = ours(layers=1, positions="learned", max_position_embeddings=20, mitigations=mitigations)
    logits(PrefixKV(tokens=4).prepare(decoder, CALIBRATION).model)  # BOS alone
    decoder.embed.weight[[BOS, int(IDS[0, 5])]] *= 100
    with pytest.raises(ValueError, match=r"2 tokens and 19 behind it are more than the 20 learned positions"):
        PrefixKV(tokens=2).prepare(decoder, CALIBRATION)


def test_sequences_without_a_bos_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^prefix-kv: not applicable: "):
        PrefixKV().prepare(ours(), Calibration([(ids(), None)]))
    with pytest.raises(AssertionError, match="stands for BOS"):
        PrefixKV().prepare(ours(), CALIBRATION).model(ids())


def test_a_prefix_removes_the_damage_of_a_planted_sink() -> None:
    plain, prepared = judged(with_sink()), judged(with_sink(), PrefixKV())
    for name in ("w8a8-static-residual", "w8a8-static-qualcomm", "w4a4-static"):
        assert damage(prepared, name) < damage(plain, name) * 0.7, name
    name = "w8a8-static-residual"
    assert damage(prepared, name) < damage(plain, name) * 0.02
    exempt = quantized(prepared, quantizer(name), exemption=True)[1]["exemption"]
    assert exempt["tokens"] == 0  # BOS is not among them
    assert exempt["extreme"]["kl"] == exempt["random"]["kl"] == damage(prepared, name)
    exact = [full_precision(reference)["loss"] for reference in (plain, prepared)]
    assert exact[0] == pytest.approx(exact[1], abs=1e-5)


def test_a_prefix_harms_no_model_without_outliers() -> None:
    decoder = with_sink()
    decoder.embed.weight[0] = decoder.embed.weight[1]
    plain, prepared = judged(copy.deepcopy(decoder)), judged(decoder, PrefixKV(tokens=8))
    assert prepared.model.prefix_R.tolist() == [0]
    for name in ("w8a8-static-residual", "w8a8-token", "w4a4kv4"):
        assert damage(prepared, name) < damage(plain, name) * 1.1, name


def test_extreme_tokens_behind_a_prefix_can_be_exempt() -> None:
    """Scores of pairs, too: their keys are more than the queries."""
    decoder = with_sink()
    decoder.embed.weight[3] *= 40
    prepared = judged(decoder, PrefixKV())
    _, found = quantized(prepared, quantizer("w8a8-static-qualcomm"), exemption=True)
    assert found["exemption"]["tokens"] == int((prepared.ids_NT[:, 1:-1] == 3).sum()) > 0
    assert found["exemption"]["extreme"]["kl"] < found["kl"] * 0.7
    assert None not in found["sqnr"]["non-sink"]


def test_metrics_see_the_attention_whole_and_the_stream_behind_the_prefix() -> None:
    names = ["residual-peak", "act-max", "sink-rate", "bos-attention", "delta-logit", "value-drain"]
    plain, prepared = with_sink(), PrefixKV().prepare(with_sink(), Calibration([(sampled(with_sink(), 4), None)])).model
    batches = [sampled(plain, 4)]
    found, expected = measure(prepared, batches, names), measure(plain, batches, names)
    for name in names[2:]:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-4), name
    for name in names[:2]:
        assert found[name].value < expected[name].value / 2, name  # type: ignore[operator]


def test_lm_eval_finds_the_same_behind_a_prefix(tmp_path: Path) -> None:
    _, smoke = load_track("smoke", ROOT)
    data = smoke.task.open(tmp_path)  # type: ignore[attr-defined]
    decoder = model(vocab_size=data.vocab, max_position_embeddings=smoke.length, bos_token_id=data.bos)
    plain, prepared = (Reference(decoder, data, smoke, entry) for entry in (Mitigation(), PrefixKV()))
    found, expected = harness(prepared.model, prepared), harness(plain.model, plain)
    assert found == pytest.approx(expected, rel=1e-5)


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_percentiles_stand_in_for_the_rule_of_static_ranges_alone() -> None:
    decoder = ours()
    prepared = PercentileClip(percent=99.0).prepare(decoder, CALIBRATION)
    ruled = replace(CALIBRATION, rule=prepared.rule, percent=prepared.percent)
    by_name = {"w8a8-static": quantizer("w8a8-static", rule="percentile", percent=99.0), "w8a8-token": None}
    for name, expected in by_name.items():
        low, other = copy.deepcopy(decoder), copy.deepcopy(decoder)
        quantizer(name).quantize(low, ruled)
        (expected or quantizer(name)).quantize(other, CALIBRATION)
        assert torch.equal(logits(low), logits(other))
    clipped, whole = (spans(decoder, c, ["residual"], 8) for c in (ruled, CALIBRATION))
    assert all(clipped[place].high < whole[place].high for place in whole)


def test_a_clipped_range_is_what_the_sink_no_longer_sets() -> None:
    """BOS is one token of 12, with one large feature of 64: .13% of the values."""
    plain, prepared = judged(with_sink()), judged(with_sink(), PercentileClip(percent=99.5))
    low, _ = quantized(prepared, quantizer("w8a8-static-residual"), exemption=False)
    scale = low.blocks[0].rounding_of_residual.static_scale
    assert float(scale) * 127 < 10 < 300
    assert damage(plain, "w8a8-token") == damage(prepared, "w8a8-token")


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_the_rate_of_what_it_builds_on(name: str) -> None:
    _, recipe = load_recipe(name, ROOT)
    after = post_hoc(recipe)
    if after:
        trained = {entry: kw for entry, kw in RECIPES[name].items() if entry not in after}
        bases = [base for base, mitigations in RECIPES.items() if mitigations == trained]
        assert bases, "no recipe is what it builds on"
        assert all(load_recipe(base, ROOT)[1].lr == recipe.lr for base in bases)


@pytest.mark.parametrize("name", [name for name, m in RECIPES.items() if m and set(m) <= set(POST_HOC)])
def test_the_rate_of_a_post_hoc_recipe_is_not_tuned(name: str, tmp_path: Path) -> None:
    tiny = load_track("smoke", ROOT)
    with pytest.raises(ValueError, match=f"^{name}: all it changes comes after pretraining; .*the baseline$"):
        tune(*load_recipe(name, ROOT), 4e-3, *tiny, Store(tmp_path), workers=1, tell=lambda line: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project_in(tmp_path_factory.mktemp("project"))
    tracks = folder / "recipes" / "tracks" / "tiny.yaml"
    tracks.write_text(TINY.replace("steps: 60", "steps: 10").replace("w8a8-token: {}", "w8a8-static: {}"))
    stacked = "title: Both\nwhy: They stack.\nmitigations: {relu-attention: {}, hadamard: {}}\nlr: {text: 0.004}\n"
    (folder / "recipes" / "both.yaml").write_text(stacked)
    return folder


def test_post_hoc_recipes_share_a_checkpoint_and_nothing_else(project: Path) -> None:
    store = Store(project / ".quantbench")
    records: dict[str, Any] = {}

    def cells() -> dict[str, int]:
        return {stage: count for stage, count, _ in store.usage()}

    for name in ("prefix-kv", "baseline", "hadamard", "smoothquant", "percentile-clip", "relu-attn", "both"):
        done = experiment(Job(*load_recipe(name, project), *load_track("tiny", project), 0), store)
        assert done is not None
        records[name], run = done
        assert run["stages"].keys() >= {"measure", "quantize"}
        assert ("pretrain" in run["stages"]) == (name in ("prefix-kv", "relu-attn")), name
    assert cells()["pretrain"] == 2
    assert cells()["measure"] == len(records)
    assert cells()["quantize"] == 3 * len(records)
    (config,) = {
        path.read_text()
        for path in (project / ".quantbench").rglob("config.json")
        if "relu-attention" not in path.read_text()
    }
    assert "prefix-kv" not in config  # whoever came first

    loss = {name: record["full-precision"]["loss"] for name, record in records.items()}
    for name in ("prefix-kv", "hadamard", "smoothquant", "percentile-clip"):
        assert loss[name] == pytest.approx(loss["baseline"], abs=1e-5), name
        assert records[name]["training"] == records["baseline"]["training"]
        assert records[name]["versions"]["mitigations"] == {name: 1}
        assert records[name]["quantized"]["w8a8-static"]["kl"] != records["baseline"]["quantized"]["w8a8-static"]["kl"]
    assert loss["both"] == pytest.approx(loss["relu-attn"], abs=1e-5)
    assert records["both"]["training"] == records["relu-attn"]["training"]
    found = records["baseline"]["quantized"]["w4a16-rtn"], records["percentile-clip"]["quantized"]["w4a16-rtn"]
    assert found[0] == found[1]
    assert records["prefix-kv"]["quantized"]["w8a8-static-residual"]["exemption"]["tokens"] == 0


def test_two_mitigations_after_pretraining_are_refused(project: Path) -> None:
    path = project / "recipes" / "twice.yaml"
    path.write_text("title: T\nwhy: W\nmitigations: {smoothquant: {}, hadamard: {}}\n")
    with pytest.raises(StrictError, match=r"twice\.yaml:3:1: 'smoothquant' and 'hadamard' both change 'prepare'"):
        load_recipe("twice", project)
