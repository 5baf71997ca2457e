"""The format of recipes and tracks: what is read, and that whatever is wrong is one line with its place."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantbench import catalog, strict
from quantbench.mitigations import seams
from quantbench.recipe import Evaluate, Recipe, Shape, Track, digest, load_recipe, load_track
from quantbench.strict import Entries, Entry, KeyedError, Range, StrictError, dump, load, loads, override, place

ROOT = Path(__file__).parent.parent
EXAMPLES = int(os.environ.get("QUANTBENCH_MALFORMED", "300"))  # generated files a test; 10000 on demand
ONE_LINE = re.compile(r"[^\n]+:[1-9][0-9]*:[1-9][0-9]*: [^\n]+")


# A small catalog and dataclasses with every type ---------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    per_head: bool = False
    scale: float | None = None
    form: Literal["sigmoid", "silu"] = "sigmoid"


@dataclass(frozen=True)
class Grid:
    bits: Annotated[int, Range(2, 8)]
    clip_ratio: Annotated[float | None, Range(0.0, 1.0)] = None

    def __post_init__(self) -> None:
        if self.bits == 5:
            raise ValueError("5 bits\nare not packed")


class Shelf:
    """A catalog of two entries, on one axis."""

    kinds: dict[str, type] = {"gate": Gate, "grid": Grid}  # noqa: RUF012

    def names(self, axis: str) -> list[str]:
        return list(self.kinds)

    def load(self, axis: str, name: str) -> type:
        return self.kinds[name]

    declared = load

    def preset(self, axis: str, name: str) -> dict[str, object]:
        return {}

    def entry_name(self, axis: str, entry: object) -> str:
        return next(name for name, kind in self.kinds.items() if type(entry) is kind)


SHELF = Shelf()


@dataclass(frozen=True)
class Inner:
    a_b: int
    name: str = "x"


@dataclass(frozen=True)
class Sample:
    text: str
    number: Annotated[float, Range(-1.0, 1000.0)] = 0.5
    count: Annotated[int, Range(0, 100)] = 1
    flag: bool = False
    maybe: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[4, 8] = 8
    pair: tuple[int, str] = (0, "")
    many: tuple[float, ...] = ()
    words: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    by_bits: dict[Literal[4, 8], bool] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(1))
    entry: Annotated[object, Entry("shelf", SHELF)] = field(default_factory=Gate)
    entries: Annotated[dict[str, object], Entries("shelf", SHELF)] = field(default_factory=dict)
    named: Annotated[tuple[str, ...], Entries("shelf", SHELF)] = ()


# What is read --------------------------------------------------------------------------------------------------


def test_every_type_is_read() -> None:
    text = """
