"""Records: one small JSON file per recipe, track and seed, from which every table and figure is rendered.

    results/<track>/<recipe>/seed-<n>.json       the record: same inputs, same environment class -> same bytes
    results/<track>/<recipe>/seed-<n>.run.json   commit, date, timings of the run that wrote it; never compared
    results/<track>/<recipe>/sites-<quantizer>-seed-<n>.json (+ .run.json)   what each site pays, likewise
    results/<track>/<recipe>/probe-seed-<n>.json (+ .run.json)   what interventions do to the trained model, likewise

What is undefined is null, never NaN; losses are nats per token, damage and KL likewise, SQNR is in dB.
The schema is the table of checks below. A file that breaks it is an integrity error (`ResultsError`): it names
the file and the place in it, and nothing is rendered.

A file vouches for itself. Its member "sha256" stands in a line of its own, and is that of all its other lines:

    grep -v '^ "sha256"' FILE | sha256sum

So do what `tune`, `measure`, `heads`, `ablate`, `dynamics` and `make perf` keep, and the searches beside the records.
A file without it is refused: it was written by a version that could not tell a changed figure from a measured one.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from quantbench.store import atomic_write, check_name

Record = dict[str, Any]
Check = Callable[[Any, str], None]
T = TypeVar("T", str, tuple[str, str])

SCHEMA = 1
BASELINE = "baseline"
PATH = re.compile(r"(sites-.+-|probe-)?seed-(0|[1-9][0-9]{0,8})\.json")
LARGEST = 1 << 26  # bytes; a record is some tens of kilobytes
SEAL = "sha256"  # the member by which a file vouches for itself
# Members of the whole stand one space in, and text has no line ends: no other line begins like this.
SEAL_LINE = re.compile(rb'^ "sha256": "([0-9a-f]{64}|)",?\n', re.MULTILINE)


class ResultsError(Exception):
    """A committed record cannot be trusted: malformed, of another schema, or not where its content says."""


# --- the schema ----------------------------------------------------------------------------------------------------


def _of(kind: type, name: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ResultsError(f"{where}: {name} is needed, not {_short(value)}")

    return check


text, integer, mapping, sequence = _of(str, "text"), _of(int, "an integer"), _of(dict, "an object"), _of(list, "a list")


def number(value: Any, where: str) -> None:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ResultsError(f"{where}: a finite number is needed, not {_short(value)}")


def anything(value: Any, where: str) -> None:
    """JSON of any shape, as a resolved recipe is; its numbers are finite all the same."""
    if isinstance(value, dict):
        _each(anything)(value, where)
    elif isinstance(value, list):
        _list(anything)(value, where)
    elif isinstance(value, float):
        number(value, where)
    elif not isinstance(value, str | int | None):
        raise ResultsError(f"{where}: {_short(value)} is not a JSON value")


def _name(value: Any, where: str) -> None:
    text(value, where)
    try:
        check_name(value, "name")
    except ValueError as error:
        raise ResultsError(f"{where}: {error}") from error


def _or_null(check: Check) -> Check:
    def optional(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return optional


def _list(check: Check) -> Check:
    def every(value: Any, where: str) -> None:
        sequence(value, where)
        for index, member in enumerate(value):
            check(member, f"{where}[{index}]")

    return every


def _each(check: Check, names: Check = text) -> Check:
    """An object with names of its own choice."""

    def every(value: Any, where: str) -> None:
        mapping(value, where)
        for name, member in value.items():
            names(name, where)
            check(member, f"{where}.{name}")

    return every


def _object(since: tuple[str, ...] = (), **members: Check) -> Check:
    """An object with just these members; `a_b` stands for the key `a-b`. Older records lack those of `since`."""
    checks = {name.replace("_", "-"): check for name, check in members.items()}

    def every(value: Any, where: str) -> None:
        mapping(value, where)
        for name in sorted((checks.keys() ^ value.keys()) - set(since) | (value.keys() - checks.keys())):
            raise ResultsError(f"{where}: {'missing' if name in checks else 'unknown'} key {name!r}")
        for name in value:
            checks[name](value[name], f"{where}.{name}")

    return every


def _point(value: Any, where: str) -> None:
    sequence(value, where)
    if len(value) != 2:
        raise ResultsError(f"{where}: [step, loss] is needed, not {_short(value)}")
    integer(value[0], where)
    number(value[1], where)


def _interval(value: Any, where: str) -> None:
    sequence(value, where)
    if len(value) != 3:
        raise ResultsError(f"{where}: [mean, low, high] is needed, not {_short(value)}")
    number(value[0], where)
    _figure(value[1], where)
    _figure(value[2], where)


_figure = _or_null(number)
_figures = _or_null(_each(_figure))
_named: dict[str, Any] = {"name": _name, "digest": text, "title": text}
_exempted = _object(since=("sequence-losses",), damage=_figure, kl=_figure, sequence_losses=_list(_figure))
_quality: dict[str, Any] = {
    "loss": _figure,
    "perplexity": _figure,
    "bits_per_byte": _figure,
    "lm_eval": _figures,
    "lm_eval_items": _or_null(_each(text)),  # of standard tasks: which items were right, a 1 or a 0 each
    "sequence_losses": _list(_figure),
}
_UNITS = ("lm-eval-items", "sequence-losses", "sequence-kl")  # what intervals are over where a model has one seed

# What every record begins with.
_head: dict[str, Any] = {
    "schema": integer,
    "status": text,
    "reason": _or_null(text),
    "recipe": _object(**_named, resolved=_each(anything)),
    "track": _object(**_named, resolved=_each(anything)),
    "seed": integer,
    "data": text,
    "versions": _each(anything),
    "environment": _object(
        since=("statistics",),
        torch=text,
        bitsandbytes=_or_null(text),
        threads=integer,
        cpu=text,
        device=text,
        statistics=text,
    ),
}


def _watched(value: Any, where: str) -> None:
    """Of a track that is watched: {figure: a value a layer}, and the task's own figures; see watch.py."""
    mapping(value, where)
    _each(_list(_figure))({name: each for name, each in value.items() if name != "task"}, where)
    _each(_figure)(value.get("task"), f"{where}.task")


