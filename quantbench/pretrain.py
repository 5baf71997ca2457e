"""The training loop: from a recipe, a track and a seed to a checkpoint, the same bytes however often it is killed.

Sequences are indexed by global sample and parameters drawn by name, so that a step depends on nothing but its
number and the state before it. A checkpoint holds that state: parameters, optimizer, losses so far.
"""

import ctypes
import hashlib
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from quantbench.mitigations import Mitigation, Settings
from quantbench.model import QuantbenchConfig, QuantbenchModel, initialise
from quantbench.recipe import Track
from quantbench.store import atomic_write
from quantbench.strict import dump
from quantbench.tasks import Data
from quantbench.trace import signatures
from quantbench.watch import timeline

VERSION = 1  # bumped by hand when the numbers that come out change; part of the cells' keys
RECENT = 50  # steps over which a loss spike is judged
SPIKE = 1.5  # times the loss of a uniform guess
TIMELINE_SEQUENCES = 16  # held-out sequences behind each point of the timeline

Progress = Callable[[int, float], None]  # (steps done, training loss)


@dataclass
class Trained:
    """What came out. `reason` is None, or why training diverged at `step`."""

    model: QuantbenchModel
    losses: list[float]  # training loss of every step, nats a token
    timeline: list[dict[str, Any]]
    reason: str | None = None


def pretrain(
    mitigations: dict[str, dict[str, Any]],
    lr: float,
    track: Track,
    seed: int,
    data: Data,
    work: Path,
    device: torch.device,
    progress: Progress = lambda step, loss: None,
) -> Trained:
    """Trains one model, or goes on from the newest whole checkpoint in `work`."""
    model = build(mitigations, track, data)
    initialise(model, seed)
    nn.Module.to(model, device).train()
    mitigation = model.config.mitigation()
    settings = Settings(lr, track.betas, track.lr * track.weight_decay)
    optimizer = mitigation.optimizer(model, settings)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    state = _State(model, optimizer)
    _restore(state, work)
    points = set(timeline_steps(track))
    held_out_NT = data.held_out(TIMELINE_SEQUENCES, track.length)
    held_out_BT = _tensor(held_out_NT, device)[:, :-1]

    def log(step: int) -> None:
        watched = partial(timeline, model, held_out_NT, data) if track.watched else None
        state.log(step, held_out_BT, watched)

    reason = None
    while (step := len(state.losses)) < track.steps and reason is None:
        if step in points:
            log(step)
        for group, peak in zip(optimizer.param_groups, peak_lrs):
            group["lr"] = peak * schedule(step, track)
        ids_BT = _tensor(data.training(seed, step * track.batch, track.batch, track.length), device)
        loss = update(model, mitigation, optimizer, ids_BT, track)
        state.losses.append(loss)
        reason = divergence(state.losses, track, data.vocab)
        progress(step + 1, loss)
        if reason is None and len(state.losses) % track.checkpoint == 0 and len(state.losses) < track.steps:
            _checkpoint(state, work)
    if reason is None and track.steps in points:
        log(track.steps)
    return Trained(model.eval(), state.losses, state.timeline, reason)


def build(mitigations: dict[str, dict[str, Any]], track: Track, data: Data) -> QuantbenchModel:
    """The track's decoder with the recipe's parts, not yet initialised."""
    config = QuantbenchConfig(
        vocab_size=data.vocab,
        bos_token_id=data.bos,
        max_position_embeddings=track.length,
        mitigations=mitigations,
        **{key.replace("-", "_"): value for key, value in dump(track.model).items()},
    )
    return QuantbenchModel(config)


def schedule(step: int, track: Track) -> float:
    """The share of the peak learning rate at a step: linear warm-up, constant, linear decay towards 0."""
    rising = (step + 1) / track.warmup if track.warmup else 1.0
    span = track.decay * track.steps
    falling = (track.steps - step) / span if span else 1.0
    return min(1.0, rising, falling)


