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
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from quantbench import catalog
from quantbench.checks import (
    Check,
    ResultsError,
    amount,
    answers,
    any_amount,
    any_figure,
    anything,
    between,
    by_domain,
    check_masses,
    check_perplexity,
    count,
    domain,
    folder_name,
    integer,
    interval,
    layered,
    list_of,
    mapping,
    mapping_of,
    metrics,
    object_of,
    or_null,
    point,
    scores,
    several,
    share,
    short,
    text,
)
from quantbench.store import atomic_write, check_name

Record = dict[str, Any]
T = TypeVar("T", str, tuple[str, str])

SCHEMA = 1
BASELINE = "baseline"
PATH = re.compile(r"(sites-.+-|probe-)?seed-(0|[1-9][0-9]{0,8})\.json")
LARGEST = 1 << 26  # bytes; a record is some tens of kilobytes
SEAL = "sha256"  # the member by which a file vouches for itself
# Members of the whole stand one space in, and text has no line ends: no other line begins like this.
SEAL_LINE = re.compile(rb'^ "sha256": "([0-9a-f]{64}|)",?\n', re.MULTILINE)


# --- the schema ----------------------------------------------------------------------------------------------------

_named: dict[str, Any] = {"name": folder_name, "digest": text, "title": text}
_exempted = object_of(since=("sequence-losses",), damage=any_figure, kl=any_amount, sequence_losses=list_of(any_amount))
_quality: dict[str, Any] = {
    "loss": any_amount,
    "perplexity": any_amount,
    "bits_per_byte": any_amount,
    "lm_eval": or_null(scores),
    "lm_eval_items": or_null(mapping_of(answers)),
    "sequence_losses": list_of(any_amount),
}
_UNITS = ("lm-eval-items", "sequence-losses", "sequence-kl")  # what intervals are over where a model has one seed

# What every record begins with.
_head: dict[str, Any] = {
    "schema": integer,
    "status": text,
    "reason": or_null(text),
    "recipe": object_of(**_named, resolved=mapping_of(anything)),
    "track": object_of(**_named, resolved=mapping_of(anything)),
    "seed": between(0, 2**31 - 1, integer),
    "data": text,
    "versions": mapping_of(anything),
    "environment": object_of(
        since=("statistics", "settings"),
        torch=text,
        bitsandbytes=or_null(text),
        threads=several,
        cpu=text,
        device=text,
        statistics=text,
        settings=text,
    ),
}


def _watched(value: Any, where: str) -> None:
    """Of a track that is watched: {figure: a value a layer}, and the task's own figures; see watch.py."""
    mapping(value, where)
    layered({name: each for name, each in value.items() if name != "task"}, where)
    by_domain(value.get("task"), f"{where}.task")


def _ascending(step: Callable[[Any], int], member: Check) -> Check:
    """A list of points at ever later steps."""

    def check(value: Any, where: str) -> None:
        list_of(member)(value, where)
        for index in range(1, len(value)):
            if not step(value[index - 1]) < step(value[index]):
                raise ResultsError(f"{where}[{index}]: step {step(value[index])} comes after {step(value[index - 1])}")

    return check


_shape = object_of(
    **_head,
    cost=object_of(parameters=several, added_parameters=integer, flops_per_token=several),
    training=object_of(
        losses=_ascending(itemgetter(0), point),
        final_loss=any_amount,
        timeline=_ascending(
            itemgetter("step"),
            object_of(
                since=("watched",),
                step=count,
                residual_peak=any_amount,
                bos_attention=any_amount,
                value_drain=any_amount,
                loss=any_amount,
                watched=_watched,
            ),
        ),
    ),
    full_precision=or_null(
        object_of(since=_UNITS, **_quality, tokens=or_null(several), task=or_null(by_domain), metrics=metrics)
    ),
    quantized=mapping_of(
        object_of(
            since=_UNITS,
            **_quality,
            sequence_kl=list_of(any_amount),
            damage=any_figure,
            kl=any_amount,
            top1_agreement=or_null(share),
            sqnr=or_null(layered),
            report=by_domain,
            exemption=or_null(object_of(extreme=_exempted, random=_exempted, tokens=count)),
        ),
        names=folder_name,
    ),
)

