"""Text and evaluation sets out of packages: what is taken, what is cleaned, what is refused."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from quantbench import corpora, wheels
from quantbench.wheels import Wheel

MEMBER = "package/data/words.txt"


def packed(folder: Path, content: bytes) -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("package/__init__.py", "raise SystemExit")
    return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip in the place of a network: it brings a wheel of the words `right`."""
    monkeypatch.setattr(wheels, "_download", lambda exact, folder: packed(folder, b"right"))


def wheel(content: bytes) -> Wheel:
    return Wheel("package", "1.0", {MEMBER: hashlib.sha256(content).hexdigest()})


def test_a_member_is_taken_and_nothing_else(index: None, tmp_path: Path) -> None:
    mine = wheel(b"right")
    assert not mine.ready(tmp_path)
    mine.get(tmp_path)
    assert mine.ready(tmp_path)
    assert mine.path(tmp_path, MEMBER).read_bytes() == b"right"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["package--data--words.txt"]


def test_other_bytes_are_refused_and_nothing_is_left(index: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        wheel(b"wrong").get(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_package_that_pip_cannot_bring_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"package==1\.0: pip cannot download it") as error:
        wheel(b"right").get(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in corpora.NAMES if name != "code"])
def test_a_set_that_is_not_here_says_what_to_run(name: str, tmp_path: Path) -> None:
    read = corpora.documents if name in corpora.DOCUMENTS else corpora.rows
    with pytest.raises(ValueError, match=f"{name}: not here yet: run `quantbench data get {name}`"):
        read(name, tmp_path)
    assert corpora.status(tmp_path)[name].endswith(f"quantbench data get {name}")


def test_code_is_the_middle_of_modules_that_are_always_here(tmp_path: Path) -> None:
    found = corpora.documents("code", tmp_path)
    assert len(found) > 200
    assert all(corpora.SHORTEST <= len(piece) <= corpora.PIECE for piece in found)
    assert corpora.digest("code", tmp_path) == corpora.digest("code", tmp_path)
    assert sum("def " in piece for piece in found) > 0.8 * len(found)


def test_an_article_is_its_prose() -> None:
    wikitext = """{{Infobox|name=x}}'''Cats''' are [[animal|animals]].<ref>A book.</ref> [[File:cat.jpg|thumb|A cat]]
{| class="wikitable"
| cell
|}
== Life ==
They sleep [[Category:Cats]]&nbsp;much.
an {{unclosed template
== References ==
* A list"""
    plain = corpora._plain(wikitext)
    assert plain.startswith("Cats are animals.")
    assert "They sleep much." in " ".join(plain.split())
    for gone in ("Infobox", "book", "File", "cell", "Category", "unclosed", "References", "list", "'''"):
        assert gone not in plain
    assert corpora._plain("#REDIRECT [[Cats]]") == ""


def test_a_question_has_the_fields_of_the_hub() -> None:
    doc = {"id": 7, "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    assert corpora._question(doc) == {
        "id": "7",
        "question": "Why?",
        "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
