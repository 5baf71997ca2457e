"""Damaged and hostile models: each is refused in one line, before it takes the process, its memory or minutes."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import folder_of, gguf_of
from safetensors.torch import load_file, save_file

from quantbench.pretrained import open_model
from quantbench.trial import GROWTH, _growth

TEXTS = ["the cat sat on the mat and the dog ran by", "a house near a tree is old and red"] * 8
Spoil = Callable[[Path], Any]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refused(path: Path, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        open_model(str(path), path.parent)
    assert str(error.value).isprintable()
    assert str(error.value).startswith(str(path))


def edit(name: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes))

    return spoil


# --- what is no file, or not here ------------------------------------------------------------------------------------

READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "other.safetensors", "merges.txt", "vocab.json", "model.safetensors.index.json"]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_pipe_in_a_folder_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name}: no regular file")


@pytest.mark.parametrize("name", READ)
def test_a_link_leads_nowhere_else(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    for to, told in (("nowhere", "nowhere"), (name, "nowhere"), ("/dev/zero", "out of the folder"),
                     (tmp_path, "out of the folder")):  # fmt: skip
        (folder / name).symlink_to(to)
        refused(folder, f"{name}: a link that leads {told}")
        (folder / name).unlink()


def test_a_file_of_terabytes_is_not_read(folder: Path) -> None:
    for name in READ:
        if name == "other.safetensors":
            continue  # which nobody reads
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        with open(folder / name, "wb") as file:
            file.truncate(1 << 42)
        refused(folder, f"{name}: .*(bytes|MiB)")
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)
    open_model(str(folder), folder)


def test_links_stay_inside_the_hubs_cache_of_one_model(llama: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays it out: a snapshot is links to ../../blobs."""
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("a" * 40)
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    given = open_model(str(snapshot), tmp_path)
    assert given.about["name"] == "owner/tiny"
    assert given.about["digest"] == open_model(str(llama), tmp_path).about["digest"]
    shutil.move(blobs / "0", tmp_path / "0")
    (blobs / "0").symlink_to("../../0")
    refused(snapshot, "a link that leads out of the folder")


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "no JSON object"),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}", "no JSON object"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' stands there twice"),
        ('{"hidden_size": 64}', "no 'model_type'"),
        ('{"model_type": ["llama"]}', "no 'model_type'"),
    ],
)
def test_a_config_that_is_none_is_told(text: str, told: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, told)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_config_in_another_encoding_is_told(encoding: str, folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text(), encoding=encoding)
    refused(folder, "no JSON object")


@pytest.mark.parametrize("value", ["text", 0, -3, 1.5, 2**40, 10**30, [1], {}, True])
def test_a_size_is_a_number(value: Any, folder: Path) -> None:
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        kept = (folder / "config.json").read_text()
        edit("config.json", **{name: value})(folder)
        refused(folder, f"config.json: '{name}' is .*: a number from 1 to 2,147,483,647 is needed")
        (folder / "config.json").write_text(kept)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": None}, "does not say 'num_hidden_layers'.*no default means anything"),
        ({"num_attention_heads": None}, "does not say 'num_attention_heads'"),
        ({"num_hidden_layers": 100_000}, "100,000 layers are more than any model has"),
        ({"num_hidden_layers": 2}, "config.json says 2 layers, and the weights hold 3"),
        ({"num_hidden_layers": 4}, "config.json says 4 layers, and the weights hold 3"),
        ({"vocab_size": 2_000_000_000}, "its config describes 256,000,0.*its files hold"),
        ({"intermediate_size": 65}, "has the shape .64, 64., and its config describes .6[45], 6[45]."),
        ({"vocab_size": 321}, "'lm_head.weight' has the shape .320, 64., and its config describes .321, 64."),
        ({"attention_bias": True}, "of its weights are not in its files, such as model.layers.0.self_attn"),
        ({"num_attention_heads": 7}, "model: .*7"),
        ({"hidden_act": "no_such"}, "KeyError: 'no_such'"),
        ({"hidden_act": 5}, "hidden_act"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "it gives NaN or infinity"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "model: "),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"pad_token_id": 2**40}, "model: "),
        ({"dtype": "floaty"}, "floaty"),
        ({"attn_implementation": "kernels-community/attn"}, "names a kernel of the hub, which is code"),
        ({"attn_implementation": "nope"}, "nope"),
    ],
)
def test_a_config_of_no_model_is_told(changes: dict[str, Any], told: str, folder: Path) -> None:
    edit("config.json", **changes)(folder)
    refused(folder, told)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def tokenizer(**changes: Any) -> Spoil:
    return edit("tokenizer.json", **changes)