_estimated = object_of(damage=or_null(interval()), kl=or_null(interval()))
_damaged = object_of(damage=or_null(interval()), kl=or_null(interval(amount)))  # not a difference of two
_paid: dict[str, Any] = {"alone": _damaged, "spared": _estimated}
_propagated = list_of(object_of(total=any_amount, accumulated=any_amount, local=any_amount, interaction=any_figure))


def _untouched(value: Any, where: str) -> None:
    """figure -> [mean, low, high] of the model as it is."""
    mapping(value, where)
    for name, member in value.items():
        or_null(interval(domain(name)))(member, f"{where}.{name}")


# What `quantbench probe` writes: a trained model, as it is and after each intervention, in the terms of probe.py.
_probe = object_of(
    **_head,
    sequences=several,
    untouched=or_null(_untouched),
    interventions=mapping_of(mapping_of(or_null(interval()))),
)

# What `quantbench sites` writes: what each place pays for being rounded, in the terms of sites.py.
_sites = object_of(
    **_head,
    quantizer=object_of(name=folder_name, resolved=anything),
    sequences=several,
    extreme=or_null(object_of(layer=count, threshold=amount, tokens=count)),
    all=or_null(_damaged),
    kinds=mapping_of(object_of(**_paid)),
    places=mapping_of(mapping_of(object_of(**_paid, sqnr=or_null(object_of(sink=any_figure, non_sink=any_figure))))),
    propagation=or_null(object_of(all=_propagated, non_sink=_propagated)),
)


def validate(record: Any, where: str = "record") -> None:
    """ResultsError naming the first place at which this is no record."""
    mapping(record, where)
    if record.get("schema") != SCHEMA:
        raise ResultsError(f"{where}: schema {short(record.get('schema'))} is unknown (this version reads {SCHEMA})")
    of_sites, of_probe = "quantizer" in record, "interventions" in record
    (_sites if of_sites else _probe if of_probe else _shape)(record, where)
    status = record["status"]
    if status not in ("finished", "diverged"):
        raise ResultsError(f"{where}.status: finished or diverged is needed, not {short(status)}")
    _agree_with_the_track(record, where)
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
        _agree(full, record["quantized"], where)
        if rank_by(record) not in record["quantized"]:
            raise ResultsError(f"{where}.quantized: {rank_by(record)!r}, by which the track ranks, is missing")
        if not record["track"]["resolved"].get("seeds"):
            raise ResultsError(f"{where}.track.resolved.seeds: missing")


def _agree_with_the_track(record: Record, where: str) -> None:
    """What a track holds equal and a record repeats: steps, sequences, tokens."""
    resolved = record["track"]["resolved"]
    evaluate = resolved.get("evaluate", {})
    mitigations = record["recipe"]["resolved"].get("mitigations", {})
    mapping(evaluate, f"{where}.track.resolved.evaluate")
    mapping(mitigations, f"{where}.recipe.resolved.mitigations")
    for name, value in {"steps": resolved.get("steps"), "length": resolved.get("length"),
                        "evaluate.sequences": evaluate.get("sequences")}.items():  # fmt: skip
        or_null(count)(value, f"{where}.track.resolved.{name}")
    or_null(amount)(record["recipe"]["resolved"].get("lr"), f"{where}.recipe.resolved.lr")
    sequences, steps = evaluate.get("sequences"), resolved.get("steps")
    points = record.get("training", {"timeline": [], "losses": []})
    if not set(mitigations) & set(catalog.UNBOUNDED):
        check_masses(points["timeline"], f"{where}.training.timeline")
        check_masses((record.get("full-precision") or {}).get("metrics"), f"{where}.full-precision.metrics")
    latest = max([0, *(at["step"] for at in points["timeline"]), *(step for step, _ in points["losses"])])
    if steps is not None and latest > steps:
        raise ResultsError(f"{where}.training: step {latest} of {steps}")
    if sequences is None:
        return
    if record.get("sequences", 0) > sequences:
        raise ResultsError(f"{where}.sequences: {record['sequences']} of {sequences} that the track has")
    full = record.get("full-precision") or {}
    tokens, length = full.get("tokens"), resolved.get("length")
    if None not in (tokens, length) and tokens != sequences * length:
        raise ResultsError(f"{where}.full-precision.tokens: {tokens} are not {sequences} sequences of {length}")
    for at, figures in _judged(record):
        for name in ("sequence-losses", "sequence-kl"):
            if len(figures.get(name, range(sequences))) != sequences:
                raise ResultsError(f"{where}.{at}.{name}: {len(figures[name])} of {sequences} sequences")


