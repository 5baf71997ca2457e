"""The contract of a mitigation over the whole catalog, how they combine, and the baseline's and first forms by hand."""

import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENTRIES, EVERY, MODELS, RECIPES, Mitigations, gaussian, ids, model, track
from torch import Tensor, nn

from quantbench import catalog
from quantbench.attention import Form, Softmax, attend, causal, with_appended
from quantbench.mitigations import SEAMS, Mitigation, Settings, combine, seams
from quantbench.mitigations.adamw import AdamW
from quantbench.mitigations.relu_attention import Relu, ReluAttention
from quantbench.mitigations.sgd import SGD
from quantbench.mitigations.sink_logit import SinkLogit, Softmax1
from quantbench.model import QuantbenchConfig
from quantbench.ops.relu import relu_attention
from quantbench.ops.sink import sink_attention
from quantbench.pretrain import pretrain
from quantbench.tasks.bigram_backcopy import BigramBackcopy

entries = pytest.mark.parametrize("name", ENTRIES)
recipes = pytest.mark.parametrize("name", [name for name in RECIPES if name != "baseline"])
every = pytest.mark.parametrize("mitigations", EVERY.values(), ids=EVERY.keys())
models = pytest.mark.parametrize("mitigations", MODELS.values(), ids=MODELS.keys())

CPU = torch.device("cpu")
HERE = Settings(lr=0.1, betas=(0.9, 0.95), shrink=0.05)  # a weight decay of 0.5


