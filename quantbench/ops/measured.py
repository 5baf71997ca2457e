"""Which of several ways to the same numbers is the fastest here: measured once, and remembered for this machine.

    $XDG_CACHE_HOME/quantbench/measured/<digest of the class>.json    {machine, times, sha256 of both}

A way is never taken because an instruction set suggests it: int8 products that are exact take 1/7 of float32's time on
one machine and 20 times as long on another. Only ways that give the same bits may be asked for here. Choices that
change bits (bf16 or fp32) belong to the track, and what is measured of them is told, never acted upon.

The class is all that the times hang on beside the work: torch's build, the processor, the variables that hide a part
of it, threads. A file that is damaged, of another class or another user is measured anew; where none can be kept (a
home that is read-only), every process measures for itself.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantbench.ops.native import cache_folder, features, read_own
from quantbench.store import atomic_write, digest

Ways = Mapping[str, Callable[[], object]]
Times = dict[str, float]  # way -> milliseconds

ROUNDS = 7  # in which all ways take turns; the least time counts, which other work on the machine lengthens least
ENOUGH = 0.5  # seconds after which no further round begins
ROUND = 0.5e-3  # seconds that each runs in a round, at least
HOPELESS = 4.0  # times the fastest: what takes so long is not run again
SURE = 2  # rounds before that is believed
AGREE = 1.3  # times the least, that the one after it may be
PATIENCE = 20e-3  # seconds of a first call, which may compile, from which on it alone tells
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
             "MKL_DEBUG_CPU_TYPE")  # fmt: skip
LARGEST = 1 << 16  # bytes that a file of ours has at most

_here: dict[str, dict[str, Times]] = {}  # what this process knows: key of a class -> question -> times


class Choice(NamedTuple):
    """What was chosen between ways to the same numbers, and why: for `quantbench doctor`."""

    question: str
    chosen: str
    times: Times  # none where only one way gives the right numbers


def fastest(question: str, make: Callable[[], Ways]) -> str:
    """The way that took least; as `times`."""
    found = times(question, make)
    return min(found, key=found.__getitem__)


def times(question: str, make: Callable[[], Ways]) -> Times:
    """Milliseconds of each way that `make` gives, measured where neither this process nor the user's cache knows them.

    The question names the work, sizes included: who changes the work gives it another name. Put the way that is fast
    everywhere first: of one that is hopeless beside it, a single call is enough. What the rounds do not agree on, on a
    machine that is busy, serves this process alone.
    """
    key = _key(torch.get_num_threads(), torch._C._get_mkldnn_enabled())
    known = _here.setdefault(key, {})
    if question not in known:
        known |= {q: t for q, t in kept(key).items() if q not in known}
    if question not in known:
        known[question], agreed = measure(make())
        if agreed:
            keep(key, {question: known[question]})
    return known[question]


def measure(ways: Ways) -> tuple[Times, bool]:
    """Milliseconds of each way, the least of some rounds in which all take turns; and whether the rounds agree."""
    seconds: dict[str, list[float]] = {}  # ascending
    repeats: dict[str, int] = {}
    end = time.perf_counter() + ENOUGH

    def fastest_yet() -> float:
        return min(each[0] for each in seconds.values())

    with torch.inference_mode(False):
        for name, run in ways.items():
            first = _seconds(run, 1)  # it may compile, and takes memory
            if first > PATIENCE and seconds and first > HOPELESS * fastest_yet():
                seconds[name] = [first]
                continue
            seconds[name] = [_seconds(run, 1)]
            repeats[name] = max(1, round(ROUND / seconds[name][0]))
        for count in range(ROUNDS):
            if count >= SURE and time.perf_counter() > end:
                break
            for name, number in repeats.items():
                # Not by a call or two: another process may have had the core.
                if count < SURE or seconds[name][0] <= HOPELESS * fastest_yet():
                    seconds[name] = sorted([*seconds[name], _seconds(ways[name], number)])
    contending = [each for each in seconds.values() if each[0] <= HOPELESS * fastest_yet()]
    agreed = all(each[1] <= AGREE * each[0] for each in contending)
    return {name: round(1e3 * each[0], 6) for name, each in seconds.items()}, agreed


def _seconds(run: Callable[[], object], count: int) -> float:
    """Of one call; on one thread those that it worked, whatever else the machine did meanwhile."""
    clock = time.thread_time if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else time.perf_counter
    start = clock()
    for _ in range(count):
        run()
    return max((clock() - start) / count, 1e-9)


def forget() -> None:
    """What this process and the user's cache know of its class, so that it is measured anew."""
    _here.clear()
    try:
        for path in cache_folder("measured").glob("*.json"):
            path.unlink(missing_ok=True)
    except OSError:
        return  # there is no such folder, so that nothing is known


# --- the class, and its file ------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The class of this process: what decides how long something takes, beside what it is."""
    return _machine(torch.get_num_threads(), torch._C._get_mkldnn_enabled())


def _machine(threads: int, onednn: bool) -> dict[str, Any]:
    return {
        "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "onednn": onednn,
        "threads": threads, "processor": hashlib.sha256(features().encode()).hexdigest(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }  # fmt: skip


@cache
def _key(threads: int, onednn: bool) -> str:
    return digest(_machine(threads, onednn))


def path_of(key: str) -> Path:
    """The file of a class; OSError where the user has no folder for it."""
    return cache_folder("measured") / f"{key[:32]}.json"


def file() -> Path | None:
    """Where the times of this process's class are kept; None where they cannot be."""
    try:
        path = path_of(digest(machine()))
    except OSError:
        return None
    return path if os.access(path.parent, os.W_OK | os.X_OK) else None


def kept(key: str) -> dict[str, Times]:
    """What the file of a class holds: nothing where there is none, or one that cannot be trusted."""
    try:
        content = read_own(path_of(key))
        found = json.loads(content[:LARGEST])
        whole = found["sha256"] == digest([found["machine"], found["times"]]) and digest(found["machine"]) == key
        return {question: each for question, each in found["times"].items() if whole and _are_times(each)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _are_times(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(ms, float) and math.isfinite(ms) and ms > 0 for ms in found.values())
    )


def keep(key: str, found: dict[str, Times]) -> bool:
    """Adds times to the file of a class; whether that could be done."""
    about = machine()
    if digest(about) != key:  # somebody changed the environment meanwhile
        return False
    every = kept(key) | found
    record = {"machine": about, "times": every, "sha256": digest([about, every])}
    try:
        path = path_of(key)
        atomic_write(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        path.chmod(0o600)
    except OSError:  # no folder to be had, read-only, a full disk: this process knows, the next measures again
        return False
    return True
