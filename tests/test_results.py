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

from quantbench import catalog
from quantbench.checks import DOMAINS, by_name, check_masses
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


def test_every_committed_record_vouches_for_itself() -> None:
    assert len(COMMITTED) > 500
    for path in COMMITTED:
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
    numbers = [place for place in places(record) if isinstance(at_(record, place), float)]
    assert len(numbers) > 30
    for place in numbers:
        with pytest.raises(ResultsError, match="finite"):
            validate(changed(record, place, value))
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical(changed(record, place, value))


def at_(record: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        record = record[key]
    return record


def test_every_missing_or_unknown_key_is_named() -> None:
    for record in (synthetic(), diverged("sgd")):
        for key in record:
            with pytest.raises(ResultsError, match=key):
                validate({name: value for name, value in record.items() if name != key})
        for place in [place for place in places(record) if isinstance(at_(record, place), dict)]:
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


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("seed",), 2**31),
        (("cost", "parameters"), 10**400),
        (("full-precision", "bits-per-byte"), 10**400),
        (("recipe", "resolved"), {"mitigations": 5}),
        (("track", "resolved"), {"evaluate": [], "rank-by": {"damage": "w8a8-static"}, "seeds": [0]}),
        (("environment", "threads"), 0),
        (("cost", "parameters"), 0),
        (("cost", "flops-per-token"), -6000),
        (("training", "losses", 1), [-100, 3.0]),
        (("training", "losses", 1), [0, 3.0]),  # not later than the first
        (("training", "losses", 1), [100, -3.0]),
        (("training", "final-loss"), -3.0),
        (("training", "timeline", 2, "step"), 10),
        (("training", "timeline", 0, "residual-peak"), -1.0),
        (("full-precision", "loss"), -3.0),
        (("full-precision", "loss"), 3.1),  # the perplexity is that of another
        (("full-precision", "perplexity"), 0.5),
        (("full-precision", "bits-per-byte"), -1.0),
        (("full-precision", "tokens"), 0),
        (("full-precision", "metrics", "residual-peak", "value"), -1.0),
        (("full-precision", "metrics", "residual-peak", "value"), "1.0"),
        (("full-precision", "metrics", "bos-attention", "extra"), {"heads-above-half": 1.5}),
        (("full-precision", "metrics", "bos-attention", "per-layer"), [0.5]),
        (("full-precision", "metrics", "bos-attention", "extra"), {"largest-head": -0.5}),
        (("full-precision", "metrics", "act-max", "extra"), {"layer": -1}),
        (("full-precision", "lm-eval"), {"last-word": 1.5}),
        (("full-precision", "lm-eval"), {"last-word-items": -1}),
        (("full-precision", "task"), {"loss": -1.0}),
        (("quantized", "w8a8-static", "kl"), -0.1),
        (("quantized", "w8a8-static", "damage"), 0.3),  # not the difference of the losses
        (("quantized", "w8a8-static", "perplexity"), 1.0),
        (("quantized", "w8a8-static", "top1-agreement"), 1.01),
        (("quantized", "w8a8-static", "top1-agreement"), -0.01),
        (("quantized", "w8a8-static", "report"), {"share-of-weights": 1.5}),
        (("quantized", "w8a8-static", "report"), {"bits-per-weight": -8}),
        (("quantized", "w8a8-static", "sqnr", "all"), [20.0]),
        (("quantized", "w8a8-static", "exemption", "tokens"), -1),
        (("quantized", "w8a8-static", "exemption", "extreme", "kl"), -1.0),
        (("recipe", "resolved"), {"mitigations": {}, "lr": "fast"}),
        (("recipe", "resolved"), {"mitigations": {}, "lr": -1.0}),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(place: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ResultsError, match=place[0]):
        validate(changed(synthetic(), place, value))


def test_a_mass_of_attention_is_one_at_most_where_its_form_says_so() -> None:
    for place in [
        ("full-precision", "metrics", "bos-attention", "value"),
        ("training", "timeline", 0, "bos-attention"),
    ]:
        with pytest.raises(ResultsError, match=r"bos-attention.*: 1\.1 cannot be"):
            validate(changed(synthetic(), place, 1.1))
        validate(changed(synthetic("relu-attn", mitigations=("relu-attention",)), place, 1.1))


