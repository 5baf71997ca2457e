"""Records: what is no record is refused by name and place, and committed numbers are not replaced unasked."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import Record, diverged, synthetic

from quantbench.results import ResultsError, canonical, comparable, path_of, read_all, validate, write

RUN = {"commit": "abc", "dirty": False, "date": "2025-01-01", "timings": {"pretrain": 1.5}}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every member at any depth of a record."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, member in pairs for place in ((*at, key), *places(member, (*at, key)))]


def changed(record: Record, place: tuple[Any, ...], value: Any) -> Record:
    record = copy.deepcopy(record)
    at: Any = record
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return record


def test_records_are_valid_and_read_back_equal(tmp_path: Path) -> None:
    records = [synthetic(), synthetic("relu-attn", 3), diverged("sgd")]
    for record in records:
        assert write(tmp_path, record, RUN) == "written"
    assert read_all(tmp_path) == records
    assert json.loads((tmp_path / "text/sgd/seed-0.run.json").read_text()) == RUN


def test_canonical_bytes_ignore_the_order_of_keys_and_keep_floats_exactly() -> None:
    record = synthetic(loss=0.1 + 0.2)
    assert canonical(record) == canonical(dict(reversed(record.items())))
    assert json.loads(canonical(record)) == record
    assert canonical(record).endswith(b"}\n")
    assert b"0.30000000000000004" in canonical(record)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_record_may_be_nan(value: float) -> None:
    record = synthetic()
    numbers = [place for place in places(record) if isinstance(at(record, place), float)]
    assert len(numbers) > 30
    for place in numbers:
        with pytest.raises(ResultsError, match="finite"):
            validate(changed(record, place, value))
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical(changed(record, place, value))


def at(record: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        record = record[key]
    return record


def test_every_missing_or_unknown_key_is_named() -> None:
    for record in (synthetic(), diverged("sgd")):
        for key in record:
            with pytest.raises(ResultsError, match=key):
                validate({name: value for name, value in record.items() if name != key})
        for place in [place for place in places(record) if isinstance(at(record, place), dict)]:
            if place[-1] in ("environment", "cost", "training", "recipe", "track", "w8a8-token", "extreme"):
                with pytest.raises(ResultsError, match="surplus"):
                    validate(changed(record, (*place, "surplus"), 1))
    with pytest.raises(ResultsError, match="surplus"):
        validate({**synthetic(), "surplus": 1})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), 2, "schema 2"),
        (("schema",), "1", "schema"),
        (("status",), "failed", "status"),
        (("seed",), -1, "seed"),
        (("seed",), True, "seed"),
        (("seed",), 0.0, "seed"),
        (("recipe", "name"), "../evil", "recipe.name"),
        (("track", "name"), "Text", "track.name"),
        (("quantized", "../evil"), {}, "quantized"),
        (("full-precision",), None, "full-precision"),
        (("full-precision", "loss"), None, "full-precision.loss"),
        (("quantized",), {}, "w8a8-static"),
        (("track", "resolved", "rank-by"), {}, "rank-by"),
        (("track", "resolved", "seeds"), [], "seeds"),
        (("training", "losses", 1), [100], r"losses\[1\]"),
        (("training", "losses", 1), [0.5, 3.0], r"losses\[1\]"),
        (("cost", "parameters"), "many", "cost.parameters"),
        (("quantized", "w8a8-static", "kl"), "0.1", r"quantized.w8a8-static.kl"),
        (("quantized", "w8a8-static", "sqnr"), [1.0], "sqnr"),
    ],
)
def test_what_is_wrong_is_named(place: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        validate(changed(synthetic(), place, value))


def test_a_diverged_record_gives_its_reason() -> None:
    with pytest.raises(ResultsError, match="reason"):
        validate({**diverged("sgd"), "reason": None})


def test_malformed_files_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, synthetic(), RUN)
    path = tmp_path / "text/baseline/seed-0.json"
    good, generator = path.read_bytes(), random.Random(0)
    bad = [good[: generator.randrange(len(good))] for _ in range(20)]
    bad += [good.replace(b'"kl": 0.1', b'"kl": NaN'), good.replace(b'"kl": 0.1', b'"kl": 1e999')]
    bad += [b'{"schema": 1, "schema": 1}', b"[" * 100_000, b"\xff", b"null", good + b" ", good.replace(b"\n ", b"\n")]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(ResultsError, match=r"baseline/seed-0\.json"):
            read_all(tmp_path)


def test_a_record_must_be_where_it_says(tmp_path: Path) -> None:
    for wrong in ("text/baseline/seed-1.json", "text/relu-attn/seed-0.json", "code/baseline/seed-0.json"):
        path = tmp_path / wrong
        path.parent.mkdir(parents=True)
        path.write_bytes(canonical(synthetic()))
        with pytest.raises(ResultsError, match="not those of its path"):
            read_all(tmp_path)
        path.unlink()
        path.parent.rmdir()
    path = tmp_path / "text/baseline/seed-one.json"
    path.parent.mkdir()
    path.write_bytes(canonical(synthetic()))
    with pytest.raises(ResultsError, match="seed-one"):
        read_all(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", synthetic(), RUN)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/text").symlink_to(tmp_path / "elsewhere/text")
    with pytest.raises(ResultsError, match="leads out"):
        read_all(tmp_path / "results")


def test_an_empty_or_absent_folder_has_no_records(tmp_path: Path) -> None:
    assert read_all(tmp_path) == read_all(tmp_path / "none") == []


def test_other_numbers_from_the_same_inputs_do_not_replace_a_record_unasked(tmp_path: Path) -> None:
    first, second = synthetic(kl=0.1), synthetic(kl=0.2)
    assert write(tmp_path, first, RUN) == "written"
    assert write(tmp_path, first, {**RUN, "date": "later"}) == "identical"
    assert write(tmp_path, second, {**RUN, "date": "later"}) == "differs"
    assert read_all(tmp_path) == [first]
    assert json.loads(path_of(tmp_path, first).with_suffix(".run.json").read_text()) == RUN
    assert write(tmp_path, second, RUN, accept=True) == "replaced"
    assert read_all(tmp_path) == [second]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("recipe", "digest"), "other"),
        (("track", "digest"), "other"),
        (("data",), "other"),
        (("versions", "pretrain"), 2),
        (("environment", "threads"), 2),
    ],
)
def test_a_record_of_other_inputs_is_replaced(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    write(tmp_path, synthetic(), RUN)
    other = changed(synthetic(kl=0.2), place, value)
    assert write(tmp_path, other, RUN) == "replaced"
    assert read_all(tmp_path) == [other]


def test_a_bad_record_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ResultsError):
        write(tmp_path, synthetic(kl=math.nan), RUN)
    assert list(tmp_path.iterdir()) == []


def test_records_of_other_digests_are_not_comparable() -> None:
    baseline = [synthetic(seed=seed) for seed in range(3)]
    rerun = [{**synthetic(seed=seed + 3), "data": "new"} for seed in range(2)]
    others = [{**synthetic("sgd", seed), "data": "new"} for seed in range(9)]
    same = [synthetic("relu-attn", 0), synthetic("relu-attn", 1)]
    edited = changed(synthetic("relu-attn", 2), ("recipe", "digest"), "edited")
    kept, stale = comparable([*baseline, *rerun, *others, *same, edited])
    assert kept == [*baseline, *same]
    assert stale == [*rerun, *others, edited]
    assert comparable([]) == ([], [])
