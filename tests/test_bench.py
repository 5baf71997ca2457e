"""The whole experiment, run for real on a tiny track: the same bytes however it is run, killed or resumed.

QUANTBENCH_KILLS kill points (default 3; 100 on demand) are spread over pretraining, quantization and rendering.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from blows import Blow, Stillborn, Unreadable, meet
from test_store import read_only

from quantbench.bench import Job, environment, experiment
from quantbench.cli import main
from quantbench.recipe import Track, load_recipe, load_track
from quantbench.results import load, read, read_all, sealed
from quantbench.store import Store, digest
from quantbench.strict import loads
from quantbench.sweep import each

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("QUANTBENCH_KILLS", "3"))

TINY = """
title: As smoke, with few quantizers
task:
  text: {packages: [pyyaml, rich], vocab: 320}
model: {layers: 2, heads: 4, width: 64, mlp-width: 64}
length: 32
batch: 4
steps: 60
warmup: 5
lr: 4e-3
checkpoint: 5
timeline: 3
seeds: [0, 1, 2]
quantizers: {w8a8-static-residual: {}, w8a8-token: {}, w4a16-rtn: {group: 64}}
metrics: [residual-peak, act-max]
evaluate: {sequences: 16, traced: 8, calibration: 2, exemption: [w8a8-static-residual]}
rank-by: {damage: w8a8-static-residual}
"""
WILD = "title: Too fast\nwhy: It diverges.\nlr: {tiny: 100}\n"
BENCH = ("bench", "relu-attn", "wild", "--track", "tiny", "--seeds", "1")


def project_in(folder: Path) -> Path:
    """A project with the tiny track, whose store is its own."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "recipes" / "tracks" / "tiny.yaml").write_text(TINY)
    (folder / "recipes" / "wild.yaml").write_text(WILD)
    return folder


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return start_python("-m", "quantbench", *arguments, cwd=project)


def start_python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    # A shell that runs the suite in the background ignores SIGINT, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)


def run(project: Path, *arguments: str) -> tuple[int, str, str]:
    with start(project, *arguments) as child:
        out, err = child.communicate()
    return child.returncode, out, err


