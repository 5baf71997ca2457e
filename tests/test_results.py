"""Records: what is no record is refused by name and place, and committed numbers are not replaced unasked."""

import copy
import hashlib
import json
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import Record, diverged, synthetic

from quantbench.results import (
    SEAL_LINE,
    ResultsError,
    canonical,
    check_others,
    comparable,
    load,
    path_of,
    read,
    read_all,
    sealed,
    unsealed,
    validate,
    write,
)

ROOT = Path(__file__).resolve().parent.parent
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
    assert load(tmp_path / "text/sgd/seed-0.run.json") == RUN


def test_canonical_bytes_ignore_the_order_of_keys_and_keep_floats_exactly() -> None:
    record = synthetic(loss=0.1 + 0.2)
    assert canonical(record) == canonical(dict(reversed(record.items())))
    assert json.loads(canonical(record)) == record
    assert canonical(record).endswith(b"}\n")
    assert b"0.30000000000000004" in canonical(record)


# --- a file vouches for itself ---------------------------------------------------------------------------------------

COMMITTED = sorted(path for path in (ROOT / "results").rglob("*.json"))


def test_the_seal_is_the_sha256_of_the_other_lines(tmp_path: Path) -> None:
    """As `grep -v` and `sha256sum` find it, wherever the line stands."""
    for number, record in enumerate((synthetic(), RUN, {"a": 1}, {"z": '\n "sha256": "",\n'})):
        path = tmp_path / f"{number}.json"
        path.write_bytes(sealed(record))
        others = subprocess.run(["grep", "-v", '^ "sha256"', path], capture_output=True, check=True).stdout
        assert json.loads(path.read_bytes())["sha256"] == hashlib.sha256(others).hexdigest()
        assert unsealed(path.read_bytes()) == load(path) == record


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_committed_record_vouches_for_itself(path: Path) -> None:
    assert sealed(load(path)) == path.read_bytes()


def test_no_changed_byte_of_a_committed_record_is_taken_for_sound() -> None:
    """Digits above all: another figure is what nobody would see."""
    generator = random.Random(0)
    for path in generator.sample(COMMITTED, 40):
        good = path.read_bytes()
        digits = [place for place, byte in enumerate(good) if chr(byte).isdigit()]
        for place in generator.sample(digits, min(5, len(digits))):
            other = bytes([generator.choice([d for d in b"0123456789" if d != good[place]])])
            with pytest.raises(ResultsError):
                unsealed(good[:place] + other + good[place + 1 :])
        place, bit = generator.randrange(len(good)), 1 << generator.randrange(8)
        with pytest.raises(ResultsError):
            unsealed(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])


def test_other_bytes_of_the_same_record_are_refused() -> None:
    """White space, another order, a repeated key: even under a seal that fits them."""
    good = sealed(synthetic())
    seal = SEAL_LINE.search(good)
    assert seal is not None
    for other in (
        good.replace(b'"schema": 1', b'"schema":  1'),
        good.replace(b'"kl": 0.1,', b'"kl": 0.10,'),
        good.replace(b'"kl": 0.1,', b'"kl": 0.2,\n   "kl": 0.1,'),
        good.replace(b' "status"', b' "seed": 0,\n "status"'),
        good + b"\n",
        good + seal[0],
    ):
        assert other != good
        rest = SEAL_LINE.sub(b"", other)
        fitting = seal[0].replace(seal[1], hashlib.sha256(rest).hexdigest().encode())
        with pytest.raises(ResultsError):
            unsealed(SEAL_LINE.sub(fitting, other))


def test_a_record_of_an_older_version_has_nothing_that_vouches_for_it(tmp_path: Path) -> None:
    write(tmp_path, synthetic(), RUN)
    path = tmp_path / "text/baseline/seed-0.json"
    path.write_bytes(canonical(synthetic()))
    with pytest.raises(ResultsError, match=r"seed-0\.json: no line 'sha256' vouches for it: .* run its recipe again"):
        read(path)


@pytest.mark.parametrize(
    "name", ["text/sgd/seed-0.run.json", "text/sgd/tune.json", "text/search.json", "perf/some.json"]
)
def test_what_no_table_is_made_of_is_looked_at_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(sealed(RUN))
    check_others(tmp_path)
    path.write_bytes(sealed(RUN).replace(b"1.5", b"1.6"))
    with pytest.raises(ResultsError, match=f"{name}: it is not as it was written"):
        check_others(tmp_path)


# --- the schema ------------------------------------------------------------------------------------------------------


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
        path.write_bytes(sealed(synthetic()))
        with pytest.raises(ResultsError, match="not those of its path"):
            read_all(tmp_path)
        path.unlink()
        path.parent.rmdir()
    path = tmp_path / "text/baseline/seed-one.json"
    path.parent.mkdir()
    path.write_bytes(sealed(synthetic()))
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
    assert load(path_of(tmp_path, first).with_suffix(".run.json")) == RUN
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
