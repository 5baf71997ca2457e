"""The training loop: interrupted or not the same bytes, a step by hand, divergence, schedule, and golden losses."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RECIPES, ROOT, VOCAB, Mitigations, track
from torch import Tensor

from quantbench import catalog
from quantbench.mitigations import Mitigation
from quantbench.model import QuantbenchConfig, initialise
from quantbench.pretrain import RECENT, Trained, build, divergence, pretrain, schedule, timeline_steps
from quantbench.recipe import Track
from quantbench.tasks import Ids
from quantbench.tasks.bigram_backcopy import BigramBackcopy, Sequences
from quantbench.trace import signatures

CPU = torch.device("cpu")
DATA = BigramBackcopy().open(Path())
LR = {"baseline": 4e-3, "relu-attn": 4e-3, "sgd": 0.3, "relu-attn-sgd": 0.3}

levers = pytest.mark.parametrize("name", LR)


class Stop(Exception):
    """What the tests interrupt training with."""


def train(mitigations: Mitigations, held: Track, work: Path, *, lr: float | None = None, **kwargs: Any) -> Trained:
    settings = {"seed": 0, "data": DATA, "device": CPU} | kwargs
    return pretrain(mitigations, held.lr if lr is None else lr, held, work=work, **settings)


def interrupted(mitigations: Mitigations, held: Track, work: Path, after: int, **kwargs: Any) -> None:
    def stop(step: int, loss: float) -> None:
        if step == after:
            raise Stop

    with pytest.raises(Stop):
        train(mitigations, held, work, progress=stop, **kwargs)


def same(one: Trained, other: Trained) -> bool:
    """Losses, timeline and every parameter, bit for bit."""
    a, b = one.model.state_dict(), other.model.state_dict()
    return (one.losses, one.timeline, one.reason) == (other.losses, other.timeline, other.reason) and all(
        torch.equal(a[name], b[name]) for name in a.keys() | b.keys()
    )


def checkpoints(work: Path) -> list[Path]:
    return sorted(work.iterdir())


# Interruptions


@levers
@pytest.mark.parametrize("after", [3, 5, 8, 19])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, after: int, tmp_path: Path) -> None:
    held = track(steps=20, timeline=6)
    whole = train(RECIPES[name], held, tmp_path / "whole", lr=LR[name])
    interrupted(RECIPES[name], held, tmp_path / "cut", after, lr=LR[name])
    steps: list[int] = []
    resumed = train(RECIPES[name], held, tmp_path / "cut", lr=LR[name], progress=lambda step, loss: steps.append(step))
    assert same(resumed, whole)
    # A checkpoint is written after the progress of its step is told.
    assert steps == list(range((after - 1) // 5 * 5 + 1, 21))
    assert len(whole.losses) == 20
    assert [point["step"] for point in whole.timeline] == timeline_steps(held)


def test_a_checkpoint_at_every_step_with_a_timeline_point_at_each(tmp_path: Path) -> None:
    held = track(steps=4, checkpoint=1, timeline=40)
    whole = train({}, held, tmp_path / "whole")
    for after in (2, 3, 4):
        interrupted({}, held, tmp_path / "cut", after)
    assert same(train({}, held, tmp_path / "cut"), whole)
    assert [point["step"] for point in whole.timeline] == [0, 1, 2, 3, 4]


def test_one_checkpoint_stands_named_by_its_content(tmp_path: Path) -> None:
    interrupted({}, track(), tmp_path, 10)
    (path,) = checkpoints(tmp_path)
    step, digest = path.stem.removeprefix("step-").split("-")
    assert int(step) == 5
    assert len(digest) == 16


def _flip(path: Path, byte: int = -1000) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_and_the_run_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train({}, track(), tmp_path / "whole")
    interrupted({}, track(), tmp_path / "cut", 8)
    (path,) = checkpoints(tmp_path / "cut")
    _flip(path)
    steps: list[int] = []
    resumed = train({}, track(), tmp_path / "cut", progress=lambda step, loss: steps.append(step))
    assert steps == list(range(1, 11))
    assert same(resumed, whole)
    assert capsys.readouterr().err == f"{path.name}: altered since it was written, dropped\n"


def test_an_earlier_checkpoint_serves_where_the_newest_is_spoilt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = track(steps=20)
    whole = train({}, held, tmp_path / "whole")
    interrupted({}, held, tmp_path / "cut", 8)
    (older,) = checkpoints(tmp_path / "cut")
    content = older.read_bytes()
    interrupted({}, held, tmp_path / "cut", 13)
    (newest,) = checkpoints(tmp_path / "cut")
    older.write_bytes(content)  # as if the process had been killed between writing one and removing the other
    newest.write_bytes(newest.read_bytes()[:5000])
    steps: list[int] = []
    resumed = train({}, held, tmp_path / "cut", progress=lambda step, loss: steps.append(step))
    assert steps == list(range(6, 21))
    assert same(resumed, whole)
    assert newest.name in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path

from test_pretrain import RECIPES, LR, train
from tiny import track

def progress(step, loss):
    if step == 13:
        os.kill(os.getpid(), signal.SIGKILL)

train(RECIPES[sys.argv[2]], track(steps=20), Path(sys.argv[1]), lr=LR[sys.argv[2]], progress=progress)
"""