text: no
number: 3e-2
count: 100
flag: true
maybe: null
mode: "slow"
level: 4
pair: [-3, 1.0]
many: [1, 2.5, .5, 1e2, +7]
words: [on, "null", 012]
table: {a: 1, b: 2}
by-bits: {4: true}
inner: {a-b: 7}
entry: {grid: {bits: 4, clip-ratio: 1}}
entries: {gate: {scale: 2}, grid: {bits: 2}}
named: [grid, gate]
"""
    assert loads(text, "f", Sample) == Sample(
        text="no",
        number=0.03,
        count=100,
        flag=True,
        maybe=None,
        mode="slow",
        level=4,
        pair=(-3, "1.0"),
        many=(1.0, 2.5, 0.5, 100.0, 7.0),
        words=["on", "null", "012"],
        table={"a": 1, "b": 2},
        by_bits={4: True},
        inner=Inner(7),
        entry=Grid(4, 1.0),
        entries={"gate": Gate(scale=2.0), "grid": Grid(2)},
        named=("grid", "gate"),
    )


def test_a_byte_order_mark_and_dos_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbftext: a\r\ncount: 2\r\n")
    assert load(path, Sample) == Sample("a", count=2)
    path.write_bytes(b"\xef\xbb\xbftext: a\r\ncount: x\r\n")
    with pytest.raises(StrictError, match=r"a\.yaml:2:8: "):
        load(path, Sample)


def test_a_whole_number_and_the_same_number_with_a_point_have_one_digest() -> None:
    assert loads("{text: a, number: 1}", "f", Sample) == loads("{number: 1.0, text: 'a'}", "f", Sample)
    assert digest(dump(Sample("a", number=1))) == digest(dump(Sample("a", number=1.0)))
    assert digest(dump(Sample("a"))) != digest(dump(Sample("b")))


def test_digest_is_sha256_of_sorted_compact_json() -> None:
    # printf '{"a":1,"b":"é"}' | sha256sum
    assert digest({"b": "é", "a": 1}) == "09ad9fd2fb648cb2f62141215828ea00a62c299db05d20aa9ade2f527a301cc6"


def test_dump_is_plain_sorted_and_complete() -> None:
    plain = dump(Sample("a", entry=Grid(4), entries={"grid": Grid(3), "gate": Gate()}, by_bits={8: False}))
    assert list(plain) == sorted(plain)
    assert plain["by-bits"] == {"8": False}
    assert plain["inner"] == {"a-b": 1, "name": "x"}
    assert plain["pair"] == [0, ""]
    assert plain["entry"] == {"grid": {"bits": 4, "clip-ratio": None}}
    assert list(plain["entries"].items()) == [
        ("gate", {"form": "sigmoid", "per-head": False, "scale": None}),
        ("grid", {"bits": 3, "clip-ratio": None}),
    ]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


ONE_LINE_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Co", "Zl", "Zp", "Cf", "Cn"]))
GATES = st.builds(Gate, st.booleans(), st.none() | st.floats(allow_nan=False, allow_infinity=False))
GRIDS = st.builds(Grid, st.sampled_from([2, 3, 4, 6, 7, 8]), st.none() | st.floats(0.0, 1.0))
SAMPLES = st.builds(
    Sample,
    text=ONE_LINE_TEXT,
    number=st.floats(-1.0, 1000.0),
    count=st.integers(0, 100),
    flag=st.booleans(),
    maybe=st.none() | st.integers(-(10**29), 10**29),
    mode=st.sampled_from(["fast", "slow"]),
    level=st.sampled_from([4, 8]),
    pair=st.tuples(st.integers(-9, 9), ONE_LINE_TEXT),
    many=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    words=st.lists(ONE_LINE_TEXT),
    table=st.dictionaries(ONE_LINE_TEXT.filter(lambda key: key not in ("", "<<")), st.integers(-9, 9)),
    by_bits=st.dictionaries(st.sampled_from([4, 8]), st.booleans()),
    inner=st.builds(Inner, st.integers(-9, 9), ONE_LINE_TEXT),
    entry=GATES | GRIDS,
    entries=st.fixed_dictionaries({}, optional={"gate": GATES, "grid": GRIDS}),
    named=st.permutations(["gate", "grid"]).map(tuple),
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(SAMPLES)
def test_round_trip(sample: Sample) -> None:
    plain = dump(sample)
    as_json = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    assert loads(as_json, "f", Sample) == sample
    assert loads(yaml.safe_dump(plain, allow_unicode=True, width=10**9), "f", Sample) == sample
    assert dump(loads(as_json, "f", Sample)) == plain


# What is refused -----------------------------------------------------------------------------------------------

TRACK = """\
title: A track
task: {text: {}}
quantizers: {w8a8-static: {}, llm-int8: {}}
metrics: [residual-peak, mmr]
rank-by: {damage: w8a8-static}
steps: 2000
lr: 1e-3
model: {layers: 2, heads: 4, width: 64}
seeds: [0, 1]
evaluate: {sequences: 8, exemption: [llm-int8]}
"""

# (line of TRACK, what stands there instead, place of the error, piece of its message)
TRACKS: list[tuple[int, str, str, str]] = [
    # keys
    (6, "stesp: 2000", "6:1", "unknown key 'stesp'; did you mean 'steps'?"),
    (6, "step: 2000", "6:1", "did you mean 'steps'?"),
    (6, "Steps: 2000", "6:1", "did you mean 'steps'?"),
    (6, "STEPS: 2000", "6:1", "did you mean 'steps'?"),
    (7, "lt: 1e-3", "7:1", "did you mean 'lr'?"),
    (1, "titel: A", "1:1", "did you mean 'title'?"),
    (1, "tittle: A", "1:1", "did you mean 'title'?"),
    (2, "tasks: {text: {}}", "2:1", "did you mean 'task'?"),
    (3, "quantizer: {}", "3:1", "did you mean 'quantizers'?"),
    (4, "metric: []", "4:1", "did you mean 'metrics'?"),
    (5, "rank_by: {damage: w8a8-static}", "5:1", "unknown key 'rank_by'; did you mean 'rank-by'?"),
    (5, "rankby: {damage: w8a8-static}", "5:1", "did you mean 'rank-by'?"),
    (9, "weight_decay: 0.1", "9:1", "did you mean 'weight-decay'?"),
    (9, "weigth-decay: 0.1", "9:1", "did you mean 'weight-decay'?"),
    (9, "seed: 0", "9:1", "did you mean 'seeds'?"),
    (9, "betass: [0, 0]", "9:1", "did you mean 'betas'?"),
    (9, "warm-up: 5", "9:1", "did you mean 'warmup'?"),
    (9, "zzzzzzzzzz: 5", "9:1", "unknown key 'zzzzzzzzzz'; known: baseline-only, batch, betas"),
    (9, "extends: base", "9:1", "unknown key 'extends'"),
    (9, "x" * 99 + ": 1", "9:1", "xxx...'"),
    (8, "model: {layer: 2}", "8:9", "did you mean 'layers'?"),
    (8, "model: {mlp_width: 64}", "8:9", "did you mean 'mlp-width'?"),
    (8, "model: {layers: 2, depth: 3}", "8:20", "unknown key 'depth'"),
    (10, "evaluate: {sequence: 8}", "10:12", "did you mean 'sequences'?"),
    (10, "evaluate: {lm_eval_items: 8}", "10:12", "did you mean 'lm-eval-items'?"),
    (10, "evaluate:\n  sequences: 8\n  tracd: 8", "12:3", "did you mean 'traced'?"),
    (7, "lr: 1e-3\nlr: 1e-3", "8:1", "repeated key 'lr', first on line 7"),
    (7, "lr: 1e-3\n'lr': 1e-3", "8:1", "repeated key 'lr'"),
    (8, "model: {layers: 2, layers: 2}", "8:20", "repeated key 'layers', first on line 8"),
    (3, "quantizers: {w8a8-static: {}, w8a8-static: {}}", "3:31", "repeated key 'w8a8-static'"),
    (5, "rank-by: {damage: w8a8-static, damage: llm-int8}", "5:32", "repeated key 'damage'"),
    (9, "<<: {seeds: [0]}", "9:1", "merge keys"),
    (8, "model: {<<: {layers: 1}}", "8:9", "merge keys"),
    (3, "quantizers: {<<: {}}", "3:14", "merge keys"),
    (9, "? [a, b]\n: 1", "9:3", "a key must be text, not a list"),
    (9, "? {a: b}\n: 1", "9:3", "a key must be text, not a mapping"),
    (9, ": 1", "9:1", "found ':'"),
    (9, "?\n: 1", "9:2", "a key must be text, not nothing"),
    (9, "'': 1", "9:1", "a key must be text"),
    (9, "1: 1", "9:1", "unknown key '1'"),
    (9, "null: 1", "9:1", "unknown key 'null'"),
    (9, '"\\e[31m": 1', "9:1", r"unknown key '\x1b[31m'"),
    (1, "", "2:1", "missing key 'title'"),
    (2, "", "1:1", "missing key 'task'"),
    (3, "", "1:1", "missing key 'quantizers'"),
    (4, "", "1:1", "missing key 'metrics'"),
    (5, "", "1:1", "missing key 'rank-by'"),
    (6, "", "1:1", "missing key 'steps'"),
    (7, "", "1:1", "missing key 'lr'"),
    # text
    (1, "title:", "1:7", "'title' must be text, not nothing"),
    (1, "title: null", "1:8", "'title' must be text, not 'null'; quote it"),
    (1, "title: ~", "1:8", "quote it"),
    (1, "title: [a]", "1:8", "'title' must be text, not a list"),
    (1, "title: {a: b}", "1:8", "'title' must be text, not a mapping"),
    (1, 'title: "a\\nb"', "1:8", "the character U+000A"),
    (1, 'title: "a\\tb"', "1:8", "the character U+0009"),
    (1, 'title: "a\\0b"', "1:8", "the character U+0000"),
    (1, 'title: "\\e[2J"', "1:8", "the character U+001B"),
    (1, 'title: "\\u202e"', "1:8", "the character U+202E"),
    (1, 'title: "\\L"', "1:8", "the character U+2028"),
    (1, 'title: "\\N"', "1:8", "the character U+0085"),
    (1, 'title: "\\ud800"', "1:8", "the character U+D800"),
    (1, "title: |\n  a\n  b", "1:8", "folded into one by >-"),
    (1, "title: >\n  a\n  b", "1:8", "folded into one by >-"),
    # whole numbers
    (6, "steps:", "6:7", "'steps' must be a whole number from 0 to 100000000, not nothing"),
    (6, "steps: ten", "6:8", "not 'ten'"),
    (6, "steps: 1.0", "6:8", "must be a whole number from 0 to 100000000, not '1.0'"),
    (6, "steps: 2e3", "6:8", "not '2e3'"),
    (6, "steps: 2_000", "6:8", "not '2_000'"),
    (6, "steps: 2,000", "6:8", "not '2,000'"),
    (6, "steps: 012", "6:8", "octal or decimal? write no leading zero"),
    (6, "steps: 00", "6:8", "octal or decimal?"),
    (6, "steps: 0x10", "6:8", "not '0x10'"),
    (6, "steps: 0o17", "6:8", "not '0o17'"),
    (6, "steps: 0b11", "6:8", "not '0b11'"),
    (6, "steps: 1:30", "6:8", "not '1:30'"),
    (6, "steps: '2000'", "6:8", "not the text '2000'"),
    (6, 'steps: "2000"', "6:8", "not the text '2000'"),
    (6, "steps: |-\n  2000", "6:8", "not the text '2000'"),
    (6, "steps: true", "6:8", "not 'true'"),
    (6, "steps: null", "6:8", "not 'null'"),
    (6, "steps: [2000]", "6:8", "not a list"),
    (6, "steps: {a: 1}", "6:8", "not a mapping"),
    (6, "steps: 0", "6:1", "missing key 'steps': it is above 0 unless"),
    (6, "steps: -1", "6:8", "from 0 to 100000000, not '-1'"),
    (6, "steps: 100000001", "6:8", "from 0 to 100000000"),
    (6, "steps: " + "9" * 30, "6:8", "from 0 to 100000000"),
    (6, "steps: " + "9" * 5000, "6:8", "999...'"),
    (6, "steps: ２０", "6:8", "not '２０'"),
    (6, "steps: 20 00", "6:8", "not '20 00'"),
    (6, "steps: .inf", "6:8", "not '.inf'"),
    (6, "steps: ${STEPS}", "6:8", "not '${STEPS}'"),
    (6, "steps: 2001-01-01", "6:8", "not '2001-01-01'"),
    (9, "batch: 0", "9:8", "'batch' must be a whole number from 1 to 1048576, not '0'"),
    (9, "length: 1", "9:9", "'length' must be a whole number from 2"),
    (9, "timeline: 1001", "9:11", "from 0 to 1000"),
    (9, "checkpoint: 0", "9:13", "'checkpoint'"),
    (9, "warmup: -1", "9:9", "'warmup'"),
    # numbers
    (7, "lr:", "7:4", "'lr' must be a number from 0.0 to 100.0, not nothing"),
    (7, "lr: fast", "7:5", "must be a number from 0.0 to 100.0, not 'fast'"),
    (7, "lr: '1e-3'", "7:5", "not the text '1e-3'"),
    (7, "lr: .nan", "7:5", "must be finite, not '.nan'"),
    (7, "lr: nan", "7:5", "must be finite, not 'nan'"),
    (7, "lr: NaN", "7:5", "must be finite, not 'NaN'"),
    (7, "lr: .inf", "7:5", "must be finite, not '.inf'"),
    (7, "lr: -.INF", "7:5", "must be finite, not '-.INF'"),
    (7, "lr: Infinity", "7:5", "must be finite, not 'Infinity'"),
    (7, "lr: 1e999", "7:5", "must be finite, not '1e999'"),
    (7, "lr: -1e-3", "7:5", "from 0.0 to 100.0, not '-1e-3'"),
    (7, "lr: 100.1", "7:5", "from 0.0 to 100.0"),
    (7, "lr: 01", "7:5", "octal or decimal?"),
    (7, "lr: 1e", "7:5", "not '1e'"),
    (7, "lr: 1e-3.5", "7:5", "not '1e-3.5'"),
    (7, "lr: 0,001", "7:5", "not '0,001'"),
    (7, "lr: 1e-3 # x\n  y: 2", "8:3", "expected <block end>"),
    (7, "lr: .", "7:5", "not '.'"),
    (7, "lr: true", "7:5", "not 'true'"),
    (7, "lr: 0x1p-3", "7:5", "not '0x1p-3'"),
    (7, "lr: 1e-3f", "7:5", "not '1e-3f'"),
    (7, "lr: {text: 1e-3}", "7:5", "not a mapping"),
    (9, "decay: 1.01", "9:8", "'decay' must be a number from 0.0 to 1.0, not '1.01'"),
    (9, "clip: -0.1", "9:7", "'clip'"),
    (9, "weight-decay: -1", "9:15", "'weight-decay'"),
    # choices
    (9, "precision: fp16", "9:12", "'precision' must be one of fp32, bf16, not 'fp16'; did you mean"),
    (9, "precision: 32", "9:12", "must be one of fp32, bf16"),
    (9, "precision:", "9:11", "not nothing"),
    (9, "precision: [fp32]", "9:12", "not a list"),
    (9, "precision: FP32", "9:12", "did you mean 'fp32'?"),
    (
        8,
        "model: {mlp: swigl}",
        "8:14",
        "'model.mlp' must be one of swiglu, gelu, relu, linear, not 'swigl'; did you mean 'swiglu'?",
    ),
    (8, "model: {norm: rms}", "8:15", "'model.norm'"),
    (8, "model: {positions: alibi}", "8:20", "'model.positions'"),
    (8, "model: {positions: null}", "8:20", "one of rope, learned, not 'null'"),
    # lists
    (9, "seeds: 0", "9:8", "'seeds' must be a list, each a whole number from 0 to 2147483647, not '0'"),
    (9, "seeds:", "9:7", "'seeds' must be a list"),
    (9, "seeds: {0: 1}", "9:8", "not a mapping"),
    (9, "seeds: [0, x]", "9:12", "'seeds[1]' must be a whole number"),
    (9, "seeds: [0, [1]]", "9:12", "'seeds[1]' must be a whole number from 0 to 2147483647, not a list"),
    (9, "seeds:\n- 0\n- -1", "11:3", "'seeds[1]'"),
    (9, "seeds:\n-\n- 1", "10:2", "'seeds[0]'"),
    (9, "seeds: [a: 1]", "9:9", "not a mapping"),
    (9, "seeds: []", "9:1", "'seeds' must be different, and at least one"),
    (9, "seeds: [3, 3]", "9:1", "'seeds' must be different"),
    (9, "extra-seeds: [5, 1]", "9:1", "'extra-seeds' must be different, and none of 'seeds'"),
    (9, "betas: [0.9]", "9:8", "'betas' must be a list of 2: "),
    (9, "betas: [0.9, 0.9, 0.9]", "9:8", "not of 3"),
    (9, "betas: []", "9:8", "not of 0"),
    (9, "betas: 0.9", "9:8", "not '0.9'"),
    (9, "betas: [0.9, 1]", "9:14", "'betas[1]' must be a number from 0.0 to 0.999999, not '1'"),
    (9, "betas: [high, 0.9]", "9:9", "'betas[0]'"),
    # mappings
    (8, "model: 8", "8:8", "'model' must be a mapping, not '8'"),
    (8, "model:", "8:7", "'model' must be a mapping, not nothing"),
    (8, "model: [layers, 2]", "8:8", "not a list"),
    (8, "model: {layers}", "8:15", "'model.layers' must be a whole number from 1 to 1024, not nothing"),
    (8, "model: {layers: 0}", "8:17", "'model.layers' must be a whole number from 1 to 1024, not '0'"),
    (8, "model: {heads: 1025}", "8:16", "'model.heads'"),
    (8, "model: {embedding-std: -1}", "8:24", "'model.embedding-std'"),
    (8, "model: {mlp-width: 63}", "8:20", "'model.mlp-width'"),
    (8, "model: {width: 32}", "8:16", "from 64 to 65536"),
    (10, "evaluate: all", "10:11", "'evaluate' must be a mapping"),
    (10, "evaluate: {traced: 0}", "10:20", "'evaluate.traced'"),
    (10, "evaluate: {calibration: 10001}", "10:25", "'evaluate.calibration'"),
    (10, "evaluate: {lm-eval-items: -1}", "10:27", "'evaluate.lm-eval-items'"),
    (10, "evaluate: {exemption: llm-int8}", "10:23", "'evaluate.exemption' must be a list, each text"),
    (10, "evaluate: {exemption: [{llm-int8: {}}]}", "10:24", "'evaluate.exemption[0]' must be text"),
    # entries
    (2, "task: {txt: {}}", "2:8", "tasks has no 'txt'; did you mean 'text'?"),
    (2, "task: text", "2:7", "'task' must be a mapping, not 'text'"),
    (2, "task: {}", "2:7", "'task' must be one `name: {parameters}`, not 0"),
    (2, "task: {text: {}, bigram-backcopy: {}}", "2:7", "not 2"),
    (2, "task: {text: }", "2:13", "'task.text' must be a mapping, not nothing; write {}"),
    (2, "task:\n  text:", "3:8", "write {} where it has no parameters"),
    (2, "task: {text: 3}", "2:14", "not '3'"),
    (2, "task: {text: {a: 1, a: 2}}", "2:21", "repeated key 'a'"),
    (2, "task: [text]", "2:7", "not a list"),
    (2, "task: {../text: {}}", "2:8", "tasks has no '../text'"),
    (2, "task: {os.system: {}}", "2:8", "tasks has no 'os.system'"),
    (2, "task: {'text:Text': {}}", "2:8", "tasks has no 'text:Text'"),
    (2, 'task: {"te\\nxt": {}}', "2:8", "U+000A"),
    (3, "quantizers: {w8a8-statc: {}}", "3:14", "did you mean 'w8a8-static'?"),
    (3, "quantizers: {W8A8-static: {}}", "3:14", "did you mean 'w8a8-static'?"),
    (3, "quantizers: {w8a8_static: {}}", "3:14", "did you mean 'w8a8-static'?"),
    (3, "quantizers: {llm-int-8: {}}", "3:14", "did you mean 'llm-int8'?"),
    (3, "quantizers: [w8a8-static]", "3:13", "'quantizers' must be a mapping, not a list"),
    (3, "quantizers: w8a8-static", "3:13", "'quantizers' must be a mapping"),
    (3, "quantizers: {zzzz: {}}", "3:14", "quantizers has no 'zzzz'; known: bnb-fp4"),
    (
        3,
        "quantizers:\n  w8a8-static: {}\n  llm-int8: []",
        "5:13",
        "'quantizers.llm-int8' must be a mapping, not a list",
    ),
    (3, "quantizers: {residual-peak: {}}", "3:14", "quantizers has no 'residual-peak'"),
    (4, "metrics: residual-peak", "4:10", "'metrics' must be a list"),
    (4, "metrics: {residual-peak: {}}", "4:10", "not a mapping"),
    (4, "metrics: [residual-peek]", "4:11", "metrics has no 'residual-peek'; did you mean 'residual-peak'?"),
    (4, "metrics: [mmr, mmr]", "4:16", "'metrics' repeats 'mmr'"),
    (4, "metrics: [[mmr]]", "4:11", "'metrics' must be text, not a list"),
    (4, "metrics: [~]", "4:11", "'metrics' must be text, not '~'"),
    (4, "metrics:\n  - mmr\n  - nmr", "6:5", "did you mean 'mmr'?"),
    (4, "metrics: [mmr, , sink-rate]", "4:16", ""),
    # between keys
    (5, "rank-by: {damage: w4a16-rtn}", "5:1", "'rank-by' names 'w4a16-rtn', no quantizer of this track"),
    (5, "rank-by: {damage: w8a8-statik}", "5:1", "did you mean 'w8a8-static'?"),
    (5, "rank-by: {}", "5:1", "'rank-by' must be {damage: quantizer}"),
    (5, "rank-by: {damge: w8a8-static}", "5:11", "'rank-by' must be damage, not 'damge'; did you mean 'damage'?"),
    (5, "rank-by: {loss: w8a8-static}", "5:11", "'rank-by' must be damage"),
    (5, "rank-by: {damage: [w8a8-static]}", "5:19", "'rank-by.damage' must be text"),
    (5, "rank-by: w8a8-static", "5:10", "'rank-by' must be a mapping"),
    (3, "quantizers: {}", "5:1", "'rank-by' names 'w8a8-static', no quantizer"),
    (3, "quantizers: {w8a8-static: {}}", "10:26", "'evaluate.exemption' names 'llm-int8'"),
    (10, "evaluate: {exemption: [llm-int9]}", "10:12", "did you mean 'llm-int8'?"),
    (8, "model: {width: 65}", "8:9", "'width' must be a multiple of 64, not 65"),
    (8, "model: {heads: 3}", "8:9", "'heads' (3) must divide 'width' (64)"),
    (8, "model: {width: 192, heads: 128}", "8:21", "'heads' (128) must divide 'width' (192)"),
    (8, "model: {heads: 64}", "8:9", "rope needs an even number"),
    (9, "warmup: 2001", "9:1", "'warmup' (2001) must be at most 'steps' (2000)"),
    (6, "steps: 99", "6:1", "'warmup' (100) must be at most 'steps' (99)"),
    # what YAML knows and a recipe has no need of
    (8, "model: &m {layers: 2}", "8:8", "anchors and aliases ('&m') are refused"),
    (8, "model: *m", "8:8", "anchors and aliases ('*m') are refused"),
    (1, "title: &t A", "1:8", "'&t'"),
    (1, "title: !!python/object:os.system A", "1:8", "tags ('tag:yaml.org,2002:python/object:os.system') are refused"),
    (1, "title: !!python/object/apply:os.system ['id']", "1:8", "tags ("),
    (1, "title: !!str A", "1:8", "tags ('tag:yaml.org,2002:str') are refused"),
    (1, "title: ! A", "1:8", "tags ('!') are refused"),
    (1, "title: !env HOME", "1:8", "tags ('!env')"),
    (6, "steps: !!int '2000'", "6:8", "tags ("),
    (8, "model: !!map {layers: 2}", "8:8", "tags ("),
    (8, "model: !!binary aGk=", "8:8", "tags ("),
    (9, "!!str seeds: [0]", "9:1", "tags ("),
    (9, "--- \nseeds: [0]", "9:1", "a second document; a file holds one"),
    (9, "...\n---\nseeds: [0]", "10:1", "a second document"),
    (9, "---", "9:1", "a second document"),
    # what is no YAML
    (6, "steps 2000", "6:1", "could not find expected ':'"),
    (6, "steps:2000", "6:1", "could not find expected ':'"),
    (6, "\tsteps: 2000", "6:1", r"'\t'"),
    (6, "  steps: 2000", "6:3", "expected <block end>"),
    (8, "model: {layers: 2", "9:6", ""),
    (8, "model: {layers: 2]", "8:18", "']'"),
    (9, "seeds: [0, 1", "10:9", ""),
    (9, "seeds: 0]", "9:8", "'seeds' must be a list"),
    (1, 'title: "A', "11:1", "unexpected end of stream"),
    (1, "title: 'A", "11:1", "unexpected end of stream"),
    (1, 'title: "\\q"', "1:10", "unknown escape character 'q'"),
    (1, 'title: "\\xZZ"', "1:11", "hexadecimal"),
    (1, 'title: "\\UFFFFFFFF"', "1:11", "beyond Unicode"),
    (1, "title: @a", "1:8", "'@'"),
    (1, "title: `a`", "1:8", "'`'"),
    (1, "title: %a", "1:8", "'%'"),
    (1, "title: a: b", "1:9", "mapping values are not allowed here"),
    (1, "title: - a", "1:8", "sequence entries are not allowed here"),
    (1, "title: | x\n  a", "1:10", ""),
    (1, "title: 'a' b", "1:12", ""),
    (1, "%YAML 3.0\n---\ntitle: A", "1:1", "version"),
    (9, "- seeds", "9:1", ""),
    (9, "? seeds", "10:1", "'seeds' must be a list"),
    # characters
    (1, "title: a\x00b", "1:9", "character U+0000 is not allowed"),
    (1, "title: a\x1b[31m", "1:9", "character U+001B"),
    (1, "title: \x07", "1:8", "character U+0007"),
    (1, "title: a\x7f", "1:9", "character U+007F"),
    (1, "title: é\x85", "1:9", "character U+0085"),
    (1, "title: \u202eabc", "1:8", "character U+202E"),
    (1, "title: \u2028abc", "1:8", "character U+2028"),
    (1, "title: \u2066abc", "1:8", "character U+2066"),
    (1, "title: \ufeff", "1:8", "character U+FEFF"),
    (1, "title: \ufffe", "1:8", "character U+FFFE"),
    (3, "# \x08", "3:3", "character U+0008"),
]

# (a whole file, place of the error, piece of its message), read as a Sample
SAMPLES_REFUSED: list[tuple[str, str, str]] = [
    ("", "1:1", "empty"),
    ("\n\n", "1:1", "empty"),
    ("# nothing\n", "1:1", "empty"),
    ("---\n", "2:1", "the file must be a mapping, not nothing"),
    ("null", "1:1", "the file must be a mapping, not 'null'"),
    ("text", "1:1", "the file must be a mapping, not 'text'"),
    ("42", "1:1", "the file must be a mapping, not '42'"),
    ("- text", "1:1", "the file must be a mapping, not a list"),
    ("[]", "1:1", "the file must be a mapping, not a list"),
    ("{}", "1:1", "missing key 'text'"),
    ("*a", "1:1", "anchors and aliases"),
    ("&a {text: a}", "1:1", "anchors and aliases"),
    ("!!set {text}", "1:1", "tags"),
    ("{text: a", "1:9", ""),
    ("{text: a}}", "1:10", ""),
    ("]", "1:1", ""),
    ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "1:4", "anchors and aliases"),
    ("[" * 17, "1:17", "nested deeper than 16"),
    ("[" * 200_000, "1:17", "nested deeper than 16"),
    ("{a: " * 100, "1:62", "nested deeper than 16"),
    ("\n".join(" " * i + "a:" for i in range(40)), "16:16", "nested deeper than 16"),
    ("- " * 100, "1:33", "nested deeper than 16"),
    ("[" + "a," * 5000, "1:8192", "more than 4096 keys and values"),
    ("text: a\n" * 3000, "2048:7", "more than 4096 keys and values"),
    ("x" * (256 * 1024 + 1), "1:1", "larger than 256 KiB"),
    ("text: a\nflag: yes", "2:7", "'flag' must be true or false, not 'yes'"),
    ("text: a\nflag: no", "2:7", "not 'no'"),
    ("text: a\nflag: on", "2:7", "not 'on'"),
    ("text: a\nflag: True", "2:7", "not 'True'"),
    ("text: a\nflag: 1", "2:7", "not '1'"),
    ("text: a\nflag: 'true'", "2:7", "not the text 'true'"),
    ("text: a\nflag: null", "2:7", "not 'null'"),
    ("text: a\nmaybe: none", "2:8", "'maybe' must be a whole number, not 'none'"),
    ("text: a\nmaybe: 'null'", "2:8", "not the text 'null'"),
    ("text: a\nmaybe:", "2:7", "not nothing"),
    ("text: a\nmaybe: 1.5", "2:8", "not '1.5'"),
    ("text: a\nlevel: 5", "2:8", "'level' must be one of 4, 8, not '5'"),
    ("text: a\nlevel: '4'", "2:8", "not the text '4'"),
    ("text: a\nlevel: 04", "2:8", "one of 4, 8"),
    ("text: a\nlevel: 4.0", "2:8", "one of 4, 8"),
    ("text: a\npair: [1]", "2:7", "'pair' must be a list of 2: a whole number, text, not of 1"),
    ("text: a\npair: [a, 1]", "2:8", "'pair[0]' must be a whole number"),
    ("text: a\npair: [1, [b]]", "2:11", "'pair[1]' must be text, not a list"),
    ("text: a\nwords: [a, {b: c}]", "2:12", "'words[1]' must be text, not a mapping"),
    ("text: a\nwords: a", "2:8", "'words' must be a list, each text, not 'a'"),
    ("text: a\nmany: [1, nan]", "2:11", "'many[1]' must be finite"),
    ("text: a\nmany: [1, '2']", "2:11", "not the text '2'"),
    ("text: a\ntable: {a: x}", "2:12", "'table.a' must be a whole number, not 'x'"),
    ("text: a\ntable: [a]", "2:8", "'table' must be a mapping"),
    ("text: a\ntable: {? [a] : 1}", "2:11", "a key must be text"),
    ("text: a\ntable: {a: 1, a: 1}", "2:15", "repeated key 'a'"),
    ('text: a\ntable: {"a\\nb": 1}', "2:9", "U+000A"),
    ("text: a\ntable: {~: 1}", "2:9", "quote it"),
    ("text: a\nby-bits: {5: true}", "2:11", "'by-bits' must be one of 4, 8, not '5'"),
    ("text: a\nby-bits: {4: yes}", "2:14", "'by-bits.4' must be true or false"),
    ("text: a\ninner: {}", "2:8", "missing key 'a-b' in 'inner'"),
    ("text: a\ninner: {a_b: 1}", "2:9", "unknown key 'a_b'; did you mean 'a-b'?"),
    ("text: a\nnumber: 1000.5", "2:9", "'number' must be a number from -1.0 to 1000.0"),
    ("text: a\nentry: {gate: {per_head: true}}", "2:16", "did you mean 'per-head'?"),
    ("text: a\nentry: {gate: {per-head: yes}}", "2:26", "'entry.gate.per-head' must be true or false"),
    ("text: a\nentry: {gate: {form: silo}}", "2:22", "did you mean 'silu'?"),
    ("text: a\nentry: {gate: {scale: .inf}}", "2:23", "'entry.gate.scale' must be finite"),
    ("text: a\nentry: {grid: {}}", "2:15", "missing key 'bits' in 'entry.grid'"),
    ("text: a\nentry: {grid: {bits: 9}}", "2:22", "'entry.grid.bits' must be a whole number from 2 to 8, not '9'"),
    ("text: a\nentry: {grid: {bits: 4, clip-ratio: 2}}", "2:37", "a number or null from 0.0 to 1.0"),
    ("text: a\nentries:\n  grid:\n    bits: 5\n", "4:5", "5 bits are not packed"),
    ("text: a\nentries: {gate: {a: 1}, grit: {}}", "2:25", "shelf has no 'grit'; did you mean 'grid'?"),
    ("text: a\nentries: {gate: {a: 1}}\ncount: x", "3:8", "'count'"),
    ("text: a\nnamed: [gate, gate]", "2:15", "'named' repeats 'gate'"),
]

RECIPES_REFUSED: list[tuple[str, str, str]] = [
    ("title: a", "1:1", "missing key 'why'"),
    ("title: a\nwhy: b\nsteps: 3", "3:1", "unknown key 'steps'"),
    ("title: a\nwhy: b\nbatch: 3", "3:1", "unknown key 'batch'"),
    ("title: a\nwhy: b\nmitigation: {}", "3:1", "did you mean 'mitigations'?"),
    ("title: a\nwhy: b\nmitigations: [sgd]", "3:14", "must be a mapping"),
    ("title: a\nwhy: b\nmitigations: {relu-atention: {}}", "3:15", "did you mean 'relu-attention'?"),
    ("title: a\nwhy: b\nmitigations: {sgd: null}", "3:20", "write {} where it has no parameters"),
    ("title: a\nwhy: b\nlr: 1e-3", "3:5", "'lr' must be a mapping, not '1e-3'"),
    ("title: a\nwhy: b\nlr: {text: -1}", "3:12", "'lr.text' must be a number from 1e-12 to 100.0"),
    ("title: a\nwhy: b\nlr: {Text: 1}", "3:1", "'lr' has 'Text', which is no track's name"),
    ("title: a\nwhy: b\nlr: {../text: 1}", "3:1", "which is no track's name"),
    ("title: a\nwhy: b\nlr: {" + "x" * 65 + ": 1}", "3:1", "which is no track's name"),
]


def track_with(line: int, replacement: str) -> str:
    lines = TRACK.split("\n")
    lines[line - 1] = replacement
    return "\n".join(lines)


def refused(text: str, kind: type) -> str:
    with pytest.raises(StrictError) as caught:
        loads(text, "f.yaml", kind)
    message = str(caught.value)
    assert ONE_LINE.fullmatch(message)
    assert len(message) < 1000
    return message


def test_at_least_200_kinds_of_mistakes_are_listed() -> None:
    cases = {(text, place) for _, text, place, _ in TRACKS} | {(t, p) for t, p, _ in SAMPLES_REFUSED + RECIPES_REFUSED}
    assert len(cases) >= 200


@pytest.mark.parametrize(("line", "replacement", "place", "message"), TRACKS)
def test_a_malformed_track_is_one_line_with_its_place(line: int, replacement: str, place: str, message: str) -> None:
    told = refused(track_with(line, replacement), Track)
    assert told.startswith(f"f.yaml:{place}: ")
    assert message in told


@pytest.mark.parametrize(
    ("kind", "text", "place", "message"),
    [(Sample, *case) for case in SAMPLES_REFUSED] + [(Recipe, *case) for case in RECIPES_REFUSED],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_file_is_one_line_with_its_place(kind: type, text: str, place: str, message: str) -> None:
    told = refused(text, kind)
    assert told.startswith(f"f.yaml:{place}: ")
    assert message in told


@pytest.mark.parametrize("key", [key for kind in (Recipe, Track, Shape, Evaluate) for key in strict.keys(kind)])
def test_one_slip_in_any_key_is_answered_with_the_key(key: str) -> None:
    kind = next(kind for kind in (Recipe, Track, Shape, Evaluate) if key in strict.keys(kind))
    slips = {key[:i] + key[i + 1 :] for i in range(len(key))} | {key[:i] + "z" + key[i:] for i in range(len(key) + 1)}
    slips |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    slips |= {key[:i] + "z" + key[i + 1 :] for i in range(len(key))}
    for slip in slips - set(strict.keys(kind)):
        assert f"did you mean {key!r}?" in refused(f"{slip}: 1" if slip else "'': 1", kind) or len(slip) < 2


def test_text_from_the_file_is_cut_and_escaped() -> None:
    told = refused("text: a\n" + '"' + "\\e" * 5000 + '": 1', Sample)
    assert len(told) < 400
    assert told.isprintable()
    assert len(strict.quote("x" * 61)) == len(strict.quote("\n" * 500)) == 60
    assert strict.quote("it's") == '"it\'s"'


# Files ---------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    made = {
        "large.yaml": b"#" * (256 * 1024 + 1),
        "latin.yaml": "text: a\nwords: [é]".encode("latin-1"),
        "utf16.yaml": "text: a".encode("utf-16"),
        "cut.yaml": "text: é".encode()[:-1],
        "surrogate.yaml": b"text: \xed\xa0\x80",
    }
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    expected = {
        "large.yaml": "1:1: larger than 256 KiB",
        "latin.yaml": "2:9: byte 0xe9 is not UTF-8",
        "utf16.yaml": "1:1: byte 0xff is not UTF-8",
        "cut.yaml": "1:7: byte 0xc3 is not UTF-8",
        "surrogate.yaml": "1:7: byte 0xed is not UTF-8",
        "folder.yaml": "1:1: a directory, not a file",
        "pipe.yaml": "1:1: not a regular file",
        "missing.yaml": "1:1: cannot be read: No such file or directory",
        "large.yaml/x.yaml": "1:1: cannot be read: Not a directory",
        "loop.yaml": "1:1: cannot be read: Too many levels of symbolic links",
        "x" * 300 + ".yaml": "1:1: cannot be read: File name too long",
    }
    for name, message in expected.items():
        with pytest.raises(StrictError) as caught:
            load(tmp_path / name, Sample)
        assert str(caught.value) == f"{tmp_path}/{name}:{message}"


@pytest.mark.parametrize("name", ["a\0b.yaml", "a\nb.yaml", "\x1b[31m.yaml", "\udce9.yaml"])
def test_a_strange_path_stays_one_printable_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(StrictError) as caught:
        load(tmp_path / name, Sample)
    assert ONE_LINE.fullmatch(str(caught.value))
    assert str(caught.value).isprintable()


def test_a_device_is_not_read() -> None:
    with pytest.raises(StrictError, match=r"^/dev/zero:1:1: not a regular file$"):
        load("/dev/zero", Sample)


def test_a_slip_is_told_before_torch_or_any_entry_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(track_with(9, "sedes: [0]"))
    program = (
        "import sys; from pathlib import Path; from quantbench.recipe import load_track\n"
        "try: load_track(sys.argv[1], Path('.'))\n"
        "except ValueError as error: print(error)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'quantbench.quantizers', 'quantbench.tasks'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}:9:1: unknown key 'sedes'; did you mean 'seeds'?\n"


ENTRIES = [(axis, name) for axis in ("tasks", "mitigations", "quantizers") for name in catalog.names(axis)]


@pytest.mark.parametrize(("axis", "name"), ENTRIES)
def test_what_an_entry_declares_is_what_it_is(axis: str, name: str) -> None:
    """Its keys, their types and defaults, what it overrides, its constants: without the libraries it computes with."""
    declared, real = catalog.declared(axis, name), catalog.load(axis, name)
    keys, expected = strict.keys(declared), strict.keys(real)
    assert {key: strict.describe(due) for key, (_, due) in keys.items()} == {
        key: strict.describe(due) for key, (_, due) in expected.items()
    }
    preset = catalog.preset(axis, name)
    assert dump(declared(**preset)) == dump(real(**preset))
    assert catalog.entry_name(axis, declared(**preset)) == catalog.entry_name(axis, real(**preset)) == name
    mine, theirs = ({n: v for n, v in vars(kind).items() if n[:2] != "__"} for kind in (declared, real))
    assert mine.keys() == theirs.keys()
    assert {n: v for n, v in mine.items() if isinstance(v, str | int | float | bool)} == {
        n: v for n, v in theirs.items() if isinstance(v, str | int | float | bool)
    }
    if axis == "mitigations":
        assert catalog.seams(name) == seams(real())


WRONG = [  # what no entry's type says: its own checks
    ("mitigations", "registers", {"count": 0}),
    ("mitigations", "clipped-softmax", {"zeta": 0.5}),
    ("mitigations", "peak-penalty", {"tau": 0.0}),
    ("mitigations", "gated-attention-qualcomm", {"open": 1.0}),
    ("tasks", "text", {"folder": "x", "sets": ("code",)}),
    ("tasks", "passages", {"sets": ("codes",)}),
    *[("quantizers", name, {"group": 7}) for name in ("w4a16-rtn", "w4a16-gptq", "w4a16-awq", "w4a16-hqq")],
    *[("quantizers", name, {"threshold": -1.0}) for name in ("llm-int8", "bnb-int8")],
    ("quantizers", "w8a8-static", {"sites": ("inputs", "inputs")}),
    ("quantizers", "w8a8-static", {"weights": 1}),
    ("quantizers", "w4a16-awq", {"grid": 0}),
    ("quantizers", "w4a16-gptq", {"damping": 0.0}),
    ("quantizers", "bnb-nf4", {}),
]


@pytest.mark.parametrize(("axis", "name", "wrong"), WRONG)
def test_what_is_declared_refuses_what_the_entry_refuses(axis: str, name: str, wrong: dict[str, Any]) -> None:
    def refused(kind: Any) -> str:
        try:
            kind(**catalog.preset(axis, name) | wrong).check([96])
        except ValueError as error:
            return str(error)
        pytest.fail("it was taken")

    assert refused(catalog.declared(axis, name)) == refused(catalog.load(axis, name))


# Generated -----------------------------------------------------------------------------------------------------

MANY = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FULL = """\
text: some "text" here
number: 3e-2
count: 100
flag: true
maybe: null
pair: [-3, 'one']
table: {a: 1, b: 2}
inner:
  a-b: 7  # a comment