def trained(
    mitigations: Mitigations, work: Path, steps: int = 2, **changes: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters after a few steps."""
    tiny = track(steps=steps, warmup=0, timeline=0, **changes)
    done = pretrain(mitigations, tiny.lr, tiny, 0, BigramBackcopy().open(work), work, CPU)
    return done.losses, done.model.state_dict()


def form(mitigations: Mitigations, heads: int, features: int = 16) -> Form:
    config = QuantbenchConfig(mitigations=mitigations, width=features * heads, heads=heads)
    return config.mitigation().weights(config)


# The contract, for every entry of the catalog


@entries
def test_a_weight_is_one_at_most_unless_the_catalog_says_otherwise(name: str) -> None:
    """Records are held to it: a mass of attention above 1 is refused there."""
    weigh = form({name: asdict(ENTRIES[name]())}, 4)
    scores_BHTS = 100 * gaussian(1, 4, 8, 8 + weigh.appended)
    weights_BHTS = weigh(scores_BHTS, with_appended(causal(8, CPU), 8 + weigh.appended)).detach()
    assert (float(weights_BHTS.max()) > 1 + 1e-5) == (name in catalog.UNBOUNDED)


@entries
def test_it_overrides_a_seam_and_states_its_version(name: str) -> None:
    entry = ENTRIES[name]()
    assert seams(entry)
    assert set(seams(entry)) <= set(SEAMS)
    assert isinstance(entry.version, int)
    assert catalog.entry_name("mitigations", entry) == name


@entries
def test_some_recipe_uses_it(name: str) -> None:
    assert any(name in mitigations for mitigations in RECIPES.values())


@every
def test_it_comes_back_from_the_config_as_it_was(mitigations: Mitigations) -> None:
    config = QuantbenchConfig.from_dict(QuantbenchConfig(mitigations=mitigations).to_dict())
    assert {name: asdict(ENTRIES[name](**kw)) for name, kw in config.mitigations.items()} == mitigations
    overridden = [seam for name, kw in mitigations.items() for seam in seams(ENTRIES[name](**kw))]
    assert sorted(vars(config.mitigation())) == sorted(overridden)


@every
def test_two_steps_change_the_loss(mitigations: Mitigations, tmp_path: Path) -> None:
    losses, _ = trained(mitigations, tmp_path, steps=3)
    assert len(set(losses)) == 3
    assert all(math.isfinite(loss) for loss in losses)


@recipes
def test_a_recipe_trains_another_model_than_the_baseline(name: str, tmp_path: Path) -> None:
    baseline_losses, baseline = trained({}, tmp_path, steps=3)
    losses, other = trained(RECIPES[name], tmp_path, steps=3)
    overridden = {seam for entry, kw in RECIPES[name].items() for seam in seams(ENTRIES[entry](**kw))}
    same = other.keys() == baseline.keys() and all(torch.equal(other[key], baseline[key]) for key in baseline)
    assert same == (overridden <= {"prepare"})  # what is post-hoc shares the baseline's checkpoints
    assert (losses == baseline_losses) == same  # what is added is not idle
    late = {"optimizer", "penalty"}  # in the second step
    assert (losses[0] == baseline_losses[0]) == (same or overridden <= late or name == "single-scale-norm")


@models
def test_weights_look_at_nothing_that_is_not_visible(mitigations: Mitigations) -> None:
    scores_BHTS = gaussian(2, 3, 8, 8)
    attention = form(mitigations, heads=3)
    weights = attention(scores_BHTS, causal(8, CPU))
    assert not weights[..., :8].triu(1).any()
    changed = attention(scores_BHTS + torch.ones(8, 8).triu(1) * 50, causal(8, CPU))
    assert torch.equal(weights, changed)
    hole = causal(8, CPU).clone()
    hole[4:, 2] = False
    assert not attention(scores_BHTS, hole)[..., 4:, 2].any()


@models
@pytest.mark.parametrize("size", [0.0, 300.0, -300.0])
def test_weights_are_finite_in_bf16_whatever_the_scores(mitigations: Mitigations, size: float) -> None:
    signs = gaussian(2, 3, 8, 8).sign() if size > 0 else torch.ones(2, 3, 8, 8)
    scores_BHTS = (size * signs).to(torch.bfloat16).requires_grad_()
    attention = form(mitigations, heads=3)
    weights = attention(scores_BHTS, causal(8, CPU))
    assert weights.isfinite().all()
    (gradient,) = torch.autograd.grad(weights.float().square().sum(), scores_BHTS)
    assert gradient.isfinite().all()
    q = torch.full((2, 3, 8, 16), 300**0.5 / 2).to(torch.bfloat16)  # q.k / sqrt(E) = 300
    assert attention.attend(q, math.copysign(1, size) * q, q, None).isfinite().all()


@models
def test_gradients_are_those_of_finite_differences(mitigations: Mitigations) -> None:
    attention = form(mitigations, heads=2, features=6).double()
    learned = tuple(attention.parameters())
    scores_BHTS = gaussian(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, *_: attention(s, causal(4, CPU)), (scores_BHTS, *learned))
    q, k, v = (gaussian(1, 2, 4, 6, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v, *_: attention.attend(q, k, v, None), (q, k, v, *learned))


@models
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fast_way_is_the_formula(mitigations: Mitigations, dtype: torch.dtype) -> None:
    """Outputs and gradients, at lengths on both sides of the fast ways' blocks."""
    attention = form(mitigations, heads=2, features=8).to(torch.promote_types(dtype, torch.float32))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    close = {"rtol": 2e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for length in (1, 37, 128, 300):
        q, k, v, dy = (gaussian(2, 2, length, 8, seed=seed).to(dtype) for seed in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v, *attention.parameters())]
        fast = attention.attend(q, k, v, None)
        slow = attend(attention, q.double(), k.double(), v.double(), None)
        torch.testing.assert_close(fast.double(), slow, **close)
        for got, expected in zip(*(torch.autograd.grad(y, leaves, dy.to(y.dtype)) for y in (fast, slow)), strict=True):
            if dtype == torch.bfloat16 and "clipped-softmax" in mitigations:  # a weight near a clip may fall on its
                far = ~torch.isclose(got, expected, **close)  # other side, where it has no gradient
                assert far.double().mean() < 0.01
            else:
                torch.testing.assert_close(got, expected, **close)


@models
def test_the_fast_way_runs_under_autocast_in_its_dtype(mitigations: Mitigations) -> None:
    attention = form(mitigations, heads=2, features=8)
    q, k, v = (gaussian(2, 2, 20, 8, seed=seed) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        low = attention.attend(q, k, v, None)
    halves = (x.to(torch.bfloat16) for x in (q, k, v))
    torch.testing.assert_close(low, attention.attend(*halves, None), rtol=2e-2, atol=2e-2)
    assert low.dtype == torch.bfloat16


@models
def test_gradients_of_a_whole_model_are_those_of_finite_differences(mitigations: Mitigations) -> None:
    """Along one direction in which every parameter changes, in float64; each has its share of the slope."""
    decoder = model(mitigations, positions="learned").double()
    parameters = dict(decoder.named_parameters())
    ways = {name: gaussian(*p.shape, seed=n, dtype=torch.float64) for n, (name, p) in enumerate(parameters.items())}

    def loss(step: float) -> Tensor:
        moved = {name: p + step * ways[name] for name, p in parameters.items()}
        logits_BTV = torch.func.functional_call(decoder, moved, (ids()[:, :-1],)).logits
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids()[:, 1:].flatten())

    gradients = torch.autograd.grad(loss(0.0), list(parameters.values()))
    slope = sum(float((g * ways[name]).sum()) for name, g in zip(parameters, gradients, strict=True))
    with torch.no_grad():
        expected = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert slope == pytest.approx(expected, rel=1e-6)


@models
def test_a_whole_model_is_finite_in_bf16_at_extreme_states(mitigations: Mitigations) -> None:
    decoder = model(mitigations).train()
    decoder.embed.weight.data[ids()[:, 0]] *= 300
    decoder.blocks[0].attention.qkv.weight.data *= 30
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(ids(), labels=ids())
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    low = decoder.to(torch.bfloat16).eval()
    assert low(ids()).logits.isfinite().all()


@models
def test_gradients_reach_every_parameter(mitigations: Mitigations) -> None:
    decoder = model(mitigations).train()
    decoder(ids(), labels=ids()).loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every
def test_an_optimizer_moves_every_parameter_once_and_at_the_recipes_rate(mitigations: Mitigations) -> None:
    decoder = model(mitigations)
    optimizer = decoder.config.mitigation().optimizer(decoder, HERE)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(decoder.parameters()))
    scale = mitigations.get("adamw", {}).get("lr_scale", 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * scale}