def timeline_steps(track: Track) -> list[int]:
    """Steps at which the signatures are logged, spaced evenly in log(1 + step), the first and last included."""
    if not track.timeline:
        return []
    ratio = math.log1p(track.steps) / max(1, track.timeline - 1)
    return sorted({round(math.expm1(i * ratio)) for i in range(track.timeline)} | {track.steps})


def divergence(losses: list[float], track: Track, vocab: int) -> str | None:
    """Why training counts as diverged, or None: a loss that is no number, or one that stays above a uniform guess."""
    step = len(losses)
    if not math.isfinite(losses[-1]):
        return f"the loss is {losses[-1]} at step {step}"
    recent = losses[-RECENT:]
    limit = SPIKE * math.log(vocab)
    if step > max(track.warmup, RECENT) and sum(recent) / len(recent) > limit:
        return f"the loss stayed above {limit:.2f} nats for {RECENT} steps at step {step}"
    return None


def steady_memory() -> None:
    """Keeps freed memory in the process: glibc would give every score tensor back and fault it in again.

    A fifth of a step on the track `text`; changes no number.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 64 << 20)):  # mmap, trim, pad: bytes
            libc.mallopt(parameter, value)


def update(
    model: QuantbenchModel, mitigation: Mitigation, optimizer: torch.optim.Optimizer, ids_BT: Tensor, track: Track
) -> float:
    """One update; the loss it returns is the cross-entropy alone, without any penalty."""
    low = track.precision == "bf16"
    blocks_BTD: list[Tensor] = []
    penalised = "penalty" in vars(mitigation)
    handles = [b.register_forward_hook(lambda _, __, y: blocks_BTD.append(y)) for b in model.blocks if penalised]
    with torch.autocast(ids_BT.device.type, torch.bfloat16) if low else nullcontext():
        logits_BTV = model(ids_BT[:, :-1]).logits
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())
    penalty = mitigation.penalty(blocks_BTD) if penalised else None
    (loss if penalty is None else loss + penalty).backward()
    if track.clip:
        nn.utils.clip_grad_norm_(model.parameters(), track.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@dataclass
class _State:
    """Everything a step depends on besides its number."""

    model: QuantbenchModel
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        self.losses: list[float] = []
        self.timeline: list[dict[str, Any]] = []

    def log(self, step: int, ids_BT: Tensor, watched: Callable[[], dict[str, Any]] | None) -> None:
        if not self.timeline or self.timeline[-1]["step"] != step:  # a resumed run may come by it again
            loss = self.losses[-1] if self.losses else None  # of the step before
            more = {} if watched is None else {"watched": watched()}
            self.timeline.append({"step": step, "loss": loss, **signatures(self.model, [ids_BT]), **more})

    def save(self) -> bytes:
        tensors = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:  # SGD without momentum keeps an empty buffer
                    tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        about = json.dumps({"losses": self.losses, "timeline": self.timeline})
        return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"quantbench": about})

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["quantbench"])
        self.model.load_state_dict(
            {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.losses, self.timeline = about["losses"], about["timeline"]


def _checkpoint(state: _State, work: Path) -> None:
    """Writes the state under a name that holds its sha256, then drops the one before."""
    data = state.save()
    path = work / f"step-{len(state.losses):09d}-{_sha(data)}.safetensors"
    atomic_write(path, data)
    for old in sorted(work.glob("step-*.safetensors")):
        if old != path:
            old.unlink()


def _restore(state: _State, work: Path) -> None:
    """The newest checkpoint that is whole; one that is not is dropped, said so, and the run starts over."""
    for path in sorted(work.glob("step-*.safetensors"), reverse=True):
        if path.stem.endswith(_sha(path.read_bytes())):
            return state.load(path)
        print(f"{path.name}: altered since it was written, dropped", file=sys.stderr)
        path.unlink()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _tensor(ids: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(ids).to(device)