entry: {grid: {bits: 4}}
entries:
  gate: {scale: 2}
named: [grid, gate]
"""


def outcome(text: str | bytes, path: Path) -> object:
    """The Sample, or None where it is refused as it should be; every other exception goes through."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        return load(path, Sample)
    except StrictError as error:
        told = str(error)
    assert ONE_LINE.fullmatch(told)
    assert told.startswith(f"{path}:")
    return None


# fmt: off
PIECES = st.sampled_from([
    "\t", "\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\ufeff", "\ud800", "é", "\U0001f600", "  ", "|\n", ">\n", "{",
    "}", "[", "]", ",", ":", ": ", "- ", "? ", "#", " #", "|", "%", "@", "`", "'", '"', "\\", "---\n", "...\n", "&a ",
    "*a", "!!int ", "!x ", "!<%zz>", "!!%ff", "%TAG ! x\n", "%YAML 1.9\n", "<<: ", "~", "null", "yes", ".nan", ".inf",
    "1e999", "012", "0x1", '"\\x00"', '"\\UFFFFFFFF"', '"\\ud800"', "a: b\n", "[" * 50, "9" * 40, "text: a\n",
])
# fmt: on


@MANY
@given(st.lists(st.tuples(st.integers(0, len(FULL)), st.integers(0, 12), PIECES), min_size=1, max_size=4))
def test_text_with_pieces_changed_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    text = FULL
    for at, cut, piece in edits:
        text = text[:at] + piece + text[at + cut :]
    outcome(text, tmp_path_factory.getbasetemp() / "edited.yaml")


