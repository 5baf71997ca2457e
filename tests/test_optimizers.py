"""Optimizers of recipes: their steps by hand, the track's decay under each of them, and what they are when resumed."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import interrupted, same, train
from tiny import RECIPES, gaussian, ids, model, track
from torch import Tensor, nn

from quantbench.mitigations import Mitigation, Settings, by_shape
from quantbench.mitigations.adamw import AdamW
from quantbench.mitigations.muon import Muon
from quantbench.mitigations.ortho_adam import OrthoAdam, basis, turned
from quantbench.mitigations.sgd import SGD
from quantbench.pretrain import pretrain, schedule
from quantbench.tasks.bigram_backcopy import BigramBackcopy

CPU = torch.device("cpu")
HERE = Settings(lr=0.1, betas=(0.9, 0.95), shrink=0.05)  # a weight decay of 0.5


class Two(nn.Module):
    """A matrix and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False)
        self.linear.weight.data = gaussian(3, 2)
        self.gain = nn.Parameter(gaussian(3, seed=1))

    @property
    def matrix(self) -> nn.Parameter:
        return self.linear.weight


def _follow(optimizer: torch.optim.Optimizer, two: Two, lrs: list[float]) -> None:
    """Steps with given gradients, the step's number plus one, at given rates of all groups."""
    for number, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter in two.parameters():
            parameter.grad = torch.full_like(parameter, number + 1.0)
        optimizer.step()


@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("entry", [Mitigation(), AdamW(lr_scale=0.25), SGD(), SGD(nesterov=True), Muon(), OrthoAdam()])
def test_a_step_shrinks_matrices_alike_whatever_the_rate(entry: Mitigation, lr: float) -> None:
    two = Two()
    matrix, gain = two.matrix.detach().clone(), two.gain.detach().clone()
    optimizer = entry.optimizer(two, Settings(lr, (0.9, 0.95), shrink=0.002))
    for parameter in two.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(two.matrix.detach(), matrix * (1 - 0.002))
    assert torch.equal(two.gain, gain)


ALIKE = ("baseline", "sgd", "muon", "ortho-adam")


@pytest.mark.parametrize("lr", [4e-3, 0.3])
def test_the_shrink_is_the_tracks_not_the_recipes(lr: float, tmp_path: Path) -> None:
    """`pretrain` regularises a recipe with a rate of its own as it does the track's baseline."""
    start = model(max_position_embeddings=16).state_dict()
    moved = {}
    for decay in (0.5, 0.0):
        held = track(steps=1, warmup=0, timeline=0, clip=0.0, lr=4e-3, weight_decay=decay)
        for name in ALIKE:
            work = tmp_path / f"{name}-{decay}"
            done = pretrain(RECIPES[name], lr, held, 0, BigramBackcopy().open(work), work, CPU)
            moved[name, decay] = done.model.state_dict()
    for name, parameter in start.items():
        expected = 4e-3 * 0.5 * parameter if parameter.ndim == 2 else torch.zeros_like(parameter)
        for recipe in ALIKE:
            shrunk = moved[recipe, 0.0][name] - moved[recipe, 0.5][name]
            torch.testing.assert_close(shrunk, expected, rtol=1e-3, atol=1e-6)


def test_the_schedule_scales_the_shrink_as_it_scales_the_rate() -> None:
    tiny = track(steps=10, warmup=4, decay=0.5)
    two = Two()
    before = two.matrix.detach().double()
    optimizer = SGD().optimizer(two, HERE)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = HERE.lr * schedule(step, tiny)
        for parameter in two.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    shares = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    expected = math.prod(1 - 0.05 * share for share in shares)
    torch.testing.assert_close(two.matrix.double(), before * expected, rtol=1e-6, atol=1e-6)


