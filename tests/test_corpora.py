"""Text and evaluation sets out of packages: what is taken, what is cleaned, what is refused."""

import bz2
import gzip
import hashlib
import json
import os
import random
import zipfile
from importlib import metadata
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


def damaged(path: Path, how: str) -> None:
    """As a disk, a hand or an attacker might leave it."""
    if how == "flipped":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        if how == "a link":
            path.symlink_to(path.parent.parent)
        elif how == "a folder":
            path.mkdir()
        elif how == "a pipe":
            os.mkfifo(path)


@pytest.mark.parametrize("how", ["flipped", "truncated", "a link", "a folder", "a pipe", "missing"])
def test_a_member_is_looked_at_whenever_it_is_read_and_got_anew(index: None, tmp_path: Path, how: str) -> None:
    mine = wheel(b"right")
    mine.get(tmp_path)
    assert mine.member(tmp_path, MEMBER, "words", "get words") == mine.path(tmp_path, MEMBER)
    damaged(mine.path(tmp_path, MEMBER), how)
    assert not mine.ready(tmp_path)
    with pytest.raises(ValueError, match=r"^words: (damaged since it came|not here yet): run `get words`$"):
        mine.member(tmp_path, MEMBER, "words", "get words")
    mine.get(tmp_path)
    assert mine.member(tmp_path, MEMBER, "words", "get words").read_bytes() == b"right"


@pytest.mark.parametrize("name", corpora.QUESTIONS)
def test_no_flipped_bit_of_an_evaluation_set_gives_items(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither other items nor a traceback of a parser: one line that says what to run."""
    content, generator = evaluation_file(name, tmp_path), random.Random(name)
    found, member = corpora.SETS[name]  # type: ignore[misc]
    mine = Wheel(found.package, found.version, {member: hashlib.sha256(content).hexdigest()})
    monkeypatch.setitem(corpora.SETS, name, (mine, member))
    path = mine.path(tmp_path, member)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    before = corpora.rows(name, tmp_path), corpora.digest(name, tmp_path)
    assert len(before[0]) == 4
    for place in generator.sample(range(len(content)), 25):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :])
        for read in (corpora.rows, corpora.digest):
            with pytest.raises(ValueError, match=f"^{name}: damaged since it came: run `quantbench data get {name}`$"):
                read(name, tmp_path)
        assert corpora.status(tmp_path)[name] == f"damaged since it came: quantbench data get {name}"
    path.write_bytes(content)
    assert (corpora.rows(name, tmp_path), corpora.digest(name, tmp_path)) == before


def evaluation_file(name: str, folder: Path) -> bytes:
    """Four items in the form in which the package has them."""
    if name in ("hellaswag", "piqa"):
        import datasets

        datasets.Dataset.from_list([{"goal": f"item {number}"} for number in range(4)]).save_to_disk(folder / "set")
        return next((folder / "set").glob("*.arrow")).read_bytes()
    docs = [
        {"id": n, "query": "Question: Why?\nAnswer:", "answers_text": ["so"], "choices": ["a", "b"], "gold": 1}
        for n in range(4)
    ]
    return gzip.compress("".join(json.dumps({"doc": doc}) + "\n" for doc in docs).encode())


def test_articles_of_another_parser_are_other_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read decides the digest: not the version of a file that others may read otherwise."""
    found, member = corpora.SETS["wikipedia"]  # type: ignore[misc]
    content = bz2.compress(
        b"<mediawiki><page><title>T</title><text>" + b"Prose. " * 100 + b"</text></page></mediawiki>"
    )
    mine = Wheel(found.package, found.version, {member: hashlib.sha256(content).hexdigest()})
    monkeypatch.setitem(corpora.SETS, "wikipedia", (mine, member))
    mine.path(tmp_path, member).parent.mkdir(parents=True)
    mine.path(tmp_path, member).write_bytes(content)
    first = corpora.documents("wikipedia", tmp_path), corpora.digest("wikipedia", tmp_path)
    assert len(first[0]) == 1
    monkeypatch.setattr(corpora, "_plain", lambda wikitext: "Other prose. " * 50)
    assert corpora.digest("wikipedia", tmp_path) == first[1]  # the articles are kept
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9" if name == "mwparserfromhell" else version(name))
    assert corpora.documents("wikipedia", tmp_path)[0].startswith("T\n\nOther prose.")
    assert corpora.digest("wikipedia", tmp_path) != first[1]


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