@MANY
@given(st.lists(st.tuples(st.integers(0, len(FULL) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_bytes_changed_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(FULL.encode())
    for at, byte in edits:
        data[at] = byte
    outcome(bytes(data), tmp_path_factory.getbasetemp() / "bytes.yaml")


@MANY
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_noise_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, noise: bytes | str) -> None:
    assert outcome(noise, tmp_path_factory.getbasetemp() / "noise.yaml") is None


WRONG: dict[str, list[Any]] = {
    "text": [None, [], {}, ["a"], "a\nb", "\x00", "\x1b", "\u2028"],
    "number": [None, "x", True, [], {}, 1001, -2, "1", 10**400],
    "count": [None, 0.5, True, "1", [], {}, -1, 101, 10**29, 10**5000],
    "flag": [None, 0, 1, "true", "yes", [], {}],
    "maybe": [True, 0.5, "", "null", [], {}],
    "mode": [None, "fats", 1, True, [], {}],
    "level": [None, 5, "4", 4.0, [], {}],
    "pair": [None, 1, [], [1], [1, "a", 2], ["a", "b"], {}, [1, None]],
    "many": [None, 1, ["x"], [None], [[1]], {}],
    "words": [None, "a", [None], [[]], {}],
    "table": [None, 1, [], {"a": "x"}, {"a": None}, {"": 1}, {"<<": 1}, {"a\nb": 1}],
    "inner": [None, 1, [], {}, {"a_b": 1}, {"a-b": "x"}, {"a-b": 1, "c": 2}, {"a-b": {"a-b": 1}}],
    "entry": [None, "gate", [], {}, {"gat": {}}, {"gate": None}, {"gate": {}, "grid": {}}, {"grid": {"bits": 5}}],
    "entries": [None, "gate", [], {"gat": {}}, {"gate": 1}, {"grid": {}}, {"gate": {"scale": "x"}}],
    "named": [None, "gate", {}, ["gat"], ["gate", "gate"], [None], [["gate"]]],
}


@MANY
@given(st.data(), SAMPLES)
def test_one_wrong_value_in_a_right_file_is_refused_at_its_line(data: st.DataObject, sample: Sample) -> None:
    plain = dump(sample)
    key = data.draw(st.sampled_from(sorted(WRONG)))
    plain[key] = data.draw(st.sampled_from(WRONG[key]))
    if data.draw(st.booleans()):  # or one key under a name that is none
        plain = dump(sample)
        plain[data.draw(st.sampled_from(["", "x", key + "s", key.upper(), key[1:], "_", "<<", "a\nb", key * 50]))] = (
            plain.pop(key)
        )
    order = data.draw(st.permutations(sorted(plain)))
    old = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    lines = [f"{json.dumps(k)}: {json.dumps(plain[k], ensure_ascii=False)}" for k in order]
    sys.set_int_max_str_digits(old)
    told = refused("\n".join(lines), Sample)
    wrong = next((i for i, k in enumerate(order, 1) if k == key or k not in strict.keys(Sample)), 0)
    assert re.match(rf"f\.yaml:{wrong}:[0-9]+: ", told)


# --set ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text("text: a\ncount: 3\nentry: {grid: {bits: 4}}\n")
    return path


def test_set_wins_over_the_file_and_over_what_was_set_before(file: Path) -> None:
    sets = ["count=5", "inner.a-b=2", "many=[1, 2]", "entry.grid.bits=8", "text=x=y", "count=6", "table={a: 1}"]
    expected = Sample("x=y", count=6, inner=Inner(2), many=(1.0, 2.0), entry=Grid(8), table={"a": 1})
    assert override(file, Sample, sets) == expected
    assert override(file, Sample, []) == load(file, Sample)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("count=x", "--set count=x: 'count' must be a whole number from 0 to 100, not 'x'"),
        ("count=101", "--set count=101: 'count' must be a whole number from 0 to 100, not '101'"),
        ("count=", "--set count=: empty: a mapping or a value is due"),
        ("count", "--set count: write key=value or key.key=value"),
        ("=1", "--set =1: write key=value or key.key=value"),
        ("inner..a-b=1", "--set inner..a-b=1: write key=value or key.key=value"),
        ("cuont=1", "--set cuont=1: unknown key 'cuont'; did you mean 'count'?"),
        ("by_bits={}", "--set by_bits={}: unknown key 'by_bits'; did you mean 'by-bits'?"),
        ("inner.ab=1", "--set inner.ab=1: unknown key 'ab'; did you mean 'a-b'?"),
        ("inner.name=y", "--set inner.name=y: missing key 'a-b' in 'inner'"),
        ("count.x=1", "--set count.x=1: 'x' is set inside what is not a mapping"),
        ("many=[1", "--set many=[1: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("text=*a", "--set text=*a: anchors and aliases ('*a') are refused; write the value out"),
        ("text=\x1b", r"--set text=\x1b: character U+001B is not allowed"),
        ("entry.grid.bits=1", "--set entry.grid.bits=1: 'entry.grid.bits' must be a whole number from 2 to 8, not '1'"),
        ("named=[gate, grd]", "--set named=[gate, grd]: shelf has no 'grd'; did you mean 'grid'?"),
    ],
)
def test_a_wrong_set_is_told_as_it_was_typed(file: Path, assignment: str, message: str) -> None:
    with pytest.raises(StrictError) as caught:
        override(file, Sample, [assignment])
    assert str(caught.value) == message


@MANY
@given(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(sorted(WRONG)), st.text(max_size=20)))
def test_any_set_is_taken_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, assignment: str) -> None:
    path = tmp_path_factory.getbasetemp() / "set.yaml"
    path.write_text(FULL)
    told = "--set "
    try:
        override(path, Sample, [assignment])
    except StrictError as error:
        told = str(error)
    assert told.isprintable()
    assert told.startswith(("--set ", f"{path}:"))


