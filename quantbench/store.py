"""Cells: finished pieces of work on disk, found again by a digest of everything they depend on.

    key = sha256(canonical JSON of {stage, inputs})

    root/<stage>/<key>/            a finished cell: its files and `cell.json`, which lists their sha256
    root/<stage>/<key>.work/       partial work of an unfinished one (checkpoints); survives a kill
    root/<stage>/<key>.lock        flock, held while somebody computes the cell
    root/<stage>/.tmp-<key>-...    a commit under way, or a stray of one that was killed

Nothing is ever seen half written: a file or a cell is written beside its final name, fsynced, and renamed, and
the folder is fsynced after it (rename(2) is atomic on POSIX; without the fsyncs it is not durable). A cell that
no longer has the bytes it was committed with is removed and computed again.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

Json = Mapping[str, object]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # stages, recipes, tracks
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # files of a cell
KEY = re.compile(r"[0-9a-f]{64}")
MANIFEST = "cell.json"
CHUNK = 1 << 20  # bytes


def check_name(name: str, what: str) -> str:
    """The name, where it may be a folder's; else ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r}: use 1 to 64 of a-z 0-9 . _ -, beginning with a letter or a digit")
    return name


def digest(value: object) -> str:
    """sha256 (hex) of a JSON value in its canonical form; ValueError for what JSON cannot hold exactly (NaN)."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: object) -> bytes:
    _check_json(value, "inputs")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_json(value: object, where: str) -> None:
    """Refuses what `json` would silently change: keys that are no text become text, so two inputs share a key."""
    if isinstance(value, dict):
        for name, member in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{where}: the key {name!r} must be text")
            _check_json(member, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _check_json(member, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: {type(value).__name__} is not a JSON value")


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a kill at any moment, sees the old bytes or the new, never a part.

    Strays of earlier, killed writes of the same file are removed. OSError names the file; the old one is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stray in path.parent.glob(f".tmp-*-{glob.escape(path.name)}"):
        _remove_unowned(stray)
    temporary = path.parent / f".tmp-{os.getpid()}-{time.monotonic_ns():x}-{path.name}"
    try:
        with _naming(temporary):
            descriptor = _open_owned(temporary)
            try:
                _write_all(descriptor, [data])
                os.replace(temporary, path)
            finally:
                os.close(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def check_writable(folder: Path, what: str) -> None:
    """ValueError, with what it is for, where a folder cannot be made or written to: told before hours of work."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{what} {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):  # of a read-only mount it says no even to root
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        raise ValueError(f"{what} {folder}: {there} {'is on a read-only mount' if read_only else 'cannot be written'}")


