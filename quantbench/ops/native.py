"""C++ kernels, compiled for this machine on first use and kept in the user's cache folder.

    $XDG_CACHE_HOME/quantbench/native/<digest>.so, <digest>.so.sha256, lock

The digest covers the source, the flags, the compiler's version and the processor's features, so that a file never has
to be replaced by another. It is loaded only where it is the user's own and its bytes are those that the compiler wrote
(a truncated library would take the process down with it); else it is built again. One build at a time, under a lock.

Where the cache cannot be used, the library is built for this process alone; where nothing can be built, `library`
returns None and says so, once. QUANTBENCH_NATIVE=0 turns native code off.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared"]
# From the fastest down: clang for ARM may know only -mcpu, that of macOS has no OpenMP.
VARIANTS = [
    [*arch, *openmp]
    for openmp in (["-fopenmp"], ["-fopenmp-simd"])
    for arch in (["-march=native"], ["-mcpu=native"], [])
]
FALLBACK = "; falling back to torch, slower, same results"
PATIENCE = 300  # seconds for one run of the compiler


def library(source: Path) -> ctypes.CDLL | None:
    """The library compiled from a C++ file; None where there is none to be had. The outcome is kept by the process."""
    return None if os.environ.get("QUANTBENCH_NATIVE") == "0" else _library(source)


@functools.cache
def _library(source: Path) -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        _say(f"no C++ compiler found (install g++ or clang++, or set CXX){FALLBACK}")
        return None
    try:
        name = _digest(source, compiler) + ".so"
        try:
            with _locked(cache_folder("native")) as folder:
                return _load(source, compiler, folder / name)
        except OSError:  # no such folder to be had, a full disk, no locks on it
            with tempfile.TemporaryDirectory(prefix="quantbench-") as folder:
                return _load(source, compiler, Path(folder) / name)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _say(f"{error}{FALLBACK}")
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


def _digest(source: Path, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    parts = [source.read_bytes(), repr([compiler, FLAGS, VARIANTS]).encode(), version, features().encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


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


def _load(source: Path, compiler: list[str], path: Path) -> ctypes.CDLL:
    """Loads the library at `path`, built first unless it is whole; the lock of its folder is held."""
    if _whole(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # a runtime library it needs is gone
            pass
    _build(source, compiler, path)
    return ctypes.CDLL(str(path))


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


def _build(source: Path, compiler: list[str], path: Path) -> None:
    """RuntimeError with the compiler's first complaint; OSError where the folder cannot be written to."""
    for stray in path.parent.glob(".tmp-*"):  # of builds that were killed: the lock is held, so none is under way
        shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        _say("building the CPU kernel for this machine (once, a few seconds) ...")
        built, complaint = Path(folder) / path.name, ""
        for variant in VARIANTS:
            command = [*compiler, *FLAGS, *variant, str(source), "-o", str(built)]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
            if run.returncode == 0 and built.exists():
                break
            complaint = complaint or next(iter(run.stderr.splitlines()), f"exit {run.returncode}")
        else:
            raise RuntimeError(f"{shlex.join(compiler)} cannot build {source.name} ({complaint})")
        note = Path(folder) / _note(path).name
        note.write_bytes(hashlib.sha256(built.read_bytes()).hexdigest().encode())
        for file in (built, note):
            file.chmod(0o600)
            with open(file, "rb") as synced:
                os.fsync(synced.fileno())
            os.replace(file, path.with_name(file.name))
