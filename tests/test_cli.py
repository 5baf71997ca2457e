"""The face: verbs, exit codes, one line per refusal, and nothing heavy or written before it is needed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_records import synthetic

from quantbench import __version__, catalog
from quantbench.cli import main
from quantbench.face import root
from quantbench.recipe import load_track
from quantbench.results import path_of, write
from quantbench.store import Store

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "numpy", "scipy", "transformers", "tokenizers", "bitsandbytes", "lm_eval", "matplotlib", "rich"}
PLACED = re.compile(r"[^\n]+\.yaml:[1-9][0-9]*:[1-9][0-9]*: [^\n]+\n")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, whose store is its own; we are in it."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def child(project: Path, *arguments: str) -> tuple[int, str, set[str]]:
    """(exit code, stderr, libraries that were loaded) of a run in a process of its own."""
    code = (
        "import sys\nfrom quantbench.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('\\n@', code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=project, capture_output=True, text=True, check=True
    )
    exit_code, *modules = done.stdout.rpartition("@")[2].split()
    return int(exit_code), done.stderr, {name.partition(".")[0] for name in modules}


# --- what it costs to be told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["bench", "--help"], ["list"], ["list", "--json"], ["store"]]
)
def test_help_and_lists_load_nothing_heavy(project: Path, arguments: list[str]) -> None:
    code, stderr, loaded = child(project, *arguments)
    assert (code, stderr) == (0, "")
    assert "argparse" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: T\nwhy: W\nmitigation: {}\n", r"3:1: unknown key 'mitigation'; did you mean 'mitigations'\?"),
        ("title: T\nwhy: W\nmitigations: {relu-atention: {}}\n", r"3:15: .*did you mean 'relu-attention'\?"),
        ("title: T\nwhy: W\nlr: {smoke: fast}\n", r"3:13: .*'lr.smoke' must be a number from .* to 100.0"),
        ("title: T\nwhy: W\nlr: {smoke: 1e9}\n", r"3:13: .*from .* to 100.0"),
        ("title: T\ntitle: T\nwhy: W\n", r"2:1: repeated key 'title'"),
        ("title: T\n", r"1:1: missing key 'why'"),
        ("title: T\nwhy: !!python/object/apply:os.system [ls]\n", r"2:6: tags .* refused"),
        ("title: [\n", r"\d:\d: "),
        ("", r"1:1: empty"),
    ],
)
def test_a_bad_recipe_is_one_line_with_its_place(project: Path, text: str, message: str) -> None:
    (project / "recipes" / "bad.yaml").write_text(text)
    before = tree(project)
    code, stderr, loaded = child(project, "bench", "bad", "--track", "smoke", "--seeds", "1")
    assert code == 2
    assert PLACED.fullmatch(stderr)
    assert re.search(r"bad\.yaml:" + message, stderr)
    assert not loaded & HEAVY
    assert tree(project) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 20", "steps: 0", "missing key 'steps': it is above 0 unless"),
        ("lr: 4e-3", "lr: .nan", "'lr' must be finite"),
        ("bnb-nf4", "bnb-nf5", "quantizers has no 'bnb-nf5'; did you mean 'bnb-nf4'?"),
        ("width: 64", "width: 65", "'width' must be a multiple of 64"),
        ("damage: w8a8-static-residual", "damage: int8", "'rank-by' names 'int8', no quantizer of this track"),
    ],
)
def test_a_bad_track_is_one_line_with_its_place(project: Path, old: str, new: str, message: str) -> None:
    path = project / "recipes" / "tracks" / "smoke.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    before = tree(project)
    code, stderr, loaded = child(project, "bench", "baseline", "--track", "smoke")
    assert code == 2
    assert PLACED.fullmatch(stderr)
    assert message in stderr
    assert not loaded & HEAVY
    assert tree(project) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("w4a16-rtn: {group: 64}", "w4a16-rtn: {group: 48}", "w4a16-rtn: group: 48 does not divide a Linear"),
        ("mlp-width: 64", "mlp-width: 96", "w4a16-rtn: group: 64 does not divide a Linear's input width 96"),
        ("w4a4-token: {}", "w4a4-token: {weights: 9}", "w4a4-token: weights: 9 bits; choose 2 to 8"),
        ("bnb-int8: {}", "bnb-int8: {threshold: -1}", "bnb-int8: threshold: -1.0 means nothing"),
    ],
)  # fmt: skip
def test_a_quantizer_that_cannot_work_is_refused_before_training(
    project: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    path = project / "recipes" / "tracks" / "smoke.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    before = tree(project)
    assert main(["bench", "relu-attn", "--track", "smoke"]) == 2
    stderr = capsys.readouterr().err
    assert PLACED.fullmatch(stderr)
    assert message in stderr
    key = f"  {message.partition(':')[0]}:"
    (line,) = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(key)]
    assert f"smoke.yaml:{line}:3: " in stderr
    assert main(["check", "recipes/tracks/smoke.yaml"]) == 2
    assert capsys.readouterr().err == stderr.replace(str(project) + "/", "")
    assert tree(project) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "relu-atn", "--track", "smoke"], "no recipe 'relu-atn'.*did you mean 'relu-attn'"),
        (["bench", "../evil", "--track", "smoke"], "no recipe '../evil'"),
        (["bench", "baseline", "--track", "smok"], "no track 'smok'.*did you mean 'smoke'"),
        (["show", "relu-atn", "--track", "smoke"], "did you mean 'relu-attn'"),
        (["bench", "baseline", "--track", "smoke", "--seeds", "99"], "--seeds 99: the track has 3 seeds; ask for 1"),
        (["bench", "baseline", "--track", "smoke", "--seeds", "0"], "--seeds 0: the track has 3 seeds"),
        (["bench", "baseline", "--track", "smoke", "--set", "steps"], "--set steps: write key=value"),
        (["bench", "baseline", "--track", "smoke", "--set", "stepz=3"], "unknown key 'stepz'; did you mean 'steps'"),
        (["bench", "baseline", "--track", "smoke", "--set", "steps=many"], "--set steps=many: 'steps' must be a whole"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = tree(project)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert tree(project) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["bench"],
        ["bench", "baseline", "--jobs", "0"],
        ["bench", "baseline", "--jobs", "two"],
        ["bench", "baseline", "--jobs", "100000"],
    ],
)
def test_bad_arguments_are_exit_2(project: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: quantbench" in capsys.readouterr().err


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_python_m_quantbench_is_the_same_program(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantbench", "--version"], cwd=project, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"quantbench {__version__}\n")


def test_the_project_is_the_nearest_folder_upwards(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert root() == project
    inside = project / "recipes" / "tracks"
    monkeypatch.chdir(inside)
    assert root() == project
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert root() == ROOT


def test_list_names_all_there_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes" / "mine.yaml").write_text("title: T\nwhy: W\n")
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"recipes", "tracks", *catalog.AXES}
    assert {"baseline", "relu-attn", "mine"} <= set(found["recipes"])
    assert "smoke" in found["tracks"]
    assert all(found[axis] == catalog.names(axis) for axis in catalog.AXES)
    assert main(["list"]) == 0
    plain = capsys.readouterr().out.split()
    assert all(name in plain for names in found.values() for name in names)


def test_show_gives_the_whole_recipe_and_the_difference(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "relu-attn", "--track", "smoke"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv:2410.13835" in shown
    head, _, resolved = shown.partition("resolved on smoke:\n")
    found = json.loads(resolved)
    assert found["recipe"] == {"mitigations": {"relu-attention": {"normaliser": "keys"}}, "lr": 0.004}
    assert found["track"]["steps"] == 20
    assert found["track"]["weight-decay"] == 0.5  # a default is written out, too
    assert json.loads(head.partition("baseline in:\n")[2]) == {"mitigations": found["recipe"]["mitigations"]}
    assert main(["show", "baseline", "--track", "smoke"]) == 0
    assert "it is the baseline" in capsys.readouterr().out


def test_check_reads_recipes_and_tracks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path.relative_to(project)) for path in sorted((project / "recipes").rglob("*.yaml"))]
    assert main(["check", *files]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}: fine" for file in files]
    bad = project / "recipes" / "bad.yaml"
    bad.write_text("title: T\n")
    assert main(["check", *files, "recipes/bad.yaml", "recipes/none.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out.count(": fine\n") == len(files)
    assert err == (
        "recipes/bad.yaml:1:1: missing key 'why'\nrecipes/none.yaml:1:1: cannot be read: No such file or directory\n"
    )


def test_a_dry_run_says_what_would_run_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(project)
    arguments = ["bench", "relu-attn", "sgd", "--track", "smoke", "--seeds", "2", "--dry-run"]
    assert main(arguments) == 0
    *jobs, where = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in jobs] == [
        f"{recipe} seed {seed}" for seed in (0, 1) for recipe in ("baseline", "relu-attn", "sgd")
    ]
    assert all(line.endswith("lr 0.004, 20 steps, 8 quantizers: to compute") for line in jobs)
    assert where == f"records would go to {project / 'results'}"
    assert tree(project) == before
    load_track("smoke", project)[1].task.open(project / ".quantbench")  # type: ignore[attr-defined]
    before = tree(project)
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [*jobs, where]
    assert tree(project) == before


def test_alone_leaves_the_baseline_out_and_more_seeds_are_the_extra_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sgd", "--track", "text", "--seeds", "7", "--alone", "--dry-run"]) == 0
    *jobs, _ = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in jobs] == [f"sgd seed {seed}" for seed in range(7)]


def test_set_is_for_exploring(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Never onto the leaderboard; other settings go to another folder, and no folder that is asked for is forgotten."""
    wheres = set()
    for sets in (["steps=30"], ["steps=31"], ["steps=30", "lr=1e-3"]):
        flags = [flag for one in sets for flag in ("--set", one)]
        assert main(["bench", "baseline", "--track", "smoke", "--dry-run", *flags]) == 0
        *jobs, where = capsys.readouterr().out.splitlines()
        assert all(f"{sets[0].partition('=')[2]} steps" in line for line in jobs)
        wheres.add(where.removeprefix("records would go to "))
    assert len(wheres) == 3
    assert {Path(where).parent for where in wheres} == {project / ".quantbench" / "scratch"}
    assert main(["bench", "baseline", "--track", "smoke", "--set", "steps=30", "--results", "mine"]) == 2
    assert capsys.readouterr().err.startswith("quantbench: --results and --set: what is explored goes to a scratch")


