"""recipe x track x seed -> Record: the whole experiment on one screen.

Three stages, each a cell of the store, whose key holds everything it depends on:

    pretrain   a checkpoint                                        (recipe, track, seed, data, environment class)
    given      what a model costs that is there already, instead   (the model, the packages that it runs through)
    measure    full-precision quality, metrics, lm-eval            (the checkpoint, evaluation settings, what scores)
    quantize   one quantizer's damage, KL, exemption, SQNR, ...    (that, the quantizer, the packages it is made of)

What is post-hoc (the seam `prepare`) is left out of the pretrain key, so that checkpoints are shared. On a track whose
model is `pretrained` there is one seed, and a record keeps the figures of every sequence: intervals are over these.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbench import catalog, corpora
from quantbench.markup import spelled
from quantbench.recipe import Recipe, Track, plain
from quantbench.results import BASELINE, SCHEMA, Record
from quantbench.store import Cell, Store, digest
from quantbench.strict import dump, place

if TYPE_CHECKING:
    from quantbench.evaluate import Reference
    from quantbench.pretrained import Given

# Bumped by hand when a stage's numbers change (the golden losses in tests/ guard it), so that an unrelated edit
# does not throw hours of work away.
VERSIONS = {"pretrain": 2, "given": 2, "measure": 3, "quantize": 2}

# What of a track a checkpoint does not depend on, and what does not make two tables two.
AFTER_PRETRAINING = ("title", "seeds", "extra-seeds", "quantizers", "baseline-only", "metrics", "rank-by", "survives",
                     "evaluate", "checkpoint")  # fmt: skip
COSMETIC = ("title", "seeds", "extra-seeds", "survives", "checkpoint")

ROOM = 32 << 20  # bytes that the smallest of tracks needs
# Variables that change what torch computes, beside what `environment` sees of them: part of a key where they are set.
SETTINGS = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
            "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "NVIDIA_TF32_OVERRIDE",
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")  # fmt: skip
WITHOUT_MKL = ("OPENBLAS_CORETYPE",)  # beside MKL it is numpy's matter alone, which computes no number of a record

Say = Callable[[str, int, int, str], None]  # (stage, done, of, detail)


@dataclass(frozen=True)
class Job:
    """One record to be made."""

    recipe_name: str
    recipe: Recipe
    track_name: str
    track: Track
    seed: int

    def __post_init__(self) -> None:
        if self.track.pretrained and self.recipe_name != BASELINE:
            after = post_hoc(self.recipe)
            if not after or len(after) < len(self.recipe.mitigations):
                raise ValueError(
                    f"{self.recipe_name} changes pretraining, and the model of track {self.track_name} is trained "
                    f"already: take one of {', '.join(catalog.POST_HOC)}"
                )

    def __str__(self) -> str:
        return f"{self.recipe_name} seed {self.seed}"

    @property
    def lr(self) -> float:
        return self.recipe.lr.get(self.track_name, self.track.lr)

    @cached_property
    def quantizers(self) -> dict[str, Any]:
        """Those of the track that this recipe goes through."""
        spared = () if self.recipe_name == BASELINE else self.track.baseline_only
        return _without(self.track.quantizers, spared)

    @cached_property
    def mitigations(self) -> dict[str, dict[str, Any]]:
        """The recipe's mitigations in plain form, as the checkpoint's config carries them: fields by their names."""
        resolved = dump(self.recipe)["mitigations"]
        return {name: {key.replace("-", "_"): v for key, v in kw.items()} for name, kw in resolved.items()}

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """What of the recipe decides numbers on this track."""
        return {"mitigations": dump(self.recipe)["mitigations"], "lr": self.lr}


class Missing(Exception):
    """A cell that has not been computed."""


@dataclass
class Stages:
    """The cells of one job: found in the store, or made (without `compute`: `Missing`)."""

    job: Job
    store: Store
    compute: bool
    say: Say

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.say("data", 0, 1, "")
        task: Any = self.job.track.task
        if self.job.track.pretrained:
            task.check_model(self.job.track.pretrained, self.store.root)
        self.data = task.open(self.store.root)
        self.seconds: dict[str, float] = {}
        mitigations = self.job.recipe.mitigations.items()
        self.entries = {name: entry.version for name, entry in mitigations}  # type: ignore[attr-defined]
        after = post_hoc(self.job.recipe)
        self.environment = environment() | settings()
        # What every cell that judges the checkpoint depends on.
        evaluated = _without(dump(self.job.track.evaluate), ("exemption",))
        here = _without(self.environment, ("bitsandbytes",))
        if given := self.job.track.pretrained:
            from quantbench.pretrained import SHORT, identity

            length = self.job.track.length
            self.trained = {
                "version": VERSIONS["given"],
                "model": identity(place(given, SHORT), self.store.root),
                "length": length,
                "packages": self.packages,
            }
            evaluated |= {"data": self.data.digest, "bos": self.data.bos, "environment": here, "length": length}
        else:
            self.trained = {
                "version": VERSIONS["pretrain"], "recipe": _pretraining(self.job),
                "mitigations": _without(self.entries, after),
                "track": pretraining_part(self.job.track), "seed": self.job.seed,
                "data": self.data.digest, "environment": here,
            }  # fmt: skip
        self.judged = {"checkpoint": digest(self.trained), "evaluate": evaluated}
        if after:
            resolved = self.job.resolved["mitigations"]
            self.judged["prepare"] = {name: [self.entries[name], resolved[name]] for name in after}

    def stage(self, name: str, inputs: dict[str, Any], make: Callable[[Cell], dict[str, bytes | Path]]) -> Path:
        """The folder of a cell."""
        folder = self.store.load(name, inputs)
        if folder is None and not self.compute:
            raise Missing
        if folder is None:
            with self.store.cell(name, inputs) as cell:
                start = time.monotonic()
                folder = cell.path or cell.commit(make(cell))
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
        return folder

    def checkpoint(self) -> Path:
        """The pretrain cell: a folder that `from_pretrained` reads, with training.json; of a given model that alone."""
        if self.job.track.pretrained:
            return self.stage("given", self.trained, lambda _: _given(self.job, self.store, self.say))
        return self.stage("pretrain", self.trained, lambda cell: _pretrain(self.job, self.data, cell, self.say))

    @cached_property
    def packages(self) -> dict[str, str | None]:
        """Whose code a model that is there already runs through. What we train runs through ours and torch's alone."""
        given = self.job.track.pretrained
        return installed("transformers", "tokenizers", *(["gguf"] if given.endswith(".gguf") else [])) if given else {}

    def scoring(self, own: bool) -> dict[str, Any]:
        """What the scores of lm-eval depend on, as part of a key: its tasks, prompts and items; nothing without any.

        own: whether it scores our own two tasks.
        """
        tasks = self.job.track.evaluate.lm_eval
        if not own and not tasks:
            return {}
        items = {name: corpora.identity(name) for name in tasks if name in corpora.QUESTIONS}
        scorers = installed("lm-eval", "datasets", "transformers", "tokenizers")
        return {"scored-by": scorers | {"python": list(sys.version_info[:2]), "items": items}}  # it draws them

    @property
    def made_by(self) -> str:
        """The stage that the checkpoint is of."""
        return "given" if self.job.track.pretrained else "pretrain"

    def head(self, reason: str | None, stages: dict[str, int], quantizers: dict[str, int]) -> Record:
        """What every record of the job begins with, from the versions of the stages and quantizers that it used."""
        job = self.job
        track = plain(job.track)
        return spelled({
            "schema": SCHEMA,
            "status": "finished" if reason is None else "diverged",
            "reason": reason,
            "recipe": {"name": job.recipe_name, "digest": digest(job.resolved), "title": job.recipe.title,
                       "resolved": job.resolved},
            "track": {"name": job.track_name, "digest": digest(_without(track, COSMETIC)), "title": job.track.title,
                      "resolved": track},
            "seed": job.seed,
            "data": self.data.digest,
            "versions": {"stages": stages, "mitigations": self.entries, "quantizers": quantizers,
                         **({"packages": self.packages} if self.packages else {})},
            "environment": self.environment,
        })  # fmt: skip

    def run(self) -> Record:
        """The facts of this run."""
        return {"date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self.began, 1), "stages": self.seconds,
                "machine": platform.machine(), **source()}  # fmt: skip


