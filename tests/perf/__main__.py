"""`make perf`: what is fast and what is not, each as a ratio to a peer in the same run, into results/perf/.

python -m tests.perf [statistics] [products] [attention] [training] [recipes]        all of them where none is named
"""

import os
import re
import sys
from importlib import import_module

import torch

from quantbench.bench import environment, source
from quantbench.face import root
from quantbench.results import load, sealed
from quantbench.store import atomic_write
from tests.perf.table import PARTS, render

CORES = 2


def main(parts: list[str]) -> None:
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"make perf: there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if hasattr(os, "sched_setaffinity"):  # the same two cores throughout, on a machine of many, too
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(min(CORES, torch.get_num_threads()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = environment()
    name = re.sub("[^a-z0-9]+", "-", (here["cpu"] if device == "cpu" else here["device"]).lower()).strip("-")
    folder = root() / "results" / "perf"
    path = folder / f"{name}.json"
    record = load(path) if path.exists() else {}
    for part in parts or PARTS:
        rows = import_module(f"tests.perf.{part}").rows(device)
        record[part] = {"rows": rows, "environment": here, "source": source()}
        atomic_write(path, sealed(record))
    atomic_write(folder / "README.md", render(folder).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
