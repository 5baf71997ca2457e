"""Measured choices: made once for a class of machine, kept in the user's cache, and never of any consequence but time.

Times are put into the cache's file, as a machine that is slow at something would have put them.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantbench import speed
from quantbench.bench import Job, _quota, default_jobs, environment, training
from quantbench.cli import main
from quantbench.model import cost
from quantbench.ops import integers, measured, outliers
from quantbench.pretrain import build
from quantbench.recipe import Track, load_recipe, load_track
from quantbench.store import Store, digest

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "a sum"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache, empty, of a process that knows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    measured._here.clear()
    yield tmp_path / "quantbench" / "measured"
    measured._here.clear()
    torch.set_num_threads(before)


class Called:
    """Two ways, and how often they were asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> measured.Ways:
        self.count += 1
        x = torch.ones(1000)
        return {"short": lambda: x[:10].sum(), "long": lambda: [x.sum() for _ in range(300)]}


def file() -> Path:
    found = measured.file()
    assert found is not None
    return found


def put(times: dict[str, measured.Times]) -> None:
    """The file of this class, as `keep` writes it."""
    assert measured.keep(digest(measured.machine()), times)
    measured._here.clear()


def test_the_fastest_is_found_once_a_process_and_once_a_class() -> None:
    make = Called()
    put({QUESTION: {"short": 1.0, "long": 2.0}})
    assert [measured.fastest(QUESTION, make) for _ in range(3)] == ["short"] * 3
    assert make.count == 0  # another process of this class had found it
    file().unlink()
    assert measured.fastest(QUESTION, make) == "short"
    assert make.count == 0  # this process knows
    measured._here.clear()
    assert [measured.fastest(QUESTION, make) for _ in range(3)] == ["short"] * 3
    assert make.count == 1


def test_what_is_kept_is_believed() -> None:
    put({QUESTION: {"short": 2.0, "long": 1.0}})
    assert measured.fastest(QUESTION, Called()) == "long"


def test_another_question_leaves_the_first_where_it_is() -> None:
    put({QUESTION: {"short": 2.0, "long": 1.0}})
    put({"another": {"a": 1.0}})
    assert measured.kept(digest(measured.machine())) == {QUESTION: {"short": 2.0, "long": 1.0}, "another": {"a": 1.0}}


def test_forgotten_is_measured_anew() -> None:
    put({QUESTION: {"short": 2.0, "long": 1.0}})
    measured.forget()
    assert measured.fastest(QUESTION, Called()) == "short"


def _flipped(path: Path) -> None:
    path.write_text(path.read_text().replace("2.0", "0.5"))


def _of_another(path: Path) -> None:
    about = json.loads(path.read_bytes())
    about["machine"]["capability"] = "of another"
    about["sha256"] = digest([about["machine"], about["times"]])
    path.write_text(json.dumps(about))


def _negative(path: Path) -> None:
    about = json.loads(path.read_bytes())
    about["times"][QUESTION] = {"short": 1.0, "long": -1.0}
    about["sha256"] = digest([about["machine"], about["times"]])
    path.write_text(json.dumps(about))


def _open_to_all(path: Path) -> None:
    path.chmod(0o666)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "flipped": _flipped,
    "of another class": _of_another,
    "a negative time": _negative,
    "anybody's": _open_to_all,
    "a fifo": _fifo,
    "a link": _link,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_cannot_be_trusted_is_measured_anew_and_replaced(damage: Callable[[Path], object]) -> None:
    put({QUESTION: {"short": 2.0, "long": 1.0}})
    damage(file())
    make = Called()
    assert measured.fastest(QUESTION, make) == "short"
    assert make.count == 1
    put({"another": {"a": 1.0}})
    assert json.loads(file().read_bytes())["times"]["another"] == {"a": 1.0}


def test_without_a_folder_each_process_measures_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make = Called()
    assert [measured.fastest(QUESTION, make) for _ in range(2)] == ["short"] * 2
    assert make.count == 1
    assert measured.file() is None


def test_threads_make_another_class() -> None:
    put({QUESTION: {"short": 2.0, "long": 1.0}})
    one = file()
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        assert file() != one
        assert measured.fastest(QUESTION, Called()) == "short"
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert measured.fastest(QUESTION, Called()) == "long"