_shape = _object(
    **_head,
    cost=_object(parameters=integer, added_parameters=integer, flops_per_token=integer),
    training=_object(
        losses=_list(_point),
        final_loss=_figure,
        timeline=_list(
            _object(
                since=("watched",),
                step=integer,
                residual_peak=_figure,
                bos_attention=_figure,
                value_drain=_figure,
                loss=_figure,
                watched=_watched,
            )
        ),
    ),
    full_precision=_or_null(
        _object(
            since=_UNITS,
            **_quality,
            tokens=_or_null(integer),
            task=_figures,
            metrics=_each(_object(value=_figure, per_layer=_list(_figure), extra=_each(_figure))),
        )
    ),
    quantized=_each(
        _object(
            since=_UNITS,
            **_quality,
            sequence_kl=_list(_figure),
            damage=_figure,
            kl=_figure,
            top1_agreement=_figure,
            sqnr=_or_null(_each(_list(_figure))),
            report=_each(anything),
            exemption=_or_null(_object(extreme=_exempted, random=_exempted, tokens=integer)),
        ),
        names=_name,
    ),
)

_estimated = _object(damage=_or_null(_interval), kl=_or_null(_interval))
_paid: dict[str, Any] = {"alone": _estimated, "spared": _estimated}
_propagated = _list(_object(total=_figure, accumulated=_figure, local=_figure, interaction=_figure))

# What `quantbench probe` writes: a trained model, as it is and after each intervention, in the terms of probe.py.
_probe = _object(
    **_head,
    sequences=integer,
    untouched=_or_null(_each(_or_null(_interval))),
    interventions=_each(_each(_or_null(_interval))),
)

# What `quantbench sites` writes: what each place pays for being rounded, in the terms of sites.py.
_sites = _object(
    **_head,
    quantizer=_object(name=_name, resolved=anything),
    sequences=integer,
    extreme=_or_null(_object(layer=integer, threshold=number, tokens=integer)),
    all=_or_null(_estimated),
    kinds=_each(_object(**_paid)),
    places=_each(_each(_object(**_paid, sqnr=_or_null(_object(sink=_figure, non_sink=_figure))))),
    propagation=_or_null(_object(all=_propagated, non_sink=_propagated)),
)


