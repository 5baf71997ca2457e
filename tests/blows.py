"""Jobs that do nothing but what befalls them: they are killed, exit, fail, report or wait. No heavy import."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from quantbench import shell
from quantbench.store import Store
from quantbench.sweep import each


@dataclass(frozen=True)
class Blow:
    """A job that does `what` on its first `times` tries, and gives its number of tries after that."""

    name: str
    what: str = ""
    times: int = 0
    track: ClassVar[Any] = SimpleNamespace(batch=1, length=1)

    def __str__(self) -> str:
        return self.name


class Unreadable(Blow):
    """A job whose module cannot be imported where it should be done."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _missing, (self.name,)


def _missing(name: str) -> None:
    raise ImportError(f"no module for {name}")


class Stillborn(Blow):
    """A job that ends the process that reads it."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _end, (self.what,)


def _end(starts: str) -> None:
    with open(starts, "a") as file:
        file.write("x")
    os._exit(9)


def meet(job: Blow, store: Store, compute: bool = True, say: Any = None) -> tuple[int, int] | None:
    """(number of tries, process)."""
    if not compute:
        return None
    tries = store.root / job.name
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    say("pretrain", 1, 2, "")
    if len(tries.read_text()) <= job.times:
        if job.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.what == "kill in the midst of a report":
            threading.Thread(target=lambda: [say("pretrain", i, i, "." * 9999) for i in count()], daemon=True).start()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        if job.what == "exit":
            sys.exit(7)
        if job.what == "fail":
            raise ValueError("it cannot be done")
        if job.what == "wait":
            Path(store.root, "waits").touch()
            time.sleep(60)
    time.sleep(0.1)
    return len(tries.read_text()), os.getpid()


def waits(root: str) -> int:
    """A program with two workers that wait; returns when both have ended."""
    jobs: list[Any] = [Blow("one", "wait", 9), Blow("two", "wait", 9)]
    return len(list(each(meet, jobs, Store(root), 2)))


if __name__ == "__main__":
    shell.run(lambda: waits(sys.argv[1]))