def test_rounding_is_no_fault() -> None:
    for place, value in [(("quantized", "w8a8-token", "kl"), -1e-8), (("training", "timeline", 0, "value-drain"), 0)]:
        validate(changed(synthetic(), place, value))


def test_figures_agree_with_the_track_that_they_are_of() -> None:
    record = synthetic()
    record["track"]["resolved"] |= {"steps": 100, "length": 128, "evaluate": {"sequences": 512}}
    record["full-precision"]["sequence-losses"] = [3.0] * 512
    validate(record)
    for place, value in [
        (("track", "resolved", "steps"), 99),
        (("track", "resolved", "length"), 64),
        (("track", "resolved", "evaluate", "sequences"), "512"),
        (("full-precision", "sequence-losses"), [3.0] * 511),
        (("full-precision", "tokens"), 512 * 127),
        (("quantized", "w8a8-token", "sequence-kl"), [0.1]),
    ]:
        with pytest.raises(ResultsError, match=r"step 100|sequences|a number|integer"):
            validate(changed(record, place, value))


def test_an_accuracy_is_that_of_the_items() -> None:
    record = synthetic()
    items = {"lambada": "1101"}
    full = record["full-precision"] | {"lm-eval": {"lambada": 0.75, "lambada-items": 4}, "lm-eval-items": items}
    record["full-precision"] = full
    validate(record)
    for wrong in ({"lambada": 0.5, "lambada-items": 4}, {"lambada": 0.75, "lambada-items": 5}, {}):
        with pytest.raises(ResultsError, match="share of its items"):
            validate(changed(record, ("full-precision", "lm-eval"), wrong))
    with pytest.raises(ResultsError, match="a 1 or a 0"):
        validate(changed(record, ("full-precision", "lm-eval-items"), {"lambada": "1102"}))


UNSEEN = ["\x1b[2J", "\x00", "\x7f", "\x9b31m", "\u202eevil", "\u2066", "\u200f", "\u200b", "\ufeff", "\U000e0041"]


@pytest.mark.parametrize("unseen", UNSEEN, ids=ascii)
def test_text_that_is_not_to_be_seen_is_refused_wherever_it_stands(unseen: str) -> None:
    record = diverged("sgd")
    for place in [at for at in places(record) if isinstance(at_(record, at), str) and at[-1] not in ("status", "name")]:
        with pytest.raises(ResultsError, match="not to be seen") as error:
            validate(changed(record, place, "a" + unseen))
        assert str(error.value).isprintable()
    validate(changed(record, ("recipe", "title"), "Ångström, “quoted” – 日本語 ρ\u00a0= 1"))


@pytest.mark.parametrize("name", catalog.names("metrics"))
def test_every_metric_says_what_it_can_be(name: str) -> None:
    assert name in DOMAINS


def test_limits_are_in_order_wherever_figures_have_some() -> None:
    for good in ({"mean": 0.5, "low": 0.1, "high": 1.2}, {"mean": [[0.5]], "low": [[0.1]], "high": [[1.2]]}):
        by_name({"attention": good}, "record")
    for bad in (
        {"mean": -0.5, "low": -0.6, "high": 2.0},
        {"mean": 0.5, "low": 0.6, "high": 0.7},
        {"mean": 0.5, "low": 0.6, "high": 0.4},
        {"mean": [[0.5]], "low": [[0.6]], "high": [[0.7]]},
        {"mean": [0.5, 0.5], "low": [0.1], "high": [0.7]},
        {"mean": 0.5, "low": None, "high": 0.7},
    ):
        with pytest.raises(ResultsError, match=r"record\.attention"):
            by_name({"attention": bad}, "record")
    by_name({"loss": 2.0, "perplexity": math.exp(2.0)}, "record")
    for wrong in ({"loss": 2.0, "perplexity": 2.0}, {"loss": "2.0"}, {"loss": True}, {"norm": -1.0}, {"layer": 1.5}):
        with pytest.raises(ResultsError, match="record"):
            by_name(wrong, "record")


def test_what_a_model_of_softmax_cannot_draw_is_refused() -> None:
    for body in ({"sink-attention": 1.5}, {"heads": [{"attention": {"mean": 1.1, "low": 1.0, "high": 1.2}}]}):
        with pytest.raises(ResultsError, match="1 at most"):
            check_masses(body, "record")
    check_masses({"attention": {"mean": 0.99, "low": 0.9, "high": 1.08}, "delta-logit": 4.0}, "record")


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
