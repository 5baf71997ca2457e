"""Tasks: which ids come out, that sequences stand apart from how they are drawn, and what the caches withstand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save
from scipy import stats
from transformers import PreTrainedTokenizerFast

from quantbench import catalog
from quantbench.tasks import Data, Task, random_bits
from quantbench.tasks.bigram_backcopy import BigramBackcopy, Sequences
from quantbench.tasks.text import HELD_OUT, Corpus, Text, _checksum, _docstrings

SENTENCE = "the query of a head meets every key and its softmax weighs naïve values — by <bos> or <sep>"


def _document(number: int) -> str:
    rng = np.random.default_rng(number)
    lines = [" ".join(rng.choice(SENTENCE.split(), 12)) for _ in range(6)]
    return f"Document {number}.\n\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for number in range(80):
        path = root / f"part-{number % 3}" / f"{number:03}{('.txt', '.md', '.rst', '.py')[number % 4]}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_document(number), "utf-8")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(folder: Path, cache: Path) -> Corpus:
    return Text(folder=str(folder), vocab=300).open(cache)


@pytest.fixture(scope="module")
def docstrings(cache: Path) -> Corpus:
    return Text(packages=("rich",), vocab=300).open(cache)


@pytest.fixture(scope="module")
def backcopy() -> Sequences:
    return BigramBackcopy().open(Path())


def _texts(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split, decoded with `tokenizers`."""
    from tokenizers import Tokenizer

    assert corpus.tokenizer_file is not None
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    ids = np.load(corpus.tokenizer_file.with_name(f"{split}.npy"), allow_pickle=False).tolist()
    texts, document = [], []
    for number in ids:
        if number == tokenizer.token_to_id("<sep>"):
            texts.append(tokenizer.decode(document, skip_special_tokens=False))
            document = []
        else:
            document.append(number)
    assert not document
    return texts


# Every task


