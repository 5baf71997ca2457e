"""Many experiments at once: worker processes of one thread each, progress on the terminal, records as they end.

A record does not depend on how many workers there are. A worker whose parent is killed ends itself; whatever it
had committed to the store is found again.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from quantbench.bench import Job, experiment
from quantbench.markup import visible
from quantbench.results import Record, check_recipe, rank_by, write
from quantbench.store import Store

Experiment = Callable[..., tuple[Record, Any] | None]  # as `bench.experiment`
Report = Callable[[str, str, int, int, str], None]  # (job, stage, done, of, detail)


@dataclass
class Outcome:
    """What became of the jobs: names by what happened to their records."""

    written: list[str] = field(default_factory=list)  # new, or replaced one of other inputs
    identical: list[str] = field(default_factory=list)  # the committed record came out again, byte for byte
    differs: list[str] = field(default_factory=list)  # another than the committed one, which stays
    diverged: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # name -> why

    @property
    def exit_code(self) -> int:
        """3 some cells failed, 5 integrity, 4 diverged, 0 done."""
        return 3 if self.failed else 5 if self.differs else 4 if self.diverged else 0


def sweep(
    jobs: list[Job],
    store: Store,
    results: Path,
    workers: int,
    accept: bool,
    tell: Callable[[str], None],
    function: Experiment = experiment,
) -> Outcome:
    """Makes and writes the record that `function` gives of every job.

    ResultsError, before anything is made, where a record of these recipes is not sound and is not to be replaced.
    """
    for track, recipe in {} if accept else dict.fromkeys((job.track_name, job.recipe_name) for job in jobs):
        check_recipe(results, track, recipe)
    outcome = Outcome()
    for job, done in each(function, jobs, store, workers):
        if isinstance(done, str):
            outcome.failed[str(job)] = done
            print(visible(f"quantbench: {job}: {done}"), file=sys.stderr)
        else:
            record, run = done
            _keep(job, record, run, results, accept, outcome, tell)
    return outcome


def each(function: Callable[..., Any], jobs: list[Job], store: Store, workers: int) -> Iterator[tuple[Job, Any]]:
    """Every job with what `function(job, store, compute, say)` of `bench` gives, as they end; text: why it failed.

    What is in the store already comes first and starts no worker.
    """
    missing = []
    for job in jobs:
        done = function(job, store, compute=False)
        if done is None:
            missing.append(job)
        else:
            yield job, done
    if not missing:
        return
    with _progress(missing) as report, _pool(min(workers, len(missing)), report) as pool:
        futures: dict[Future[Any], Job] = {pool.submit(_work, function, job, store.root): job for job in missing}
        for future in as_completed(futures):
            job = futures[future]
            try:
                done = future.result()
            except BrokenProcessPool:
                done = "its process was killed (out of memory?); run the command again to resume"
            except Exception as error:  # noqa: BLE001 - one bad cell must not stop the sweep; it is reported
                done = f"{type(error).__name__}: {error}"
            report(str(job), "done", 1, 1, "")
            yield job, done


def _keep(
    job: Job, record: Record, run: Any, results: Path, accept: bool, outcome: Outcome, tell: Callable[[str], None]
) -> None:
    state = write(results, record, run, accept)
    name = str(job)
    if state == "identical":
        outcome.identical.append(name)
    elif state == "differs":
        outcome.differs.append(name)
        print(
            f"quantbench: {name}: this run differs from the committed record of the same inputs and environment "
            "class; the committed one stays (--accept replaces it)",
            file=sys.stderr,
        )
    else:
        outcome.written.append(name)
    if record["status"] == "diverged":
        outcome.diverged.append(name)
    tell(f"{name}: {_headline(record)} ({state})")


def _headline(record: Record) -> str:
    """One line of a finished record."""
    if record["status"] == "diverged":
        return f"diverged: {record['reason']}"
    if "interventions" in record:  # of `quantbench probe`
        return f"{len(record['interventions'])} interventions on {record['sequences']} sequences"
    if "quantizer" in record:  # of `quantbench sites`
        whole = record["all"]["kl"]
        return f"KL under {record['quantizer']['name']} {'overflowed' if whole is None else f'{whole[0]:.4g} nats'}"
    ranking = rank_by(record)
    full, cost = record["full-precision"], record["quantized"][ranking]
    peak = full["metrics"].get("residual-peak", {}).get("value")
    shown = "" if peak is None else f", residual peak {peak:.3g}"
    damage = "overflowed" if cost["damage"] is None else f"{cost['damage']:.4g} nats"
    return f"loss {full['loss']:.4f}{shown}, damage under {ranking} {damage}"


# --- workers ---------------------------------------------------------------------------------------------------------

_reports: "SimpleQueue[Any] | None" = None


def _work(function: Callable[..., Any], job: Job, root: Path) -> Any:
    assert _reports is not None
    queue = _reports
    return function(job, Store(root), say=lambda *what: queue.put((str(job), *what)))


def _start(parent: int, queue: "SimpleQueue[Any]") -> None:
    """Makes a fresh process a worker."""
    global _reports
    _reports = queue
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch
    from transformers.utils import logging

    from quantbench.pretrain import steady_memory

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    steady_memory()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _pool(workers: int, report: Report) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: torch's and the tokenizers' threads do not survive a fork.
    context = get_context("spawn")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}  # fmt: skip
    queue: SimpleQueue[Any] = context.SimpleQueue()

    def listen() -> None:
        while (what := queue.get()) is not None:
            report(*what)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    with ProcessPoolExecutor(workers, context, _start, (os.getpid(), queue)) as pool:
        try:
            yield pool
        except BaseException:
            running = list((pool._processes or {}).values())  # which `shutdown` forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
        finally:
            # In a thread of its own: a worker killed in the midst of a report keeps the queue's lock for ever.
            threading.Thread(target=queue.put, args=(None,), daemon=True).start()
    listener.join(timeout=5)


# --- the face --------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(jobs: list[Job]) -> Iterator[Report]:
    """Bars with loss, steps/s and time left on a terminal; a plain line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Plain(jobs)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, transient=True) as bars:
        rows = {str(job): bars.add_task(str(job), start=False, visible=False, detail="") for job in jobs}
        speed = _Speed(jobs)

        def report(job: str, stage: str, done: int, of: int, detail: str) -> None:
            if stage == "done":
                bars.update(rows[job], visible=False)
                return
            bars.start_task(rows[job])
            detail += speed(job, stage, done)
            bars.update(rows[job], description=f"{job} {stage}", completed=done, total=of, detail=detail, visible=True)

        yield report