def made(project: Path) -> dict[str, bytes]:
    """Records, tables and pictures by path; not what is said about the run."""
    results = project / "results"
    files = [path for path in results.rglob("*") if path.is_file() and not path.name.endswith(".run.json")]
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def strays(project: Path) -> list[str]:
    return [p.name for p in project.rglob("*") if p.name.startswith(".tmp") or p.suffix == ".work"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """The undisturbed run, two jobs at a time: its project, exit code, stdout, stderr. Not to be changed."""
    project = project_in(tmp_path_factory.mktemp("finished"))
    return project, *run(project, *BENCH, "--jobs", "2")


@pytest.fixture
def copy(finished: tuple[Path, int, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project; we are in it."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def job(project: Path, recipe: str = "baseline", sets: tuple[str, ...] = ()) -> Job:
    return Job(*load_recipe(recipe, project), *load_track("tiny", project, sets), 0)


# --- a run and its record --------------------------------------------------------------------------------------------


def test_a_diverged_recipe_is_a_row_and_the_others_go_on(finished: tuple[Path, int, str, str]) -> None:
    project, code, out, _ = finished
    assert code == 4
    records = {record["recipe"]["name"]: record for record in read_all(project / "results")}
    status = {name: record["status"] for name, record in records.items()}
    assert status == {"baseline": "finished", "relu-attn": "finished", "wild": "diverged"}
    assert re.fullmatch(r"the loss (is (nan|inf)|stayed above .*) at step \d+", records["wild"]["reason"])
    assert records["wild"]["full-precision"] is None
    assert records["wild"]["quantized"] == {}
    assert "3 records written, 0 reproduced byte for byte, 0 differ, 1 diverged, 0 failed" in out
    page = (project / "results" / "README.md").read_text()
    assert f"diverged: seed 0: {records['wild']['reason']}" in page
    assert strays(project) == []


def test_a_record_says_what_it_depends_on(finished: tuple[Path, int, str, str]) -> None:
    project = finished[0]
    record = read(project / "results/tiny/relu-attn/seed-0.json")
    assert record["recipe"]["resolved"] == {"mitigations": {"relu-attention": {"normaliser": "keys"}}, "lr": 0.004}
    assert record["track"]["resolved"]["seeds"] == [0, 1, 2]  # those of the track, not those of this run
    assert record["data"] == job(project).track.task.open(project / ".quantbench").digest  # type: ignore[attr-defined]
    here = record["environment"]
    assert here["torch"].partition("+")[0] == metadata.version("torch").partition("+")[0]
    assert here["bitsandbytes"] == metadata.version("bitsandbytes")
    assert here["threads"] == 1
    assert record["environment"] == environment()
    assert record["cost"]["added-parameters"] == 0
    assert [point["step"] for point in record["training"]["timeline"]] == [0, 7, 60]
    about = load(project / "results/tiny/relu-attn/seed-0.run.json")
    assert about.keys() == {"commit", "dirty", "date", "machine", "seconds", "stages"}
    assert about["stages"].keys() == {"pretrain", "measure", "quantize"}


def test_cells_keep_the_loss_of_every_sequence(finished: tuple[Path, int, str, str]) -> None:
    """Their means are the record's figures: new statistics need no rerun."""
    project = finished[0]
    figures = [json.loads(path.read_bytes()) for path in (project / ".quantbench").rglob("figures.json")]
    assert len(figures) == 2 + 2 * 3
    assert all(len(found["sequence-losses"]) == 16 for found in figures)
    by_loss = {found["loss"]: found for found in figures}
    for record in read_all(project / "results"):
        for found in [record["full-precision"], *record["quantized"].values()]:
            if found is not None:
                cell = by_loss[found["loss"]]
                assert sum(cell["sequence-losses"]) / 16 == pytest.approx(found["loss"], abs=1e-6)
                assert "sequence-losses" not in found
                if "kl" in found:
                    assert sum(cell["sequence-kl"]) / 16 == pytest.approx(found["kl"], abs=1e-6)


def test_the_smoke_track_runs_every_quantizer_and_lm_eval(tmp_path: Path) -> None:
    project = project_in(tmp_path)
    code, out, err = run(project, "bench", "baseline", "--track", "smoke", "--seeds", "1")
    assert code == 0, err
    (record,) = read_all(project / "results")
    track = load_track("smoke", ROOT)[1]
    assert record["quantized"].keys() == track.quantizers.keys()
    assert record["full-precision"]["metrics"].keys() == set(track.metrics)
    assert all(found["exemption"] is None for name, found in record["quantized"].items() if "residual" not in name)
    assert record["quantized"]["w8a8-static-residual"]["exemption"]["tokens"] >= 16  # BOS of every sequence
    for found in (record["full-precision"], record["quantized"]["w8a8-static-residual"]):
        own, theirs = found["lm-eval"]["own-bits-per-byte"], found["lm-eval"]["held-out-bits-per-byte"]
        assert own == pytest.approx(theirs, abs=1e-3)
    assert record["quantized"]["w4a16-rtn"]["lm-eval"] is None
    assert "baseline" in out
    assert "it/s" not in err  # no progress bars of others
    assert "Warning" not in err


def test_the_number_of_jobs_changes_no_byte(finished: tuple[Path, int, str, str], tmp_path: Path) -> None:
    project = project_in(tmp_path)
    code, _, err = run(project, *BENCH, "--jobs", "1")
    assert code == 4, err
    assert made(project) == made(finished[0])
    assert len(made(project)) >= 6  # three records, a page, a table, pictures


# --- again -----------------------------------------------------------------------------------------------------------


def test_a_second_call_computes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, cells = made(copy), Store(copy / ".quantbench").usage()
    assert main([*BENCH]) == 4
    out, err = capsys.readouterr()
    assert "0 records written, 3 reproduced byte for byte, 0 differ, 1 diverged, 0 failed" in out
    assert out.count("(identical)") == 3
    assert "pretrain" not in err
    assert made(copy) == before
    assert Store(copy / ".quantbench").usage() == cells
    assert main([*BENCH, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("in the store") == 3


def test_a_committed_record_that_differs_stays_until_it_is_accepted(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "results/tiny/relu-attn/seed-0.json"
    good = path.read_bytes()
    record = read(path)
    record["quantized"]["w8a8-token"]["kl"] *= 1 + 1e-12
    altered = sealed(record)
    assert altered != good
    path.write_bytes(altered)
    assert main([*BENCH]) == 5
    out, err = capsys.readouterr()
    assert "2 reproduced byte for byte, 1 differ" in out
    assert "relu-attn seed 0: this run differs from the committed record" in err
    assert "--accept" in err
    assert path.read_bytes() == altered
    assert main([*BENCH, "--accept"]) == 4
    assert "1 records written" in capsys.readouterr().out
    assert path.read_bytes() == good


def test_an_altered_record_is_told_before_any_work(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "results/tiny/relu-attn/seed-0.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"seed": 0', b'"seed": 1'))
    shutil.rmtree(copy / ".quantbench" / "quantize")
    assert main([*BENCH]) == 5
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"quantbench: {path}: it is not as it was written")
    assert not (copy / ".quantbench" / "quantize").exists()
    path.write_bytes(good)
    assert main(["leaderboard"]) == 0


def test_a_new_title_or_more_seeds_is_no_contradiction(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "recipes/tracks/tiny.yaml"
    path.write_text(TINY.replace("As smoke", "Like smoke").replace("[0, 1, 2]", "[0, 1, 2, 3]"))
    assert main([*BENCH]) == 4
    assert "3 records written, 0 reproduced byte for byte, 0 differ" in capsys.readouterr().out
    assert read(copy / "results/tiny/baseline/seed-0.json")["track"]["resolved"]["seeds"] == [0, 1, 2, 3]
    assert main([*BENCH]) == 4
    assert "3 reproduced byte for byte, 0 differ" in capsys.readouterr().out


def test_a_job_that_fails_is_exit_3_and_leaves_no_record(copy: Path) -> None:
    before = made(copy)
    shutil.rmtree(copy / ".quantbench" / "measure")
    (copy / ".quantbench" / "measure").touch()  # nothing can be kept there
    code, out, err = run(copy, "bench", "wild", *BENCH[3:], "--set", "evaluate.sequences=15")
    assert code == 3
    assert "1 records written, 0 reproduced byte for byte, 0 differ, 1 diverged, 1 failed" in out
    assert "never on the leaderboard" in out
    assert re.search(r"quantbench: baseline seed 0: FileExistsError: .*/measure'\n", err)
    assert "Traceback" not in err
    scratch = list((copy / ".quantbench" / "scratch").rglob("seed-0.json"))
    assert [path.parent.name for path in scratch] == ["wild"]
    assert made(copy) == before


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["evaluate.sequences=100000"], "track tiny: text: the held-out split has "),
        (["evaluate.lm-eval-items=90000"], "track tiny: text: the held-out split has .* documents of 200 characters"),
        (["length=1000000", "model.width=128"], "track tiny: text: the held-out split has 0 windows"),
        (["task.text.packages=[no-such-package]"], "text: the package 'no-such-package' is not installed"),
        (["task.text.folder=./nowhere", "task.text.packages=[]"], "text: './nowhere' is no folder"),
    ],
)
def test_what_cannot_be_judged_is_told_before_it_is_trained(
    copy: Path, capsys: pytest.CaptureFixture[str], sets: list[str], message: str
) -> None:
    cells = Store(copy / ".quantbench").usage()
    flags = [word for one in sets for word in ("--set", one)]
    assert main(["bench", "relu-attn", "--alone", "--track", "tiny", "--seeds", "1", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"1 runs on track tiny: .*\n(quantbench: reading .*\n)?quantbench: {message}.*\n", err), err
    assert {stage: count for stage, count, _ in Store(copy / ".quantbench").usage() if stage != "text"} == {
        stage: count for stage, count, _ in cells if stage != "text"
    }


@pytest.mark.skipif(bool(find_spec("torchao")), reason="torchao is installed")
def test_a_package_that_a_quantizer_needs_is_asked_for_before(copy: Path) -> None:
    asked = ("bench", "relu-attn", "--track", "tiny", "--seeds", "1")
    code, out, err = run(copy, *asked, "--set", "quantizers.torchao-int8dyn={}")
    assert (code, out) == (2, "")
    assert err.endswith(
        "quantbench: track tiny: torchao-int8dyn needs torchao, which is not installed; it comes with: "
        "pip install quantbench[peers]\n"
    )


def test_results_that_cannot_be_written_are_told_before(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "file").touch()
    assert main([*BENCH, "--results", "file/below"]) == 2
    assert capsys.readouterr() == ("", f"quantbench: results in file/below: {copy}/file is no folder\n")
    (copy / "others" / "tiny").mkdir(parents=True)
    (copy / "others" / "tiny" / "relu-attn").touch()
    assert main([*BENCH, "--results", "others"]) == 2
    assert capsys.readouterr().err.endswith("results in others/tiny/relu-attn: others/tiny/relu-attn is no folder\n")


def test_everything_is_read_from_a_store_that_cannot_be_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with read_only(copy / ".quantbench"):
        assert main([*BENCH]) == 4
        out, err = capsys.readouterr()
        assert "0 records written, 3 reproduced byte for byte, 0 differ, 1 diverged, 0 failed" in out
        assert err.count("\n") == 1  # which runs there are
        assert main([*BENCH[:-1], "2"]) == 2
        assert capsys.readouterr().err.splitlines()[1:] == [
            f"quantbench: the store {copy}/.quantbench: {copy}/.quantbench is on a read-only mount, and there is "
            "something to compute: copy the project to where it can be written, and run there"
        ]


def test_a_track_and_a_recipe_by_their_paths(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the summary are those of their names."""
    (copy / "elsewhere").mkdir()
    shutil.copy(copy / "recipes" / "tracks" / "tiny.yaml", copy / "elsewhere" / "mine.yaml")
    shutil.copy(copy / "recipes" / "relu-attn.yaml", copy / "elsewhere" / "rectified.yaml")
    arguments = ["bench", "elsewhere/rectified.yaml", "--track", "elsewhere/mine.yaml", "--seeds", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "2 records written" in out
    assert "mine, ranked by damage" in out
    assert re.search(r"^│ [12] +│ rectified +│", out, re.MULTILINE)
    assert err == "2 runs on track mine: baseline seed 0, rectified seed 0\n"
    assert {"mine/baseline/seed-0.json", "mine/rectified/seed-0.json"} <= made(copy).keys()
    assert main(["check", "elsewhere/mine.yaml", "elsewhere/rectified.yaml"]) == 0
    shutil.copy(copy / "elsewhere" / "rectified.yaml", copy / "elsewhere" / "baseline.yaml")
    assert main(["bench", "elsewhere/baseline.yaml", "--track", "tiny"]) == 2
    assert "two different recipes are named 'baseline'" in capsys.readouterr().err


def test_a_corrupted_checkpoint_is_noticed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(copy / ".quantbench")
    relu, baseline = job(copy, "relu-attn"), job(copy)
    assert experiment(relu, store, compute=False) is not None
    for weights in (copy / ".quantbench" / "pretrain").rglob("model.safetensors"):
        if "relu-attention" in (weights.parent / "config.json").read_text():
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
    assert experiment(relu, store, compute=False) is None
    assert "model.safetensors is corrupted; computing it anew" in capsys.readouterr().err
    assert experiment(baseline, store, compute=False) is not None


# --- keys ------------------------------------------------------------------------------------------------------------


class Asked(Store):
    """A store that remembers which keys it was asked for, by stage."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: dict[str, list[str]] = {}

    def load(self, stage: str, inputs: Any) -> Path | None:
        self.keys.setdefault(stage, []).append(digest(inputs))
        return super().load(stage, inputs)


def keys(project: Path, job: Job) -> dict[str, list[str]]:
    """The keys that a job looks for, up to the first that is missing."""
    store = Asked(project / ".quantbench")
    experiment(job, store, compute=False)
    return store.keys


def with_track(job: Job, old: str, new: str) -> Job:
    assert old in TINY
    return replace(job, track=loads(TINY.replace(old, new), "tiny.yaml", Track))


def test_what_a_checkpoint_depends_on_changes_its_key(copy: Path) -> None:
    base = job(copy)
    known = keys(copy, base)
    assert {stage: len(found) for stage, found in known.items()} == {"pretrain": 1, "measure": 1, "quantize": 3}
    others = {
        "recipe": job(copy, "relu-attn"),
        "a mitigation's parameter": job(copy, "relu-attn-sqrt"),
        "the recipe's lr": replace(base, recipe=replace(base.recipe, lr={"tiny": 3e-3})),
        "seed": replace(base, seed=1),
        "lr": with_track(base, "lr: 4e-3", "lr: 5e-3"),
        "steps": with_track(base, "steps: 60", "steps: 61"),
        "batch": with_track(base, "batch: 4", "batch: 5"),
        "length": with_track(base, "length: 32", "length: 33"),
        "warmup": with_track(base, "warmup: 5", "warmup: 6"),
        "width": with_track(base, "mlp-width: 64", "mlp-width: 128"),
        "a default": with_track(base, "batch: 4", "batch: 4\nweight-decay: 0.4"),
        "precision": with_track(base, "batch: 4", "batch: 4\nprecision: bf16"),
        "timeline": with_track(base, "timeline: 3", "timeline: 4"),
        "the text": with_track(base, "[pyyaml, rich]", "[rich, pyyaml]"),
        "the tokenizer": with_track(base, "vocab: 320", "vocab: 300"),
    }
    found = {what: keys(copy, other)["pretrain"][0] for what, other in others.items()}
    assert len({known["pretrain"][0], *found.values()}) == 1 + len(others), found


def test_what_a_quantizer_depends_on_changes_its_key_alone(copy: Path) -> None:
    base = job(copy)
    known = keys(copy, base)
    for old, new, index in [
        ("w8a8-static-residual: {}", "w8a8-static-residual: {weights: 7}", 0),
        ("w8a8-token: {}", "w8a8-token: {activations: 7}", 1),
        ("w4a16-rtn: {group: 64}", "w4a16-rtn: {group: 32}", 2),
        ("exemption: [w8a8-static-residual]", "exemption: []", 0),
    ]:
        found = keys(copy, with_track(base, old, new))
        assert found["pretrain"] == known["pretrain"]
        assert found["measure"] == known["measure"]
        assert found["quantize"] == [*known["quantize"][:index], found["quantize"][-1]]
        assert found["quantize"][-1] != known["quantize"][index], new


def test_how_it_is_evaluated_leaves_the_checkpoint(copy: Path) -> None:
    base = job(copy)
    known = keys(copy, base)
    for old, new in [
        ("sequences: 16", "sequences: 17"),
        ("traced: 8", "traced: 9"),
        ("calibration: 2", "calibration: 3"),
        ("metrics: [residual-peak, act-max]", "metrics: [residual-peak]"),
    ]:
        found = keys(copy, with_track(base, old, new))
        assert found["pretrain"] == known["pretrain"]
        assert found["measure"] != known["measure"], new


def test_what_decides_no_number_changes_no_key(copy: Path) -> None:
    base = job(copy)
    known = keys(copy, base)
    same = [
        replace(base, recipe=replace(base.recipe, title="Another", why="Because", lr={"text": 1.0})),
        with_track(base, "title: As smoke", "title: Like smoke"),
        with_track(base, "seeds: [0, 1, 2]", "seeds: [0, 7]"),
        with_track(base, "checkpoint: 5", "checkpoint: 6"),
        with_track(base, "steps: 60\nwarmup: 5", "warmup: 5\nsteps: 60"),
    ]
    for other in same:
        assert keys(copy, other) == known


# --- killed ----------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def exists(project: Path, pattern: str, count: int = 1) -> Callable[[], bool]:
    return lambda: len(list(project.glob(pattern))) >= count


MOMENTS = {  # what there is when the stage has begun, and within how many seconds it is killed
    "pretraining": (".quantbench/pretrain/*.work/step-*", 1, 0.4),
    "quantization": (".quantbench/quantize/*.lock", 1, 0.6),
    "rendering": ("results/tiny/*/seed-0.json", 3, 1.5),
}


@pytest.mark.parametrize("first", range(0, KILLS, len(MOMENTS)))
def test_a_killed_run_ends_with_the_same_bytes(
    finished: tuple[Path, int, str, str], tmp_path: Path, first: int
) -> None:
    project, generator = project_in(tmp_path), random.Random(first)
    jobs = str(1 + first // len(MOMENTS) % 2)  # one at a time, two at a time, in turn
    killed = 0
    for moment in list(MOMENTS)[: KILLS - first]:
        pattern, count, longest = MOMENTS[moment]
        with start(project, *BENCH, "--jobs", jobs) as child:
            wait_for(exists(project, pattern, count), child)
            time.sleep(generator.uniform(0, longest))
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        killed += child.returncode == -signal.SIGKILL
        if moment == "pretraining":
            assert not list(project.glob("results/tiny/relu-attn/*"))
    assert killed  # rendering may have come to its end before
    code, out, err = run(project, *BENCH, "--jobs", jobs)
    assert code == 4, err
    assert "0 differ, 1 diverged, 0 failed" in out
    assert made(project) == made(finished[0])
    assert strays(project) == []


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_of(child: subprocess.Popen[str]) -> list[int]:
    return [pid for pid in children(child.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "orphans work on"
        time.sleep(0.05)


@contextmanager
def endless(project: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run that would train for days, and the worker that trains it."""
    path = project / "recipes" / "tracks" / "tiny.yaml"
    path.write_text(TINY.replace("steps: 60", "steps: 100000000"))
    with start(project, "bench", "baseline", "--track", "tiny", "--seeds", "1", "--jobs", "2") as child:
        try:
            wait_for(exists(project, ".quantbench/pretrain/*.work/step-*"), child)
            yield child, workers_of(child)
        finally:
            os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, blow: signal.Signals) -> None:
    with endless(project_in(tmp_path)) as (child, workers):
        assert len(workers) == 1
        assert all(map(alive, workers))
        child.send_signal(blow)  # to the parent alone
        _, err = child.communicate(timeout=60)  # workers write to the same pipe: this waits for their end, too
        wait_for_end(workers)
        if blow == signal.SIGINT:
            assert child.returncode == 130
            assert err.endswith("run the same command again to go on where it stopped\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_that_breaks_whenever_it_runs_is_a_failure_that_says_how_to_go_on(tmp_path: Path) -> None:
    project = project_in(tmp_path)
    with endless(project) as (child, workers):
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: bool(set(workers_of(child)) - set(workers)), child)
        again = sorted(set(workers_of(child)) - set(workers))
        os.kill(again[0], signal.SIGKILL)
        out, err = child.communicate()
        assert child.returncode == 3
        assert "0 records written, 0 reproduced byte for byte, 0 differ, 0 diverged, 1 failed" in out
        killed = "quantbench: baseline seed 0: its process was killed by SIGKILL (out of memory?)"
        assert [line for line in err.splitlines() if "its process" in line] == [
            f"{killed}; it is tried again, alone",
            f"{killed}, and so when it was tried again; run the command again to resume",
        ]
        assert not any(map(alive, workers + again))
    assert exists(project, ".quantbench/pretrain/*.work/step-*")()  # what there is to resume from


def outcomes(jobs: list[Any], root: Path, workers: int = 2) -> dict[str, Any]:
    return {str(job): done for job, done in each(meet, jobs, Store(root), workers)}


def test_a_killed_worker_costs_its_job_a_try_and_nobody_else_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [Blow("a"), Blow("once", "kill", 1), Blow("b"), Blow("twice", "kill in the midst of a report", 2), Blow("c"),
            Blow("always", "kill", 9), Blow("d")]  # fmt: skip
    found = outcomes(jobs, tmp_path)
    assert {name: found[name][0] for name in ("a", "b", "c", "d", "once", "twice")} == {
        "a": 1, "b": 1, "c": 1, "d": 1, "once": 2, "twice": 3,
    }  # fmt: skip
    assert list(found)[-3:] == ["once", "twice", "always"]  # alone, when the others are done
    assert (tmp_path / "always").read_text() == "xxx"  # once beside others, twice alone
    killed = "its process was killed by SIGKILL (out of memory?)"
    assert found["always"] == f"{killed}, and so when it was tried again; run the command again to resume"
    told = [line for line in capsys.readouterr().err.splitlines() if killed in line]
    assert sorted(told) == [
        f"quantbench: {name}: {killed}; it is tried again, alone"
        for name in ("always", "always", "once", "twice", "twice")
    ]


def test_a_job_that_fails_or_cannot_be_read_is_not_tried_again(tmp_path: Path) -> None:
    found = outcomes([Blow("fails", "fail", 9), Unreadable("unreadable"), Blow("fine")], tmp_path)
    assert found.pop("fine")[0] == 1
    assert found == {"fails": "ValueError: it cannot be done", "unreadable": "ImportError: no module for unreadable"}
    assert (tmp_path / "fails").read_text() == "x"


def test_one_job_alone_is_tried_twice(tmp_path: Path) -> None:
    found = outcomes([Blow("exits", "exit", 9)], tmp_path)
    assert found["exits"].startswith("its process ended with exit code 7, and so when it was tried again; ")
    assert (tmp_path / "exits").read_text() == "xx"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_a_signal_to_all_of_them(tmp_path: Path, blow: signal.Signals, twice: bool) -> None:
    """As a terminal or a scheduler sends it; the line and the code are the parent's alone."""
    with start_python(Path(__file__).with_name("blows.py"), str(tmp_path)) as child:
        wait_for((tmp_path / "waits").exists, child)
        workers = workers_of(child)
        assert len(workers) == 2
        for _ in range(1 + twice):
            os.kill(child.pid, blow) if blow == signal.SIGKILL else os.killpg(child.pid, blow)
        _, err = child.communicate(timeout=60)
        wait_for_end(workers)
    said = [line for line in err.splitlines() if ": pretrain " not in line]
    if blow == signal.SIGKILL:
        assert said == []
    else:
        how = "interrupted" if blow == signal.SIGINT else f"stopped by {blow.name}"
        assert said == [f"quantbench: {how}; run the same command again to go on where it stopped"]
        assert child.returncode == 128 + blow


def test_processes_that_cannot_start_are_not_started_for_every_job(tmp_path: Path) -> None:
    jobs: list[Any] = [Stillborn(f"job {number}", str(tmp_path / "starts")) for number in range(20)]
    found = outcomes(jobs, tmp_path, workers=1)
    assert all(done.startswith("its process ended with exit code 9, and so when") for done in found.values())
    assert (len(found), len((tmp_path / "starts").read_text())) == (20, 6)  # three in a row, in two rounds