def test_random_bits_are_those_of_splitmix64() -> None:
    # Reference outputs of splitmix64 seeded with 1234567 (Vigna, splitmix64.c), from which a counter starts.
    def splitmix64(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert splitmix64(1234567) == 6457827717110365317
    golden = 0x9E3779B97F4A7C15
    start = splitmix64(-7 - golden)
    expected = [splitmix64((start + i * golden) % 2**64) for i in range(5)]
    assert random_bits(-7, np.arange(5)).tolist() == expected


# `passages` has no training split, and needs a model's tokenizer: test_given.
@pytest.mark.parametrize("name", [name for name in catalog.names("tasks") if name != "passages"])
def test_every_task_keeps_the_contract(
    name: str, folder: Path, cache: Path, corpus: Corpus, backcopy: Sequences
) -> None:
    kind = catalog.load("tasks", name)
    assert issubclass(kind, Task)
    given: dict[str, Data] = {"text": corpus, "bigram-backcopy": backcopy}
    data = given.get(name) or kind().open(cache)
    for sequences in (data.training(3, 5, 4, 17), data.calibration(4, 17), data.held_out(4, 17)):
        assert sequences.shape == (4, 18)
        assert sequences.dtype == np.int64
        assert (sequences[:, 0] == data.bos).all()
        assert (sequences[:, 1:] != data.bos).all()
        assert sequences.min() >= 0
        assert sequences.max() < data.vocab
    assert len(data.digest) == 64
    if name == "bigram-backcopy":
        assert data.bytes_of(data.held_out(4, 17)) is None


@pytest.mark.parametrize("name", ["corpus", "docstrings", "backcopy"])
def test_a_sequence_depends_on_its_seed_and_number_alone(name: str, request: pytest.FixtureRequest) -> None:
    data: Data = request.getfixturevalue(name)
    whole = data.training(1, 0, 32, 20)
    singly = np.concatenate([data.training(1, i, 1, 20) for i in reversed(range(32))])[::-1]
    assert np.array_equal(whole, singly)
    assert np.array_equal(whole[7:19], data.training(1, 7, 12, 20))
    assert not (whole == data.training(2, 0, 32, 20)).all(1).any()
    assert len(np.unique(whole, axis=0)) == 32
    assert np.array_equal(data.held_out(8, 20), data.held_out(8, 20))
    assert not (data.calibration(8, 20) == whole[:8]).all(1).any()


def test_another_process_draws_the_same(folder: Path, cache: Path, corpus: Corpus, backcopy: Sequences) -> None:
    program = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from quantbench.tasks.text import Text; from quantbench.tasks.bigram_backcopy import BigramBackcopy\n"
        "for data in Text(folder=sys.argv[1], vocab=300).open(Path(sys.argv[2])), BigramBackcopy().open(Path()):\n"
        "    print(data.digest, data.training(4, 10, 3, 12).tolist(), data.held_out(3, 12).tolist())\n"
    )
    # Into an empty cache as well: the ids come of the text, not of this process' files or hash seed.
    for other in (cache, cache / "fresh"):
        out = subprocess.run(
            [sys.executable, "-c", program, str(folder), str(other)],
            env={**os.environ, "PYTHONHASHSEED": "5", "RAYON_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for line, data in zip(out, (corpus, backcopy), strict=True):
            expected = data.training(4, 10, 3, 12).tolist(), data.held_out(3, 12).tolist()
            assert line == f"{data.digest} {expected[0]} {expected[1]}"


# Text


def test_a_folder_is_split_by_file_and_nothing_is_lost(corpus: Corpus) -> None:
    training, held_out = _texts(corpus, "training"), _texts(corpus, "held-out")
    assert sorted(training + held_out) == sorted(_document(number) for number in range(80))
    assert 1 <= len(held_out) <= 80 * 3 // HELD_OUT


def test_docstrings_are_those_that_import_shows(docstrings: Corpus) -> None:
    import inspect

    import rich.console
    import rich.table

    texts = _texts(docstrings, "training") + _texts(docstrings, "held-out")
    for thing in (rich.console.Console, rich.console.Console.print, rich.table.Table.add_row):
        assert sum(text == inspect.getdoc(thing) for text in texts) == 1
    assert len(set(texts)) == len(texts)  # every document once, so none is in both splits
    assert min(map(len, texts)) >= 32


def test_the_splits_share_neither_file_nor_document(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(_document(number % 40))
        (tmp_path / f"short-{number}.txt").write_text(f"{number:031}")
    corpus = Text(folder=str(tmp_path), vocab=270).open(tmp_path / "cache")
    training, held_out = _texts(corpus, "training"), _texts(corpus, "held-out")
    assert sorted(training + held_out) == sorted(_document(number) for number in range(40))
    assert held_out


def test_docstrings_of_nested_definitions_come_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    source = '''"""One."""
import sys
if sys:
    class A:
        """Two."""
        async def f(self):
            r"""Three.

            margin
                indented \\d
            """
else:
    def g():
        try:
            def h(): "Four."
        finally:
            def i(): return """none"""
x = "\\d"
'''
    expected = ["One.", "Two.", "Three.\n\nmargin\n    indented \\d", "Four."]
    assert [text for text in _docstrings(Path("a.py"), source) if text] == expected
    assert _docstrings(Path("a.py"), "def f(): 'no triple quotes'") == []
    assert capsys.readouterr().err == ""
    assert _docstrings(Path("bad.py"), 'def """') == []
    assert "bad.py left out" in capsys.readouterr().err


def test_code_is_the_sources(cache: Path) -> None:
    import yaml

    corpus = Text(packages=("PyYAML",), domain="code", vocab=300).open(cache)
    texts = set(_texts(corpus, "training") + _texts(corpus, "held-out"))
    sources = {path.read_text("utf-8") for path in Path(yaml.__file__).parent.glob("*.py")}
    assert sources <= texts


def test_bytes_of_is_the_length_of_the_decoded_text(corpus: Corpus) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer_file), bos_token="<bos>")
    assert tokenizer.bos_token_id == corpus.bos
    assert len(tokenizer) == corpus.vocab == 300
    texts = _texts(corpus, "held-out")
    ids = np.load(corpus.tokenizer_file.with_name("held-out.npy")).astype(np.int64)
    assert corpus.bytes_of(ids) == sum(len(text.encode()) for text in texts)
    assert corpus.bytes_of(np.array([[corpus.bos, *tokenizer("naïve — values")["input_ids"]]])) == 17


def test_held_out_windows_do_not_overlap(corpus: Corpus) -> None:
    stream = np.load(corpus.tokenizer_file.with_name("held-out.npy"))
    most = len(stream) // 16
    assert np.array_equal(corpus.held_out(most, 16)[:, 1:].ravel(), stream[: most * 16])
    spread = corpus.held_out(3, 16)[:, 1:]
    assert np.array_equal(spread, corpus.held_out(most, 16)[[0, most // 3, 2 * most // 3], 1:])
    with pytest.raises(ValueError, match=r"held-out split has .* evaluate fewer"):
        corpus.held_out(most + 1, 16)


def test_training_windows_are_uniform_over_the_split(corpus: Corpus) -> None:
    stream = np.load(corpus.tokenizer_file.with_name("training.npy"))
    drawn = np.bincount(corpus.training(0, 0, 20_000, 1)[:, 1], minlength=300)
    share = np.bincount(stream, minlength=300) / len(stream)
    seen = share > 0
    assert drawn[~seen].sum() == 0
    assert stats.chisquare(drawn[seen], 20_000 * share[seen]).pvalue > 1e-3
    ends = corpus.training(0, 0, 64, len(stream) - 1)[:, 1:3]  # two places: both are drawn
    assert len(np.unique(ends, axis=0)) == 2
    with pytest.raises(ValueError, match="the training split has"):
        corpus.training(0, 0, 1, len(stream) + 1)


def test_documents_are_whole_and_spell_no_special_token(docstrings: Corpus, corpus: Corpus) -> None:
    held_out = _texts(docstrings, "held-out")
    documents = docstrings.documents(3)
    assert len(set(documents)) == 3
    assert all(document in held_out and len(document) >= 200 for document in documents)
    fit = [t for t in _texts(corpus, "held-out") if len(t) >= 200 and "<bos>" not in t and "<sep>" not in t]
    assert corpus.documents(len(fit)) == fit
    with pytest.raises(ValueError, match=f"has {len(fit)} documents"):
        corpus.documents(len(fit) + 1)


def test_the_digest_changes_with_text_and_parameters(folder: Path, cache: Path, corpus: Corpus, tmp_path: Path) -> None:
    here = Text(folder=str(folder), vocab=300)
    assert here.open(cache).digest == corpus.digest
    assert Text(folder=str(folder), vocab=301).open(cache).digest != corpus.digest
    for path in sorted(folder.rglob("*.*")):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    there = Text(folder=str(tmp_path), vocab=300)
    assert there.open(cache).digest == corpus.digest  # the text counts, not where it lies
    changed = copy.read_bytes().replace(b"Document", b"document")
    at = copy.stat()
    copy.write_bytes(changed)
    os.utime(copy, ns=(at.st_atime_ns, at.st_mtime_ns))  # of the same size and date
    assert there.open(cache).digest != corpus.digest


def test_suffixes_are_read_in_either_case_and_what_is_left_out_is_said(
    folder: Path, cache: Path, corpus: Corpus, tmp_path: Path, capfd
) -> None:
    there = tmp_path / "loud"
    for path in sorted(folder.rglob("*.*")):
        copy = there / path.relative_to(folder).with_suffix(path.suffix.upper())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    loud = Text(folder=str(there), vocab=300)
    counts = [json.loads((data.tokenizer_file.parent / "corpus.json").read_bytes())["documents"]
              for data in (corpus, loud.open(cache))]  # fmt: skip
    assert sum(counts[0].values()) == sum(counts[1].values()) == 80
    assert "left out" not in capfd.readouterr().err
    (there / "picture.png").write_bytes(b"\x89PNG")
    (there / "b.pdf").write_bytes(b"%PDF")
    (there / "link.txt").symlink_to(there / "part-0" / "000.TXT")
    Text(folder=str(there), vocab=301).open(cache)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert "3 files of it are left out, such as 'b.pdf': read are .txt, .md, .rst, .py that are no links" in line


def test_the_second_opening_reads_the_cache(folder: Path, cache: Path, corpus: Corpus, capfd) -> None:
    again = Text(folder=str(folder), vocab=300).open(cache)
    assert capfd.readouterr().err == ""
    assert again.tokenizer_file == corpus.tokenizer_file
    Text(folder=str(folder), vocab=302).open(cache)
    assert "reading the text files of" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "training.npy", "held-out.npy", "corpus.json", "cell.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_corrupted_cache_is_made_anew(fault: str, name: str, folder: Path, cache: Path, corpus: Corpus) -> None:
    assert corpus.tokenizer_file is not None
    path = corpus.tokenizer_file.with_name(name)
    intact = path.read_bytes()
    if fault == "flip":
        middle = len(intact) // 2
        path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    elif fault == "truncate":
        path.write_bytes(intact[:-1])
    else:
        path.unlink()
    again = Text(folder=str(folder), vocab=300).open(cache)
    assert again.digest == corpus.digest
    assert path.read_bytes() == intact


def test_two_processes_open_at_once(folder: Path, cache: Path, corpus: Corpus, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from quantbench.tasks.text import Text\n"
        "print(Text(folder=sys.argv[1], vocab=300).open(Path(sys.argv[2])).digest)"
    )
    arguments = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    both = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == [corpus.digest] * 2
    assert [process.returncode for process in both] == [0, 0]
    assert len([path for path in (tmp_path / "text").iterdir() if path.is_dir()]) == 1


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(_document(number))
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "linked.txt").symlink_to(folder / "part-1" / "076.txt")
    assert (tmp_path / "linked.txt").read_text("utf-8") == _document(76)
    (tmp_path / "other.bin").write_bytes(b"\xff")
    corpus = Text(folder=str(tmp_path), vocab=270).open(tmp_path / "cache")
    assert len(_texts(corpus, "training") + _texts(corpus, "held-out")) == 40


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: byte 2 is not UTF-8"):
        Text(folder=str(tmp_path)).open(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        Text(folder=str(tmp_path / "absent")).open(tmp_path)
    with pytest.raises(ValueError, match="'no-such-package' is not installed"):
        Text(packages=("no-such-package",)).open(tmp_path)
    (tmp_path / "latin.txt").write_text(_document(0))
    with pytest.raises(ValueError, match="name more files"):
        Text(folder=str(tmp_path)).open(tmp_path)


def test_a_vocabulary_larger_than_the_text_gives_is_refused(folder: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab 5000: the text yields \d+ tokens"):
        Text(folder=str(folder), vocab=5000).open(cache)


# Text, carried


@pytest.fixture
def lent(folder: Path, tmp_path: Path) -> tuple[Text, Path]:
    """A text whose source is gone, and the file of its ids in an empty cache."""
    source, here, there = tmp_path / "texts", tmp_path / "here", tmp_path / "there"
    shutil.copytree(folder, source)
    text = Text(folder=str(source), vocab=300)
    path = text.carry(here)
    shutil.rmtree(source)
    copy = there / path.relative_to(here)
    copy.parent.mkdir(parents=True)
    shutil.copyfile(path, copy)
    return text, copy


def test_a_carried_file_is_the_corpus(lent: tuple[Text, Path], corpus: Corpus, capfd: pytest.CaptureFixture) -> None:
    text, path = lent
    there = path.parents[1]
    assert not text.ready(there)
    opened = text.open(there)
    assert text.ready(there)
    assert opened.digest == corpus.digest
    assert opened.tokenizer_file is not None
    assert corpus.tokenizer_file is not None
    for name in ("tokenizer.json", "training.npy", "held-out.npy"):
        assert opened.tokenizer_file.with_name(name).read_bytes() == corpus.tokenizer_file.with_name(name).read_bytes()
    assert np.array_equal(opened.training(0, 5, 3, 20), corpus.training(0, 5, 3, 20))
    assert capfd.readouterr().err.count("are unpacked, once") == 1
    assert text.open(there).tokenizer_file == opened.tokenizer_file  # the second time from the cache
    assert capfd.readouterr().err == ""
    assert len(list((there / "text").glob("*/cell.json"))) == 1


def test_a_carried_file_wins_over_what_is_installed(cache: Path, docstrings: Corpus, tmp_path: Path) -> None:
    """Else a machine with another version of a package would make other ids, and never say so."""
    text = Text(packages=("rich",), vocab=300)
    path = text.carry(cache)
    other = safe_open(path, "np")
    streams = {name: other.get_tensor(name) for name in ("training", "held-out")}
    about = other.metadata()
    about["inputs"] = about["inputs"].replace('"rich", "', '"rich", "0.')
    about["sha256"] = _checksum(about, streams)
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / path.name).write_bytes(save(streams, about))
    assert text.open(tmp_path).digest == docstrings.digest
    assert '"0.' in next((tmp_path / "text").glob("*/cell.json")).read_text()
    path.unlink()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9999])
@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_an_altered_carried_file_is_refused(fault: str, share: float, lent: tuple[Text, Path]) -> None:
    text, path = lent
    content = bytearray(path.read_bytes())
    at = int(share * len(content))
    if fault == "flip":
        content[at] ^= 1
    path.write_bytes(content if fault == "flip" else content[:at])
    with pytest.raises(
        ValueError, match=r"text-[0-9a-f]{16}\.safetensors: altered since it was written.*: carry it again"
    ):
        text.open(path.parents[1])
    assert not list(path.parents[1].glob("text/*/cell.json"))


def test_too_much_to_carry_and_nothing_to_carry_are_refused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantbench.tasks.text.LARGEST", 1 << 14)
    with pytest.raises(ValueError, match=r"the ids take 0\.\d MiB, more than the 0 that .* name fewer packages"):
        Text(folder=str(folder), vocab=300).carry(cache)
    assert not (cache / "carried").exists() or not list((cache / "carried").iterdir())
    with pytest.raises(ValueError, match="nothing to carry"):
        BigramBackcopy().carry(cache)


# Bigram-Backcopy


def test_the_counts_are_those_of_the_paper(backcopy: Sequences) -> None:
    content = json.loads((Path(__file__).parents[1] / "quantbench/tasks/bigram-counts.json").read_text())
    assert (backcopy.bos, backcopy.vocab, content["characters"][0]) == (65, 67, "\n")
    for k, characters in (3, " et"), (5, " aeot"):
        triggers = np.flatnonzero(BigramBackcopy(k).open(Path()).is_trigger_V)
        assert "".join(content["characters"][i] for i in triggers) == characters
    mass = backcopy.unigrams_V[backcopy.is_trigger_V[:65]].sum() / backcopy.unigrams_V.sum()
    assert mass == pytest.approx(0.2972, abs=5e-5)


def test_triggers_copy_back_and_never_follow_one_another(backcopy: Sequences) -> None:
    ids = backcopy.training(0, 0, 256, 256)
    triggers = backcopy.is_trigger_V[ids]
    assert triggers[:, :-1].mean() == pytest.approx(0.256, abs=0.003)
    assert not (triggers[:, 1:] & triggers[:, :-1]).any()
    assert not triggers[:, 1].any()
    assert np.array_equal(ids[:, 2:][triggers[:, 1:-1]], ids[:, :-2][triggers[:, 1:-1]])
    assert ids[:, 1:].max() < 65


def test_other_characters_follow_the_bigrams(backcopy: Sequences) -> None:
    ids = backcopy.training(1, 0, 2048, 256)
    first = np.bincount(ids[:, 1], minlength=65)[:65]
    pi = np.where(backcopy.is_trigger_V[:65], 0, backcopy.unigrams_V) / backcopy.unigrams_V.sum()
    assert first[pi == 0].sum() == 0
    statistic, degrees = _chi_square(first, pi / pi.sum())
    x, y = ids[:, 1:-1].ravel(), ids[:, 2:].ravel()
    drawn = np.zeros((65, 65), np.int64)
    np.add.at(drawn, (x, y), 1)
    for character in np.flatnonzero(~backcopy.is_trigger_V[:65]):
        row = backcopy.bigrams_VV[character] / backcopy.bigrams_VV[character].sum()
        assert drawn[character][row == 0].sum() == 0
        more = _chi_square(drawn[character], row)
        statistic, degrees = statistic + more[0], degrees + more[1]
    assert degrees > 300
    assert 1e-3 < stats.chi2.sf(statistic, degrees) < 1 - 1e-3


def _chi_square(drawn: np.ndarray, probability: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; bins where fewer than 5 are expected are pooled into one."""
    expected = drawn.sum() * probability
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    drawn = np.append(drawn[~rare], drawn[rare].sum())
    kept = expected >= 5
    return float(((drawn - expected)[kept] ** 2 / expected[kept]).sum()), max(int(kept.sum()) - 1, 0)


def test_the_oracles_risk_is_the_published_one(backcopy: Sequences) -> None:
    ids = backcopy.held_out(1024, 256)
    x = ids[:, :-1]
    oracle = backcopy.oracle(ids)
    bigram = ~backcopy.is_trigger_V[x] & (x != backcopy.bos)
    assert oracle[bigram].mean() == pytest.approx(2.215, abs=0.006)
    assert (oracle[~bigram] == 0).all()


def test_figures_are_excesses_over_the_oracle(backcopy: Sequences) -> None:
    ids = backcopy.held_out(16, 64)
    x = ids[:, :-1]
    added = np.where(x == backcopy.bos, 3.0, np.where(backcopy.is_trigger_V[x], 0.25, 0.5))
    figures = backcopy.figures(ids, (backcopy.oracle(ids) + added).astype(np.float32))
    assert figures == pytest.approx({"excess-risk-trigger": 0.25, "excess-risk-bigram": 0.5, "risk-bos": 3.0})
    # By hand: after "h", character 46, "e" has 18,000-odd of its pairs; a uniform model knows neither.
    uniform = np.full((1, 2), np.log(67), np.float32)
    pair = backcopy.figures(np.array([[65, 46, 43]]), uniform)
    share = backcopy.bigrams_VV[46, 43] / backcopy.bigrams_VV[46].sum()
    expected = {"risk-bos": np.log(67), "excess-risk-bigram": np.log(67) + np.log(share)}
    assert pair == pytest.approx(expected)


def test_the_number_of_triggers_is_part_of_the_digest(backcopy: Sequences) -> None:
    assert BigramBackcopy(3).open(Path()).digest == backcopy.digest
    assert BigramBackcopy(5).open(Path()).digest != backcopy.digest
