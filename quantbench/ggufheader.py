"""The header of a GGUF file, read with every count and offset held against the size of the file. Nothing is loaded.

    "GGUF", version, number of tensors, number of keys | key, type, value ... | name, shape, type, offset ... | data

The libraries that read such files trust what stands in them; a damaged one ends in a crash there, or in another model:
what a file says in a key that transformers leaves out is not in the model that it builds. Format: ggml's docs/gguf.md.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantbench.modelfiles import LAYERS, SIZE, check_regular, memory
from quantbench.strict import quote

ARCHITECTURES = {  # general.architecture -> the model_type that transformers makes of it, of those that we know
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY, UINT8 = 8, 9, 0
BLOCK = re.compile(r"blk\.(\d+)\.")
DIMENSIONS = 4
KEYS = 1 << 16  # more than any file has
SPELLED = 1 << 16  # bytes of a key or a name

# Below the architecture's name, without a default that means anything.
STATED = ("block_count", "embedding_length", "attention.head_count", "context_length", "feed_forward_length")
GEMMA = ("attention.key_length", "attention.sliding_window")
# What changes the numbers, and transformers leaves out: (key, values with which nothing is left out).
LEFT_OUT = (
    ("rope.scaling.type", ("none",)),
    ("rope.scale_linear", (1.0,)),
    ("expert_count", (0,)),
    ("logit_scale", (1.0, 0.0)),
    ("residual_scale", (1.0, 0.0)),
    ("embedding_scale", (1.0, 0.0)),
    ("attention.scale", (0.0,)),
    ("attention.clamp_kqv", (0.0,)),
    ("attn_logit_softcapping", (50.0,)),  # Gemma2's
    ("final_logit_softcapping", (30.0,)),
)


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    kind: str  # a config's model_type
    keys: dict[str, Any]  # of an array, how many there are
    elements: int  # of all tensors
    layers: int

    @property
    def bos(self) -> int | None:
        """The id of the token that the file names as BOS."""
        return self.keys.get("tokenizer.ggml.bos_token_id")


class _BrokenError(Exception):
    """Where the bytes end, or say what cannot be."""


def header(path: Path) -> Header:
    """The header of a file. ValueError, one line, where it is broken, truncated, or says what would be left out."""
    check_regular(path)
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: no GGUF file, or a truncated one: fetch it again")
    if path.stat().st_size > 2 * memory():
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are more than this machine's memory holds")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            keys, tensors = _read(data)
        except (_BrokenError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            told = str(error) if isinstance(error, _BrokenError) else "it ends, or counts, where it cannot"
            raise ValueError(f"{path}: a broken GGUF file ({told}): fetch it again") from None
    return _understood(path, keys, tensors)


def _read(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise _BrokenError("its first bytes are not those of version 2 or 3")
    if key_count > KEYS or tensor_count > KEYS:
        raise _BrokenError(f"{key_count:,} keys and {tensor_count:,} tensors")
    keys: dict[str, Any] = {}
    at = 24
    for _ in range(key_count):
        key, at = _string(data, at, SPELLED)
        if key in keys:
            raise _BrokenError(f"the key {quote(key)} is there twice")
        (kind,) = struct.unpack_from("<I", data, at)
        keys[key], at = _value(data, at + 4, kind)
    tensors, at = _tensors(data, at, tensor_count, keys.get("general.alignment", 32))
    return keys, tensors


def _string(data: mmap.mmap, at: int, most: int | None = None) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data) or (most is not None and length > most):
        raise _BrokenError("a text runs beyond the file")
    return data[at + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind in SCALARS:
        (value,) = struct.unpack_from(SCALARS[kind], data, at)
        return value, at + struct.calcsize(SCALARS[kind])
    if kind == STRING:
        return _string(data, at)
    if kind != ARRAY:
        raise _BrokenError(f"a value of the type {kind}")
    of, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if of in SCALARS:
        end = at + count * struct.calcsize(SCALARS[of])
    elif of == STRING and 8 * count <= len(data):
        end = at
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, end)
            end += 8 + length
            if end > len(data):
                break
            data[end - length : end].decode("utf-8")
    else:
        raise _BrokenError(f"a list of {count:,} values of the type {of}")
    if end > len(data):
        raise _BrokenError("a list runs beyond the file")
    return count, end


def _tensors(data: mmap.mmap, at: int, count: int, alignment: Any) -> tuple[dict[str, tuple[int, ...]], int]:
    """Tensor -> shape, and where the data begins."""
    from gguf import GGML_QUANT_SIZES

    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise _BrokenError(f"an alignment of {alignment}")
    shapes: dict[str, tuple[int, ...]] = {}
    places = []
    for _ in range(count):
        name, at = _string(data, at, SPELLED)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if name in shapes or not 1 <= dimensions <= DIMENSIONS:
            raise _BrokenError(f"the tensor {quote(name)} is there twice, or has {dimensions} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        if kind not in GGML_QUANT_SIZES:
            raise _BrokenError(f"the tensor {quote(name)} has the type {kind}")
        block, size = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[0] % block or offset % alignment:
            raise _BrokenError(f"the tensor {quote(name)} has the shape {shape} at {offset:,}")
        shapes[name] = shape
        places.append((offset, offset + prod(shape) // block * size))
    at += -at % alignment
    reached = 0
    for begin, end in sorted(places):
        if begin < reached:
            raise _BrokenError("tensors overlap")
        reached = end
    if at + reached > len(data):
        raise _BrokenError("truncated: tensors run beyond the file")
    return shapes, at


def _understood(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Header:
    """ValueError where another model than the file's would be built of it."""
    architecture = keys.get("general.architecture")
    kind = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if kind is None:
        raise ValueError(
            f"{path}: its architecture is {quote(architecture)}; known of GGUF files: {', '.join(ARCHITECTURES)}"
        )
    norm = "attention.layer_norm_epsilon" if kind == "gpt2" else "attention.layer_norm_rms_epsilon"
    due = [*STATED, norm, *(["attention.head_count_kv"] if kind not in ("gpt2", "llama") else [])]
    due += GEMMA if kind.startswith("gemma") else ()
    for name in due:
        value = keys.get(f"{architecture}.{name}")
        fine = type(value) is float if name == norm else type(value) is int and 1 <= value <= SIZE
        if not fine:
            raise ValueError(f"{path}: {architecture}.{name} is {quote(value)}, and no default means anything")
    for name, harmless in LEFT_OUT:
        value = keys.get(f"{architecture}.{name}")
        if value is not None and value not in harmless:
            raise ValueError(
                f"{path}: {architecture}.{name} is {quote(value)}, which transformers leaves out of GGUF files: give "
                "the model as safetensors"
            )
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path}: it scales its rotary frequencies (rope_freqs.weight), which transformers leaves out of GGUF "
            "files: give the model as safetensors"
        )
    layers = keys[f"{architecture}.block_count"]
    found = {int(match[1][:9]) for name in tensors if (match := BLOCK.match(name))}
    if layers > LAYERS or found != set(range(layers)):
        raise ValueError(f"{path}: it says {layers:,} layers, and holds {len(found)}: fetch it again")
    _check_vocabulary(path, keys, tensors)
    return Header(kind, keys, sum(map(prod, tensors.values())), layers)


def _check_vocabulary(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
    table, tokens = tensors.get("token_embd.weight"), keys.get("tokenizer.ggml.tokens")
    if table is None or len(table) != 2 or type(tokens) is not int or not 1 <= tokens <= table[1]:
        rows = table[1] if table and len(table) == 2 else 0
        raise ValueError(f"{path}: {quote(tokens)} tokens for {rows:,} embeddings: fetch it again")
    for name in ("token_type", "scores"):
        if keys.get(f"tokenizer.ggml.{name}", tokens) != tokens:
            raise ValueError(f"{path}: tokenizer.ggml.{name} is not of its {tokens:,} tokens: fetch it again")
    for name in ("bos", "eos", "unknown", "padding"):
        value = keys.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < tokens):
            raise ValueError(f"{path}: its {name} token is {quote(value)}, of {tokens:,} tokens: fetch it again")
