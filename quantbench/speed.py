"""How long a track takes on this machine, from a moment's measurement: a training step in each precision, and the grid.

Precision changes numbers, so it is the track's to say and nothing here chooses it: where the other one was measured to
be faster, that is told. What is timed is a small part of the work (a decoder of two layers on one thread, as a worker
has), kept by `ops.measured`, and carried over by counted FLOPs: minutes that come of it are good to a third or so.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from quantbench import catalog
from quantbench.bench import Job, device, to_train
from quantbench.recipe import Track
from quantbench.store import Store
from quantbench.strict import dump

if TYPE_CHECKING:
    from torch import Tensor

    from quantbench.model import QuantbenchModel
    from quantbench.ops.measured import Times, Ways
    from quantbench.tasks import Data

STEP, PASS = "training step", "quantized pass"
LAYERS = 2  # of the decoder that is timed
FLOPS = 1e9  # of a step that is timed, at most, as long as a sequence is left; one of more
SHORT = 64  # tokens has this length
SLOWER = 1.25  # times fp32's step, from which on bf16 is advised against
BATCH = 32  # held-out sequences of a pass
OVERHEAD = 1.5  # the grid over its evaluation passes alone: calibration, fitting, SQNR, lm-eval; measured on `text`
START = 20.0  # seconds until a worker trains: imports, reading the corpus

# What can be done about it: of `bench`, and of every verb. Recipes state their learning rates by the track's name, and
# records go by it: so a copy keeps the name, and its records need a folder of their own.
BY_SET = "add `--set precision=fp32` (into a scratch folder, never onto the leaderboard)"
BY_COPY = (
    "give --track a copy of its file, of the same name in another folder, that says `precision: fp32` "
    "(and --results a folder of its own, where there are any)"
)


def step_times(track: Track) -> "Times":
    """Milliseconds of a training step of the track's baseline, by precision, as a worker takes it."""
    part, factor = part_of(track)
    found = _measured(STEP, part, lambda: {p: _step(part, p) for p in ("fp32", "bf16")})
    return {precision: ms * factor for precision, ms in found.items()}


def grid_seconds(track: Track) -> float:
    """What measuring and quantizing one model of the track takes a worker, about."""
    part, factor = part_of(replace(track, batch=BATCH))
    found = _measured(PASS, part, lambda: {"w8a8-token": _quantized_pass(part)})
    variants = sum(3 if name in track.evaluate.exemption else 1 for name in track.quantizers)
    passes = 1 + variants * track.evaluate.sequences / BATCH
    return OVERHEAD * passes * found["w8a8-token"] * factor / 1e3


