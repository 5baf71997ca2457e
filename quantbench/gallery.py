"""Records of models that somebody trained: what `measure`, `heads`, `ablate` and `dynamics` found, and their page.

    results/models/<name>/<verb>.json        the record: same model, same text, same environment class -> same numbers
    results/models/<name>/<verb>.run.json    commit, date, seconds and memory of the run that wrote it
    results/models/<name>/<verb>-*.svg       its pictures
    results/models/README.md                 all of them, rendered from the records; never edited

A record begins with {schema, verb, model, text, environment}; what follows is the verb's own (portrait.py, dormant.py,
ablation.py, dynamics.py), which also says how it is shown: as `tables` and as `pictures`.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quantbench.checks import ResultsError, by_name, check_masses, mapping, text
from quantbench.markup import Table, escape, markdown, spelled
from quantbench.results import load, placed, sealed
from quantbench.store import atomic_write, check_name
from quantbench.strict import quote

Record = dict[str, Any]

SCHEMA = 1
FOLDER = "models"
VERBS = {"measure": "portrait", "heads": "dormant", "ablate": "ablation", "dynamics": "dynamics"}  # verb -> module
OURS = "quantbench"  # the type of a model that we trained
HEAD = ("schema", "verb", "model", "text", "environment")


def compose(verb: str, model: Mapping[str, Any], read: Mapping[str, Any], environment: Any, body: Record) -> Record:
    """A whole record; ResultsError where the body holds what JSON cannot (NaN), or what no model can give."""
    record = {"schema": SCHEMA, "verb": verb, "model": dict(model), "text": dict(read), "environment": environment}
    assert not record.keys() & body.keys(), "a body has keys of its own"
    # Names and tokens of a model may hold anything: it is spelled out, since what is measured must not be lost for it.
    record = spelled(record | body)
    validate(record)
    return record


def validate(record: Any, where: str = "record") -> None:
    """ResultsError naming the first place at which this is no record of a model."""
    mapping(record, where)
    by_name(record, where)
    if record.get("schema") != SCHEMA:
        raise ResultsError(f"{where}: schema {record.get('schema')!r} is unknown (this version reads {SCHEMA})")
    if missing := [key for key in HEAD if key not in record]:
        raise ResultsError(f"{where}: missing key {missing[0]!r}")
    if record["verb"] not in VERBS:
        raise ResultsError(f"{where}.verb: {record['verb']!r} is none of {', '.join(VERBS)}")
    mapping(record["model"], f"{where}.model")
    text(record["model"].get("name"), f"{where}.model.name")
    if record["model"].get("model-type") != OURS:  # which may have any form of attention
        check_masses(record, where)


def folder_name(record: Record) -> str:
    """The name of a model as a folder has it: of a path or a hub name its last part, what a folder cannot have as -."""
    return _folder_name(str(record["model"]["name"]))


def folder(results: Path, name: str) -> Path:
    """Where the records of a model are. ValueError where nothing of its name can be a folder's."""
    return results / FOLDER / _folder_name(name)


def _folder_name(name: str) -> str:
    last = Path(name).name.lower()
    found = re.sub(r"[^a-z0-9._-]+", "-", last).lstrip("._-")[:64]
    if not found:
        raise ValueError(f"model {quote(name)}: nothing of it can name a folder of records (a-z 0-9 . _ -): rename it")
    return check_name(found, "model")


def write(results: Path, record: Record, run: Record) -> Path:
    """Puts a record, the facts of its run and its pictures below the results folder; returns the record's path."""
    place = folder(results, str(record["model"]["name"]))
    path = place / f"{record['verb']}.json"
    for name, picture in pictures(record).items():
        atomic_write(place / name, picture)
    atomic_write(path.with_suffix(".run.json"), sealed(run))
    atomic_write(path, sealed(record))
    return path


def read_all(results: Path) -> list[Record]:
    """Every record of a model, by name and in the order of VERBS. ResultsError where one is not sound."""
    found, remedy = [], "measure again"
    for path in sorted((results / FOLDER).glob("*/*.json")):
        if path.name.endswith(".run.json"):
            continue
        if not path.resolve().is_relative_to(results.resolve()):
            raise ResultsError(f"{path}: a link leads out of the results folder")
        record = load(path, remedy)
        with placed(path, remedy):
            validate(record)
            if path != results / FOLDER / folder_name(record) / f"{record['verb']}.json":
                raise ResultsError("its model or verb are not those of its path")
        found.append(record)
    return sorted(found, key=lambda r: (folder_name(r), list(VERBS).index(r["verb"])))


def tables(record: Record) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of a record, as its module shows it."""
    found: list[tuple[str, Table]] = _module(record).tables(record)
    return found


def pictures(record: Record) -> dict[str, bytes]:
    """file name -> SVG."""
    drawn: dict[str, bytes] = _module(record).pictures(record)
    return drawn


def _module(record: Record) -> Any:
    return import_module(f"quantbench.{VERBS[record['verb']]}")


INTRODUCTION = """# Models that are there already

Rendered by `quantbench leaderboard` from the records in this folder; never edited. `quantbench measure`, `heads`,
`ablate` and `dynamics` make them with `--record`.
"""


def render(results: Path) -> dict[Path, bytes]:
    """The page and the pictures, by path; nothing where there are no records."""
    records = read_all(results)
    if not records:
        return {}
    files: dict[Path, bytes] = {}
    parts = [INTRODUCTION]
    names = dict.fromkeys(map(folder_name, records))
    for name in names:
        mine = [record for record in records if folder_name(record) == name]
        parts.append(f"## {escape(name)}\n\n{escape(_about(mine[0]))}")
        for record in mine:
            parts.append(f"### {record['verb']}\n\n{escape(_source(record))}")
            parts += [f"{escape(title)}\n\n{markdown(table)}" for title, table in tables(record)]
            for file, picture in pictures(record).items():
                files[results / FOLDER / name / file] = picture
                parts.append(f"![{escape(record['verb'])} of {escape(name)}]({name}/{file})")
    files[results / FOLDER / "README.md"] = ("\n\n".join(parts) + "\n").encode()
    return files


def _about(record: Record) -> str:
    model = record["model"]
    facts = [str(model[key]) for key in ("name", "model-type", "revision", "note", "dtype") if model.get(key)]
    count = model.get("parameters")
    return ", ".join([*facts, *([f"{count:,} parameters"] if isinstance(count, int) else [])])


def _source(record: Record) -> str:
    read = "; ".join(f"{key} {value}" for key, value in record["text"].items() if key != "digest" and value is not None)
    return (
        f"On: {read}. Environment: {record['environment'].get('cpu', '')}, {record['environment'].get('device', '')}."
    )