def validate(record: Any, where: str = "record") -> None:
    """ResultsError naming the first place at which this is no record."""
    mapping(record, where)
    if record.get("schema") != SCHEMA:
        raise ResultsError(f"{where}: schema {_short(record.get('schema'))} is unknown (this version reads {SCHEMA})")
    of_sites, of_probe = "quantizer" in record, "interventions" in record
    (_sites if of_sites else _probe if of_probe else _shape)(record, where)
    status = record["status"]
    if status not in ("finished", "diverged"):
        raise ResultsError(f"{where}.status: finished or diverged is needed, not {_short(status)}")
    if record["seed"] < 0:
        raise ResultsError(f"{where}.seed: {record['seed']} is below 0")
    if status == "diverged" and not record["reason"]:
        raise ResultsError(f"{where}.reason: a diverged run says why")
    if status == "finished" and of_sites:
        for name in ("extreme", "all", "propagation"):
            if record[name] is None:
                raise ResultsError(f"{where}.{name}: a finished run has it")
        if record["kinds"].keys() != record["places"].keys():
            raise ResultsError(f"{where}.places: its kinds of site are not those of {where}.kinds")
    elif status == "finished" and of_probe:
        if record["untouched"] is None or not record["interventions"]:
            raise ResultsError(f"{where}.untouched: a finished run has it, and interventions")
    elif status == "finished":
        full = record["full-precision"]
        if full is None or full["loss"] is None:
            raise ResultsError(f"{where}.full-precision.loss: a finished run has one")
        if rank_by(record) not in record["quantized"]:
            raise ResultsError(f"{where}.quantized: {rank_by(record)!r}, by which the track ranks, is missing")
        if not record["track"]["resolved"].get("seeds"):
            raise ResultsError(f"{where}.track.resolved.seeds: missing")


def rank_by(record: Record) -> str:
    """The quantizer by whose damage the record's track ranks its rows."""
    rule = record["track"]["resolved"].get("rank-by")
    if not isinstance(rule, dict) or not isinstance(rule.get("damage"), str):
        raise ResultsError(f"track {record['track']['name']}: rank-by names no quantizer")
    return str(rule["damage"])


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# --- files ---------------------------------------------------------------------------------------------------------