def vocabulary(**more: int) -> Spoil:
    def spoil(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        tokenizer(model=model | {"vocab": model["vocab"] | more})(folder)

    return spoil


def replaces(pattern: dict[str, str], content: str, times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000), "tokenizer.json: no JSON object"),
        (tokenizer(model=5), "a broken tokenizer"),
        (tokenizer(normalizer=replaces({"String": "a"}, "aa", 30)), "may make a text 1.07e.09 times as long"),
        (tokenizer(normalizer=replaces({"Regex": "."}, "a" * 10, 9)), "times as long"),
        (tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 10**6}), "may make a text 1e.06 times as long"),
        (tokenizer(model={"type": "BPE", "dropout": 0.1, "vocab": {}, "merges": []}), "dropout 0.1"),
        (tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated",
                                  "invert": False}), "a broken tokenizer: "),
        (tokenizer(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, pre_tokenizer=None),
         "a broken tokenizer: .*Missing"),
        (vocabulary(zz=10**6), "its tokenizer gives ids up to 1,000,000, and it has 320 embeddings"),
        (vocabulary(zz=2**32), "a broken tokenizer"),
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "names code of its own .auto_map."),
        (edit("tokenizer_config.json", bos_token=5), "its tokenizer cannot be read"),
        (edit("generation_config.json", auto_map={}), "names code of its own .auto_map."),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter of another model: merge it"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_takes_the_process_with_it_is_told(spoil: Spoil, told: str, folder: Path) -> None:
    spoil(folder)
    refused(folder, told)


def test_replacements_of_published_tokenizers_grow_nothing() -> None:
    spaces = replaces({"String": " "}, "▁", 1)
    assert _growth({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}) <= 16
    assert _growth(replaces({"Regex": " {2,}"}, " ", 12)) <= GROWTH
    assert _growth(None) == 1


# --- weights ---------------------------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes the header of a file of safetensors."""

    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def entry(**changes: Any) -> Spoil:
    return header(lambda found: found[EMBEDDING].update(changes))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return spoil


def index(text: str) -> Spoil:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (entry(data_offsets=["a", "b"]), f"its header is broken at '{EMBEDDING}'"),
        (entry(data_offsets=[-4, 4]), "its header is broken at"),
        (entry(data_offsets=[0, 2**62]), "its header is broken at"),
        (entry(data_offsets=None), "its header is broken at"),
        (entry(shape="ab"), "its header is broken at"),
        (entry(shape=[-320, -64]), "its header is broken at"),
        (entry(shape=[2**40, 2**40]), "its header is broken at"),
        (entry(dtype="F7"), "its header is broken at"),
        (entry(dtype=["F32"]), "its header is broken at"),
        (entry(dtype="I32"), f"'{EMBEDDING}' is I32, no floating-point weight"),
        (entry(shape=[64, 320]), f"'{EMBEDDING}' has the shape .64, 320., and its config describes .320, 64."),
        (header(lambda found: found.update({EMBEDDING: 5})), "its header is broken at"),
        (header(lambda found: found["lm_head.weight"].update(found[EMBEDDING])), "tensors overlap, or leave a gap"),
        (header(lambda found: found.update({"\x1b[31m\n": found.pop(EMBEDDING)})), "1 of its weights are not in"),
        (header(lambda found: found.update(__metadata__={"a": {}})), "model: "),
        (weights(lambda found: found[EMBEDDING].__setitem__((-1, 0), torch.nan)),
         f"in float32 it gives NaN or infinity, as its weight {EMBEDDING} does"),
        (weights(lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
         "its config leaves out 1 weights of its files"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors"),
         "'x.safetensors' without model.safetensors.index.json"),
        (index("[]"), "no JSON object"),
        (index("{}"), "no index of safetensors"),
        (index('{"weight_map": {"a": 5}}'), "no index of safetensors"),
        (index('{"weight_map": {"a": "x.bin"}}'), "it names 'x.bin', which is no file of this folder"),
    ],
)  # fmt: skip
def test_weights_that_are_broken_or_of_another_model_are_told(spoil: Spoil, told: str, folder: Path) -> None:
    spoil(folder)
    refused(folder, told)


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_of(tmp_path_factory.mktemp("gguf") / "m.gguf", TEXTS).read_bytes()