def test_leaderboard_renders_the_records_and_the_projects_page(project: Path) -> None:
    results = project / "results"
    for record in (synthetic(), synthetic("relu-attn", damage=0.05, peak=30.0)):
        write(results, record, {})
    readme = project / "README.md"
    readme.write_text("# mine\n<!-- leaderboard:begin -->\n<!-- leaderboard:end -->\nafter\n")
    assert main(["leaderboard"]) == 0
    first = tree(project)
    assert "relu-attn" in (results / "README.md").read_text()
    assert "relu-attn" in (results / "leaderboard.csv").read_text()
    assert readme.read_text().startswith("# mine\n")
    assert readme.read_text().endswith("\nafter\n")
    assert "relu-attn" in readme.read_text()
    assert main(["leaderboard"]) == 0
    assert tree(project) == first


def test_leaderboard_leaves_a_page_beside_other_results_alone(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "results", synthetic(), {})
    page = elsewhere / "README.md"
    page.write_text("somebody else's\n")
    assert main(["leaderboard", "--results", str(elsewhere / "results")]) == 0
    assert page.read_text() == "somebody else's\n"
    assert (elsewhere / "results" / "README.md").is_file()


@pytest.mark.parametrize("verb", ["leaderboard", "relation"])
def test_a_broken_record_is_exit_5_and_named(project: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    results = project / "results"
    for record in (synthetic(), synthetic("relu-attn")):
        write(results, record, {})
    path = path_of(results, synthetic())
    path.write_bytes(path.read_bytes().replace(b'"kl": 0.1,', b'"kl": 0.2 ,', 1))
    before = tree(project)
    assert main([verb]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err
    assert tree(project) == before


def test_what_cannot_be_rendered_is_told_before_anything_is_trained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "baseline", "--track", "smoke", "--seeds", "1"]
    (project / "README.md").write_text("no block for a table\n")
    assert main(arguments) == 2
    assert "put one line <!-- leaderboard:begin -->" in capsys.readouterr().err
    (project / "README.md").unlink()
    write(project / "results", synthetic(), {})
    path = path_of(project / "results", synthetic())
    path.write_bytes(path.read_bytes().replace(b'"kl": 0.1,', b'"kl": 0.2 ,', 1))
    assert main(arguments) == 5
    assert str(path) in capsys.readouterr().err
    assert not (project / ".quantbench").exists()


@pytest.mark.parametrize("verb", ["claims", "relation", "leaderboard"])
def test_results_that_are_not_there_are_told(project: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "--results", "nowhere"]) == 2
    assert capsys.readouterr() == ("", "quantbench: --results nowhere: no such folder\n")
    assert not (project / "nowhere").exists()