# --- SGD and AdamW ---


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov: bool) -> None:
    two = Two()
    matrix, gain = two.matrix.detach().double(), two.gain.detach().double()
    optimizer = SGD(momentum=0.8, nesterov=nesterov).optimizer(two, HERE)
    lrs = [0.1, 0.05, 0.01]
    _follow(optimizer, two, lrs)
    v = 0.0
    for number, lr in enumerate(lrs):
        g = number + 1.0
        v = 0.8 * v + g
        move = lr * (g + 0.8 * v if nesterov else v)
        matrix = matrix * (1 - 0.05 * lr / 0.1) - move  # the shrink of the track, which follows the schedule
        gain = gain - move
    torch.testing.assert_close(two.matrix.double(), matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two.gain.double(), gain, rtol=1e-6, atol=1e-6)


def test_adamw_by_hand() -> None:
    two = Two()
    matrix, gain = two.matrix.detach().double(), two.gain.detach().double()
    _follow(Mitigation().optimizer(two, HERE), two, [0.1, 0.05])
    m = s = 0.0
    for t, lr in ((1, 0.1), (2, 0.05)):
        m, s = 0.9 * m + 0.1 * t, 0.95 * s + 0.05 * t**2
        move = lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.95**t)) ** 0.5 + 1e-8)
        matrix, gain = matrix * (1 - lr * 0.5) - move, gain - move
    torch.testing.assert_close(two.matrix.double(), matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.gain.double(), gain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("entry", "lr", "decay"),
    [
        (Mitigation(), 0.1, 0.5),
        (AdamW(), 0.1, 0.5),
        (AdamW(lr_scale=0.25), 0.025, 2.0),  # the shrink stays
        (AdamW(lr_scale=0.25, shrink_scale=0.25), 0.025, 0.5),
        (AdamW(shrink_scale=0.0), 0.1, 0.0),
    ],
)
def test_adamw_is_torchs_with_decay_on_matrices_only(entry: Mitigation, lr: float, decay: float) -> None:
    ours, theirs = model(norm="layernorm"), model(norm="layernorm")
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        foreach=False,
    )
    optimizer = entry.optimizer(ours, HERE)
    for seed in range(3):
        ours(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_gains_and_biases_are_no_matrices() -> None:
    decoder = model(norm="layernorm")
    matrices, others = by_shape(decoder)
    assert len(matrices) == 2 + 2 * 4
    assert len(others) == 5 * 2
    assert {p.ndim for p in others} == {1}


# --- Muon ---


def spun(update_NK: Tensor) -> Tensor:
    """Five Newton-Schulz steps as Jordan gives them, float64: X <- a X + (b X X^T + c (X X^T)^2) X."""
    x = update_NK.T if update_NK.shape[0] > update_NK.shape[1] else update_NK
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if update_NK.shape[0] > update_NK.shape[1] else x


def off(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_muon_by_hand(shape: tuple[int, int], nesterov: bool) -> None:
    """Torch's steps are in bf16, ours in float64."""
    linear = nn.Linear(shape[1], shape[0], bias=False)
    start = linear.weight.detach().double()
    holder = nn.ModuleDict({"inside": linear, "table": nn.Embedding(5, 4)})
    optimizer = Muon(momentum=0.8, nesterov=nesterov).optimizer(holder, HERE)
    m, expected = torch.zeros(shape, dtype=torch.float64), start
    for step, lr in enumerate([0.1, 0.05, 0.02]):
        g = gaussian(*shape, seed=step, dtype=torch.float64)
        linear.weight.grad = g.float()
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = linear.weight.detach().double()
        optimizer.step()
        m = 0.8 * m + 0.2 * g
        update = g + 0.8 * (m - g) if nesterov else m
        move = before * (1 - lr * 0.5) - linear.weight.detach().double()
        assert off(move, lr * 0.2 * max(shape) ** 0.5 * spun(update)) < 0.02
        expected = expected * (1 - lr * 0.5) - lr * 0.2 * max(shape) ** 0.5 * spun(update)
        # Whatever the steps are: the update has the momentum's singular vectors, and its sizes are near 1.
        U, S, V = torch.linalg.svd(update, full_matrices=False)
        sizes = U.T @ (move / (lr * 0.2 * max(shape) ** 0.5)) @ V.T
        assert off(sizes.diagonal().diag(), sizes) < 0.05
        large = sizes.diagonal()[0.02 * S.norm() < S]  # what is smaller needs more than five steps
        assert 0.6 < large.min() < large.max() < 1.3
        assert S.max() > 2 * S.min()
    assert off(linear.weight, expected) < 0.02


def test_muon_moves_the_matrices_of_linears_and_adam_all_else() -> None:
    decoder = model({"muon": {}, "registers": {}, "value-gate": {}, "embedding-projection": {}})
    optimizer = decoder.config.mitigation().optimizer(decoder, HERE)
    names = {id(p): name for name, p in decoder.named_parameters()}
    groups = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    linears = {f"{name}.weight" for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and name != "head"}
    gates = {f"blocks.{layer}.attention.output.weight_HE" for layer in (0, 1)}
    gains = {name for name, p in decoder.named_parameters() if p.ndim == 1}
    assert len(linears) == 2 * 4 + 2
    assert groups == [(linears, 0.5), ({"embed.weight", "front.tokens_RD", "head.weight"} | gates, 0.5), (gains, 0.0)]


def test_muon_is_torchs_beside_torchs_adamw() -> None:
    ours, theirs = model({"muon": {}}), model()
    optimizer = ours.config.mitigation().optimizer(ours, HERE)
    inside = [m.weight for m in theirs.modules() if isinstance(m, nn.Linear) and m is not theirs.head]
    references = [
        torch.optim.Muon(inside, lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs.embed.weight, theirs.head.weight], 0.1, (0.9, 0.95), weight_decay=0.5, fused=True),
        torch.optim.AdamW(
            [p for p in theirs.parameters() if p.ndim == 1], 0.1, (0.9, 0.95), weight_decay=0, fused=True
        ),
    ]
    for seed in range(3):
        ours(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        for part in (optimizer, *references):
            for group in part.param_groups:  # a schedule
                group["lr"] = 0.1 / (1 + seed)
            part.step()
        optimizer.zero_grad()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, expected), name


# --- OrthoAdam ---


def adam_in(bases: list[Tensor | None], start: Tensor, gradients: list[Tensor], lrs: list[float], wd: float) -> Tensor:
    """Adam on the flattened parameter, in the basis that the Kronecker product of its sides' is, float64."""
    K = torch.ones(1, 1, dtype=torch.float64)
    for side, q in zip(start.shape, bases, strict=True):
        K = torch.kron(K, torch.eye(side, dtype=torch.float64) if q is None else q.double().contiguous())
    torch.testing.assert_close(K @ K.T, torch.eye(len(K), dtype=torch.float64), rtol=0, atol=1e-6)
    w, m, s = start.double().flatten(), 0.0, 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        g = K @ gradient.double().flatten()
        m, s = 0.9 * m + 0.1 * g, 0.95 * s + 0.05 * g**2
        w = w * (1 - lr * wd) - lr * K.T @ ((m / (1 - 0.9**t)) / ((s / (1 - 0.95**t)).sqrt() + 1e-8))
    return w.view(start.shape)


@pytest.mark.parametrize("largest", [4096, 2, 0])
def test_ortho_adam_is_adam_on_the_flattened_parameter(largest: int) -> None:
    two, lrs = Two(), [0.1, 0.05, 0.02]
    starts = [p.detach().clone() for p in two.parameters()]
    gradients = [[gaussian(*p.shape, seed=10 * step + p.ndim) for p in two.parameters()] for step in range(3)]
    optimizer: Any = OrthoAdam(seed=3, largest=largest).optimizer(two, HERE)
    for lr, now in zip(lrs, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(two.parameters(), now, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for number, parameter in enumerate(two.parameters()):
        bases = optimizer.bases[parameter]
        assert [q is None for q in bases] == [side > largest for side in parameter.shape]
        mine, decay = [now[number] for now in gradients], 0.5 if parameter.ndim == 2 else 0.0
        expected = adam_in(bases, starts[number], mine, lrs, decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
        if largest == 4096:
            assert off(adam_in([None] * parameter.ndim, starts[number], mine, lrs, decay), expected) > 0.01


@pytest.mark.parametrize("how", ["identities", "no bases"])
def test_ortho_adam_in_the_axes_themselves_is_adam(how: str) -> None:
    ours, theirs = model(), model()
    optimizer: Any = OrthoAdam(largest=0 if how == "no bases" else 4096).optimizer(ours, HERE)
    if how == "identities":
        optimizer.bases = {p: [torch.eye(side) for side in p.shape] for p in ours.parameters()}
    reference = Mitigation().optimizer(theirs, HERE)
    for seed in range(3):
        ours(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_bases_are_orthogonal_drawn_from_the_seed_and_each_of_its_own() -> None:
    first, again, other = (
        list(OrthoAdam(seed=seed).optimizer(Two(), HERE).bases.values())  # type: ignore[attr-defined]
        for seed in (0, 0, 1)
    )
    for bases, repeated, different in zip(first, again, other, strict=True):
        for q, equal, unlike in zip(bases, repeated, different, strict=True):
            assert torch.equal(q, equal)
            assert not torch.equal(q, unlike)
            torch.testing.assert_close(q @ q.T, torch.eye(len(q)), rtol=0, atol=1e-6)
    assert not torch.equal(first[0][0], first[1][0])  # both of side 3
    x, bases = gaussian(3, 2), [basis(side, torch.Generator().manual_seed(side)).float() for side in (3, 2)]
    torch.testing.assert_close(turned(x, bases), bases[0] @ x @ bases[1].T)
    torch.testing.assert_close(turned(turned(x, bases), bases, back=True), x)


# --- what is resumed ---


@pytest.mark.parametrize("name", ["baseline", "sgd", "muon", "ortho-adam", "osp"])
def test_an_optimizer_goes_on_from_its_saved_state_bit_for_bit(name: str) -> None:
    def steps(decoder: Any, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + seed)
            decoder(ids(seed=seed), labels=ids(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = model(RECIPES[name])
    optimizer = whole.config.mitigation().optimizer(whole, HERE)
    steps(whole, optimizer, range(3))
    resumed, forgetful, saved = copy.deepcopy(whole), copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, range(3, 6))
    fresh = resumed.config.mitigation().optimizer(resumed, HERE)
    fresh.load_state_dict(saved)
    steps(resumed, fresh, range(3, 6))
    for (path, got), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, expected), path
    assert fresh.state_dict()["state"].keys() == set(range(len(list(whole.parameters()))))
    steps(forgetful, forgetful.config.mitigation().optimizer(forgetful, HERE), range(3, 6))
    assert not torch.equal(forgetful.head.weight, whole.head.weight)


@pytest.mark.parametrize("name", ["muon", "ortho-adam", "osp", "peak-penalty", "registers"])
def test_an_interrupted_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    held = track(steps=12, timeline=4)
    whole = train(RECIPES[name], held, tmp_path / "whole")
    interrupted(RECIPES[name], held, tmp_path / "cut", after=8)
    assert same(train(RECIPES[name], held, tmp_path / "cut"), whole)


def test_the_peak_penalty_is_left_out_of_what_is_logged_and_lowers_the_peaks(tmp_path: Path) -> None:
    held = track(steps=20, timeline=2)
    plain = train({}, held, tmp_path / "plain")
    penalised = train({"peak-penalty": {"weight": 10.0, "relative": True}}, held, tmp_path / "penalised")
    assert penalised.losses[0] == plain.losses[0]
    assert penalised.timeline[0] == plain.timeline[0]
    assert penalised.losses[1] != plain.losses[1]
    largest = []
    for done in (plain, penalised):
        states: list[Tensor] = []
        done.model.blocks[-1].register_forward_hook(lambda _, __, y, states=states: states.append(y))
        with torch.no_grad():
            done.model(ids(16))
        largest.append(float(states[0].abs().max() / states[0].square().mean().sqrt()))
    assert largest[1] < 0.9 * largest[0]