def test_a_gguf_file_cut_anywhere_is_told(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, 12_000, 97), *range(12_000, len(sound), 20_011), len(sound) - 1]:
        path.write_bytes(sound[:length])
        refused(path, "m.gguf: (no GGUF file|a broken GGUF file)")


def after(key: bytes, skip: int, kind: str, value: float) -> Callable[[bytes], bytes]:
    """Another number so many bytes behind the end of a text."""

    def spoil(data: bytes) -> bytes:
        at = data.index(key) + len(key) + skip
        return data[:at] + struct.pack(kind, value) + data[at + struct.calcsize(kind) :]

    return spoil


def at(place: int, kind: str, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + struct.pack(kind, value) + data[place + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (at(4, "<I", 99), "not those of version 2 or 3"),
        (at(8, "<Q", 2**63), "tensors"),
        (at(16, "<Q", 2**63), "keys"),
        (at(16, "<Q", 60_000), "a broken GGUF file"),
        (after(b"llama.block_count", 4, "<I", 3), "it says 3 layers, and holds 2"),
        (after(b"llama.block_count", 4, "<I", 2**32 - 1), "llama.block_count is 4294967295"),
        (after(b"llama.embedding_length", 4, "<I", 0), "llama.embedding_length is 0, and no default"),
        (after(b"llama.attention.head_count", 4, "<I", 3), "m.gguf: "),
        (after(b"llama.attention.head_count_kv", 4, "<I", 0), "m.gguf: "),
        (after(b"llama.attention.layer_norm_rms_epsilon", 4, "<f", float("nan")), "NaN"),
        (after(b"tokenizer.ggml.bos_token_id", 4, "<I", 5000), "its bos token is 5000, of 3"),
        (after(b"tokenizer.ggml.tokens", 8, "<Q", 2**63), "a list of"),
        (after(b"tokenizer.ggml.token_type", 8, "<Q", 2**40), "a list runs beyond the file"),
        (after(b"tokenizer.ggml.tokens", 4, "<I", 9), "values of the type 9"),
        (after(b"token_embd.weight", 0, "<I", 2**31), "has 2147483648 dimensions"),
        (after(b"token_embd.weight", 4, "<Q", 2**63), "m.gguf: a broken GGUF file"),
        (after(b"token_embd.weight", 12, "<Q", 7), "tokens for 7 embeddings|overlap"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_cOunt"), "llama.block_count is None"),
        (lambda data: data.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens"), "is there twice"),
        (lambda data: data[:-8000] + b"\xff" * 8000, "NaN or infinity"),
    ],
)
def test_a_damaged_gguf_file_is_told(spoil: Callable[[bytes], bytes], told: str, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(spoil(sound))
    refused(path, told)


def test_what_transformers_leaves_out_of_a_gguf_file_is_told(tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "m.gguf", TEXTS, **{"llama.rope.scaling.type": "linear"})
    refused(path, "llama.rope.scaling.type is 'linear', which transformers leaves out")
    open_model(str(gguf_of(path, TEXTS, **{"llama.rope.scaling.type": "none"})), tmp_path)
    refused(
        gguf_of(path, TEXTS, without="blk.1.ffn_up"), "1 of its weights are not in its files, such as model.layers.1"
    )


# --- from outside ----------------------------------------------------------------------------------------------------


def test_no_verb_shows_a_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "tracks").mkdir(parents=True)
    header(lambda found: found.update(__metadata__={"a": {}}))(folder)
    code = "import sys; from quantbench.cli import main; print([main([verb, 'model']) for verb in sys.argv[1:]])"
    done = subprocess.run([sys.executable, "-c", code, "measure", "heads", "ablate"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout == "[2, 2, 2]\n"
    told = [line for line in done.stderr.splitlines() if not line.startswith("open ")]
    assert len(told) == 3
    assert all(line.startswith("quantbench: model: ") for line in told)
