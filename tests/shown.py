"""A record of a measured model is shown without torch: the leaderboard renders all pages at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from quantbench.results import canonical


def without_torch(module: str, body: dict[str, Any], folder: Path) -> list[str]:
    """In a process of its own: how many tables, how many pictures, and whether torch was loaded."""
    (folder / "record.json").write_bytes(canonical({k: v for k, v in body.items() if k != "run"}))
    program = (
        f"import json, sys; from quantbench.{module} import pictures, tables; record = json.load(open(sys.argv[1])); "
        "print(len(tables(record)), len(pictures(record)), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(folder / "record.json")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