# Recipes and tracks by name ------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "recipes" / "tracks").mkdir(parents=True)
    (tmp_path / "recipes" / "relu-attn.yaml").write_text("title: R\nwhy: W\nlr: {text: 4e-3}\n")
    (tmp_path / "recipes" / "baseline.yaml").write_text("title: B\nwhy: W\n")
    (tmp_path / "recipes" / "tracks" / "text.yaml").write_text(TRACK)
    return tmp_path


def test_a_recipe_is_found_by_name_and_by_path(root: Path) -> None:
    expected = ("relu-attn", Recipe("R", "W", lr={"text": 4e-3}))
    assert load_recipe("relu-attn", root) == expected
    assert load_recipe(root / "recipes" / "relu-attn.yaml", Path("elsewhere")) == expected
    assert load_recipe("relu-attn", root, ["title=X"])[1].title == "X"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relu-atn", "no recipe 'relu-atn' in {}/recipes; did you mean 'relu-attn'?"),
        ("zzz", "no recipe 'zzz' in {}/recipes; known: baseline, relu-attn"),
        ("tracks/text", "no recipe 'tracks/text' in {}/recipes; known: baseline, relu-attn"),
        ("../recipes/baseline", "no recipe '../recipes/baseline' in {}/recipes; did you mean 'baseline'?"),
        ("", "no recipe '' in {}/recipes; known: baseline, relu-attn"),
        ("a\nb\x1b", r"no recipe 'a\nb\x1b' in {}/recipes; known: baseline, relu-attn"),
        ("Big.yaml", "'Big.yaml': a recipe's file is named [a-z0-9][a-z0-9._-]{{0,63}}.yaml; rename it"),
        ("gone.yaml", "gone.yaml:1:1: cannot be read: No such file or directory"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(root: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"recipe|gone") as caught:
        load_recipe(name, root)
    assert str(caught.value) == message.format(root)


@pytest.mark.parametrize("name", ["models", "perf", "claims.md"])
def test_a_name_that_is_taken_in_the_results_is_no_tracks(root: Path, name: str) -> None:
    (root / f"{name}.yaml").write_text(TRACK)
    with pytest.raises(ValueError, match=rf"in results/, the name {name} is another's; rename it"):
        load_track(root / f"{name}.yaml", root)


def test_a_link_out_of_the_folder_is_no_recipe(root: Path) -> None:
    (root / "outside.yaml").write_text("title: O\nwhy: W\n")
    (root / "recipes" / "linked.yaml").symlink_to(root / "outside.yaml")
    with pytest.raises(ValueError, match="no recipe 'linked'"):
        load_recipe("linked", root)


def test_a_track_is_loaded_with_its_entries(root: Path) -> None:
    name, track = load_track("text", root, ["quantizers.w8a8-static.weights=4", "warmup=0"])
    assert name == "text"
    preset = catalog.preset("quantizers", "w8a8-static") | {"weights": 4}
    assert track.quantizers["w8a8-static"] == catalog.load("quantizers", "w8a8-static")(**preset)
    assert dump(track)["quantizers"]["w8a8-static"]["weights"] == 4
    assert track.model == Shape(layers=2, heads=4)
    assert track.evaluate == Evaluate(sequences=8, exemption=("llm-int8",))
    assert loads(json.dumps(dump(track)), "f", Track) == track


def test_mitigations_of_one_seam_are_refused_at_their_key(root: Path) -> None:
    (root / "recipes" / "two.yaml").write_text("title: R\nwhy: W\nmitigations: {sgd: {}, adamw: {}}\n")
    with pytest.raises(StrictError, match=r"two\.yaml:3:1: 'sgd' and 'adamw' both change 'optimizer'"):
        load_recipe("two", root)
    (root / "recipes" / "two.yaml").write_text("title: R\nwhy: W\nmitigations: {sgd: {}, relu-attention: {}}\n")
    _, recipe = load_recipe("two", root)
    assert list(recipe.mitigations) == ["sgd", "relu-attention"]
    assert loads(json.dumps(dump(recipe)), "f", Recipe) == recipe


TINY = """\
title: T
task: {passages: {tokenizer: ./m, sets: [code]}}
pretrained: m
seeds: [0]
quantizers: {w8a8-static: {}}
metrics: []
rank-by: {damage: w8a8-static}
"""


def test_places_are_relative_to_their_file_and_kept_as_they_are_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folder in ("here", "there"):
        home = tmp_path / folder
        (home / "m").mkdir(parents=True)
        (home / "mine.yaml").write_text(TINY)
        monkeypatch.chdir(home)
        for path in ("mine.yaml", str(home / "mine.yaml")):
            track = load_track(path, root)[1]
            found.append(digest(dump(track)))
            for held in (track, copy.deepcopy(track)):
                monkeypatch.chdir(root)
                assert Path(place(held.pretrained)) == home / "m"
                assert Path(place(held.task.tokenizer)) == home / "m"
                assert place(held.pretrained, ["m"]) == "m"  # a name comes before a folder
                monkeypatch.chdir(home)
    assert len(set(found)) == 1  # the same track wherever it is
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    (tmp_path / "here" / "mine.yaml").write_text(TINY.replace("pretrained: m", "pretrained: ~/m"))
    track = load_track(tmp_path / "here" / "mine.yaml", root)[1]
    assert (track.pretrained, place(track.pretrained)) == ("~/m", str(tmp_path / "there" / "m"))
    monkeypatch.chdir(root)
    track = load_track(tmp_path / "here" / "mine.yaml", root, ["pretrained=./recipes"])[1]
    assert Path(place(track.pretrained)) == Path("recipes")  # as it is typed
    assert place("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pretrained: m", "pretrained: ./none", "3:1: 'pretrained': there is no /"),
        ("pretrained: m", "steps: 9\nlr: 1e-3\nwarmup: 0", "2:1: nothing is trained on passages"),
        ("sets: [code]", "sets: [codes]", "2:35: 'sets' has 'codes'; did you mean 'code'?"),
        ("./m, sets: [code]", "./m, sets: code", "2:41: 'task.passages.sets' must be a list"),
        (
            "pretrained: m\n",
            "pretrained: m\nevaluate: {lm-eval-items: 9}\n",
            "4:1: 'evaluate.lm-eval-items' is for a task",
        ),
    ],
)
def test_a_task_that_does_not_suit_its_track_is_refused(root: Path, old: str, new: str, message: str) -> None:
    (root / "mine.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(StrictError) as caught:
        load_track(root / "mine.yaml", root, declared=True)
    assert str(caught.value).startswith(f"{root}/mine.yaml:{message}")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [("{lm-eval: {lambada: 9}}", "'evaluate.lm-eval' is for a model that is 'pretrained'"),
     ("{lm-eval-items: 9}", "'evaluate.lm-eval-items' needs a task that is text, not bigram-backcopy")],
)  # fmt: skip
def test_evaluations_that_a_track_cannot_have_are_refused(root: Path, evaluate: str, message: str) -> None:
    (root / "mine.yaml").write_text(
        TINY.replace("pretrained: m", f"steps: 9\nlr: 1e-3\nwarmup: 0\nevaluate: {evaluate}").replace(
            "{passages: {tokenizer: ./m, sets: [code]}}", "{bigram-backcopy: {}}"
        )
    )
    with pytest.raises(StrictError, match=re.escape(message)):
        load_track(root / "mine.yaml", root)


