"""What the program owes the shell that it runs in: signals are answered, and output that nobody takes loses no work.

A signal (SIGINT, SIGTERM, SIGHUP) ends the program with one line and 128 + its number, whenever it comes: during
imports, twice, while the interpreter shuts down. Nothing has to be put in order for it, since whatever is written is
whole after a kill at any moment (see store.py).

A reader that has enough (`| head`) is no failure. A stream that is closed, or on a full disk, is one that is told at
the end, when the work is done and kept. What the terminal's encoding has no sign for is written in ASCII.

Imported before anything else, when signals are not yet answered: so it is quick, and imports nothing that is slow.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # as that of typing, which alone takes longer than all the rest
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 3.0  # seconds from the first signal to the end
ASCII = {"×": "x", "−": "-", "–": "-", "±": "+/-", "ρ": "rho", "‖": "||", "→": "->", "²": "^2", "Δ": "delta ",
         "†": "*", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"'}  # fmt: skip


class Stopped(KeyboardInterrupt):
    """A signal has come. A KeyboardInterrupt, so that nobody takes it for an error that can be handled."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(main: Callable[[], int]) -> int:
    """Runs the program `main` and ends the process with its exit code: signals are answered, and output may fail."""
    if _state["running"]:
        return main()
    _state["running"] = True
    try:
        install()
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except KeyboardInterrupt as stop:
        code = stopped(stop)
    _state["ending"] = True  # from here on, nobody would catch a `Stopped`
    code = _finished(code)
    os._exit(code)  # at once: there is nothing to put in order, and a signal in the midst of that would be an error


def install() -> None:
    """Signals become `Stopped`, and the streams steady. A signal that the caller ignores (nohup) stays ignored."""
    for signum in STOPS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)
    steady_streams()


# --- signals ---------------------------------------------------------------------------------------------------------

_state = {"running": False, "ending": False, "told": False}


def _stop(signum: int, _frame: FrameType | None) -> None:
    if _state["ending"]:  # asked twice, or too late for an exception
        _end(signum)
    _state["ending"] = True
    # In case that nobody catches it (Python drops what is raised within a __del__), or what is put in order hangs.
    signal.signal(signal.SIGALRM, lambda *_: _end(signum))
    signal.setitimer(signal.ITIMER_REAL, GRACE)
    raise Stopped(signum)


def stopped(stop: KeyboardInterrupt) -> int:
    """Says, once, that the program was stopped; its exit code."""
    signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
    if not _state["told"]:
        _state["told"] = True
        how = "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"
        line = f"quantbench: {how}; run the same command again to go on where it stopped"
        # Not through sys.stderr, in the midst of whose work a second signal may have come.
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
    return 128 + signum


def _end(signum: int) -> NoReturn:
    """Ends the program from within a handler, where everything may be half done."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    processes: Any = sys.modules.get("multiprocessing.process")
    for worker in processes.active_children() if processes else ():
        worker.kill()
    code = stopped(Stopped(signum))
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the cursor, which bars of progress hide
    os._exit(code)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until this is left; a process that is started in it never gets them, but for SIGKILL."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- streams ---------------------------------------------------------------------------------------------------------


class _Steady(io.RawIOBase):
    """A descriptor to write to. From the first failure on what is written is dropped, and the failure kept."""

    def __init__(self, descriptor: int, failure: OSError | None) -> None:
        self._descriptor, self.failure = descriptor, failure

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


def steady_streams() -> None:
    """Puts streams that never raise in the place of sys.stdout and sys.stderr."""
    if isinstance(_raw(sys.stdout), _Steady):
        return
    codecs.register_error("ascii-signs", _in_ascii)
    closed = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: else the next file would be stdout
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        failure = OSError(errno.EBADF, os.strerror(errno.EBADF)) if descriptor in closed else None
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(_Steady(descriptor, failure)),
            encoding=getattr(before, "encoding", "utf-8"),
            errors="surrogateescape" if getattr(before, "errors", "") == "surrogateescape" else "ascii-signs",
            line_buffering=getattr(before, "line_buffering", True),
            write_through=getattr(before, "write_through", False),
        ))  # fmt: skip


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _raw(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """For what an encoding lacks: the ASCII that stands for a sign, else its escape."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    return "".join(ASCII.get(sign) or sign.encode("unicode-escape").decode() for sign in signs), error.end


def _finished(code: int) -> int:
    """The exit code, when the output is out, or what became of it is told."""
    sys.stdout.flush()
    failure = getattr(_raw(sys.stdout), "failure", None)
    if failure and failure.errno != errno.EPIPE:
        print(f"quantbench: stdout: {failure.strerror}: what was to be printed is lost, not the work", file=sys.stderr)
        code = code or 2
    sys.stderr.flush()
    return code
