"""Real text: docstrings or sources of pinned packages, which every machine has; a folder of one's own; other corpora.

A document is a docstring (prose), a source file (code), a file of the folder, a document of a set of `quantbench data`,
or a row of a data set of the Hugging Face hub, of which the first `take` are streamed once. Files are split by a hash
of their path, about one in ten held out. A document is kept once; one that the training split has is no held-out
document. A byte-level BPE is trained on the training split; a split is then one stream of ids:

    document <sep> document <sep> ...

and a sequence is BOS and a window of the stream. Packages are known by their distribution's name and version,
read by the list of files that pip keeps, and never imported.

A machine that lacks the text, or has other versions of it, can be given the ids: `carry` writes one file,

    <cache>/carried/text-<digest of the parameters>.safetensors

which, where it is there, is what `open` reads: the cell that it was made of, with the digest of the same text.
"""

import ast
import gc
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from quantbench import corpora
from quantbench.store import Store, atomic_write
from quantbench.store import digest as digest_of
from quantbench.strict import Added, KeyedError, Place, Range, dump, nearest, place, quote
from quantbench.tasks import Data, Ids, Task, random_bits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1  # bumped by hand when other ids come out of the same text
BOS, SEP = "<bos>", "<sep>"
SPLITS = ("training", "held-out")
SHORTEST = 32  # characters of a document
HELD_OUT = 10  # one file in so many
SUFFIXES = (".txt", ".md", ".rst", ".py")  # of a folder's files
BUILD_FILES = ("__config__.py",)  # written by a package's build: these differ between its wheels
PROSE = ("wikipedia", "code")  # sets of `quantbench data` that are documents
CARRIED = "carried"  # the folder of files that bring ids from elsewhere
LARGEST = 60 << 20  # bytes of such a file
CALIBRATION_SEED = 0x63616C6962726174  # a stream of its own, far from the seeds that people choose


@dataclass(frozen=True)
class Text(Task):
    """Next-token prediction on text."""

    domain: Literal["prose", "code"] = "prose"  # of packages: their docstrings, or their sources
    packages: tuple[str, ...] = ("numpy", "scipy", "transformers")  # names of installed distributions
    folder: Annotated[str, Place()] = (
        ""  # text files (.txt, .md, .rst, .py, of either case; UTF-8; links not followed) in place of packages
    )
    vocab: Annotated[int, Range(258, 65536)] = 512  # 256 bytes, 2 special tokens, the rest merges
    sets: Annotated[tuple[str, ...], Added()] = ()  # in place of packages: wikipedia, code
    dataset: Annotated[str, Added()] = (
        ""  # in place of packages: a data set of the hub, `owner/name` or `owner/name:config`
    )
    take: Annotated[int, Range(1, 100_000_000), Added()] = 10_000  # of its rows, from the first
    column: Annotated[str, Added()] = "text"  # of its rows

    def __post_init__(self) -> None:
        named = [key for key in ("folder", "sets", "dataset") if getattr(self, key)]
        if len(named) > 1:
            raise KeyedError(f"{named[0]!r} and {named[1]!r} are both given: text comes from one of them", *named)
        for name in self.sets:
            if name not in PROSE:
                raise KeyedError(f"'sets' has {quote(name)}{nearest(name, PROSE)}", "sets")

    def open(self, cache: Path) -> "Corpus":
        carried = self._carried(cache)
        return Corpus(_unpacked(carried, Store(cache)) if carried.exists() else self._made(cache)[0])

    def ready(self, cache: Path) -> bool:
        carried = self._carried(cache)
        inputs = _read(carried)[0] if carried.exists() else self._source(cache)[1]
        return Store(cache).load("text", inputs) is not None

    def carry(self, cache: Path) -> Path:
        folder, inputs = self._made(cache)
        content = _packed(folder, inputs)
        if len(content) > LARGEST:
            raise ValueError(
                f"text: the ids take {len(content) / 2**20:.1f} MiB, more than the {LARGEST >> 20} that a carried file "
                "may have: name fewer packages"
            )
        atomic_write(self._carried(cache), content)
        return self._carried(cache)

    def _carried(self, cache: Path) -> Path:
        return cache / CARRIED / f"text-{digest_of(_named(self))[:16]}.safetensors"

    def _made(self, cache: Path) -> tuple[Path, dict[str, object]]:
        """The cell of what is installed here, made where it is missing, and what it depends on."""
        source, inputs = self._source(cache)
        store = Store(cache)
        found = store.load("text", inputs)
        if found is None:
            with store.cell("text", inputs) as cell:
                found = cell.path or cell.commit(_build(source, self.vocab))
        return found, inputs

    def _source(self, cache: Path) -> "tuple[Source, dict[str, object]]":
        """Where the text comes from, and what its cell depends on."""
        source: Source
        if self.folder:
            source = _Folder(self.folder)
        elif self.sets:
            source = _Sets(self.sets, cache)
        elif self.dataset:
            source = _Dataset(self.dataset, self.take, self.column)
        else:
            source = _Packages(self.packages, self.domain)
        # Merges are the tokenizer's work; Python says what a docstring is, and which files have a syntax.
        makers = {"tokenizers": metadata.version("tokenizers"), "python": list(sys.version_info[:2])}
        return source, {"version": VERSION, "source": source.identity(), "vocab": self.vocab, **makers}