def training(job: Job, store: Store, compute: bool = True, say: Say = lambda *_: None) -> dict[str, Any] | None:
    """Pretraining alone: its losses, timeline, cost, and why it diverged if it did. `compute` as in `experiment`."""
    try:
        found: dict[str, Any] = from_json(Stages(job, store, compute, say).checkpoint(), "training.json")
    except Missing:
        return None
    return found


def experiment(job: Job, store: Store, compute: bool = True, say: Say = lambda *_: None) -> tuple[Record, Any] | None:
    """The record of a job and the facts of its run; without `compute`, None where a cell is still missing."""
    track, here = plain(job.track), environment()
    stages = Stages(job, store, compute, say)
    stage, data, judged = stages.stage, stages.data, stages.judged
    try:
        checkpoint = stages.checkpoint()
        trained = from_json(checkpoint, "training.json")
        reason = trained["reason"]
        lazy = Lazy(job, data, checkpoint, store)
        full, quantized = None, {}
        if reason is None:
            metrics = {name: catalog.load("metrics", name).version for name in job.track.metrics}
            inputs = judged | {"version": VERSIONS["measure"], "metrics": metrics}
            inputs |= stages.scoring(bool(job.track.evaluate.lm_eval_items))
            full = from_json(stage("measure", inputs, lambda _: _measure(lazy, say)), "figures.json")
            reason = None if full["loss"] is not None else "the held-out loss is not finite"
        if reason is None:
            for index, (name, quantizer) in enumerate(job.quantizers.items()):
                inputs = judged | {
                    "version": VERSIONS["quantize"], "quantizer": {name: track["quantizers"][name]},
                    "entry": quantizer.version, "exemption": name in job.track.evaluate.exemption,
                    "lm-eval": _harnessed(job, name), "bitsandbytes": here["bitsandbytes"],
                    **stages.scoring(_harnessed(job, name)),
                    **({"packages": installed(*quantizer.packages)} if quantizer.packages else {}),
                }  # fmt: skip
                say("quantize", index, len(job.quantizers), name)
                folder = stage("quantize", inputs, lambda _, name=name: _quantize(lazy, name, say))  # type: ignore[misc]
                quantized[name] = from_json(folder, "figures.json")
    except Missing:
        return None
    versions = {name: quantizer.version for name, quantizer in job.quantizers.items()}
    used = {name: VERSIONS[name] for name in (stages.made_by, "measure", "quantize")}
    record = stages.head(reason, used, versions) | {
        "cost": trained["cost"],
        "training": {key: trained[key] for key in ("losses", "final-loss", "timeline")},
        "full-precision": full if job.track.pretrained else _pooled(full),
        "quantized": quantized
        if job.track.pretrained
        else {name: _pooled(figures) for name, figures in quantized.items()},
    }
    return record, stages.run()