class _Speed:
    """Tokens a second of a job's pretraining, since its first report."""

    def __init__(self, jobs: list[Job]) -> None:
        self._tokens = {str(job): job.track.batch * job.track.length for job in jobs}
        self._first: dict[str, tuple[int, float]] = {}

    def __call__(self, job: str, stage: str, done: int) -> str:
        if stage != "pretrain":
            return ""
        step, when = self._first.setdefault(job, (done, time.monotonic()))
        passed = time.monotonic() - when
        return f", {(done - step) * self._tokens[job] / passed:,.0f} tokens/s" if done > step and passed > 0 else ""


class _Plain:
    """A line at the start of a stage and every fifteen seconds within it."""

    def __init__(self, jobs: list[Job]) -> None:
        self._speed = _Speed(jobs)
        self._last: dict[str, tuple[str, float]] = {}

    def __call__(self, job: str, stage: str, done: int, of: int, detail: str) -> None:
        speed = self._speed(job, stage, done)
        before, when = self._last.get(job, ("", 0.0))
        now = time.monotonic()
        if stage == "done" or (stage == before and now - when < 15):
            return
        self._last[job] = (stage, now)
        print(f"{job}: {stage} {done}/{of} {detail}{speed}".rstrip(), file=sys.stderr, flush=True)