class Cell:
    """A cell whose lock this process holds; see `Store.cell`."""

    def __init__(self, folder: Path, header: Json, path: Path | None):
        self.path = path  # the finished folder, or None until `commit`
        self._final = folder
        self._header = header

    @property
    def work(self) -> Path:
        """A folder for partial work, which the next run finds again after a kill; `commit` deletes it."""
        assert self.path is None, "a finished cell has no partial work"
        folder = _work(self._final)
        folder.mkdir(exist_ok=True)
        return folder

    def commit(self, files: Mapping[str, bytes | Path]) -> Path:
        """Makes the cell of these files (bytes, or a file to copy) visible at once, and returns its folder.

        OSError (disk full, no permission) leaves no half cell, and partial work intact.
        """
        assert self.path is None, "a cell is committed once"
        for name in files:
            if not FILE.fullmatch(name) or name == MANIFEST:
                raise ValueError(f"a cell cannot hold a file named {name!r}")
        temporary = self._final.parent / f".tmp-{self._final.name}-{os.getpid()}"
        try:
            temporary.mkdir()
            listed = {name: _write_new(temporary / name, content) for name, content in files.items()}
            _write_new(temporary / MANIFEST, _canonical({**self._header, "files": listed}))
            _fsync_folder(temporary)
            os.rename(temporary, self._final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the next holder of the lock tries again
            raise
        _fsync_folder(self._final.parent)
        _remove_folder(_work(self._final))
        self.path = self._final
        return self._final


class Store:
    """The cells under one folder. Any number of processes may use it at once."""

    def __init__(self, root: Path | str):
        self.root = Path(root).resolve()

    def load(self, stage: str, inputs: Json) -> Path | None:
        """The folder of a finished cell, every byte of it verified; None where there is none.

        A corrupted cell is reported on stderr in a line and removed.
        """
        folder = self._folder(stage, inputs)
        fault = _fault(folder, _header(stage, inputs))
        if fault is None:
            return _used(folder)
        if folder.exists():
            if not os.access(folder.parent, os.W_OK):
                print(f"quantbench: {stage} cell {folder.name[:12]}: {fault}; it cannot be removed", file=sys.stderr)
                return None
            with _lock(folder, wait=False) as held:
                if held:  # else its holder deals with it
                    return _verified(folder, _header(stage, inputs))
        return None

    @contextmanager
    def cell(self, stage: str, inputs: Json) -> Iterator[Cell]:
        """Holds the cell's lock: of two runs of one folder one computes, the other waits and finds it finished."""
        folder, header = self._folder(stage, inputs), _header(stage, inputs)
        self.check_writable(f"a {stage} cell is missing there")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, wait=True):
            _remove_strays(folder)
            finished = _verified(folder, header)
            if finished is not None:
                _remove_folder(_work(folder))  # of a run killed between its commit's rename and this
            cell = Cell(folder, header, finished)
            try:
                yield cell
            finally:
                work = _work(folder)
                if work.is_dir() and not any(work.iterdir()):
                    work.rmdir()

    def check_writable(self, why: str) -> None:
        """ValueError where nothing can be kept: what is there can be read all the same."""
        try:
            check_writable(self.root, "the store")
        except ValueError as error:
            raise ValueError(
                f"{error}, and {why}: copy the project to where it can be written, and run there"
            ) from None

    def usage(self) -> list[tuple[str, int, int]]:
        """(stage, finished cells, bytes on disk with partial work) of every stage, by name."""
        rows = []
        for stage in self._stages():
            cells = [path for path in stage.iterdir() if KEY.fullmatch(path.name)]
            size = sum(path.lstat().st_size for path in stage.rglob("*") if path.is_file())
            rows.append((stage.name, len(cells), size))
        return rows

    def prune(self, days: float = 30.0) -> int:
        """Removes partial work, strays, and cells not used for `days` days; returns how many cells.

        Cells that some process holds are left alone, whatever their age.
        """
        removed = 0
        for stage in self._stages():
            for key in sorted({match[0] for path in stage.iterdir() if (match := KEY.search(path.name))}):
                folder = stage / key
                with _lock(folder, wait=False) as held:
                    if not held:
                        continue
                    _remove_strays(folder)
                    _remove_folder(_work(folder))
                    if folder.is_dir() and time.time() - folder.stat().st_mtime > days * 86400:
                        _remove_folder(folder)
                        removed += 1
                    folder.with_suffix(".lock").unlink()
        return removed

    def _folder(self, stage: str, inputs: Json) -> Path:
        folder = self.root / check_name(stage, "stage")
        if not folder.resolve().is_relative_to(self.root):
            raise ValueError(f"{folder} leads out of {self.root}: remove that link")
        return folder / digest(_header(stage, inputs))

    def _stages(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if NAME.fullmatch(path.name) and _is_folder(path))


def _header(stage: str, inputs: Json) -> Json:
    return {"stage": stage, "inputs": inputs}


def _work(folder: Path) -> Path:
    return folder.with_suffix(".work")


def _verified(folder: Path, header: Json) -> Path | None:
    """The cell, where it is whole; removed with a line on stderr where it is not. The lock is held."""
    fault = _fault(folder, header)
    if fault is None:
        return _used(folder)
    if folder.is_symlink() or folder.exists():
        print(f"quantbench: {folder.parent.name} cell {folder.name[:12]}: {fault}; computing it anew", file=sys.stderr)
        _remove_folder(folder)
    return None


