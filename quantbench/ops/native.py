"""C++ kernels, compiled for this machine on first use and kept in the user's cache folder.

    $XDG_CACHE_HOME/quantbench/native/<digest>.so, <digest>.so.sha256, <digest>.fastest.json, lock

The digest covers the source, the flags, the compiler's version and the processor's features, so that a file never has
to be replaced by another. It is loaded only where it is the user's own and its bytes are those that the compiler wrote
(a truncated library would take the process down with it); else it is built again. One build at a time, under a lock.

Where a processor has vectors of 512 bits a kernel is built for these and for 256 bits, and the one that was measured
faster is used: once, and noted in <digest>.fastest.json. Kernels are written so that both give the same bits.

Where the cache cannot be used, the library is built for this process alone; where nothing can be built, `library`
returns None and says so, once. QUANTBENCH_NATIVE=0 turns native code off. ATEN_CPU_CAPABILITY=avx2 (or default), by
which torch does without wider vectors, holds for these kernels, too: so one machine shows how fast another would be.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# -ffp-contract=off: which sums are rounded once is up to the source. -fno-tree-ter: else g++ moves loads away from
# their use, and there are too few registers of 256 bits to hold them (a tenth of the time; clang knows no such thing).
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fno-tree-ter", "-fPIC", "-shared"]
OPENMP = [["-fopenmp"], ["-fopenmp-simd"]]  # clang of macOS has no OpenMP
# By ATEN_CPU_CAPABILITY, the fastest first. clang for ARM may know only -mcpu.
PROCESSORS: dict[str, list[list[str]]] = {
    "": [["-march=native"], ["-mcpu=native"], []],
    "avx2": [["-march=haswell", "-mtune=native"], ["-march=haswell"]],
    "default": [[]],
}
WIDTHS: dict[str, list[str]] = {"512-bit": [], "256-bit": ["-DNARROW", "-mprefer-vector-width=256"]}
FALLBACK = "; falling back to torch, slower, same results"
PATIENCE = 300  # seconds for one run of the compiler


class Choice(NamedTuple):
    """Which build of a kernel runs, and the milliseconds by which it was chosen: none where there is but one build."""

    path: str
    ms: dict[str, float]


Measure = Callable[[dict[str, ctypes.CDLL]], dict[str, float]]  # milliseconds of each build


def library(source: Path, measure: Measure | None = None) -> ctypes.CDLL | None:
    """The library compiled from a C++ file; None where there is none to be had. The outcome is kept by the process.

    With `measure` the file is built for every width of vectors in `WIDTHS` that the processor has.
    """
    return (_outcome(source, measure) or (None,))[0]


def choice(source: Path, measure: Measure | None = None) -> Choice | None:
    """What `library` chose."""
    outcome = _outcome(source, measure)
    return outcome and outcome[1]


def _outcome(source: Path, measure: Measure | None) -> tuple[ctypes.CDLL, Choice] | None:
    return None if os.environ.get("QUANTBENCH_NATIVE") == "0" else _library(source, measure, _capability())


def _capability() -> str:
    """The capability that the user holds torch to, where this processor has it."""
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "")
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return asked if on_x86 and (asked == "default" or (asked == "avx2" and _has("avx2"))) else ""


@functools.cache
def _library(source: Path, measure: Measure | None, capability: str) -> tuple[ctypes.CDLL, Choice] | None:
    compiler = find_compiler()
    if compiler is None:
        _say(f"no C++ compiler found (install g++ or clang++, or set CXX){FALLBACK}")
        return None
    try:
        try:
            with _locked(cache_folder("native")) as folder:
                return _fastest(source, compiler, capability, folder, measure)
        except OSError:  # no such folder to be had, a full disk, no locks on it
            with tempfile.TemporaryDirectory(prefix="quantbench-") as folder:
                return _fastest(source, compiler, capability, Path(folder), measure)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _say(f"{error}{FALLBACK}")
        return None


def _fastest(
    source: Path, compiler: list[str], capability: str, folder: Path, measure: Measure | None
) -> tuple[ctypes.CDLL, Choice]:
    """Loads the build that is noted as the fastest, or all of them, where that is yet to be measured."""
    commands = _commands(compiler, capability, measure is not None)
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    paths = {name: folder / f"{_digest(source, tried, version)}.so" for name, tried in commands.items()}
    if measure is None or len(commands) == 1:
        (name,) = commands
        return _load(source, commands, paths)[name], Choice(name, {})
    note = folder / f"{_digest(source, list(commands.values()), version)}.fastest.json"
    noted = _noted(note, set(commands))
    if noted is not None:
        return _load(source, {noted.path: commands[noted.path]}, paths)[noted.path], noted
    libraries = _load(source, commands, paths)
    ms = measure(libraries)
    found = Choice(min(ms, key=lambda name: ms[name]), ms)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        written = Path(temporary) / note.name
        written.write_text(json.dumps(found._asdict()))
        _publish(written, note)
    return libraries[found.path], found


def _commands(compiler: list[str], capability: str, widths: bool) -> dict[str, list[list[str]]]:
    """For every build those that are tried in turn, but for the source and the output."""
    variants = [[*processor, *openmp] for openmp in OPENMP for processor in PROCESSORS[capability]]
    builds: dict[str, list[str]] = {capability or "native": []}
    if widths and capability == "" and _has("avx512bw"):
        builds = WIDTHS
    return {name: [[*compiler, *FLAGS, *more, *variant] for variant in variants] for name, more in builds.items()}


def _noted(note: Path, builds: set[str]) -> Choice | None:
    """None where nothing was noted, or what was is not whole."""
    try:
        found = Choice(**json.loads(read_own(note)))
        known = found.path in builds and found.ms.keys() == builds
        return found if known and all(isinstance(time, float) for time in found.ms.values()) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _say(line: str) -> None:
    print(f"quantbench: {line}", file=sys.stderr, flush=True)


def find_compiler() -> list[str] | None:
    """The words that call a C++ compiler; None where there is none."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _digest(source: Path, commands: Sequence[object], version: bytes) -> str:
    parts = [source.read_bytes(), repr(commands).encode(), version, features().encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _has(feature: str) -> bool:
    return feature in features().split()


def features() -> str:
    """What the processor is and can do: what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *sorted(kept)])


def cache_folder(part: str) -> Path:
    """A folder of the user's cache, which only the user can write to; OSError where there is none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else _home() / ".cache") / "quantbench" / part
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise FileNotFoundError("no home folder") from error


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def _load(source: Path, commands: dict[str, list[list[str]]], paths: dict[str, Path]) -> dict[str, ctypes.CDLL]:
    """Loads the libraries at `paths`, built first unless they are whole; the lock of their folder is held."""
    found = {name: loaded for name in commands if (loaded := _loaded(paths[name])) is not None}
    if missing := commands.keys() - found.keys():
        for stray in paths[min(missing)].parent.glob(".tmp-*"):  # of builds that were killed: none is under way
            shutil.rmtree(stray, ignore_errors=True)
        _say("building the CPU kernel for this machine (once, a few seconds) ...")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: _build(source, commands[name], paths[name]), sorted(missing)))
        found |= {name: ctypes.CDLL(str(paths[name])) for name in missing}
    return {name: found[name] for name in commands}