def _named(task: Text) -> dict[str, object]:
    """The parameters by their names; what came later is left out where nobody sets it, so that old files are found."""
    return {key.replace("-", "_"): value for key, value in dump(task).items()}


class Corpus(Data):
    """Both splits as streams of ids, mapped into memory."""

    def __init__(self, folder: Path):
        self.tokenizer_file = folder / "tokenizer.json"
        self.digest = json.loads((folder / "corpus.json").read_bytes())["digest"]
        tokens: dict[str, int] = json.loads(self.tokenizer_file.read_bytes())["model"]["vocab"]
        self.vocab = len(tokens)
        self.bos, self._sep = tokens[BOS], tokens[SEP]
        # The alphabet of a byte-level BPE has one character a byte.
        self._bytes = np.zeros(self.vocab, np.int64)
        for token, number in tokens.items():
            self._bytes[number] = 0 if token in (BOS, SEP) else len(token)
        self._training, self._held_out = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in SPLITS
        )

    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        """Windows of the training split at random places."""
        places = len(self._training) - length + 1
        if places < 1:
            raise ValueError(
                f"text: the training split has {len(self._training):,} tokens, a sequence {length:,}: "
                "take shorter sequences, or name more text"
            )
        starts = random_bits(seed, np.arange(first, first + count)) % np.uint64(places)
        return self._windows(self._training, starts.astype(np.int64), length)

    def calibration(self, count: int, length: int) -> Ids:
        return self.training(CALIBRATION_SEED, 0, count, length)

    def held_out(self, count: int, length: int) -> Ids:
        """Windows that do not overlap, spread evenly over the held-out split."""
        windows = len(self._held_out) // length
        if count > windows:
            raise ValueError(
                f"text: the held-out split has {windows:,} windows of {length:,} tokens, {count:,} are asked for: "
                "evaluate fewer sequences, or name more text"
            )
        return self._windows(self._held_out, np.arange(count) * windows // count * length, length)

    def bytes_of(self, ids: Ids) -> int:
        return int(self._bytes[ids].sum())

    def documents(self, count: int) -> list[str]:
        """Held-out documents of 200 characters or more, spread evenly over the split.

        Those that spell a special token are left out, since not every tokenizer can be told to read it as text.
        """
        from tokenizers import Tokenizer

        assert self.tokenizer_file is not None
        ends = np.flatnonzero(self._held_out == self._sep)
        pieces = [piece[piece != self._sep].tolist() for piece in np.split(self._held_out, ends)[:-1]]
        texts = Tokenizer.from_file(str(self.tokenizer_file)).decode_batch(pieces, skip_special_tokens=False)
        texts = [text for text in texts if len(text) >= 200 and BOS not in text and SEP not in text]
        if count > len(texts):
            raise ValueError(f"text: the held-out split has {len(texts):,} documents of 200 characters, not {count:,}")
        return [texts[i * len(texts) // count] for i in range(count)]

    def _windows(self, stream_N: NDArray[np.uint16], starts_B: NDArray[np.int64], length: int) -> Ids:
        ids = np.full((len(starts_B), length + 1), self.bos, np.int64)
        ids[:, 1:] = stream_N[starts_B[:, None] + np.arange(length)]
        return ids


class _Packages:
    """The Python files of installed distributions."""

    def __init__(self, names: tuple[str, ...], domain: Literal["prose", "code"]):
        self.domain = domain
        self.found: list[metadata.Distribution] = []
        for name in names:
            try:
                self.found.append(metadata.distribution(name))
            except metadata.PackageNotFoundError:
                raise ValueError(f"text: the package {name!r} is not installed: pip install {name}") from None
        self.title = ", ".join(f"{package.name} {package.version}" for package in self.found)
        self.title = f"{'docstrings' if domain == 'prose' else 'sources'} of {self.title}"

    def identity(self) -> dict[str, object]:
        # A version may have several builds: pip's list of files has the digest of each.
        return {"domain": self.domain, "packages": [[p.name, p.version, _listed(p)] for p in self.found]}

    def documents(self) -> Iterator[tuple[str, list[str]]]:
        for package in self.found:
            if package.files is None:
                raise ValueError(f"text: pip keeps no list of the files of {package.name}: reinstall it with pip")
            for file in sorted(package.files, key=str):
                if file.suffix != ".py" or ".." in file.parts or file.name in BUILD_FILES:
                    continue
                path = Path(str(package.locate_file(file)))
                source = _utf8(path, path.read_bytes())
                yield file.as_posix(), [source] if self.domain == "code" else _docstrings(path, source)


def _listed(package: metadata.Distribution) -> str:
    """sha256 (hex) of what pip's list says of the files that are read."""
    lines = (package.read_text("RECORD") or "").splitlines()
    return _sha256(sorted(line for line in lines if ".py," in line and not line.startswith("..")))


class _Folder:
    """The text files under a folder, whole."""

    def __init__(self, folder: str):
        root = Path(place(folder))
        if not root.is_dir():
            raise ValueError(f"text: {folder!r} is no folder")
        self.title = f"the text files of {folder}"
        self.files: dict[str, str] = {}
        self.left_out: list[str] = []
        for parent, _, names in os.walk(root, followlinks=False):
            for path in (Path(parent, name) for name in names):
                name = path.relative_to(root).as_posix()
                if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
                    self.files[name] = _utf8(path, path.read_bytes())
                else:
                    self.left_out.append(name)

    def identity(self) -> dict[str, object]:
        # By content, not by name and date: a file changed in place is other text.
        return {"folder": _sha256(part for item in self.documents() for part in (item[0], *item[1]))}

    def documents(self) -> Iterator[tuple[str, list[str]]]:
        for name in sorted(self.files):
            yield name, [self.files[name]]


class _Sets:
    """Documents of `quantbench data`."""

    def __init__(self, names: tuple[str, ...], cache: Path):
        self.names, self.cache = names, cache
        self.title = ", ".join(names)

    def identity(self) -> dict[str, object]:
        return {"sets": [[name, corpora.digest(name, self.cache)] for name in self.names]}

    def documents(self) -> Iterator[tuple[str, list[str]]]:
        for name in self.names:
            for number, text in enumerate(corpora.documents(name, self.cache)):
                yield f"{name}/{number}", [text]


class _Dataset:
    """The first rows of a data set of the hub, streamed."""

    def __init__(self, given: str, take: int, column: str):
        self.name, _, self.config = given.partition(":")
        self.take, self.column = take, column
        self.title = f"{take:,} rows of {given}"

    def identity(self) -> dict[str, object]:
        return {"dataset": [self.name, self.config], "take": self.take, "column": self.column}

    def documents(self) -> Iterator[tuple[str, list[str]]]:
        import datasets

        try:
            rows = datasets.load_dataset(self.name, self.config or None, split="train", streaming=True)
            for number, row in enumerate(rows.take(self.take)):
                yield f"{number}", [str(row[self.column])]
        except KeyError:
            raise ValueError(f"text: the rows of {self.name} have no column {self.column!r}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"text: {self.name}: {str(error).splitlines()[0]}") from error


Source = _Packages | _Folder | _Sets | _Dataset


def _utf8(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: convert the file, or leave it out") from None


def _docstrings(path: Path, source: str) -> list[str]:
    """The docstrings of a module, its classes and functions, in order; none where no triple quotes are."""
    if '"""' not in source and "'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the sources of others
            module = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        print(f"quantbench: {path} left out: {error}", file=sys.stderr)
        return []
    found: list[str] = []
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        # Statements alone: expressions, most of the tree, hold no definitions.
        inside = [c for field in ("body", "handlers", "orelse", "finalbody") for c in _statements(node, field)]
        pending.extend(reversed(inside))
    return found


def _statements(node: ast.AST, field: str) -> list[ast.AST]:
    return getattr(node, field, [])


def _build(source: Source, vocab: int) -> dict[str, bytes]:
    """The files of a finished corpus. ValueError where the text is too little."""
    print(f"quantbench: reading {source.title}, once ...", file=sys.stderr, flush=True)
    if isinstance(source, _Folder) and source.left_out:
        first = quote(min(source.left_out), 60)
        print(f"quantbench: {len(source.left_out):,} files of it are left out, such as {first}: read are "
              f"{', '.join(SUFFIXES)} that are no links", file=sys.stderr, flush=True)  # fmt: skip
    training, held_out = _split(source)
    if not training or not held_out:
        raise ValueError(
            f"text: {source.title}: {len(training)} documents to train on and {len(held_out)} held out: "
            f"about one file in {HELD_OUT} is held out, so name more files"
        )
    tokenizer = _train(training, vocab)
    file = tokenizer.to_str(pretty=True)
    digest = _sha256([str(VERSION), file, *training, "", *held_out])
    counts = {"training": len(training), "held-out": len(held_out)}
    return {
        "tokenizer.json": file.encode(),
        "training.npy": _encode(tokenizer, training),
        "held-out.npy": _encode(tokenizer, held_out),
        "corpus.json": json.dumps({"digest": digest, "documents": counts, "source": source.title}).encode(),
    }


def _split(source: Source) -> tuple[list[str], list[str]]:
    """The documents of the training and of the held-out split; every one once, in the order of the files."""
    splits: tuple[dict[str, None], dict[str, None]] = ({}, {})
    collects = gc.isenabled()
    gc.disable()  # syntax trees are large and hold no cycles: looking for some doubles the time
    try:
        for name, documents in source.documents():
            held_out = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % HELD_OUT == 0
            splits[held_out].update((text, None) for text in documents if len(text) >= SHORTEST and _is_unicode(text))
    finally:
        if collects:
            gc.enable()
    return list(splits[0]), [text for text in splits[1] if text not in splits[0]]


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates that an escape in a docstring may spell: UTF-8 has no bytes for them."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _train(documents: list[str], vocab: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, SEP], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise ValueError(f"text: vocab {vocab}: the text yields {tokenizer.get_vocab_size()} tokens: ask for no more")
    return tokenizer


def _encode(tokenizer: "Tokenizer", documents: list[str]) -> bytes:
    """The stream of a split as a .npy file."""
    tokenizer.encode_special_tokens = True  # a document that spells "<bos>" means the text
    sep = tokenizer.token_to_id(SEP)
    pieces = [
        np.array([*encoding.ids, sep], np.uint16)
        for first in range(0, len(documents), 1024)
        for encoding in tokenizer.encode_batch_fast(documents[first : first + 1024])
    ]
    return _npy(np.concatenate(pieces))


def _npy(stream_N: NDArray[np.uint16]) -> bytes:
    file = io.BytesIO()
    np.save(file, stream_N, allow_pickle=False)
    return file.getvalue()


def _sha256(texts: Iterable[str | bytes]) -> str:
    """sha256 (hex) of a list of texts; each with its length, so that no two lists are the same bytes."""
    digest = hashlib.sha256()
    for text in texts:
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# --- carried from one machine to another -----------------------------------------------------------------------------

TEXTS = ("corpus.json", "tokenizer.json")  # the files of a cell that are no streams


def _packed(folder: Path, inputs: dict[str, object]) -> bytes:
    """A cell as one safetensors file: the streams of ids, and as metadata all else with a checksum over everything."""
    from safetensors.numpy import save

    streams = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in SPLITS}
    about = {"inputs": json.dumps(inputs)} | {name: (folder / name).read_bytes().decode() for name in TEXTS}
    return save(streams, about | {"sha256": _checksum(about, streams)})


def _unpacked(path: Path, store: Store) -> Path:
    """The cell that a carried file was made of, put into the store where it is missing."""
    inputs = _read(path)[0]
    found = store.load("text", inputs)
    if found is None:
        inputs, files = _read(path, whole=True)
        print(f"quantbench: the ids of {path.name} are unpacked, once", file=sys.stderr, flush=True)
        with store.cell("text", inputs) as cell:
            found = cell.path or cell.commit(files)
    return found


def _read(path: Path, whole: bool = False) -> tuple[dict[str, object], dict[str, bytes]]:
    """What the cell of a carried file depends on, and its files where the `whole` is asked for, which is verified.

    ValueError where the file was altered.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            about = file.metadata()
            streams = {name: file.get_tensor(name) for name in SPLITS} if whole else {}
        inputs = json.loads(about["inputs"])
        if not whole:
            return inputs, {}
        if about["sha256"] != _checksum(about, streams):
            raise ValueError("its checksum is another")
        if any(stream.dtype != np.uint16 for stream in streams.values()):
            raise ValueError("its ids are of another type")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: altered since it was written ({error}): carry it again") from None
    return inputs, {name: about[name].encode() for name in TEXTS} | {f"{n}.npy": _npy(x) for n, x in streams.items()}


def _checksum(about: dict[str, str], streams: dict[str, NDArray[np.uint16]]) -> str:
    return _sha256([*(about[name] for name in ("inputs", *TEXTS)), *(streams[name].tobytes() for name in SPLITS)])