def check(jobs: list[Job], store: Store) -> None:
    """ValueError for what would stop one of these jobs, of one track, after hours of work, and can be known before."""
    store.check_writable("there is something to compute")
    free = shutil.disk_usage(next(path for path in (store.root, *store.root.parents) if path.exists())).free
    if free < ROOM:
        raise ValueError(f"the store {store.root}: {free >> 20} MiB are free on its disk, too few to begin with")
    name, track = jobs[0].track_name, jobs[0].track
    needed = {catalog.package(quantizer): quantizer for job in jobs for quantizer in job.quantizers}
    for package, quantizer in needed.items():
        if package and find_spec(package) is None:
            extra = "" if package == "bitsandbytes" else "; it comes with: pip install quantbench[peers]"
            raise ValueError(f"track {name}: {quantizer} needs {package}, which is not installed{extra}")
    data, due = track.task.open(store.root), track.evaluate  # type: ignore[attr-defined]
    try:
        data.held_out(due.sequences, track.length)
        data.calibration(due.calibration, track.length)
        if due.lm_eval_items:
            data.documents(due.lm_eval_items * 2)
        if due.lm_eval:
            from quantbench import harness

            harness.check(due.lm_eval, store.root)
    except ValueError as error:
        raise ValueError(f"track {name}: {error}") from None


def to_train(jobs: list[Job], store: Store) -> list[Job]:
    """Those whose checkpoint the store lacks, one of each that share it."""
    found: dict[str, Job] = {}
    for job in jobs:
        stages = Stages(job, store, False, lambda *_: None)
        if not job.track.pretrained and store.load("pretrain", stages.trained) is None:
            found.setdefault(digest(stages.trained), job)
    return list(found.values())


