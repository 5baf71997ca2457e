"""What is opened of models that are there already, and what is refused, each in one line."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import torch
from checkpoint import SHAPES, folder_of
from safetensors.torch import load_file, save_file

import quantbench.model  # noqa: F401 - a folder may be a checkpoint of ours
from quantbench.pretrained import SHORT, _joined, cost, get, identity, open_model, tokenizer_of

TEXTS = ["the cat sat on the mat and the dog ran by", "a house near a tree is old and red"] * 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_folder_is_opened_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path, TEXTS)
    given = open_model(str(folder), tmp_path)
    assert given.bos == 0
    assert given.about["model-type"] == kind
    assert given.about["digest"] == identity(str(folder), tmp_path)["digest"]
    ids = torch.tensor([[0, *given.encode(TEXTS[0])]])
    weights = load_file(folder / "model.safetensors")
    assert not given.model.training
    assert torch.isfinite(given.model(ids).logits).all()
    assert given.about["parameters"] == sum(p.numel() for p in given.model.parameters())
    assert sum(w.numel() for w in weights.values()) <= given.about["parameters"]


def test_a_digest_is_of_the_weights(copied: Path, llama: Path) -> None:
    before = identity(str(llama), copied)["digest"]
    assert identity(str(copied), copied)["digest"] == before
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert identity(str(copied), copied)["digest"] != before


def test_windows_stand_behind_bos_and_do_not_overlap(llama: Path) -> None:
    given = open_model(str(llama), llama)
    ids = given.encode(TEXTS[0])
    windows = list(given.windows(TEXTS[:2], 5))
    mine = [window.tolist() for number, window in windows if number == 0]
    assert mine == [[0, *ids[i : i + 4]] for i in range(0, len(ids) - 3, 4)]
    bare = [window.tolist() for number, window in given.windows(TEXTS[:2], 4, bos=False) if number == 0]
    assert bare == [window[1:] for window in mine]


def test_a_special_token_in_a_text_is_text(llama: Path) -> None:
    given = open_model(str(llama), llama)
    assert 0 not in given.encode("a <s> b")
    assert tokenizer_of(str(llama), llama)[1] == 0


def test_flops_are_counted_as_for_our_own(llama: Path) -> None:
    given = open_model(str(llama), llama)
    paid = cost(given.model, 8)
    linears = sum(m.weight.numel() for m in given.model.modules() if isinstance(m, torch.nn.Linear))
    assert paid["flops-per-token"] == 6 * (linears + 3 * 64 * 8)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-64])


def _cut_in_the_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


def _bomb(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def _not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _a_weight_is_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _a_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def _a_way_out_of_the_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_pickled, r"its weights are pickled \(pytorch_model.bin\), which runs code"),
        (_truncated, "model.safetensors: truncated"),
        (_cut_in_the_header, "no safetensors file, or a truncated one"),
        (_bomb, "no safetensors file, or a truncated one"),
        (_not_a_number, "in float32 it gives NaN or infinity"),
        (_a_weight_is_missing, "1 of its weights are not in its files, such as model.layers.1.mlp.up_proj.weight"),
        (_no_tokenizer, "no tokenizer"),
        (_a_way_out, "a link that leads out of the folder"),
        (_a_way_out_of_the_index, "which is no file of this folder"),
        (lambda folder: edit(folder, auto_map={"AutoModelForCausalLM": "x.Y"}), "code of its own .auto_map., which"),
        (lambda folder: edit(folder, quantization_config={"quant_method": "mxfp4"}), "quantized already"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "no JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: edit(folder, model_type="bert", architectures=["BertModel"]), "copied"),
    ],
)  # fmt: skip
def test_what_must_not_be_opened_is_refused_in_one_line(spoil: Any, told: str, copied: Path) -> None:
    spoil(copied)
    with pytest.raises(ValueError, match=told) as error:
        open_model(str(copied), copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("smollm2", "not here yet: run `quantbench models get smollm2`"),
        ("nowhere.gguf", "no such file"),
        ("~nobody-at-all/model", "no folder, no .gguf file"),
        ("a\0b", "no folder, no .gguf file"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_model_that_is_not_there_is_told(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        open_model(name, tmp_path)


def test_a_licence_of_its_own_is_accepted_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add --accept-licence"):
        get("gemma3", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_a_file_of_parts(name: str, tmp_path: Path) -> None:
    parts = SHORT[name].parts(tmp_path)
    assert len(set(parts)) == len(parts) > 0
    for number, part in enumerate(parts):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(bytes([number]) * (number + 1))
    whole = _joined(parts, tmp_path)
    assert whole.read_bytes() == b"".join(part.read_bytes() for part in parts)


def test_a_revision_is_of_the_hub(llama: Path) -> None:
    with pytest.raises(ValueError, match="--revision is of a name of the hub"):
        open_model(str(llama), llama, revision="step1000")


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """What a hub answers for one repository, `owner/tiny`, which is a folder here."""

    folder: Path
    commits: dict[str, str]  # revision -> commit
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if path.startswith("/api/models/owner/tiny/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)}
                     for f in sorted(self.folder.iterdir())]  # fmt: skip
            return self._answer(json.dumps(files).encode(), {})
        if path.startswith("/api/models/owner/tiny"):
            commit = self.commits.get(path.rpartition("/revision/")[2] if "/revision/" in path else "main")
            if commit is not None:
                return self._answer(json.dumps({"id": "owner/tiny", "sha": commit, "siblings": []}).encode(), {})
            return self._answer(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        if path.startswith("/owner/tiny/resolve/"):
            commit, name = path.removeprefix("/owner/tiny/resolve/").split("/", 1)
            if (file := self.folder / name).is_file():
                about = {"X-Repo-Commit": self.commits.get(commit, commit), "ETag": f'"{_oid(file)}"'}
                return self._answer(file.read_bytes(), about)
            return self._answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
        gated = path.startswith("/api/models/owner/gated")
        return self._answer(b"", {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"}, 403 if gated else 401)

    def _answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _oid(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def asked(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub of this machine in the place of the real one; the paths that it is asked for."""
    commits = {"main": "a" * 40, "step10": "b" * 40}
    handler = type("Handler", (Hub,), {"folder": copied, "commits": commits, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    told = {  # by variables, when it is imported
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in told.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler.asked
    server.shutdown()
    server.server_close()


def test_a_name_of_the_hub_is_the_folder_that_it_holds(
    asked: list[str], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "pytorch_model.bin").write_bytes(b"never read")
    found, here = open_model("owner/tiny", tmp_path, "step10"), open_model(str(copied), tmp_path)
    assert {key: found.about[key] for key in ("name", "kind", "revision")} == {
        "name": "owner/tiny", "kind": "hub", "revision": "b" * 40,
    }  # fmt: skip
    assert found.about["digest"] == here.about["digest"]
    ids_BT = torch.tensor([[0, 5, 9, 7]])
    assert torch.equal(found.model(ids_BT).logits, here.model(ids_BT).logits)
    assert not [path for path in asked if path.endswith(".bin")]
    known = identity("owner/tiny", tmp_path)
    assert known == identity(str(copied), tmp_path) | {"revision": "a" * 40}
    before = len(asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_model("owner/tiny", tmp_path, "step10").about == found.about
    with pytest.raises(ValueError, match="owner/other: the hub does not answer, and it is not in"):
        open_model("owner/other", tmp_path)
    assert len(asked) == before


@pytest.mark.parametrize(
    ("name", "revision", "spoil", "told"),
    [
        ("owner/none", None, {}, "^owner/none: the hub has no such model"),
        ("owner/tiny", "none", {}, "^owner/tiny: it has no revision 'none'"),
        ("owner/gated", None, {}, "^owner/gated: its owner asks who reads it"),
        ("owner/tiny", None, {"model_type": "bert"}, "does not know where a 'bert' model keeps its layers"),
        ("owner/tiny", None, {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "which is never run"),
        ("owner/tiny", None, {"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_what_is_refused_is_before_its_weights_come(
    name: str, revision: str | None, spoil: dict[str, Any], told: str, asked: list[str], copied: Path, tmp_path: Path
) -> None:
    edit(copied, **spoil)
    with pytest.raises(ValueError, match=told) as error:
        open_model(name, tmp_path, revision)
    assert "\n" not in str(error.value)
    assert not [path for path in asked if path.endswith(".safetensors")]
