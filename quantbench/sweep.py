"""Many experiments at once: worker processes of one thread each, progress on the terminal, records as they end.

A record does not depend on how many workers there are. A worker whose parent is killed ends itself; whatever it
had committed to the store is found again. A job whose worker is killed, as by the kernel when memory is short, is tried
again when the others are done, alone.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbench import shell
from quantbench.bench import Job, check, experiment
from quantbench.markup import visible
from quantbench.results import Record, check_recipe, rank_by, write
from quantbench.store import Store

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

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
    before = partial(begin, workers=workers, can_set=function is experiment)
    for job, done in each(function, jobs, store, workers, before):
        if isinstance(done, str):
            outcome.failed[str(job)] = done
            print(visible(f"quantbench: {job}: {done}"), file=sys.stderr)
        else:
            record, run = done
            _keep(job, record, run, results, accept, outcome, tell)
    return outcome


def begin(jobs: list[Job], store: Store, workers: int, can_set: bool) -> None:
    """ValueError for what would stop jobs after hours of work; a line where they take longer here than they need to.

    can_set: whether the verb takes `--set`, by which that can be changed.
    """
    from quantbench.speed import BY_COPY, BY_SET, advice

    check(jobs, store)
    if line := advice(jobs, store, workers, BY_SET if can_set else BY_COPY):
        print(f"quantbench: {line}", file=sys.stderr, flush=True)


def each(
    function: Callable[..., Any],
    jobs: list[Job],
    store: Store,
    workers: int,
    before: Callable[[list[Job], Store], None] = lambda *_: None,
) -> Iterator[tuple[Job, Any]]:
    """Every job with what `function(job, store, compute, say)` of `bench` gives, as they end; text: why it failed.

    What is in the store already comes first and starts no worker; `before` may refuse the rest before any work.
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
    before(missing, store)
    with _progress(missing) as report:
        # Twice alone, where the memory is its own: what breaks then is broken.
        rounds = [1, 1] if min(workers, len(missing)) == 1 else [workers, 1, 1]
        broken: dict[str, str] = {}
        for number, at_once in enumerate(rounds, 1):
            broken = yield from _round(function, missing, store.root, at_once, report, number == len(rounds))
            missing = [job for job in missing if str(job) in broken]
        for job in missing:
            yield job, f"{broken[str(job)]}, and so when it was tried again; run the command again to resume"


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

STILLBORN = 3  # processes in a row that end before their first word: then no other would come further
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
               "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}  # fmt: skip


def _round(
    function: Callable[..., Any], jobs: list[Job], root: Path, workers: int, report: Report, last: bool
) -> Generator[tuple[Job, Any], None, dict[str, str]]:
    """Every job once: yields those that came to an end, returns the names of those whose process broke, and how.

    No worker shares anything with another, so that the end of one concerns its own job alone.
    """
    todo, broken = deque(jobs), dict[str, str]()
    team: list[_Worker] = []
    stillborn = 0
    try:
        while todo and len(team) < workers:
            team.append(_Worker(root, function, todo.popleft()))
        while team:
            ready = wait([end for worker in team for end in (worker.pipe, worker.process.sentinel)])
            for worker in [worker for worker in team if worker.pipe in ready or worker.process.sentinel in ready]:
                job, heard = worker.job, worker.hear()
                stillborn = 0 if worker.began else stillborn + 1
                if heard and heard[0] == "say":
                    report(str(job), *heard[1:])
                    continue
                report(str(job), "done", 1, 1, "")
                if heard and todo:
                    worker.give(function, todo.popleft())
                else:
                    team.remove(worker)
                    how = worker.end()
                if heard:
                    yield job, heard[1]
                    continue
                broken[str(job)] = how
                if not last:
                    print(f"quantbench: {job}: {how}; it is tried again, alone", file=sys.stderr, flush=True)
                if todo and stillborn < STILLBORN:
                    team.append(_Worker(root, function, todo.popleft()))
        return broken | {str(job): how for job in todo}
    except BaseException:
        for worker in team:
            worker.process.kill()
        raise
    finally:
        for worker in team:
            worker.end()


class _Worker:
    """A process with a pipe of its own, at work on a job. A signal is the parent's to answer: only SIGKILL gets it."""

    def __init__(self, root: Path, function: Callable[..., Any], job: Job) -> None:
        # Spawned, not forked: torch's and the tokenizers' threads do not survive a fork.
        context = get_context("spawn")
        os.environ |= ENVIRONMENT
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid(), root))
        with shell.held():
            resource_tracker.ensure_running()  # lets signals through when it is done
        with shell.held():
            self.process.start()
        theirs.close()
        self.began = False  # whether it has said anything yet
        self.give(function, job)

    def give(self, function: Callable[..., Any], job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it is dead, which is noticed when it is read
            self.pipe.send((function, job))

    def hear(self) -> tuple[Any, ...] | None:
        """What it says, ("say", ...) or ("done", result); None where it is dead, and all that it said was heard."""
        try:
            # A process of its own might keep the pipe open after it.
            heard: tuple[Any, ...] | None = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            heard = None
        self.began = self.began or heard is not None
        return heard

    def end(self) -> str:
        """Lets it end, or ends it; how it did."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with exit code {code}"
        how = "SIGKILL (out of memory?)" if code == -signal.SIGKILL else signal.Signals(-code).name
        return f"its process was killed by {how}"


def _serve(pipe: "Connection", parent: int, root: Path) -> None:
    """What a worker does: jobs that come through the pipe, until that is closed."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    shell.steady_streams()

    def tell(*what: Any) -> None:
        try:
            pipe.send(what)
        except OSError:
            os._exit(1)  # nobody listens any more

    ready = False
    while True:
        try:
            function, job = pipe.recv()
            ready = ready or _settle()
            done = function(job, Store(root), say=partial(tell, "say"))
            tell("done", done)
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 - one bad cell must not stop the sweep; it is reported
            tell("done", f"{type(error).__name__}: {error}")


def _settle() -> bool:
    """What a fresh process needs before its first job that computes: torch came with it, in its quantizers."""
    if "torch" not in sys.modules:
        return False
    import torch
    from transformers.utils import logging

    from quantbench.pretrain import steady_memory

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    steady_memory()
    return True


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


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