def test_a_way_that_is_hopeless_is_called_once() -> None:
    calls: list[int] = []

    def hopeless() -> None:
        calls.append(1)
        torch.randn(1_500_000).sort()

    measured.measure({"short": lambda: None, "hopeless": hopeless})
    assert len(calls) == 1


# --- the exact product ------------------------------------------------------------------------------------------------


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """torch without oneDNN, as on a CPU without VNNI: its int8 product is exact and slow."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


def test_a_slow_int8_product_is_not_taken_for_being_exact(reference_kernels: None) -> None:
    assert integers._multiplies_int8(False)
    assert not integers.int8_is_faster(2048, 64 * 192)
    assert not integers.int8_is_faster(512, 576 * 1536)
    for choice in integers.choices():
        assert choice.chosen == "float32"
        assert choice.times["float32"] < choice.times["int8"]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("N", "K"), [(192, 64), (1536, 576), (96, 1537)])
@pytest.mark.parametrize(("x_most", "w_most"), [(127, 127), (128, 128), (7, 127), (1, 1), (255, 127)])
def test_neither_way_changes_a_number(
    rows: int, N: int, K: int, x_most: int, w_most: int, reference_kernels: None
) -> None:
    generator = torch.Generator().manual_seed(rows * K)
    x = torch.randint(-x_most, min(x_most, 127 if x_most == 128 else x_most) + 1, (rows, K), generator=generator)
    w = torch.randint(-w_most, min(w_most, 127 if w_most == 128 else w_most) + 1, (N, K), generator=generator)
    x[0], w[0] = -x_most, -w_most  # the largest sum
    found = set()
    for slow, fast in (("int8", "float32"), ("float32", "int8")):
        put({integers.question(*case): {fast: 1.0, slow: 2.0} for case in integers.CASES})
        found.add(integers.int8_is_faster(rows, N * K))
        assert torch.equal(integers.product(x.float(), w.float(), x_most, w_most), (x @ w.T).float())
    assert found == {True, False}  # the file was listened to


# --- bf16 -------------------------------------------------------------------------------------------------------------

TRACK = """
title: As smoke, with little to do
task:
  text: {packages: [pyyaml, rich], vocab: 320}
model: {layers: 2, heads: 4, width: 64, mlp-width: 64}
length: 32
batch: 4
steps: 2
warmup: 1
lr: 4e-3
precision: bf16
seeds: [0, 1, 2]
timeline: 0
quantizers: {w8a8-token: {}}
metrics: [act-max]
evaluate: {sequences: 8, traced: 8, calibration: 1}
rank-by: {damage: w8a8-token}
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Three seeds of the baseline on a track in bf16, in a project of their own."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "recipes" / "tracks" / "tiny.yaml").write_text(TRACK)
    monkeypatch.chdir(tmp_path)
    track = load_track("tiny", tmp_path)[1]
    return [Job("baseline", load_recipe("baseline", tmp_path)[1], "tiny", track, seed) for seed in track.seeds]


def put_steps(track: Track, fp32: float, bf16: float) -> None:
    """A whole step's milliseconds, as they were measured on some machine."""
    part, factor = speed.part_of(track)
    put({speed.question(speed.STEP, part): {"fp32": fp32 / factor, "bf16": bf16 / factor}})


def test_who_trains_in_bf16_where_that_is_slow_is_told_what_it_takes(jobs: list[Job], tmp_path: Path) -> None:
    put_steps(jobs[0].track, fp32=104.0, bf16=796.0)
    longer = [replace(job, track=replace(job.track, steps=3000)) for job in jobs]
    line = speed.advice(longer, Store(tmp_path / ".quantbench"), 2, speed.BY_COPY)
    # Three runs, two at a time, take twice 3,000 steps.
    assert line is not None
    assert line.startswith("bf16 is slow on this machine: training 3 runs takes about 80 minutes, in fp32 about 10 m")
    assert line.endswith(speed.BY_COPY)
    assert "\n" not in line


