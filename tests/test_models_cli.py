"""The verbs about a model: what it is called wherever it is named from, and what is told before the work."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint import folder_of

from quantbench import gallery
from quantbench.cli import main
from quantbench.pretrained import name_of

TEXTS = ["the cat sat on the mat and the dog ran by", "a house near a tree is old and red"] * 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def project(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model and a text in it, which is somebody's home, too; we are in it."""
    (tmp_path / "recipes" / "tracks").mkdir(parents=True)
    shutil.copytree(llama, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(verb: str, model: str) -> list[str]:
    return [verb, model, "--text", "~/text.txt", "--length", "8", "--windows", "1", "--json"]


@pytest.mark.parametrize(
    ("verb", "within", "given"),
    [
        ("measure", "tiny", "."),
        ("ablate", "tiny", "../tiny/"),
        ("measure", "recipes/tracks", "../../tiny/../tiny"),
        ("measure", ".", "~/tiny"),
    ],
)
def test_a_model_is_called_as_its_folder_is(
    verb: str, within: str, given: str, project: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(project / within)
    assert main([*arguments(verb, given), "--record"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "tiny"
    assert (project / "results" / "models" / "tiny" / f"{verb}.json").is_file()


def test_checkpoints_side_by_side_are_called_as_their_folder_is(
    llama: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("step1", "step2"):
        shutil.copytree(llama, project / "run" / step)
    assert main([*arguments("dynamics", "~/run/"), "--revisions", "step1", "step2/", "--record"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["name"] == "run"
    assert [at["revision"] for at in record["revisions"]] == ["step1", "step2"]


def test_a_name_that_no_folder_can_have_is_spelled(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(project / "tiny", project / "Modèle (v2)")
    assert main([*arguments("measure", "Modèle (v2)"), "--record"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "Modèle (v2)"
    assert (project / "results" / "models" / "mod-le-v2-" / "measure.json").is_file()
    assert [record["verb"] for record in gallery.read_all(project / "results")] == ["measure"]


@pytest.mark.parametrize(
    ("model", "more", "told"),
    [
        ("模型", ["--record"], "model '模型': nothing of it can name a folder of records"),
        ("tiny", ["--figures", "text.txt/pictures"], "text.txt: no folder, and measure is to write into it"),
        ("tiny", ["--record"], "results: no folder, and measure is to write into it"),
    ],
)
def test_what_would_lose_the_work_is_told_before_it(
    model: str, more: list[str], told: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tiny" / "model.safetensors").unlink()  # so that opening it would be told otherwise
    if model != "tiny":
        shutil.move(project / "tiny", project / model)
    (project / "results").write_text("a file")
    assert main([*arguments("measure", model), *more]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_snapshot_of_the_hubs_cache_is_called_as_its_model_is(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    assert name_of(str(snapshot)) == "owner/tiny"
    assert name_of("owner/tiny") == "owner/tiny"
    assert name_of("smollm2") == "smollm2"
