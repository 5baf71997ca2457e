"""results/perf/*.json -> the tables of results/perf/README.md."""

from itertools import groupby
from pathlib import Path

from quantbench.results import load

PARTS = ("statistics", "products", "attention", "training", "recipes")  # in the order of the page

HEADER = """# Speed

Rendered by `make perf` from the files of this folder, one per machine. Times are medians over rounds in which all
contestants of a case take turns; a ratio is the median over rounds of a time over the anchor's: below 1 is faster; in
brackets, where they are known, the quartiles of the rounds' ratios.
A goal is met (✓) or missed (✗) by the ratio to the contestant it names.
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


def _line(row: dict) -> str:
    goals = [("✓" if g["ratio"] <= g["at-most"] else "✗", g["goal"], f"({g['ratio']:.3g})") for g in row["goals"]]
    reached = "; ".join(" ".join(goal) for goal in goals)
    ratio = f"{row['ratio']:.3g}" + (" ({:.3g} to {:.3g})".format(*row["quartiles"]) if "quartiles" in row else "")
    return f"| {row['case']} | {row['what']} | {row['ms']:.4g} | {ratio} | {reached} |"
