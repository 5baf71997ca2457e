"""What a verb needs of the place where it runs: the project's folder, the terminal. Nothing heavy is imported."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from quantbench.markup import visible


def root() -> Path:
    """The project: the nearest folder from here upwards that has recipes/tracks; else where this package stands."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "recipes" / "tracks").is_dir():
            return folder
    raise ValueError("no recipes/tracks folder here or above: run quantbench inside a clone of the project")


def print_table(shown: "tuple[list[str], list[list[str]]]", title: str) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    header, rows = shown
    table = Table(*map(visible, header), title=visible(title), title_justify="left")
    for row in rows:
        table.add_row(*map(visible, row))
    # A pipe has no width of its own: give it all the table needs.
    console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=240)
    console.print(table)


def print_json(found: object) -> None:
    """One JSON object on the terminal, in ASCII where that has no other signs; keys are sorted, a NaN is refused."""
    wide = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(found, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=not wide))


def progress() -> Callable[[str, int, int, str], None]:
    """Progress on stderr: one line that is written over on a terminal, a line every five seconds elsewhere."""
    last = [0.0]
    terminal = sys.stderr.isatty()

    def say(stage: str, done: int, of: int, detail: str) -> None:
        now = time.monotonic()
        if not terminal and done < of and now - last[0] < 5:
            return
        last[0] = now
        width = 24
        bar = "#" * (width * done // max(1, of))
        line = f"{stage:<10} [{bar:<{width}}] {done}/{of} {detail}".rstrip()
        print(f"\r\x1b[2K{line[:110]}" if terminal else line, end="" if terminal and done < of else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    return say


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The type of an argument."""

    def number(text: str) -> int:
        found = int(text)
        if not least <= found <= most:
            due = f"{least} or more" if most == math.inf else f"{least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{found}: {due} is needed")
        return found

    return number
