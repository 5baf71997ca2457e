"""Interventions on a trained model: take one thing away and see which of the three signatures goes with it.

    attention.l    the attention of layer l adds nothing to the residual stream
    mlp.l          the MLP of layer l adds nothing
    block.l        neither: what enters the block is what leaves it
    bos.l, bos.l.h all heads of layer l, or head h alone, put all of their weight on BOS, at every query
    first.l        block l does nothing at BOS alone: there, what enters it is what leaves it
    peak.l         after block l, BOS's residual state is scaled to the median norm of the other tokens of its sequence:
                   the peak alone is gone, its direction stays;  peak.all: after every block

Removing block 0 (arXiv:2410.13835, section 3) takes the peak together with all that the block computes for all tokens:
if sinks and drains go, either may have held them. `first.0` leaves the other tokens what they have. `peak.l` leaves
even BOS its direction: every reader of the stream has a norm in front, so that only how much later sublayers turn BOS's
state depends on its size.

Figures are those of watch.py, for each of the held-out sequences: those of the untouched model as means, those of an
intervention as what it changes, paired; both with 95% intervals over sequences. Of a figure that is undefined in some
sequence, these are left out. Values and weights are read where the model computes them, so that a head that is moved
is seen where it was moved to.

Shapes: B sequences, T tokens, D residual features, H heads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantbench import bench
from quantbench.anatomy import Anatomy, Prefixed, anatomy
from quantbench.bench import Job, Say, from_json, to_json
from quantbench.evaluate import Reference
from quantbench.interventions import stream, with_stream
from quantbench.results import Record
from quantbench.stats import t_interval
from quantbench.store import Store
from quantbench.watch import look

VERSION = 1  # bumped by hand when the figures change: it is part of the cells' keys
SEQUENCES = 128  # of the track's held-out ones
FEW_HEADS = 16  # of a model: with more, heads are moved a layer at a time only

Hook = tuple[nn.Module, Callable[..., Any]]  # (module, forward hook that replaces its output)
Figures = dict[str, Any]


def experiment(
    job: Job, store: Store, compute: bool = True, say: Say = lambda *_: None, *, sequences: int = SEQUENCES
) -> tuple[Record, Record] | None:
    """What every intervention does to the job's model, as a record, and the facts of its run; as `bench.experiment`."""
    stages = bench.Stages(job, store, compute, say)
    count = min(sequences, job.track.evaluate.sequences)
    found: Figures = {"untouched": None, "interventions": {}}
    try:
        checkpoint = stages.checkpoint()
        reason = from_json(checkpoint, "training.json")["reason"]
        if reason is None:
            inputs = stages.judged | {"version": VERSION, "sequences": count}
            fewer = replace(job.track, evaluate=replace(job.track.evaluate, sequences=count))
            lazy = bench.Lazy(replace(job, track=fewer), stages.data, checkpoint, store)
            found = from_json(stages.stage("probe", inputs, lambda _: _probe(lazy, say)), "figures.json")
    except bench.Missing:
        return None
    versions = {stages.made_by: bench.VERSIONS[stages.made_by], "probe": VERSION}
    return stages.head(reason, versions, {}) | {"sequences": count} | found, stages.run()


def _probe(lazy: bench.Lazy, say: Say) -> dict[str, bytes | Path]:
    figures = probe(lazy.reference, partial(say, "probe"))
    return {"figures.json": to_json(figures)}


def probe(reference: Reference, tell: Callable[[int, int, str], None] = lambda *_: None) -> Figures:
    """{untouched: {figure: [mean, low, high]}, interventions: {name: {figure: [mean, low, high] of its change}}}."""
    model, data = reference.model, reference.data
    if isinstance(model, Prefixed):
        raise ValueError(
            "probe: this recipe's BOS stands in a cache, where nothing can be taken from it: choose another"
        )
    parts = anatomy(model)
    ids = reference.ids_NT
    before = look(model, ids, data, parts)
    planned = interventions(parts, int(model.config.num_attention_heads))  # type: ignore[union-attr, arg-type]
    changes = {}
    for index, (name, hooks) in enumerate(planned.items()):
        tell(index, len(planned), name)
        with replaced(hooks):
            after = look(model, ids, data, parts)
        changes[name] = {
            figure: estimate([b - a for a, b in zip(before[figure], values, strict=True)])
            for figure, values in after.items()
            if figure in before
        }
    untouched = {figure: estimate(values) for figure, values in before.items()}
    return {"untouched": untouched, "interventions": changes}


