"""results/perf/*.json -> the tables of results/perf/README.md."""

from itertools import groupby
from pathlib import Path

from quantbench.results import load

PARTS = ("statistics", "products", "grid", "attention", "training", "recipes")  # in the order of the page

HEADER = """# Speed

Rendered by `make perf` from the files of this folder, one per machine. Times are medians over rounds in which all
contestants of a case take turns (on one thread: those that the process worked); a ratio is the median over rounds of a
time over the anchor's: below 1 is faster; in brackets, where they are known, the quartiles of the rounds' ratios.
A goal is met (✓) or missed (✗) by the ratio to the contestant it names. *Emulated* is a CPU that had more, used as one
with AVX2 and nothing newer.
"""


def render(folder: Path) -> str:
    """The tables of every machine's file."""
    lines = [HEADER]
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        for part in sorted(record, key=PARTS.index):
            found = record[part]
            here = found["environment"]
            where = here["cpu"] if here["device"] == "cpu" else here["device"]
            lines += [f"## {part.capitalize()}: {where}, torch {here['torch']}", ""]
            for (table, anchor), rows in groupby(found["rows"], key=lambda row: (row["table"], row["anchor"])):
                lines += [f"### {table}", "", f"| case | contestant | ms | × {anchor} | goals |"]
                lines += ["| --- | --- | --: | --: | --- |"]
                lines += [_line(row) for row in rows] + [""]
    return "\n".join(lines)


def missed(rows: list[dict]) -> list[str]:
    """The goals that were not reached, a line each."""
    return [
        f"{row['table']}, {row['case']}: {row['what']} {goal['goal']} ({goal['ratio']:.3g})"
        for row in rows
        for goal in row["goals"]
        if goal["ratio"] > goal["at-most"]
    ]


def _line(row: dict) -> str:
    goals = [("✓" if g["ratio"] <= g["at-most"] else "✗", g["goal"], f"({g['ratio']:.3g})") for g in row["goals"]]
    reached = "; ".join(" ".join(goal) for goal in goals)
    ratio = f"{row['ratio']:.3g}" + (" ({:.3g} to {:.3g})".format(*row["quartiles"]) if "quartiles" in row else "")
    return f"| {row['case']} | {row['what']} | {row['ms']:.4g} | {ratio} | {reached} |"