# Combinations


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ENTRIES, 2)))
def test_two_entries_combine_where_they_share_no_seam(first: str, second: str) -> None:
    one, other = ENTRIES[first](), ENTRIES[second]()
    if set(seams(one)) & set(seams(other)):
        with pytest.raises(ValueError, match=f"'{first}' and '{second}' both change '"):
            combine({first: one, second: other})
    else:
        combined = combine({first: one, second: other})
        assert sorted(vars(combined)) == sorted(seams(one) + seams(other))
        for owner in (one, other):
            assert all(getattr(combined, seam) == getattr(owner, seam) for seam in seams(owner))


def test_a_conflict_names_both_and_the_seam() -> None:
    with pytest.raises(ValueError, match=r"^'sgd' and 'adamw' both change 'optimizer': a recipe can have one of them$"):
        combine({"relu-attention": ReluAttention(), "sgd": SGD(), "adamw": AdamW()})


def test_nothing_combined_is_the_baseline() -> None:
    assert vars(combine({})) == {}
    assert seams(Mitigation()) == []


def test_the_order_of_a_combination_changes_nothing(tmp_path: Path) -> None:
    both = RECIPES["relu-attn-sgd"]
    losses, parameters = trained(both, tmp_path)
    again, others = trained(dict(reversed(both.items())), tmp_path)
    assert losses == again
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


# Norms of the baseline


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])  # where eps decides, and where it does not
def test_norms_by_hand(size: float) -> None:
    x = gaussian(5, 64, dtype=torch.float64) * size
    rms = Mitigation().norm(QuantbenchConfig(norm="rmsnorm"))(x.float())
    torch.testing.assert_close(
        rms.double(), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-5, atol=1e-5
    )
    layer = Mitigation().norm(QuantbenchConfig(norm="layernorm"))(x.float())
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer.double(), expected, rtol=1e-5, atol=1e-5)


# relu-attention