@pytest.mark.parametrize("name", ["baseline", "relu-attn-sgd"])
def test_a_killed_process_goes_on_in_another(name: str, tmp_path: Path) -> None:
    held = track(steps=20)
    whole = train(RECIPES[name], held, tmp_path / "whole", lr=LR[name])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut"), name]
    child = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert child.returncode == -9, child.stderr
    steps: list[int] = []
    resumed = train(RECIPES[name], held, tmp_path / "cut", lr=LR[name], progress=lambda step, loss: steps.append(step))
    assert steps == list(range(11, 21))
    assert same(resumed, whole)


# Data


class Recording(Sequences):
    """Writes down which training sequences are asked for."""

    def __init__(self) -> None:
        super().__init__(3)
        self.asked: list[tuple[int, int, int, int]] = []

    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        self.asked.append((seed, first, count, length))
        return super().training(seed, first, count, length)


def test_a_batch_depends_on_the_seed_and_the_step_alone(tmp_path: Path) -> None:
    data = Recording()
    for name in ("baseline", "relu-attn-sgd"):
        data.asked.clear()
        interrupted(RECIPES[name], track(timeline=0), tmp_path / name, 8, seed=7, data=data)
        train(RECIPES[name], track(timeline=0), tmp_path / name, seed=7, data=data)
        drawn = [(seed, first) for seed, first, count, length in data.asked if (count, length) == (4, 16)]
        assert drawn == [(7, 4 * step) for step in (*range(8), *range(5, 10))]


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    runs = [train({}, track(), tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert same(runs[0], runs[1])
    assert runs[0].losses[0] != runs[2].losses[0]


# A step


def _gradients(start: Any, ids_BT: Tensor, penalised: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch, by autograd alone."""
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, y: states.append(y)) for block in start.blocks]
    z = start(ids_BT[:, :-1]).logits
    for handle in handles:
        handle.remove()
    loss = -z.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).mean()
    whole = loss + 0.1 * sum(state.square().mean() for state in states) if penalised else loss
    names, parameters = zip(*start.named_parameters(), strict=True)
    return loss.item(), dict(zip(names, torch.autograd.grad(whole, parameters), strict=True))


@dataclass(frozen=True)
class SquaredResidual(Mitigation):
    strength: float = 0.1

    def penalty(self, blocks_BTD: Sequence[Tensor]) -> Tensor | None:
        return self.strength * torch.stack([x.square().mean() for x in blocks_BTD]).sum()


@pytest.fixture
def squared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quantbench.mitigations.of_the_tests", sys.modules[__name__])
    monkeypatch.setitem(catalog.AXES["mitigations"], "squared-residual", "of_the_tests:SquaredResidual")


@pytest.mark.usefixtures("squared")
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_by_hand(penalised: bool, clip: float, tmp_path: Path) -> None:
    held = track(steps=1, warmup=0, decay=0.0, clip=clip, weight_decay=0.0, timeline=0)
    mitigations: Mitigations = {"sgd": {}} | ({"squared-residual": {}} if penalised else {})
    start = build(mitigations, held, DATA)
    initialise(start, 0)
    loss, gradients = _gradients(start, torch.from_numpy(DATA.training(0, 0, 4, 16)), penalised)
    done = train(mitigations, held, tmp_path, lr=0.1)
    assert done.losses == [pytest.approx(loss, abs=1e-6)]  # the cross-entropy, without the penalty
    size = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert size > 0.5
    shrunk = clip / size if clip else 1.0
    for name, parameter in start.named_parameters():
        expected = parameter - 0.1 * shrunk * gradients[name]
        torch.testing.assert_close(done.model.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("squared")
def test_a_penalty_changes_what_is_learned_and_not_what_is_logged(tmp_path: Path) -> None:
    plain = train({}, track(steps=20), tmp_path / "plain")
    penalised = train({"squared-residual": {"strength": 1.0}}, track(steps=20), tmp_path / "penalised")
    assert penalised.losses[0] == plain.losses[0]
    batch = torch.from_numpy(DATA.held_out(4, 16))[:, :-1]
    norms = []
    for done in (plain, penalised):
        states: list[Tensor] = []
        done.model.blocks[-1].register_forward_hook(lambda _, __, y, states=states: states.append(y))
        with torch.no_grad():
            done.model(batch)
        norms.append(states[0].square().mean().item())
    assert norms[1] < 0.7 * norms[0]


def test_bf16_computes_low_and_keeps_parameters_and_timeline_full(tmp_path: Path) -> None:
    full = train({}, track(), tmp_path / "fp32")
    low = train({}, track(precision="bf16"), tmp_path / "bf16")
    assert low.losses[0] != full.losses[0]
    assert low.losses == pytest.approx(full.losses, rel=0.02)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    assert low.timeline[0] == full.timeline[0]


@levers
def test_the_loss_falls_in_a_few_steps(name: str, tmp_path: Path) -> None:
    losses = train(RECIPES[name], track(steps=60, timeline=0), tmp_path, lr=LR[name]).losses
    assert losses[0] > 0.95 * math.log(VOCAB)
    assert np.mean(losses[-10:]) < losses[0] - 0.8


# Schedule and timeline


def test_the_schedule_by_hand() -> None:
    held = track(steps=10, warmup=4, decay=0.5)
    shares = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [schedule(step, held) for step in range(10)] == pytest.approx(shares)


def test_without_warmup_or_decay_the_rate_is_constant() -> None:
    held = track(steps=10, warmup=0, decay=0.0)
    assert [schedule(step, held) for step in range(10)] == [1.0] * 10


def test_where_warmup_and_decay_overlap_the_lower_counts() -> None:
    held = track(steps=4, warmup=4, decay=1.0)
    assert [schedule(step, held) for step in range(4)] == pytest.approx([0.25, 0.5, 0.5, 0.25])


def test_every_group_keeps_its_own_peak_rate(tmp_path: Path) -> None:
    # Adam's first step moves a parameter by the rate, whatever its gradient.
    held = track(steps=1, warmup=0, decay=0.0, weight_decay=0.0, timeline=0)
    start = build({}, held, DATA)
    initialise(start, 0)
    head = start.head.weight.detach()
    for scale in (1.0, 0.25):
        done = train({"adamw": {"lr_scale": scale}}, held, tmp_path / str(scale))
        moved = (done.model.head.weight - head).abs().median().item()
        assert moved == pytest.approx(4e-3 * scale, rel=1e-3)


def test_the_timeline_is_even_in_the_logarithm() -> None:
    assert timeline_steps(track(steps=15, timeline=5)) == [0, 1, 3, 7, 15]
    assert timeline_steps(track(steps=2000, timeline=12))[:4] == [0, 1, 3, 7]
    assert timeline_steps(track(steps=2000, timeline=12))[-1] == 2000
    assert timeline_steps(track(steps=15, timeline=1)) == [0, 15]
    assert timeline_steps(track(timeline=0)) == []


def test_the_timeline_holds_the_signatures_on_held_out_sequences(tmp_path: Path) -> None:
    held = track(steps=3, timeline=2)
    done = train({}, held, tmp_path)
    start = build({}, held, DATA)
    initialise(start, 0)
    batch = torch.from_numpy(DATA.held_out(16, 16))[:, :-1]
    assert done.timeline == [
        {"step": 0, "loss": None, **signatures(start, [batch])},
        {"step": 3, "loss": done.losses[-1], **signatures(done.model, [batch])},
    ]


def test_logging_changes_no_number(tmp_path: Path) -> None:
    often = train({}, track(timeline=40), tmp_path / "often")
    never = train({}, track(timeline=0), tmp_path / "never")
    assert never.timeline == []
    assert often.losses == never.losses


# Divergence


def test_divergence_by_hand() -> None:
    held = track(warmup=10, steps=200)
    limit = 1.5 * math.log(VOCAB)
    assert divergence([1.0, math.nan], held, VOCAB) == "the loss is nan at step 2"
    assert divergence([math.inf], held, VOCAB) == "the loss is inf at step 1"
    high = [limit + 0.01]
    assert divergence(high * RECENT, held, VOCAB) is None  # too early to tell
    assert (
        divergence(high * (RECENT + 1), held, VOCAB) == f"the loss stayed above 6.31 nats for {RECENT} steps at step 51"
    )
    assert divergence([*high * 60, *[limit - 1] * RECENT], held, VOCAB) is None  # recovered
    assert divergence([limit - 0.01] * 100, held, VOCAB) is None
    slow = track(warmup=100, steps=200)
    assert divergence(high * 100, slow, VOCAB) is None
    assert divergence(high * 101, slow, VOCAB) is not None


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    done = train({"sgd": {}}, track(clip=0.0, checkpoint=1, warmup=0), tmp_path, lr=1e30)
    assert done.reason == f"the loss is {done.losses[-1]} at step {len(done.losses)}"
    assert not math.isfinite(done.losses[-1])
    assert 1 < len(done.losses) < 10
    assert done.timeline[-1]["step"] < 10
    finite = [path for path in checkpoints(tmp_path) if f"{len(done.losses):09d}" in path.name]
    assert finite == []  # a spoilt state is not kept


def test_an_enormous_rate_is_recorded_as_divergence(tmp_path: Path) -> None:
    done = train({}, track(steps=100, warmup=0, timeline=0, clip=0.0, weight_decay=0.0), tmp_path, lr=50.0)
    assert done.reason is not None
    assert done.reason.startswith("the loss stayed above 6.31 nats")
    assert done.reason.endswith(f"at step {len(done.losses)}")
    assert RECENT < len(done.losses) < 100


# Golden losses

# What these settings trained to when the committed records were made. They hold across machines within their
# tolerance. Where one changes, so does every trained number: bump VERSIONS["pretrain"] in bench.py, so that no cell
# of the old code is taken for one of the new, and train the committed records again.
GOLDEN = {
    "baseline": [4.401949, 4.244693, 4.284628, 4.13486, 4.19534, 3.768437, 3.826093, 3.639796, 3.883344, 3.410106],
    "relu-attn": [4.375456, 4.268691, 4.294723, 4.196898, 4.258935, 3.881083, 3.949498, 3.839541, 3.967054, 3.491719],
    "sgd": [4.401949, 4.248636, 4.27503, 4.0055, 4.099876, 3.551018, 3.449099, 3.028355, 3.813391, 2.955846],
}


@pytest.mark.parametrize("name", ["baseline", "relu-attn", "sgd"])
def test_golden_losses(name: str, tmp_path: Path) -> None:
    assert train(RECIPES[name], track(timeline=0), tmp_path, lr=LR[name]).losses == pytest.approx(
        GOLDEN[name], rel=1e-4
    )


def test_build_takes_the_tracks_shape() -> None:
    held = track()
    config = build({"relu-attention": {}}, held, DATA).config
    assert isinstance(config, QuantbenchConfig)
    shape = (config.vocab_size, config.bos_token_id, config.layers, config.heads, config.width, config.mlp_width)
    assert shape == (67, 65, 2, 4, 64, 64)
    assert (config.max_position_embeddings, config.mitigations) == (16, {"relu-attention": {}})
