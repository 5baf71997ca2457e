"""The files of a model that somebody made: which are read, whether they may be, and one digest over all of them.

Nothing is loaded here, and nothing heavy imported: what bytes, sizes and names alone tell is told before a library sees
a file. That is cheap, and keeps out what libraries answer with a crash, a hang or all of the memory.

Which files decide a model's numbers is nowhere listed: a tokenizer's class may read any name. So everything in the
folder counts, but what nobody reads as a part of a model: pictures, documents, code, data, archives, pickled weights,
hidden files, and weights that are neither model.safetensors nor in the index.

No link leads out of a folder. A snapshot in the hub's cache is a folder of links to ../../blobs: there, they may lead
anywhere inside the cache of that one model (models--owner--name), and no further.
"""

import hashlib
import json
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from quantbench.store import sha256_of
from quantbench.strict import quote

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
UNREAD = (*PICKLED, ".md", ".rst", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".py", ".gguf",
          ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".npz", ".npy", ".csv", ".jsonl", ".parquet", ".arrow",
          ".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".log")  # fmt: skip
WEIGHTS = ".safetensors"
ABOUT = "quantbench.json"  # in the folder of a short name: what it was made of, and the sha256 of every file
REMOTE = "names code of its own (auto_map), which is never run: take an architecture of transformers itself"

# Bounds: above what published models have, below what takes a machine's memory or minutes.
TEXT = 16 << 20  # bytes of a JSON file
TOKENIZER = 256 << 20  # bytes of a tokenizer's file
HEADER = 32 << 20  # bytes of the header of a safetensors file
LAYERS = 512
SIZE = 2**31 - 1

WEIGHED = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # types of weights, and their bits
OTHER = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}  # of buffers
BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".position_ids")  # once saved, read by nobody
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # in the name of a tensor: the layer it is of

# What decides the shape of the computation, and has no default that means anything: by the names that it goes under.
DEPTH = ("num_hidden_layers", "n_layer", "layers")
STATED = (DEPTH, ("hidden_size", "n_embd"), ("num_attention_heads", "n_head"),
          ("vocab_size",))  # fmt: skip
SIZES = (*(name for names in STATED for name in names), "num_key_value_heads", "head_dim", "intermediate_size",
         "n_inner", "ffn_dim", "word_embed_proj_dim", "max_position_embeddings", "n_positions", "sliding_window",
         "num_local_experts", "num_experts_per_tok", "layers", "heads", "width", "mlp_width")  # fmt: skip


class AlteredError(Exception):
    """Files that we wrote, and vouch for, are no longer those (exit code 5)."""


# --- one file --------------------------------------------------------------------------------------------------------


def texts(folder: Path) -> list[Path]:
    """Every file beside the weights that may decide a model's numbers, by name.

    ValueError, one line, for a link that leads out or nowhere, and for what is no regular file (reading a pipe hangs).
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() not in (*UNREAD, WEIGHTS) and not path.name.startswith(".") and path.name != ABOUT
        if _is_file(path, _inside(folder))
    ]


def _is_file(path: Path, inside: Path) -> bool:
    """Whether it is a file, where nothing forbids to read it; a folder is none, and is not read."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError:
        raise ValueError(f"{_shown(path)}: a link that leads nowhere: put the file itself there") from None
    if not real.is_relative_to(inside):
        raise ValueError(f"{_shown(path)}: a link that leads out of the folder: put the file itself there")
    if real.is_dir():
        return False
    check_regular(real, path)
    return True


def _inside(folder: Path) -> Path:
    """What no link of a folder may lead out of: the folder; of a snapshot in the hub's cache, the model's cache."""
    real = folder.resolve()
    repository = real.parent.parent
    return repository if real.parent.name == "snapshots" and repository.name.startswith("models--") else real


