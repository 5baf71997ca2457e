"""`make perf`: what is fast and what is not, each as a ratio to a peer in the same run, into results/perf/.

python -m tests.perf [PART ...]        statistics products grid attention training recipes; all where none is named

A CPU that has more than AVX2 runs some parts a second time as one that has not, for a file of its own: with the
variables that hide the rest from torch and from the math libraries, and without oneDNN, which torch takes for bf16 and
int8 products only where it sees AVX512 or VNNI. Exit code 1 where a goal is missed.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from quantbench.bench import environment, source
from quantbench.face import root
from quantbench.results import load, sealed
from quantbench.store import atomic_write
from tests.perf.table import PARTS, missed, render

CORES = 2
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ON_AVX2 = ("statistics", "products", "grid", "attention")  # whose paths or goals depend on the CPU


def main(parts: list[str]) -> int:
    if unknown := set(parts) - set(PARTS) - {"--avx2"}:
        sys.exit(f"make perf: there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if "--avx2" in parts:
        torch._C._set_mkldnn_enabled(False)
        return run([part for part in parts if part != "--avx2"], "avx2-emulated")
    code = run(parts or [*PARTS])
    again = [part for part in ON_AVX2 if part in (parts or PARTS)]
    if again and not torch.cuda.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability():
        print("once more, as a CPU with AVX2 and nothing newer", flush=True)
        command = [sys.executable, "-m", "tests.perf", "--avx2", *again]
        code = max(code, subprocess.run(command, env=os.environ | AVX2).returncode)
    return code


def run(parts: list[str], suffix: str = "") -> int:
    """Measures the parts into this machine's file, and renders all files; 1 where a goal is missed."""
    if hasattr(os, "sched_setaffinity"):  # the same two cores throughout, on a machine of many, too
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(min(CORES, torch.get_num_threads()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here: dict[str, Any] = environment()
    name = re.sub("[^a-z0-9]+", "-", (here["cpu"] if device == "cpu" else here["device"]).lower()).strip("-")
    if suffix:
        name, here = f"{name.removesuffix('-avx2')}-{suffix}", here | {"cpu": f"{here['cpu']} emulated"}
    folder = root() / "results" / "perf"
    path = folder / f"{name}.json"
    record = load(path) if path.exists() else {}
    lines = []
    for part in parts:
        rows = import_module(f"tests.perf.{part}").rows(device)
        lines += missed(rows)
        record[part] = {"rows": rows, "environment": here, "source": source()}
        atomic_write(path, sealed(record))
    atomic_write(folder / "README.md", render(folder).encode())
    for line in lines:
        print(f"MISSED on {here['cpu']}: {line}", file=sys.stderr, flush=True)
    _summary(path, lines)
    return 1 if lines else 0


def _summary(path: Path, lines: list[str]) -> None:
    print(f"{path.name}: " + (f"{len(lines)} goals missed" if lines else "every goal met"), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