def attention_times(track: Track) -> "dict[str, Times]":
    """Milliseconds of softmax attention and its gradients by SDPA and by explicit products, by precision.

    Their last bits differ, so that `attention.Softmax` goes one way for each, always: SDPA in fp32, products in bf16.
    """
    from quantbench.attention import Softmax, attend

    def ways(precision: str) -> "Ways":
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        shape = (track.batch, track.model.heads, track.length, track.model.width // track.model.heads)
        dtype, form = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], Softmax()
        q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        both: dict[str, Callable[[], Tensor]] = {
            "products": lambda: form.attend(q, k, v, None) if precision == "bf16" else attend(form, q, k, v, None),
            "SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        }

        def with_gradients(run: "Callable[[], Tensor]") -> Callable[[], object]:
            return lambda: torch.autograd.grad(run().sum(), (q, k, v))

        return {name: with_gradients(run) for name, run in both.items()}

    return {p: _measured(f"attention in {p}", track, partial(ways, p)) for p in ("fp32", "bf16")}


def bench_seconds(track: Track, runs: int, workers: int, precision: str | None = None) -> float:
    """What so many runs of a track take from nothing, about, so many at a time; in the track's precision or another."""
    step = step_times(track)[precision or track.precision] / 1e3
    return START + ceil(runs / workers) * (track.steps * step + grid_seconds(track))


def advice(jobs: list[Job], store: Store, workers: int, follow: str) -> str | None:
    """A line for who is about to train in bf16 where that was measured to be slow; `follow` says what can be done."""
    low = [job for job in jobs if job.track.precision == "bf16" and not job.track.pretrained]
    if not low or device().type != "cpu":
        return None
    track = low[0].track
    found = step_times(track)
    if not bf16_is_slow(found) or not (count := len(to_train(low, store))):
        return None
    bf16, fp32 = (_minutes(ceil(count / workers) * track.steps * found[name] / 60e3) for name in ("bf16", "fp32"))
    runs = "1 run" if count == 1 else f"{count} runs"
    return f"bf16 is slow on this machine: training {runs} takes about {bf16}, in fp32 about {fp32}; {follow}"


def bf16_is_slow(found: "Times") -> bool:
    """Whether steps took so much longer in bf16 that it is advised against."""
    return found["bf16"] > SLOWER * found["fp32"]


def _minutes(minutes: float) -> str:
    return f"{minutes:,.0f} minutes" if minutes >= 1.5 else "a minute"


# --- what is timed ----------------------------------------------------------------------------------------------------


def part_of(track: Track) -> tuple[Track, float]:
    """A track with less to do, and how many times as much the whole one has."""
    shape = track.model
    fewer = shape if shape.sublayers else replace(shape, layers=min(LAYERS, shape.layers))
    part = replace(track, model=fewer)
    if _flops(part) > FLOPS:
        part = replace(part, length=min(SHORT, track.length))
    mine, whole = _flops(part), _flops(track)
    batch = max(1, min(track.batch, int(FLOPS // mine)))
    return replace(part, batch=batch), whole * track.batch / (mine * batch)


def _flops(track: Track) -> float:
    """Of training the baseline on one sequence, as `model.cost` counts them; without the model, which takes seconds."""
    shape, length = track.model, track.length
    attention = shape.width * (4 * shape.width + length)
    mlp = (3 if shape.mlp == "swiglu" else 2) * shape.width * shape.mlp_width
    each = {"block": attention + mlp, "attention": attention, "mlp": mlp}
    products = sum(each[kind] for kind in shape.sublayers or ("block",) * shape.layers)
    return 6.0 * length * (products + shape.width * _vocab(track))


def _vocab(track: Track) -> int:
    return int(getattr(track.task, "vocab", 64))


def question(what: str, part: Track) -> str:
    """By what name the times of a part are kept."""
    import torch

    shape = json.dumps(dump(part.model), sort_keys=True)
    where = "" if device().type == "cpu" else f"{torch.cuda.get_device_name()}: "
    return f"{where}{what}, {part.batch} x {part.length} tokens of {_vocab(part)}, {shape}"


def _measured(what: str, part: Track, make: "Callable[[], Ways]") -> "Times":
    import torch

    from quantbench.ops.measured import times

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker
    try:
        return times(question(what, part), make)
    finally:
        torch.set_num_threads(before)


def _model(part: Track) -> "tuple[QuantbenchModel, Tensor]":
    import torch

    from quantbench.model import initialise
    from quantbench.pretrain import build, steady_memory

    steady_memory()  # as a worker
    model = build({}, part, cast("Data", SimpleNamespace(vocab=_vocab(part), bos=0)))
    initialise(model, 0)
    ids_BT = torch.randint(_vocab(part), (part.batch, part.length + 1), generator=torch.Generator().manual_seed(0))
    return torch.nn.Module.to(model, device()), ids_BT.to(device())


def _step(part: Track, precision: Any) -> Callable[[], object]:
    from quantbench.mitigations import Settings
    from quantbench.pretrain import update

    track = replace(part, precision=precision)
    model, ids_BT = _model(track)
    mitigation = model.train().config.mitigation()
    optimizer = mitigation.optimizer(model, Settings(track.lr, track.betas, track.lr * track.weight_decay))
    return partial(update, model, mitigation, optimizer, ids_BT, track)


def _quantized_pass(part: Track) -> Callable[[], object]:
    from quantbench.calibration import Calibration
    from quantbench.evaluate import log_probabilities

    model, ids_BT = _model(part)
    quantizer = catalog.load("quantizers", "w8a8-token")(**catalog.preset("quantizers", "w8a8-token"))
    quantizer.quantize(model.eval(), Calibration([(ids_BT[:, :-1], None)]))
    return lambda: log_probabilities(model, ids_BT)[0, 0, 0].item()  # a GPU has finished, too
