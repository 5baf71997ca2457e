"""What this machine has, what was chosen on it and why, what is missing for what, and how long the first command takes.

Sections come one by one, the quick ones first: a person reads while the next is measured. A section is JSON, and
`lines` says it in words. Nothing is changed but the user's cache of measured times.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbench import __version__
from quantbench.bench import default_jobs, device, environment
from quantbench.recipe import Track, load_track

if TYPE_CHECKING:
    from quantbench.ops.measured import Choice

COMMAND, RECIPES, TRACK, SEEDS = "make bench RECIPE=relu-attn", ("baseline", "relu-attn"), "text", 3
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "bitsandbytes", "lm_eval")
OPTIONAL = {
    "triton": "testing the CUDA kernels without a GPU",
    "hqq": "the quantizer w4a16-hqq",
    "torchao": "the quantizer torchao-int8dyn",
}
ESSENTIAL = "the default command"
FIXED = {"fp32": "SDPA", "bf16": "products"}  # how attention is computed on a CPU: the other way has other last bits
ROOM, NEEDED = 1 << 30, 1 << 27  # bytes of disk: with less it is told, with less it cannot run

Section = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Missing:
    """Something that is not here."""

    what: str
    cost: str  # what cannot be done without it, or is slower
    remedy: str
    essential: bool = False  # to the default command


def choices() -> "list[Choice]":
    """What was chosen between ways to the same numbers, by everything that chooses: one line each."""
    from quantbench.ops import integers, outliers
    from quantbench.ops.measured import Choice

    kernel = outliers.choice()
    return [*integers.choices(), Choice("outlier statistics: which build", kernel["path"], kernel["ms"])]


def examine(root: Path) -> Iterator[Section]:
    """Every section, the quick ones first; the last is `ready`."""
    store, missing = root / ".quantbench", list[Missing]()
    yield "machine", _machine()
    yield "versions", _versions(root, missing)
    yield "store", _store(store, missing)
    if not any(m.essential and m.what in LIBRARIES for m in missing):
        track = load_track(TRACK, root)[1]
        yield "device", _device(missing)
        import torch

        torch.set_num_threads(1)  # as the workers, whose choices these are
        yield "choices", _choices(track, missing)
        yield "data", _data(track, store, missing)
        if not any(m.essential for m in missing):
            yield "time", _time(track)
    missing.sort(key=lambda m: not m.essential)
    yield "missing", {"missing": [asdict(m) for m in missing]}
    yield "ready", {"command": COMMAND, "ready": not any(m.essential for m in missing)}


# --- sections ---------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # no Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    known = getattr(os, "sysconf_names", {})
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in known else None
    return {
        "quantbench": __version__, "python": platform.python_version(), "processor": name, "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory": None if pages is None else pages * os.sysconf("SC_PAGE_SIZE"),
    }  # fmt: skip


def _versions(root: Path, missing: list[Missing]) -> dict[str, Any]:
    found = {name: _version(name) for name in (*LIBRARIES, *OPTIONAL)}
    for name in OPTIONAL:  # `make setup` keeps two of them apart, where tests alone find them
        if found[name] is None and (root / ".venv" / "peers" / name).is_dir():
            found[name] = "for tests alone"
    for name, version in found.items():
        if version is None:
            essential = name in LIBRARIES
            cost = ESSENTIAL if essential else OPTIONAL[name]
            missing.append(Missing(name, cost, "make setup", essential))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _store(store: Path, missing: list[Missing]) -> dict[str, Any]:
    there = next(folder for folder in (store, *store.parents) if folder.is_dir())
    writable, free = os.access(there, os.W_OK | os.X_OK), shutil.disk_usage(there).free
    size = 0
    for path in store.rglob("*"):
        with suppress(OSError):  # of a run that goes on meanwhile
            size += path.lstat().st_size
    if not writable:
        missing.append(Missing("a store", ESSENTIAL, f"make {there} writable", essential=True))
    if free < ROOM:
        cost = f"{free / 1e6:,.0f} MB are free; the default command takes about {NEEDED / 1e6:,.0f} MB"
        missing.append(Missing("disk", cost, f"free some of the disk of {there}", essential=free < NEEDED))
    return {"path": str(store), "bytes": size, "writable": writable, "free": free}


def _device(missing: list[Missing]) -> dict[str, Any]:
    import torch

    from quantbench.ops import native

    compiler = native.find_compiler()
    if compiler is None:
        cost = "the outlier statistics (torch computes them, 5 to 10 times slower, same results)"
        missing.append(Missing("a C++ compiler", cost, "install g++ or clang++, or set CXX"))
    if not (cuda := torch.cuda.is_available()):
        missing.append(
            Missing("CUDA", "the tracks text-gpu and bb-paper-*", "a machine with a GPU and its build of torch")
        )
    return {
        "class": environment(), "workers": default_jobs(),
        "compiler": compiler and _first_line([*compiler, "--version"]),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }  # fmt: skip


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def _choices(track: Track, missing: list[Missing]) -> dict[str, Any]:
    from quantbench.ops import measured
    from quantbench.speed import BY_SET, attention_times, bf16_is_slow, step_times

    steps, on_cpu = step_times(track), device().type == "cpu"
    attention = attention_times(track) if on_cpu else {}
    slow = track.precision == "bf16" and bf16_is_slow(steps) and on_cpu
    if (kept := measured.file()) is None:
        missing.append(
            Missing("a cache folder", "every process measures anew which way is faster", "make ~/.cache writable")
        )
    return {
        "kept": kept and str(kept), "choices": [choice._asdict() for choice in choices()],
        "attention": {p: {"is": FIXED[p], "times": each} for p, each in attention.items()},
        "precision": {"track": TRACK, "is": track.precision, "times": steps, "advice": BY_SET if slow else None},
    }  # fmt: skip


def _data(track: Track, store: Path, missing: list[Missing]) -> dict[str, Any]:
    from quantbench import corpora, pretrained

    try:
        text = "ready" if track.task.ready(store) else "made at the first run, from installed packages"  # type: ignore[attr-defined]
    except (ValueError, OSError) as error:
        text = str(error)
        missing.append(Missing(f"the text of track {TRACK}", ESSENTIAL, text, essential=True))
    models, sets = pretrained.status(store), corpora.status(store)
    for name, state in models.items():
        if not state.endswith("ready"):
            missing.append(
                Missing(
                    f"the model {name}",
                    f"the track {name}, `quantbench measure {name}`",
                    f"quantbench models get {name}",
                )
            )
    if absent := [name for name, state in sets.items() if state != "ready"]:
        cost = "measuring models that are there already, and the tracks smollm2 and gemma3"
        missing.append(Missing(", ".join(absent), cost, "quantbench data get"))
    return {"text": text, "models": models, "sets": sets}


def _time(track: Track) -> dict[str, Any]:
    from quantbench.speed import bench_seconds

    workers, runs = default_jobs(), len(RECIPES) * SEEDS
    seconds = {name: round(bench_seconds(track, runs, workers, name)) for name in ("bf16", "fp32")}
    return {"command": COMMAND, "runs": runs, "workers": workers, "seconds": seconds[track.precision],
            "by-precision": seconds}  # fmt: skip


# --- in words ---------------------------------------------------------------------------------------------------------


def lines(section: str, found: dict[str, Any]) -> list[str]:
    """A section for a person to read."""
    return _IN_WORDS[section](found)


def _say_machine(found: dict[str, Any]) -> list[str]:
    memory = f", {found['memory'] / 2**30:.0f} GiB" if found["memory"] else ""
    return [
        f"quantbench {found['quantbench']}, Python {found['python']}, {found['system']}",
        f"processor   {found['processor']}, {found['cores']} cores{memory}",
    ]


def _say_versions(found: dict[str, Any]) -> list[str]:
    return ["versions    " + ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())]


def _say_store(found: dict[str, Any]) -> list[str]:
    writable = "writable" if found["writable"] else "NOT writable"
    return [
        f"store       {found['path']}: {found['bytes'] / 1e6:,.1f} MB, {writable}; {found['free'] / 1e9:,.0f} GB free"
    ]


def _say_device(found: dict[str, Any]) -> list[str]:
    here, workers = found["class"], found["workers"]
    return [
        f"CPU         {here['cpu']}; {workers} runs at a time, one thread each; statistics: {here['statistics']}",
        f"GPU         {', '.join(found['gpu']) or 'none that torch can use'}",
        f"compiler    {found['compiler'] or 'none'}",
    ]


def _say_choices(found: dict[str, Any]) -> list[str]:
    shown = ["measured on one thread, and chosen (the numbers are the same either way):"]
    shown += [f"  {c['question']}: {c['chosen']}{_times(c['times'])}" for c in found["choices"]]
    shown += ["measured, and left as it is (another way gives other last bits):"]
    shown += [
        f"  attention of track {TRACK} in {p}: {a['is']}{_times(a['times'])}" for p, a in found["attention"].items()
    ]
    precision = found["precision"]
    shown += [
        f"  a training step of track {precision['track']}, which says {precision['is']}:{_times(precision['times'])}"
    ]
    if precision["advice"]:
        shown += [f"    bf16 is slow on this machine: {precision['advice']}"]
    return shown


def _times(times: dict[str, float]) -> str:
    return f" ({', '.join(f'{way} {ms:.3g} ms' for way, ms in sorted(times.items()))})" if times else ""


def _say_data(found: dict[str, Any]) -> list[str]:
    return [f"text        of track {TRACK}: {found['text']}"]


def _say_time(found: dict[str, Any]) -> list[str]:
    minutes = {name: max(1, round(seconds / 60)) for name, seconds in found["by-precision"].items()}
    return [
        f"time        {found['command']}: {found['runs']} runs, {found['workers']} at a time, about "
        f"{max(1, round(found['seconds'] / 60)):,} minutes from nothing "
        f"({', '.join(f'{m:,} in {name}' for name, m in minutes.items())})"
    ]


def _say_missing(found: dict[str, Any]) -> list[str]:
    return [
        f"{'MISSING' if m['essential'] else 'not here':<12}{m['what']}: needed for {m['cost']}; {m['remedy']}"
        for m in found["missing"]
    ]


def _say_ready(found: dict[str, Any]) -> list[str]:
    return [f"`{found['command']}` can run" if found["ready"] else f"`{found['command']}` cannot run: see MISSING"]


_IN_WORDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "machine": _say_machine, "versions": _say_versions, "store": _say_store, "device": _say_device,
    "choices": _say_choices, "data": _say_data, "time": _say_time, "missing": _say_missing, "ready": _say_ready,
}  # fmt: skip