@pytest.mark.parametrize(
    ("normaliser", "last", "later"),
    [("keys", 3.0, 2.0), ("sqrt-keys", 3**0.5, 2**0.5), ("none", 1.0, 1.0)],
)
def test_relu_by_hand(normaliser: Any, last: float, later: float) -> None:
    relu = ReluAttention(normaliser).weights(QuantbenchConfig())
    scores_TS = torch.tensor([[2.0, 9.0, 9.0], [-1.0, 4.0, 9.0], [3.0, -2.0, 6.0]])
    expected = torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0 / later, 0.0], [3.0 / last, 0.0, 6.0 / last]])
    torch.testing.assert_close(relu(scores_TS[None, None], causal(3, CPU))[0, 0], expected)


def test_relu_counts_the_keys_that_are_seen_not_the_positions() -> None:
    visible = torch.tensor([[True, False, False], [False, True, False], [False, True, True]])  # position 0 is padding
    weights = Relu(1.0)(torch.ones(1, 1, 3, 3), visible)[0, 0]
    assert weights.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_relu_attends_by_the_papers_formula(power: float) -> None:
    q, k, v = (gaussian(1, 2, 5, 4, seed=seed) for seed in range(3))
    got = Relu(power).attend(q, k, v, None)
    for h, i in itertools.product(range(2), range(5)):
        logit = [float(q[0, h, i] @ k[0, h, j]) / 4**0.5 for j in range(i + 1)]
        expected = sum(max(s, 0.0) / (i + 1) ** power * v[0, h, j] for j, s in enumerate(logit))
        torch.testing.assert_close(got[0, h, i], expected)


def test_a_head_of_relu_attention_may_rest() -> None:
    assert not Relu(1.0)(-torch.ones(1, 1, 4, 4), causal(4, CPU)).any()


# softmax1, sink-logit


def test_softmax1_by_hand() -> None:
    scores_TS = torch.tensor([[0.0, 9.0], [math.log(2), math.log(3)]])
    weights = Softmax1().weights(QuantbenchConfig())(scores_TS[None, None], causal(2, CPU))[0, 0]
    torch.testing.assert_close(weights, torch.tensor([[1 / 2, 0], [2 / 6, 3 / 6]]))


def test_softmax1_is_softmax_where_logits_are_large_and_nothing_where_they_are_small() -> None:
    scores_BHTS, visible = gaussian(1, 2, 6, 6), causal(6, CPU)
    softmax1 = Softmax1().weights(QuantbenchConfig(heads=2))
    torch.testing.assert_close(softmax1(scores_BHTS + 30, visible), Softmax()(scores_BHTS, visible))
    assert softmax1(scores_BHTS - 30, visible).sum() < 1e-10


def test_a_sink_logit_of_0_is_softmax1_and_one_of_20_leaves_little() -> None:
    q, k, v = (gaussian(2, 4, 12, 16, seed=seed) for seed in range(3))
    softmax1, sink = Softmax1().weights(QuantbenchConfig(heads=4)), SinkLogit().weights(QuantbenchConfig(heads=4))
    with torch.no_grad():
        assert torch.equal(sink.attend(q, k, v, None), softmax1.attend(q, k, v, None))
        sink.sink_H.copy_(torch.tensor([0.0, 20.0, -20.0, 0.0]))
        got, plain = sink.attend(q, k, v, None), Softmax().attend(q, k, v, None)
    assert got[:, 1].abs().max() < 1e-6
    torch.testing.assert_close(got[:, 2], plain[:, 2])


def test_sink_logits_start_near_0_and_are_no_matrix() -> None:
    decoder = model({"sink-logit": {"std": 0.02}})
    logits = torch.stack([block.attention.form.sink_H.detach() for block in decoder.blocks])
    assert 0 < logits.std() < 0.06
    assert decoder.blocks[0].attention.form.sink_H.ndim == 1  # weight decay leaves it alone


def test_attention_with_a_sink_says_what_it_takes() -> None:
    q = gaussian(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"one shape .* and a sink \[H\], not \[1, 2, 3, 4\], .*, \[3\]$"):
        sink_attention(q, q, q, torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        relu_attention(q, q, q[..., :2], 1.0)