def test_nobody_is_told_where_bf16_is_fast_or_nothing_is_trained_in_it(jobs: list[Job], tmp_path: Path) -> None:
    store = Store(tmp_path / ".quantbench")
    put_steps(jobs[0].track, fp32=44.0, bf16=29.0)
    assert speed.advice(jobs, store, 2, speed.BY_SET) is None
    put_steps(jobs[0].track, fp32=104.0, bf16=796.0)
    assert speed.advice([replace(j, track=replace(j.track, precision="fp32")) for j in jobs], store, 2, "") is None
    assert training(jobs[0], store) is not None
    assert speed.advice(jobs[:1], store, 2, speed.BY_SET) is None  # it is trained already
    told = speed.advice(jobs, store, 2, speed.BY_SET)
    assert told is not None
    assert "training 2 runs" in told


def test_a_copy_of_the_track_under_its_name_does_what_is_advised(jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "tiny.yaml"
    copy.write_text(TRACK.replace("precision: bf16", "precision: fp32"))
    assert load_track(str(copy), tmp_path) == ("tiny", replace(jobs[0].track, precision="fp32"))


def test_bench_says_it_before_it_trains(jobs: list[Job], capfd: pytest.CaptureFixture[str]) -> None:
    put_steps(jobs[0].track, fp32=104.0, bf16=796.0)
    assert main(["bench", "baseline", "--alone", "--track", "tiny", "--seeds", "1", "--jobs", "1"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "bf16" in line]
    assert len(told) == 1
    assert told[0].startswith("quantbench: bf16 is slow on this machine: training 1 run takes")
    assert "--set precision=fp32" in told[0]


def test_the_part_that_is_timed_is_carried_over_by_the_flops_of_the_model(jobs: list[Job]) -> None:
    for name in ("text", "bb-3layer", "bb-attn-tf-mlp", "wiki"):
        track = load_track(name, ROOT)[1]
        part, factor = speed.part_of(track)
        flops = [_flops(each) * each.batch for each in (part, track)]
        assert factor == pytest.approx(flops[1] / flops[0], rel=0.01)


def _flops(track: Track) -> int:
    model = build({}, track, SimpleNamespace(vocab=getattr(track.task, "vocab", 64), bos=0))  # type: ignore[arg-type]
    return cost(model, track.length)["flops-per-token"] * track.length


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_is_one_object_with_what_was_chosen_and_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    put_steps(load_track("text", tmp_path)[1], fp32=104.0, bf16=796.0)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] == {"command": "make bench RECIPE=relu-attn", "ready": True}
    assert found["device"]["class"] == environment()
    products = [one for one in found["choices"]["choices"] if one["question"].startswith("exact integer product")]
    assert products
    assert {one["chosen"] for one in products} <= {"int8", "float32"}
    [kernel] = [one for one in found["choices"]["choices"] if one not in products]
    assert kernel["chosen"] == outliers.choice()["path"]
    assert found["choices"]["precision"]["times"] == pytest.approx({"fp32": 104.0, "bf16": 796.0})
    assert found["choices"]["precision"]["advice"] == speed.BY_SET
    rounds = math.ceil(6 / found["time"]["workers"])
    saved = found["time"]["by-precision"]["bf16"] - found["time"]["by-precision"]["fp32"]
    assert saved == pytest.approx(rounds * 3000 * (0.796 - 0.104), abs=1.5)
    assert not [each["what"] for each in found["missing"]["missing"] if each["essential"]]
    assert "the model smollm2" in [each["what"] for each in found["missing"]["missing"]]


def test_doctor_says_what_is_missing_and_that_the_command_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    version = metadata.version

    def without(name: str) -> str:
        if name == "lm_eval":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    assert main(["doctor"]) == 2
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("MISSING     lm_eval: needed for the default command") for line in shown)
    assert shown[-1] == "`make bench RECIPE=relu-attn` cannot run: see MISSING"


def test_doctor_begins_before_anything_heavy_is_loaded() -> None:
    code = (
        "import sys\nfrom quantbench import doctor, cli\nfrom quantbench.face import root\n"
        "sections = doctor.examine(root())\n"
        "print([next(sections)[0] for _ in range(3)], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['machine', 'versions', 'store'] False"


# --- how many at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "\n"}, None),
        ({}, None),
    ],
)
def test_a_container_runs_as_many_at_a_time_as_it_has_time_for(
    files: dict[str, str], cores: int | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert _quota(tmp_path) == cores
    assert 1 <= default_jobs() <= (os.cpu_count() or 1)