def check_regular(path: Path, called: Path | None = None) -> None:
    """ValueError where something is no regular file: opening a pipe or a device may hang."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{_shown(called or path)}: no regular file: a model is made of files alone")


def read_json(path: Path, most: int = TEXT) -> dict[str, Any]:
    """The object in a file of a model; ValueError, one line, where it holds none."""
    if path.stat().st_size > most:
        raise ValueError(f"{_shown(path)}: more than {most >> 20} MiB of JSON: no file of a model")
    return _object(path.read_bytes(), path)


def _object(data: bytes, path: Path) -> dict[str, Any]:
    """What the bytes spell. A key that stands there twice is told; a tokenizer's readers all take the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise KeyError(next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1))
        return found

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=dict if "token" in path.name else once)
    except KeyError as error:
        raise ValueError(f"{_shown(path)}: the key {quote(error.args[0])} stands there twice") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{_shown(path)}: no JSON object") from None
    return found


def _shown(path: Path) -> str:
    """A path in a message; a name may hold anything."""
    text = str(path)
    return text if text.isprintable() else quote(text, 200)


# --- the whole folder ------------------------------------------------------------------------------------------------


def check_weights(folder: Path, config: dict[str, Any]) -> int:
    """How many numbers the weights hold. ValueError, one line, where they are not sound, or not of this config."""
    found = weights(folder)
    for path in found:
        if path.stat().st_size > 2 * memory():  # even at half of the bits
            raise ValueError(f"{_shown(path)}: {path.stat().st_size:,} bytes are more than this machine's memory holds")
    elements, layers, seen = 0, set(), set()
    for path in found:
        for name, shape in _header(path).items():
            if name in seen:
                raise ValueError(f"{_shown(path)}: the tensor {quote(name)} is in two files")
            seen.add(name)
            elements += _product(shape)
            if match := LAYER.search(name):
                layers.add(int(match[1][:9]))
    said = stated(config, DEPTH)
    if layers != set(range(said)):
        raise ValueError(
            f"{_shown(folder)}: config.json says {said} layers, and the weights hold {len(layers)}: they are not of "
            "one model"
        )
    return elements


def check_texts(folder: Path) -> dict[str, Any]:
    """What config.json says; ValueError, one line, where the files beside the weights must not be opened."""
    if not folder.is_dir():
        raise ValueError(f"{_shown(folder)}: no such folder")
    config_path = folder / "config.json"
    names = {path.name: path for path in texts(folder)}
    if "config.json" not in names:
        raise ValueError(f"{_shown(folder)}: no config.json: a folder that `save_pretrained` wrote is needed")
    for path in names.values():
        if path.stat().st_size > TOKENIZER:
            raise ValueError(f"{_shown(path)}: {path.stat().st_size:,} bytes: no file of a model: put it elsewhere")
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        if name in names and "auto_map" in read_json(names[name]):
            raise ValueError(f"{_shown(names[name])}: it {REMOTE}")
    if "adapter_config.json" in names:
        raise ValueError(f"{_shown(folder)}: an adapter of another model: merge it, and save the whole model")
    config = read_json(config_path)
    if "auto_map" in config:
        raise ValueError(f"{_shown(folder)}: its config {REMOTE}")
    if config.get("quantization_config"):
        raise ValueError(f"{_shown(folder)}: it is quantized already: give the model that it was made of")
    for key in ("attn_implementation", "experts_implementation", "_attn_implementation"):
        if "/" in str(config.get(key, "")):
            raise ValueError(f"{_shown(config_path)}: {key!r} names a kernel of the hub, which is code: leave it out")
    _check_sizes(config, config_path)
    return config


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    """ValueError where a size is missing, is none, or is one that no model has."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{_shown(path)}: no 'model_type', the name of an architecture")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{_shown(path)}: {quote(kind)} is no causal language model of a decoder alone")
    for name in SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= SIZE):
            raise ValueError(f"{_shown(path)}: {name!r} is {quote(value)}: a number from 1 to {SIZE:,} is needed")
    if kind != "quantbench":
        for names in STATED:
            stated(config, names, path)
    if (layers := stated(config, DEPTH, path)) > LAYERS:
        raise ValueError(f"{_shown(path)}: {layers:,} layers are more than any model has ({LAYERS:,} at most)")


def stated(config: dict[str, Any], names: tuple[str, ...], path: Path = Path("config.json")) -> int:
    """A size under the one of these names that the config has; ValueError where it has none."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ValueError(f"{_shown(path)}: it does not say {' or '.join(map(repr, names))}, and no default means anything")