def test_a_check_places_its_error_at_the_first_key_that_is_there() -> None:
    error = KeyedError("no", "a", "b")
    assert isinstance(error, ValueError)
    assert (str(error), error.keys) == ("no", ("a", "b"))


COMMITTED = sorted((ROOT / "recipes").glob("*.yaml")) + sorted((ROOT / "recipes" / "tracks").glob("*.yaml"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_recipe_and_track_is_read_and_round_trips(path: Path) -> None:
    loader, kind = (load_track, Track) if path.parent.name == "tracks" else (load_recipe, Recipe)
    name, instance = loader(path.stem, ROOT)
    assert name == path.stem
    assert loads(json.dumps(dump(instance), ensure_ascii=False), "f", kind) == instance


def test_the_reference_of_keys_is_that_of_the_dataclasses() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    for kind in (Recipe, Track, Shape, Evaluate):
        section = text.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| .+ \|$", section, re.MULTILINE)
        expected = []
        for key, (f, due) in strict.keys(kind).items():
            default = f.default if f.default_factory is MISSING else f.default_factory()
            shown = {} if type(default) in (Shape, Evaluate) else default  # {} takes all of its defaults
            expected.append((key, strict.describe(due), "required" if default is MISSING else f"`{json.dumps(shown)}`"))
        assert rows == expected
