"""What a run of the track `text` spends: its steps in fp32 and bf16, and the grid of quantizers against its training.

Training is the track's 3,000 steps at the median of those taken here between one quantizer and the next, so that a
machine that is slower for a while is slower for both. The grid is the whole of it, on a model as it was initialised:
full precision, every quantizer with its exemption on all held-out sequences, lm-eval where it runs. On one thread.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from quantbench.evaluate import Reference, full_precision, quantized
from quantbench.harness import harness
from quantbench.model import initialise
from quantbench.pretrain import build, steady_memory
from quantbench.recipe import Track
from quantbench.tasks import Data
from tests.perf.contest import Goal, Row, clock, contest, threads
from tests.perf.training import opened, our_loop

BETWEEN = 4  # steps between one quantizer and the next


def rows(device: str) -> list[Row]:
    if device == "cuda":
        return []  # the track's home is a CPU
    steady_memory()
    name, track, data = opened(device)
    with threads(1):
        steps = {p: our_loop("baseline", replace(track, precision=p), data, device) for p in ("fp32", "bf16")}
        case = f"{name}: {track.batch} x {track.length} tokens, one thread"
        found = contest("Precision of a training step", case, steps, "fp32")
        return [*found, *grid(name, track, data, steps["fp32"])]


def grid(name: str, track: Track, data: Data, step: Callable[[], None]) -> list[Row]:
    """Two rows: training, and the grid."""
    model = build({}, track, data)
    initialise(model, 0)
    reference = Reference(nn.Module.eval(model), data, track)
    taken: list[float] = []
    spent = 0.0

    def full() -> nn.Module:
        full_precision(reference)
        return reference.model

    def variant(quantizer: str) -> nn.Module:
        return quantized(reference, track.quantizers[quantizer], quantizer in track.evaluate.exemption)[0]  # type: ignore[arg-type]

    work: dict[str, Callable[[], nn.Module]] = {"": full}
    work |= {quantizer: lambda quantizer=quantizer: variant(quantizer) for quantizer in track.quantizers}
    scored = ("", *track.rank_by.values()) if track.evaluate.lm_eval_items else ()
    for quantizer, run in work.items():
        for _ in range(BETWEEN):
            taken.append(_seconds(step))
        start = clock("cpu")
        quantized_model = run()
        if quantizer in scored:
            harness(quantized_model, reference)
        spent += clock("cpu") - start
    low, middle, high = (track.steps * s for s in statistics.quantiles(taken, n=4, method="inclusive"))
    table = "The grid against training"
    case = f"{name}: {len(track.quantizers)} quantizers, {track.evaluate.sequences} sequences, one thread"
    training = f"training, {track.steps:,} steps in fp32"
    ratio, *quartiles = (float(f"{spent / seconds:.3g}") for seconds in (middle, high, low))
    goal = Goal(training, 1.0)
    both = [
        {"what": training, "ms": middle * 1e3, "ratio": 1.0, "quartiles": [1.0, 1.0], "goals": []},
        {"what": "the grid", "ms": spent * 1e3, "ratio": ratio, "quartiles": quartiles,
         "goals": [{"goal": str(goal), "ratio": ratio, "at-most": goal.at_most}]},
    ]  # fmt: skip
    print(f"{table}, {case}: {spent:.1f} s, {ratio:.3g} x {training} ({middle:.1f} s)", flush=True)
    return [{"table": table, "case": case, "anchor": training, **row, "ms": round(row["ms"], 1)} for row in both]


def _seconds(run: Callable[[], object]) -> float:
    start = clock("cpu")
    run()
    return clock("cpu") - start