def export(job: Job, store: Store, quantizer: Any, folder: Path, say: Say = lambda *_: None) -> dict[str, float] | None:
    """Saves the job's model, quantized, in a folder (`packed.load` reads it): its report, and `bytes` on disk.

    None where pretraining diverged.
    """
    from quantbench.packed import save

    stages = Stages(job, store, True, say)
    checkpoint = stages.checkpoint()
    if from_json(checkpoint, "training.json")["reason"] is not None:
        return None
    say("quantize", 0, 1, "")
    reference = Lazy(job, stages.data, checkpoint, store).reference
    report = quantizer.quantize(reference.model, reference.calibrate())
    name = catalog.entry_name("quantizers", quantizer)
    return {**report, "bytes": save(reference.model, name, quantizer, folder, report)}


# --- the three stages ------------------------------------------------------------------------------------------------


def _pretrain(job: Job, data: Any, cell: Cell, say: Say) -> dict[str, bytes | Path]:
    from quantbench.model import cost
    from quantbench.pretrain import build, pretrain

    def progress(step: int, loss: float) -> None:
        say("pretrain", step, job.track.steps, f"loss {loss:.3f}")

    mitigations = _without(job.mitigations, post_hoc(job.recipe))
    trained = pretrain(mitigations, job.lr, job.track, job.seed, data, cell.work, device(), progress)
    length = job.track.length
    paid = cost(trained.model, length)
    paid["added-parameters"] = paid["parameters"] - cost(build({}, job.track, data), length)["parameters"]
    every = max(1, job.track.steps // 50)
    curve = [[i + 1, _plain(loss)] for i, loss in enumerate(trained.losses) if (i + 1) % every == 0]
    recent = trained.losses[-every:]
    about = {
        "reason": trained.reason,
        "cost": paid,
        "losses": [point for point in curve if point[1] is not None],
        "final-loss": _plain(sum(recent) / len(recent)),
        "timeline": trained.timeline,
    }
    trained.model.cpu().save_pretrained(cell.work / "model")
    files: dict[str, bytes | Path] = {path.name: path for path in sorted((cell.work / "model").iterdir())}
    return files | {"training.json": to_json(about)}


def _given(job: Job, store: Store, say: Say) -> dict[str, bytes | Path]:
    """The facts of a pretrained model in the place of those of a training."""
    from quantbench.pretrained import SHORT, cost, open_model

    say("open", 0, 1, job.track.pretrained)
    paid = cost(open_model(place(job.track.pretrained, SHORT), store.root).model, job.track.length)
    about: dict[str, Any] = {"reason": None, "cost": paid, "losses": [], "final-loss": None, "timeline": []}
    return {"training.json": to_json(about)}


def _measure(lazy: "Lazy", say: Say) -> dict[str, bytes | Path]:
    from quantbench.evaluate import full_precision

    say("measure", 0, 1, "full precision")
    figures = full_precision(lazy.reference)
    figures |= _scored(lazy, lazy.reference.model, bool(lazy.job.track.evaluate.lm_eval_items), say)
    return {"figures.json": to_json(figures)}


def _quantize(lazy: "Lazy", name: str, say: Say) -> dict[str, bytes | Path]:
    from quantbench.evaluate import quantized

    track = lazy.job.track
    quantizer: Any = track.quantizers[name]
    model, figures = quantized(lazy.reference, quantizer, name in track.evaluate.exemption)
    figures |= _scored(lazy, model, _harnessed(lazy.job, name), say)
    return {"figures.json": to_json(figures)}


def _scored(lazy: "Lazy", model: Any, own: bool, say: Say) -> dict[str, Any]:
    """What lm-eval makes of a model: our own two tasks, where `own` asks for them, and the track's standard ones."""
    from quantbench.harness import harness, standard

    found: dict[str, Any] = {"lm-eval": harness(model, lazy.reference) if own else None}
    if tasks := lazy.job.track.evaluate.lm_eval:
        figures, items = standard(model, lazy.given.tokenizer, lazy.given.bos, tasks, lazy.store.root, say)
        found = {"lm-eval": (found["lm-eval"] or {}) | figures, "lm-eval-items": items}
    return found


@dataclass
class Lazy:
    """The checkpoint, prepared, on the held-out sequences; loaded when the first missing cell needs it."""

    job: Job
    data: Any
    checkpoint: Path
    store: Store

    @cached_property
    def given(self) -> "Given":
        """Of a track whose model is pretrained: it, and its tokenizer."""
        from quantbench.pretrained import SHORT, open_model

        return open_model(place(self.job.track.pretrained, SHORT), self.store.root)

    @cached_property
    def reference(self) -> "Reference":
        from quantbench.evaluate import Reference
        from quantbench.mitigations import combine
        from quantbench.model import QuantbenchModel

        if self.job.track.pretrained:
            model = self.given.model
        else:
            model = QuantbenchModel.from_pretrained(self.checkpoint).eval().to(device())
        return Reference(model, self.data, self.job.track, combine(self.job.recipe.mitigations))  # type: ignore[arg-type]


def _harnessed(job: Job, quantizer: str) -> bool:
    """Whether lm-eval scores this quantizer's model: the one that ranks, since a pass costs seconds."""
    return bool(job.track.evaluate.lm_eval_items) and quantizer in job.track.rank_by.values()


def _pretraining(job: Job) -> dict[str, Any]:
    """The part of the recipe that pretraining sees."""
    return job.resolved | {"mitigations": _without(job.resolved["mitigations"], post_hoc(job.recipe))}


def post_hoc(recipe: Recipe) -> tuple[str, ...]:
    """The mitigations of a recipe that come after pretraining, and are no part of it."""
    return tuple(name for name in recipe.mitigations if name in catalog.POST_HOC)


# --- small things ----------------------------------------------------------------------------------------------------


@cache
def device() -> Any:
    """CUDA where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def environment() -> dict[str, Any]:
    """The environment class: what, beside the inputs, decides the last bits of a result."""
    import torch

    from quantbench.ops import implementation

    # An instruction set says by which code torch computes, and so what the last bits are; never how fast it is.
    low = torch.ops.mkldnn._is_mkldnn_bf16_supported() if device().type == "cpu" else False
    kind = "cpu" if device().type == "cpu" else torch.cuda.get_device_name()
    cpu = f"{_vendor()} {torch.backends.cpu.get_cpu_capability()}{' bf16' if low else ''}"
    try:
        bnb = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        bnb = None  # a track may do without it
    return {"torch": torch.__version__, "bitsandbytes": bnb, "threads": 1, "cpu": cpu, "device": kind,
            "statistics": implementation(device())}  # fmt: skip


def _vendor() -> str:
    """The processor's maker: the math library picks its kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())


def installed(*packages: str) -> dict[str, str | None]:
    """package -> its version; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None  # what needs it says so
    return found


def settings() -> dict[str, str]:
    """Those of SETTINGS that are set, in one text; nothing where none is, so that keys hold."""
    import torch

    read = SETTINGS if torch.backends.mkl.is_available() else SETTINGS + WITHOUT_MKL
    told = [f"{name}={os.environ[name]}" for name in read if name in os.environ]
    return {"settings": " ".join(told)} if told else {}


@cache
def source() -> dict[str, Any]:
    """The commit this code is at, and whether it was changed since; nulls outside a git checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changed = git("status", "--porcelain", "--", ".")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def pretraining_part(track: Track) -> dict[str, Any]:
    """What of a track a checkpoint depends on."""
    return _without(dump(track), AFTER_PRETRAINING)


def first_seeds(track: Track, count: int) -> tuple[int, ...]:
    """The first `count` seeds of a track, its extra ones last; ValueError where it has fewer."""
    every = track.seeds + track.extra_seeds
    if not 1 <= count <= len(every):
        raise ValueError(f"--seeds {count}: the track has {len(every)} seeds; ask for 1 to {len(every)}")
    return every[:count]


def default_jobs() -> int:
    """One run a core that this process may use; one on a GPU."""
    if device().type == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(Path("/sys/fs/cgroup")) or cores))


def _quota(cgroup: Path) -> int | None:
    """The cores' time that a container is given, in whole cores; None where it is not limited (Linux control groups).

    A container of two cores' time on a machine of 64 sees all 64: so many runs would only be in each other's way.
    """
    try:
        if (unified := cgroup / "cpu.max").is_file():
            quota, period = unified.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no control groups
        return None
    return cores if cores > 0 else None  # -1: not limited


def _pooled(figures: Any) -> Any:
    """Figures without those of single sequences, which cells keep."""
    if not isinstance(figures, dict):
        return figures
    return {key: _pooled(value) for key, value in figures.items() if key not in ("sequence-losses", "sequence-kl")}


def _without(mapping: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def from_json(folder: Path, name: str) -> Any:
    """What a file of a cell holds."""
    return json.loads((folder / name).read_bytes())


def to_json(value: Any) -> bytes:
    """The bytes of a cell's file."""
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _plain(x: float) -> float | None:
    return x if -float("inf") < x < float("inf") else None
