"""How extreme tokens came about: the three signatures over the checkpoints of one training run that were published.

Revisions of a hub model, or folders, are opened one after the other and closed again. Each is measured on the same
text, windows behind BOS where there is one:

    residual-peak, bos-attention, value-drain, delta-logit, sink-rate    as in the catalog of metrics, of BOS
    first-norm     norm of the first token of a window, mean over windows, largest over blocks. Under Adam it grows
                   about linearly in steps (Guo et al., arXiv:2410.13835: OLMo-7B, 1,890 at step 450k)
    loss           nats per token

The step is read from the name of a revision (step1000, stage1-step1000-tokens3B, checkpoint-500, 1000-unsharded);
where one has none, or two have the same, revisions are counted in the order in which they were given. A revision that
cannot be opened or measured becomes a line with its reason, and the rest goes on.
"""

import gc
import re
import time
from collections.abc import Callable, Iterator
from os.path import normpath
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from quantbench.markup import Table
from quantbench.numerals import NOTHING, plain

if TYPE_CHECKING:
    from torch import Tensor

    from quantbench.pretrained import Given

Body = dict[str, Any]
Say = Callable[[str, int, int, str], None]

FIGURES = ("residual-peak", "bos-attention", "value-drain", "delta-logit", "sink-rate")  # metrics of the catalog
STEP = re.compile(r"(?:step|checkpoint|iter(?:ation)?)[-_]?(\d+)(?!\d*[kKmM])|^(\d+)(?:-unsharded)?$")


# --- measuring -------------------------------------------------------------------------------------------------------


def follow(
    opened: "Callable[[str], Given]",
    revisions: list[str],
    documents: list[str],
    length: int,
    windows: int,
    say: Say = lambda *_: None,
) -> Body:
    """The body of a record, fit for JSON; `run` in it are the facts of this run.

    `opened` gives the model of a revision. ValueError where no revision can be measured: the reason of the first.
    """
    started = time.perf_counter()
    found: list[Body] = []
    for done, (revision, step) in enumerate(zip(revisions, steps(revisions), strict=True)):
        say("follow", done, len(revisions), revision)
        line: Body = {"revision": _last(revision), "step": step, "failed": None}
        try:
            line |= _measured(opened(revision), documents, length, windows)
        except (ValueError, OSError) as error:  # of a hub that does not answer, too
            line["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found.append(line)
        gc.collect()  # a model may hold itself in a circle; the next one needs its room
    say("follow", len(revisions), len(revisions), "")
    failed = [line for line in found if line["failed"] is not None]
    if len(failed) == len(found):
        raise ValueError(f"no revision could be measured: {failed[0]['failed']}")
    order = sorted(found, key=lambda line: line["step"])
    notes = [f"{line['revision']} failed: {line['failed']}" for line in order if line["failed"] is not None]
    if not counted_in_steps(revisions):
        notes.append("revisions are counted in the order given: their names have no steps, or the same")
    return {
        "length": length,
        "windows": max(line["windows"] for line in found if line["failed"] is None),
        "steps": counted_in_steps(revisions),
        "revisions": order,
        "notes": notes,
        "run": {"seconds": round(time.perf_counter() - started, 1)},
    }


def _last(revision: str) -> str:
    """The last part of a path; a revision as it is."""
    return PurePath(normpath(revision)).name or revision


def step_of(revision: str) -> int | None:
    """The training step in the name of a revision or in the last part of a path."""
    found = STEP.search(_last(revision))
    return int(found[1] or found[2]) if found else None


def counted_in_steps(revisions: list[str]) -> bool:
    """Whether every name has a step of its own."""
    named = [step_of(revision) for revision in revisions]
    return None not in named and len(set(named)) == len(named)


def steps(revisions: list[str]) -> list[int]:
    """The step of every revision, or its place in the list."""
    if not counted_in_steps(revisions):
        return list(range(len(revisions)))
    return [step for revision in revisions if (step := step_of(revision)) is not None]


def _measured(given: "Given", documents: list[str], length: int, windows: int) -> Body:
    """What is known of one checkpoint."""
    from quantbench import catalog
    from quantbench.anatomy import anatomy
    from quantbench.interventions import windows_of
    from quantbench.metrics import Metric, finite, largest
    from quantbench.trace import observe
    from quantbench.watchers import Carriers, Loss

    parts = anatomy(given.model)
    read = windows_of(given, documents, length, windows, parts.room)
    metrics: dict[str, Metric] = {name: catalog.load("metrics", name)() for name in FIGURES}
    if not parts.heads:
        metrics = {"residual-peak": metrics["residual-peak"]}
    carriers, loss = Carriers(), Loss()

    def batches() -> "Iterator[Tensor]":
        for ids_T in read:
            yield ids_T[None]

    with loss.of(given.model):
        observe(given.model, batches(), [*metrics.values(), carriers], parts)
    readings = {name: metric.result() for name, metric in metrics.items()}
    norms = carriers.bos.per_layer()
    return {
        "digest": given.about["digest"],
        "windows": len(read),
        **{name: finite(readings[name].value) if name in readings else None for name in FIGURES},
        "layer": readings["residual-peak"].extra["layer"],
        "first-norm": finite(largest(norms)[0]),
        "first-norms": [finite(norm) for norm in norms],
        "loss": finite(loss.total / loss.tokens),
    }


# --- showing ---------------------------------------------------------------------------------------------------------


def tables(record: Body) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of a record, for the terminal and for the page."""
    header = ["revision", "step" if record["steps"] else "place", "loss", "residual peak", "after block",
              "norm of the first token", "attention to BOS", "value drain", "delta logit", "sink rate"]  # fmt: skip
    names = ("bos-attention", "value-drain", "delta-logit", "sink-rate")
    rows = []
    for at in record["revisions"]:
        cells = [NOTHING] * (len(header) - 2)
        if at["failed"] is None:
            layer = NOTHING if at["layer"] is None else str(at["layer"])
            cells = [plain(at["loss"]), plain(at["residual-peak"]), layer, plain(at["first-norm"]),
                     *(plain(at[name]) for name in names)]  # fmt: skip
        rows.append([at["revision"], f"{at['step']:,}", *cells])
    told = f"Over training: {record['windows']} windows of {record['length']} tokens"
    return [(". ".join([told, *record["notes"]]), (header, rows))]


def pictures(record: Body) -> dict[str, bytes]:
    """file name -> SVG."""
    from quantbench import figures

    measured = [at for at in record["revisions"] if at["failed"] is None]
    drawn = figures.over_training(measured, "training step" if record["steps"] else "revision")
    return {} if drawn is None else {"dynamics-timeline.svg": drawn}