def _fault(folder: Path, header: Json) -> str | None:
    """What is wrong with a cell, in words; None where every byte is as committed."""
    if not _is_folder(folder):
        return "missing"
    try:
        manifest = read_regular(folder / MANIFEST)
        content = json.loads(manifest)
        # Equal bytes after a round trip: no flipped bit of the manifest can hide in white space or a repeated key.
        if not isinstance(content, dict) or _canonical(content) != manifest:
            return f"{MANIFEST} is corrupted"
        listed = content.pop("files")
        if _canonical(content) != _canonical(dict(header)):
            return f"{MANIFEST} is of another cell"
        if {path.name for path in folder.iterdir()} != {MANIFEST, *listed}:
            return f"its files are not those of {MANIFEST}"
        for name, sha256 in listed.items():
            if _sha256(folder / name) != sha256:
                return f"{name} is corrupted"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return f"{MANIFEST} is corrupted"
    except (FileNotFoundError, IsADirectoryError):
        return "a file is missing"
    return None


def read_regular(path: Path) -> bytes:
    """The bytes of a file; FileNotFoundError for a link or a pipe."""
    with open(path, "rb", opener=_no_link) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file as it is now: read again only where it has changed. FileNotFoundError as `read_regular`.

    Every job of a sweep asks, and some files are gigabytes.
    """
    about = path.lstat()
    return _sha256_of(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@cache
def _sha256_of(path: Path, *state: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb", opener=_no_link) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_link(path: str, flags: int) -> int:
    """Opens a regular file only: a cell made elsewhere must not make us read through a link, or hang on a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISLNK(os.lstat(path).st_mode) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{path} is no regular file")
    return descriptor


def _used(folder: Path) -> Path:
    """Notes the time of use, for `prune`."""
    try:
        os.utime(folder)
    except OSError as error:  # somebody else's store, or a read-only one, which we may read: its owner prunes it
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return folder


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove_folder(folder: Path) -> None:
    """Removes a folder that may not be there; first its name, at once, so that nobody reads a part of it."""
    if not os.path.lexists(folder):
        return
    if not _is_folder(folder):
        folder.unlink()
        return
    stray = folder.parent / f".tmp-{folder.name}-{os.getpid()}-{time.monotonic_ns():x}"
    os.rename(folder, stray)
    shutil.rmtree(stray)


def _remove_strays(folder: Path) -> None:
    """Removes what killed commits of this key left. The lock is held, so none is under way."""
    for stray in folder.parent.glob(f".tmp-{folder.name}*"):
        shutil.rmtree(stray) if _is_folder(stray) else stray.unlink()
    for stray in _work(folder).rglob(".tmp-*"):
        stray.unlink()


def _open_owned(temporary: Path) -> int:
    """Creates a temporary file and locks it: that its writer lives (a pid is reused, and means nothing elsewhere)."""
    while True:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # another writer took it for a stray before it was locked


def _remove_unowned(stray: Path) -> None:
    """Removes a temporary file unless its writer lives."""
    try:
        descriptor = os.open(stray, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return  # renamed meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stray.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds the flock of a key; yields False where it is taken and we should not wait."""
    path = folder.with_suffix(".lock")
    descriptor = _acquire(path, wait, announce=f"{folder.parent.name} cell {folder.name[:12]}")
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _acquire(path: Path, wait: bool, announce: str) -> int | None:
    began, announced = time.monotonic(), False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if not wait:
                return None
            if not announced and time.monotonic() - began > 1.0:
                print(f"quantbench: waiting for another run, which holds {announce}", file=sys.stderr, flush=True)
                announced = True
            time.sleep(0.2 if announced else 0.02)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the next process would open the same file: `prune` removes lock files."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_new(path: Path, content: bytes | Path) -> str:
    """Writes and fsyncs a file that was not there, from bytes or by copying a file; returns its sha256."""
    sha256 = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        if isinstance(content, bytes):
            sha256.update(content)
            yield content
            return
        with open(content, "rb", opener=_no_link) as source:
            while chunk := source.read(CHUNK):
                sha256.update(chunk)
                yield chunk

    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, chunks())
        finally:
            os.close(descriptor)
    return sha256.hexdigest()


def _write_all(descriptor: int, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _fsync_folder(folder: Path) -> None:
    with _naming(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of a call on a descriptor (write, fsync), which names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