def interventions(parts: Anatomy, heads_each: int) -> dict[str, list[Hook]]:
    """Every intervention that the model has a place for, as hooks on its modules; layers have so many heads each."""
    front, heads = parts.front, parts.heads
    downs = {} if parts.stream is None else _by_layer(parts, parts.stream.downs)
    found: dict[str, list[Hook]] = {}
    for layer in heads:
        found[f"attention.{layer}"] = [(heads[layer].output, _nothing)]
    for layer, down in downs.items():
        found[f"mlp.{layer}"] = [(down, _nothing)]
    for layer, block in enumerate(parts.blocks):
        found[f"block.{layer}"] = [(block, _idle)]
    for layer, each in heads.items():
        found[f"bos.{layer}"] = [(each.weights, _on_bos(front, None))]
        if heads_each > 1 and heads_each * len(heads) <= FEW_HEADS:
            for head in range(heads_each):
                found[f"bos.{layer}.{head}"] = [(each.weights, _on_bos(front, head))]
    for layer, block in enumerate(parts.blocks):
        found[f"first.{layer}"] = [(block, _as_it_entered(front))]
    for layer, block in enumerate(parts.blocks):
        found[f"peak.{layer}"] = [(block, _without_peak(front))]
    found["peak.all"] = [(block, _without_peak(front)) for block in parts.blocks]
    return found


def _by_layer(parts: Anatomy, modules: list[nn.Linear]) -> dict[int, nn.Linear]:
    inside = {module: layer for layer, block in enumerate(parts.blocks) for module in block.modules()}
    return {inside[module]: module for module in modules}


@contextmanager
def replaced(hooks: list[Hook]) -> Iterator[None]:
    """Within it, the hooks stand; hooks of watchers that come later see what they give."""
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.enter_context(module.register_forward_hook(hook))
        yield


def _nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _idle(block: nn.Module, args: Any, output: Any) -> Any:
    return with_stream(output, args[0])


def _on_bos(front: int, head: int | None) -> Callable[..., Tensor]:
    """All weight of a head (None: of every head) on BOS, of queries that see it."""

    def hook(module: nn.Module, args: Any, weights_BHTT: Tensor) -> Tensor:
        moved_BHTT = weights_BHTT.clone()
        chosen = slice(None) if head is None else slice(head, head + 1)
        moved_BHTT[:, chosen, front:] = 0.0
        moved_BHTT[:, chosen, front:, front] = 1.0
        return moved_BHTT

    return hook


def _as_it_entered(front: int) -> Callable[..., Any]:
    """BOS's state as the block was given it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        kept_BTD = stream(output).clone()
        kept_BTD[:, front] = args[0][:, front]
        return with_stream(output, kept_BTD)

    return hook


def _without_peak(front: int) -> Callable[..., Any]:
    """BOS's state at the median norm of the others', its direction kept."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden_BTD = stream(output)
        norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1)
        others_BT = torch.cat((norms_BT[:, :front], norms_BT[:, front + 1 :]), 1)
        scale_B = others_BT.median(-1).values / norms_BT[:, front].clamp_min(torch.finfo(norms_BT.dtype).tiny)
        scaled_BTD = hidden_BTD.clone()
        scaled_BTD[:, front] *= scale_B[:, None]
        return with_stream(output, scaled_BTD)

    return hook


def estimate(values: list[float]) -> list[float | None] | None:
    """[mean, low, high] at 95% over the sequences that have the figure; None where none has, or one is infinite."""
    kept = [value for value in values if not math.isnan(value)]
    if not kept or not all(map(math.isfinite, kept)):
        return None
    interval = t_interval(kept)
    limits = [None, None] if interval is None else [_digits(interval.low), _digits(interval.high)]
    return [_digits(math.fsum(kept) / len(kept)), *limits]


def _digits(x: float) -> float:
    """Five digits, which is more than an interval of so many sequences has to say."""
    return float(f"{x:.5g}")