def test_relation_gives_figures_for_every_quantizer(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, recipe in enumerate(("baseline", "relu-attn", "sgd", "muon")):
        for seed in range(2):
            record = synthetic(recipe, seed, kl=0.1 * 2**index, peak=100.0 * 3**index, mitigations=(recipe,))
            write(project / "results", record, {})
    assert main(["relation", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"text"}
    assert found["text"].keys() == {"w8a8-static", "w8a8-token"}
    figures = found["text"]["w8a8-static"]["residual-peak"]
    assert (figures["n"], figures["recipes"], figures["rho"]["estimate"]) == (8, 4, 1.0)
    assert main(["relation"]) == 0
    plain = capsys.readouterr().out
    assert "text: log KL under w8a8-static on log residual-peak: Spearman rho" in plain
    assert "None" not in plain


def test_relation_of_nothing_is_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert main(["relation"]) == 0
    assert capsys.readouterr().out == ""


def test_carry_writes_one_file_that_stands_for_the_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["carry", "smoke"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    (path,) = (project / ".quantbench" / "carried").iterdir()
    data = load_track("smoke", project)[1].task.open(project / ".quantbench")  # type: ignore[attr-defined]
    assert re.fullmatch(rf"{re.escape(str(path))}: \d\.\d MiB, data {data.digest[:12]}", first)
    assert second == f"copy it to {path.relative_to(project)} of the clone on the other machine"
    assert main(["store", "--prune"]) == 0  # leaves it where it is
    assert path.exists()
    assert main(["carry", "bb-3layer"]) == 2
    assert capsys.readouterr().err.endswith(
        "track bb-3layer: this task makes its data wherever it runs: there is nothing to carry\n"
    )


def test_store_counts_cells_and_prunes_partial_work(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store"]) == 0
    assert capsys.readouterr().out == ""
    assert not (project / ".quantbench").exists()
    store = Store(project / ".quantbench")
    with store.cell("pretrain", {"seed": 0}) as cell:
        cell.commit({"weights": bytes(2_000_000)})
    with pytest.raises(KeyboardInterrupt), store.cell("pretrain", {"seed": 1}) as cell:  # noqa: PT012
        (cell.work / "step-5").write_bytes(bytes(1_000_000))
        raise KeyboardInterrupt
    assert main(["store"]) == 0
    assert capsys.readouterr().out.split() == ["pretrain", "1", "cells", "3.0", "MB"]
    assert main(["store", "--prune"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "0 cells removed, and all partial work"
    assert main(["store"]) == 0
    assert capsys.readouterr().out.split() == ["pretrain", "1", "cells", "2.0", "MB"]
    assert store.load("pretrain", {"seed": 0}) is not None


# --- signals ---------------------------------------------------------------------------------------------------------

LINE = "run the same command again to go on where it stopped\n"
SAID = {
    signal.SIGINT: f"quantbench: interrupted; {LINE}",
    signal.SIGTERM: f"quantbench: stopped by SIGTERM; {LINE}",
    signal.SIGHUP: f"quantbench: stopped by SIGHUP; {LINE}",
}
WAITS = "print('ready', flush=True); time.sleep(60)"
PROGRAMS = {  # when a signal comes, and a program that waits for it there
    "at work": f"def main():\n {WAITS}",
    "while it imports": "def main():\n sys.path.insert(0, sys.argv[1]); import waits",
    "while it ends": f"def main():\n try:\n  os.kill(os.getpid(), signal.SIGTERM)\n finally:\n  {WAITS}",
    "while it prints": "def main():\n while True: print('ready', flush=True)",
}
DEAF = f"class Deaf:\n def __del__(self):\n  {WAITS}\ndef main():\n Deaf()\n time.sleep(60)"


def program(code: str, *arguments: str, encoding: str = "utf-8") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import os, signal, sys, time\nfrom quantbench import shell\n{code}", *arguments]
    # A shell that runs the suite in the background ignores SIGINT, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding=encoding)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", SAID)
@pytest.mark.parametrize("moment", PROGRAMS)
def test_a_signal_is_one_line_and_its_code(tmp_path: Path, moment: str, signum: signal.Signals) -> None:
    (tmp_path / "waits.py").write_text(f"import time\n{WAITS}\n")
    with program(f"{PROGRAMS[moment]}\nshell.run(main)", str(tmp_path)) as child:
        assert (child.stdout and child.stdout.readline()) == "ready\n"
        child.send_signal(signum)
        _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (128 + signum, SAID[signum])


def test_a_signal_is_obeyed_where_python_ignores_exceptions() -> None:
    with program(f"{DEAF}\nshell.run(main)") as child:
        assert (child.stdout and child.stdout.readline()) == "ready\n"
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM
    assert err.endswith(SAID[signal.SIGTERM])


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As by nohup."""
    code = (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nshell.install()\nos.kill(os.getpid(), signal.SIGHUP)\nprint(1)"
    )
    with program(code) as child:
        assert child.communicate() == ("1\n", "")
    assert child.returncode == 0


# --- output that nobody takes ----------------------------------------------------------------------------------------

PRINTING = [
    ["--help"],
    ["list"],
    ["list", "--json"],
    ["show", "relu-attn"],
    ["check", "recipes/baseline.yaml"],
    ["claims", "--track", "bb-1layer"],
]


def told(arguments: list[str], stdout: str, **environment: str) -> tuple[int, str, bytes]:
    """(exit code, stderr, what came out) of a run whose stdout a shell has set up."""
    command = f'"{sys.executable}" -m quantbench {shlex.join(arguments)} {stdout}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, env=os.environ | environment)
    return done.returncode, done.stderr.decode(), done.stdout


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_enough_is_no_failure(arguments: list[str]) -> None:
    code, err, _ = told(arguments, "| head -c 1; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("stdout", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")])
@pytest.mark.parametrize("arguments", PRINTING[:2], ids=" ".join)
def test_output_that_is_lost_is_told_in_a_line(arguments: list[str], stdout: str, why: str) -> None:
    code, err, _ = told(arguments, stdout)
    assert (code, err) == (2, f"quantbench: stdout: {why}: what was to be printed is lost, not the work\n")


def test_errors_that_cannot_be_told_keep_their_code(project: Path) -> None:
    assert told(["bench", "none"], "2>&-")[::2] == (2, b"")
    assert told(["bench", "none"], "2>/dev/full")[::2] == (2, b"")
    assert told(["list"], ">&- 2>&-")[0] == 2


@pytest.mark.parametrize(
    ("encoding", "sign", "text"),
    [("ascii", "x 3 \\xe9", '"\\u00d7 3 \\u00e9"'), ("latin-1", "× 3 é", None), ("utf-8", "× 3 é", '"× 3 é"')],
)
def test_signs_that_a_terminal_lacks_are_written_in_ascii(
    encoding: str, sign: str, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    prints = "from quantbench.face import print_json\ndef main():\n print(s); print_json(s); return 0"
    with program(f"s = '\\xd7 3 \\xe9'\n{prints}\nshell.run(main)", encoding=encoding) as child:
        out, err = child.communicate()
    assert (child.returncode, err) == (0, "")
    assert out.splitlines()[0] == sign
    assert json.loads(out.splitlines()[1]) == "× 3 é"
    assert text in (None, out.splitlines()[1])