def canonical(record: Record) -> bytes:
    """The record's bytes: sorted keys, floats in the shortest form that reads back equal, no NaN."""
    return (json.dumps(record, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def sealed(record: Record) -> bytes:
    """The bytes of a record's file: canonical, with the member that vouches for all the others."""
    assert SEAL not in record, "a record in memory has no seal"
    return canonical({**record, SEAL: _seal(canonical({**record, SEAL: ""}))})


def unsealed(data: bytes) -> Record:
    """The record that a file holds. ResultsError where its bytes are not those that `sealed` wrote."""
    found = SEAL_LINE.search(data)
    if found is None:
        raise ResultsError(f"no line {SEAL!r} vouches for it: it is of an older version, or was damaged")
    if found[1].decode() != _seal(data):
        raise ResultsError(f"it is not as it was written: its {SEAL} is of other bytes")
    try:
        record: Record = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"no JSON: {error}") from error
    mapping(record, "record")
    if canonical(record) != data:
        raise ResultsError("not in canonical form: it was edited after it was written")
    del record[SEAL]
    return record


def _seal(data: bytes) -> str:
    return hashlib.sha256(SEAL_LINE.sub(b"", data)).hexdigest()


def load(path: Path, remedy: str = "run again what made it") -> Record:
    """The record of a file, as it was written; its schema is not looked at. ResultsError names the file."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
        raise ResultsError(f"{path}: not a record file")
    with placed(path, remedy):
        return unsealed(path.read_bytes())


@contextmanager
def placed(path: Path, remedy: str) -> Iterator[None]:
    """Names the file, and what to do, in what is wrong with a record."""
    try:
        yield
    except (ResultsError, ValueError, RecursionError) as error:
        raise ResultsError(
            f"{path}: {error}; restore it (git checkout -- {path}), or remove it and {remedy}"
        ) from error


def path_of(root: Path, record: Record) -> Path:
    """Where the record lives below the results folder."""
    track, recipe = check_name(record["track"]["name"], "track"), check_name(record["recipe"]["name"], "recipe")
    name = f"seed-{record['seed']}.json"
    if "quantizer" in record:
        name = f"sites-{check_name(record['quantizer']['name'], 'quantizer')}-{name}"
    if "interventions" in record:
        name = f"probe-{name}"
    return root / track / recipe / name


def read(path: Path) -> Record:
    """One record, validated. ResultsError names the file."""
    remedy = "run its recipe again"
    record = load(path, remedy)
    with placed(path, remedy):
        validate(record)
        if not PATH.fullmatch(path.name) or path_of(path.parents[2], record) != path:
            raise ResultsError("its track, recipe, seed or quantizer are not those of its path")
    return record


def check_others(root: Path) -> None:
    """ResultsError where a file below the results folder that no table is made of is not as it was written.

    These are the facts of runs, sweeps of learning rates, searches for a track's setting, and measurements of speed.
    """
    for pattern in ("*/*/*.run.json", "*/*/tune.json", "*/search.json", "perf/*.json"):
        for path in sorted(root.glob(pattern)):
            load(path)


def read_all(root: Path) -> list[Record]:
    """Every record below the results folder, by track, recipe and seed. ResultsError where one is not sound."""
    return _read_below(root, "seed-*.json")


def read_sites(root: Path) -> list[Record]:
    """What `quantbench sites` wrote below the results folder; as `read_all`."""
    return sorted(_read_below(root, "sites-*.json"), key=lambda r: str(r["quantizer"]["name"]))


def read_probes(root: Path) -> list[Record]:
    """What `quantbench probe` wrote below the results folder; as `read_all`."""
    return _read_below(root, "probe-*.json")


def _read_below(root: Path, pattern: str) -> list[Record]:
    paths = [path for path in root.glob(f"*/*/{pattern}") if not path.name.endswith(".run.json")]
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ResultsError(f"{path}: a link leads out of the results folder")
    records = [read(path) for path in paths]
    return sorted(records, key=lambda r: (r["track"]["name"], r["recipe"]["name"], r["seed"]))


def write(
    root: Path, record: Record, run: Record, accept: bool = False
) -> Literal["written", "identical", "replaced", "differs"]:
    """Writes a record and the facts of its run, unless the record there has the same inputs and other numbers.

    In that case ("differs") the committed record stays, until `accept` says that the new one is right. One of
    other inputs (digests, versions, environment class), or of the same numbers under another title, is replaced.
    """
    validate(record)
    path = path_of(root, record)
    state: Literal["written", "replaced"] = "written"
    if path.exists():
        if path.read_bytes() == sealed(record):
            return "identical"
        old = None if accept else read(path)
        if old is not None and _inputs(old) == _inputs(record) and _outputs(old) != _outputs(record):
            return "differs"
        state = "replaced"
    # The record last: while it is missing, or the old one, the run counts as not yet written.
    atomic_write(path.with_suffix(".run.json"), sealed(run))
    atomic_write(path, sealed(record))
    return state


def _inputs(record: Record) -> list[Any]:
    """What decides a record's numbers."""
    measured = [record.get("quantizer"), record.get("sequences")]  # of `quantbench sites` and `probe`
    return [record["recipe"]["digest"], *digests(record), record["versions"], record["environment"], *measured]


def _outputs(record: Record) -> Record:
    """The numbers, without titles and what else a digest leaves out: a track may be given more seeds."""
    return {key: value for key, value in record.items() if key not in ("recipe", "track")}


def _refuse_constant(name: str) -> float:
    raise ResultsError(f"{name} is no JSON")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ResultsError(f"the key {repeated!r} appears twice")
    return members


# --- what may be pooled --------------------------------------------------------------------------------------------


def digests(record: Record) -> tuple[str, str]:
    """(track, data): records that differ in them measured different things."""
    return record["track"]["digest"], record["data"]


def comparable(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Splits one track's records into those that may be pooled and compared, and stale ones.

    The table is that of the digests which most of the baseline's records carry (of all records, where there is no
    baseline). Within a recipe, seeds of another recipe digest than most of its seeds are stale, too.
    """
    ruling = [r for r in records if r["recipe"]["name"] == BASELINE] or records
    table = _most_common([digests(r) for r in ruling])
    current = [r for r in records if digests(r) == table]
    versions: dict[str, list[str]] = {}
    for record in current:
        versions.setdefault(record["recipe"]["name"], []).append(record["recipe"]["digest"])
    kept = [r for r in current if r["recipe"]["digest"] == _most_common(versions[r["recipe"]["name"]])]
    return kept, [r for r in records if r not in kept]


def _most_common(values: list[T]) -> T | None:
    """The most frequent value; of equally frequent ones the first in order, whatever the order of the records."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=None)