def _judged(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, figures) of everything that was judged on the held-out sequences."""
    if record.get("full-precision"):
        yield "full-precision", record["full-precision"]
    for name, found in record.get("quantized", {}).items():
        yield f"quantized.{name}", found
        for exempt in ("extreme", "random") if found["exemption"] else ():
            yield f"quantized.{name}.exemption.{exempt}", found["exemption"][exempt]


def _agree(full: dict[str, Any], quantized: dict[str, dict[str, Any]], where: str) -> None:
    """Figures that follow from others: perplexity from the loss, damage from two losses, accuracies from the items."""
    for at, found in {
        f"{where}.full-precision": full,
        **{f"{where}.quantized.{n}": q for n, q in quantized.items()},
    }.items():
        if found["perplexity"] is not None:
            check_perplexity(found, at)
        if found.get("damage") is not None and found["loss"] is not None:
            due = found["loss"] - full["loss"]
            if not math.isclose(found["damage"], due, rel_tol=1e-9, abs_tol=1e-9):
                raise ResultsError(f"{at}.damage: {found['damage']} is not its loss less that in full precision, {due}")
        for task, items in (found.get("lm-eval-items") or {}).items():
            found_by = found["lm-eval"] or {}
            if found_by.get(f"{task}-items") != len(items) or not math.isclose(
                found_by.get(task, math.inf), items.count("1") / len(items), abs_tol=1e-9
            ):
                raise ResultsError(f"{at}.lm-eval.{task}: not the share of its items that were right")


def level_of(record: Record) -> float:
    """The damage below which a recipe survives, nats per token, as its track states it."""
    from quantbench.recipe import SURVIVES

    return float(record["track"]["resolved"].get("survives", SURVIVES))


def rank_by(record: Record) -> str:
    """The quantizer by whose damage the record's track ranks its rows."""
    rule = record["track"]["resolved"].get("rank-by")
    if not isinstance(rule, dict) or not isinstance(rule.get("damage"), str):
        raise ResultsError(f"track {record['track']['name']}: rank-by names no quantizer")
    return str(rule["damage"])


# --- files ---------------------------------------------------------------------------------------------------------


def canonical(record: Record) -> bytes:
    """The record's bytes: sorted keys, floats in the shortest form that reads back equal, no NaN."""
    return _encoded(record, indent=1) + b"\n"


def _encoded(record: Record, **layout: Any) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False, ensure_ascii=False, **layout).encode()


_LINE_BREAK = re.compile(rb"\n *(?=\S)")


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
    # Where lines break is the seal's business: to compare without them takes a third of the time.
    if _LINE_BREAK.sub(b"", data) != _encoded(record, separators=(",", ": ")) + b"\n":
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


def check_recipe(root: Path, track: str, recipe: str) -> None:
    """ResultsError where a record of a recipe is not sound: to be told before hours of work, not when it is written."""
    for path in sorted((root / track / recipe).glob("*seed-*.json")):
        if not path.name.endswith(".run.json"):
            read(path)


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