def memory() -> int:
    """Bytes that a model may take: this machine's, and its GPUs' where torch is at work."""
    import sys

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        total += sum(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))
    return total


def digest(folder: Path) -> str:
    """sha256 (hex) over the names and bytes of every file that may decide a model's numbers."""
    return combined(digests(folder))


def digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 (hex) of each of them; ValueError as `texts` and `weights`."""
    return {path.name: sha256(path) for path in (*texts(folder), *weights(folder))}


def combined(found: dict[str, str]) -> str:
    """One digest (hex) of named ones."""
    return hashlib.sha256("".join(f"{name} {found[name]} " for name in sorted(found)).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file as it is now (hex), or of that which a link of a hub's cache leads to."""
    return sha256_of(path.resolve())


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> list[Path]:
    """The files that transformers takes the weights from: the one of all, or those of the index."""
    single, index = folder / f"model{WEIGHTS}", folder / f"model{WEIGHTS}.index.json"
    parts = sorted(path for path in folder.iterdir() if path.suffix == WEIGHTS)
    here = [path.name for path in parts if _is_file(path, _inside(folder))]
    indexed = _indexed(index, here) if index.is_file() else []
    if found := [single] if single.name in here else indexed:
        return found
    if here:
        raise ValueError(f"{_shown(folder)}: {quote(here[0])} without {index.name}: fetch it, too")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        raise ValueError(f"{_shown(folder)}: no {WEIGHTS} in it")
    raise ValueError(
        f"{_shown(folder)}: its weights are pickled ({pickled[0]}), which runs code when it is read: load them where "
        "they are trusted, and write `save_pretrained(folder)`"
    )


def _indexed(index: Path, here: list[str]) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{_shown(index)}: no index of safetensors")
    for name in sorted(set(named.values())):
        if name not in here:
            raise ValueError(f"{_shown(index)}: it names {quote(name)}, which is no file of this folder")
    return [index.parent / name for name in sorted(set(named.values()))]


def _header(path: Path) -> dict[str, list[int]]:
    """Tensor -> shape. ValueError where the header is not that of these bytes: a truncated file is told unmapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, HEADER):
            raise ValueError(f"{_shown(path)}: no safetensors file, or a truncated one: fetch it again")
        header = _object(file.read(length), path)
    header.pop("__metadata__", None)
    at = []
    for name, entry in header.items():
        try:
            bits, shape, (begin, end) = (WEIGHED | OTHER)[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            sound = sound and (end - begin) * 8 == _product(shape) * bits
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"{_shown(path)}: its header is broken at {quote(name)}: fetch it again")
        if entry["dtype"] in OTHER and not name.endswith(BUFFERS):
            raise ValueError(
                f"{_shown(path)}: {quote(name)} is {entry['dtype']}, no floating-point weight: give the model that it "
                "was made of, before it was quantized"
            )
        at.append((begin, end))
    reached = 0
    for begin, end in sorted(at):
        if begin != reached:
            raise ValueError(f"{_shown(path)}: its header is broken: tensors overlap, or leave a gap: fetch it again")
        reached = end
    if 8 + length + reached != size:
        raise ValueError(f"{_shown(path)}: truncated, or something follows: {size:,} bytes, fetch it again")
    return {name: entry["shape"] for name, entry in header.items()}


def _product(shape: list[int]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found