def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path)) if _whole(path) else None
    except OSError:  # a runtime library it needs is gone
        return None


def _whole(path: Path) -> bool:
    """Whether it is the user's own file, with the bytes that were noted when it was built."""
    try:
        content, noted = read_own(path), read_own(_note(path))
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == noted


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def read_own(path: Path) -> bytes:
    """The bytes of a file that the user alone can write to; OSError where it is none."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{path} is not a file of this user alone")
        return file.read()


def _build(source: Path, commands: list[list[str]], path: Path) -> None:
    """By the first command that can. RuntimeError with the first complaint; OSError where the folder is read-only."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        built, complaint = Path(folder) / path.name, ""
        for command in commands:
            run = subprocess.run(
                [*command, str(source), "-o", str(built)],
                capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            )  # fmt: skip
            if run.returncode == 0 and built.exists():
                break
            complaint = complaint or next(iter(run.stderr.splitlines()), f"exit {run.returncode}")
        else:
            raise RuntimeError(f"{commands[0][0]} cannot build {source.name} ({complaint})")
        note = Path(folder) / _note(path).name
        note.write_bytes(hashlib.sha256(built.read_bytes()).hexdigest().encode())
        _publish(built, path)
        _publish(note, _note(path))


def _publish(file: Path, path: Path) -> None:
    """Moves a file, whole, to where it is looked for."""
    file.chmod(0o600)
    with open(file, "rb") as synced:
        os.fsync(synced.fileno())
    os.replace(file, path)
