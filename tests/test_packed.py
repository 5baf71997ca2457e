"""Quantized models on disk: bit-equal without calibration, really packed, and refused where they are not as saved."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, ids, quantizer
from tiny import model as ours
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantbench import catalog, packed
from quantbench.calibration import Calibration
from quantbench.cli import main
from quantbench.quantizers import LowBitLinear, Quantizer
from quantbench.store import digest

ROOT = Path(__file__).resolve().parent.parent
IDS = ids(4, 12)
EVERYTHING = ("inputs", "residual", "norms", "keys", "values", "scores", "probabilities", "products")
BY_THEMSELVES = ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8dyn")


def calibration() -> Calibration:
    return Calibration([(half, None) for half in IDS.split(2)])


def quantized(entry: Quantizer, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, float]]:
    model = ours() if model is None else model
    model.embed.weight.data[IDS[:, 0]] *= 20
    return model, entry.quantize(model, calibration())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def saved(folder: Path, name: str = "w8a8-static", **changes: Any) -> nn.Module:
    entry = quantizer(name, **changes)
    model, report = quantized(entry)
    packed.save(model, name, entry, folder, report)
    return model


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.names("quantizers"))
def test_every_entry_comes_back_bit_for_bit_or_says_that_it_saves_itself(name: str, tmp_path: Path) -> None:
    entry = quantizer(name)
    model, report = quantized(entry)
    kinds = {type(module) for module in model.modules() if isinstance(module, LowBitLinear)}
    if any(kind.plan is LowBitLinear.plan for kind in kinds):
        with pytest.raises(ValueError, match=rf"^{name}: a \w+ saves itself by its own means$"):
            packed.save(model, name, entry, tmp_path / "a", report)
        assert not (tmp_path / "a").exists()
        return
    assert name not in BY_THEMSELVES
    size = packed.save(model, name, entry, tmp_path / "a", report)
    assert size == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    before = torch.get_rng_state()
    back = packed.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(back), logits(model))
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert {path: type(m) for path, m in back.named_modules()} == {path: type(m) for path, m in model.named_modules()}
    again = packed.save(back, name, entry, tmp_path / "b", report)
    assert again == size
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("w8a8-static", {"sites": (*EVERYTHING, "embeddings", "head"), "symmetric": False}),
        ("w4a4-token", {"sites": (*EVERYTHING, "embeddings", "head")}),
        ("w8a8-tensor", {"sites": EVERYTHING, "weights": 16, "symmetric": False}),
        ("w4a16-rtn", {"symmetric_weights": False, "sites": ("head",)}),
        ("w8a8-static", {"rule": "percentile", "percent": 99.0, "symmetric": False}),
        ("w4a4-static", {"weights": 3, "activations": 5, "rule": "mse", "sites": ("residual",)}),
        ("llm-int8", {"threshold": 1.5, "share": 0.3}),
        ("llm-int8-elementwise", {"threshold": 1.5}),
    ],
)
def test_sites_scopes_and_codes_come_back(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path, name, **changes)
    assert torch.equal(logits(packed.load(tmp_path)), logits(model))


@pytest.mark.parametrize("change", MODELS)
def test_every_model_part_comes_back(change: str, tmp_path: Path) -> None:
    entry = quantizer("w8a8-static-residual")
    model, report = quantized(entry, ours(MODELS[change]))
    packed.save(model, "w8a8-static-residual", entry, tmp_path, report)
    back = packed.load(tmp_path)
    assert torch.equal(logits(back), logits(model))
    assert back.config.mitigations == model.config.mitigations


def test_exempt_positions_are_the_callers_to_set(tmp_path: Path) -> None:
    saved(tmp_path)
    (exemption,) = {module.exemption for module in packed.load(tmp_path).modules() if isinstance(module, LowBitLinear)}
    assert exemption.mask_BT is None


def test_what_is_on_disk_is_what_bits_per_weight_says(tmp_path: Path) -> None:
    sizes, in_blocks = {}, {}
    for bits in (4, 8):
        entry = quantizer("w8a8-token", weights=bits, sites=("inputs", "embeddings", "head"))
        model, report = quantized(entry, ours(layers=4))
        sizes[bits] = packed.save(model, "w8a8-token", entry, tmp_path / str(bits), report)
        tensors = load_file(tmp_path / str(bits) / packed.TENSORS)
        blocks = {key: tensor for key, tensor in tensors.items() if re.match(r"blocks\..*(weight|scale_NG)$", key)}
        in_blocks[bits] = 8 * sum(t.nbytes for key, t in blocks.items() if "norm" not in key)
        weights = sum(t.numel() * 8 // bits for key, t in blocks.items() if t.dtype in (torch.int8, torch.uint8))
        assert in_blocks[bits] / weights == pytest.approx(report["bits-per-weight"])
        assert not [key for key, t in tensors.items() if t.is_floating_point() and t.numel() > 64 * 16]
    assert sizes[4] < 0.65 * sizes[8]
    assert in_blocks[4] < 0.55 * in_blocks[8]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    saved(tmp_path, "llm-int8-3")
    text = (tmp_path / packed.ABOUT).read_text()
    about = json.loads(text)
    assert about["quantizer"] == {"llm-int8-3": {"elementwise": False, "share": 0.06, "threshold": 3.0}}
    assert about["config"]["layers"] == 2
    assert about["report"]["bits-per-weight"] > 8
    assert len(text) < 4000
    assert {path.name for path in tmp_path.iterdir()} == {packed.ABOUT, packed.TENSORS}


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        packed.load(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{folder}: ")


def rewrite(folder: Path, change: Any) -> None:
    """Changes the JSON, and signs it anew."""
    about = json.loads((folder / packed.ABOUT).read_text())
    del about["digest"]
    change(about)
    (folder / packed.ABOUT).write_text(json.dumps(about | {"digest": digest(about)}))


@pytest.mark.parametrize("file", [packed.ABOUT, packed.TENSORS])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "longer", "of another"])
def test_files_that_are_not_as_saved(file: str, damage: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    path = tmp_path / "a" / file
    data = path.read_bytes()
    if damage == "of another":
        saved(tmp_path / "b", "w8a8-static-residual")
        data = (tmp_path / "b" / file).read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"cut": data[:middle], "empty": b"", "flip": flipped, "longer": data + b"x"}.get(damage, data))
    refused(tmp_path / "a", "is not as it was saved; export the model again")


@pytest.mark.parametrize("file", [packed.ABOUT, packed.TENSORS])
def test_a_link_or_a_missing_file(file: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    path = tmp_path / "a" / file
    shutil.move(path, tmp_path / "elsewhere")
    refused(tmp_path / "a", "no quantized model")
    path.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "a", "is no regular file")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.update(quantizer={"w9a9": {}}), "quantizers has no 'w9a9'"),
        (lambda a: a.update(quantizer={"w8a8-static": {"wieghts": 8}}), "did you mean 'weights'"),
        (lambda a: a.update(quantizer={}), "ValueError"),
        (lambda a: a.update(schema=2), "schema 2 is not this version's"),
        (lambda a: a["modules"][0]["at"].append("../blocks.0"), "has no attribute"),
        (lambda a: a["modules"][0]["at"].append("blocks.0.attention.missing"), "has no attribute"),
        (lambda a: a["modules"][0]["at"].append("blocks.0.attention"), "AttributeError"),
        (lambda a: a["modules"][0]["at"].append(3), "AttributeError"),
        (lambda a: a["modules"][0]["linear"].update(kind="Bnb4Linear"), "no low-bit Linear is called 'Bnb4Linear'"),
        (lambda a: a["modules"][0]["linear"].update(kind="LowBitLinear"), "NotImplementedError"),
        (lambda a: a["modules"][0]["linear"].update(kind="Rounding"), "no low-bit Linear is called 'Rounding'"),
        (lambda a: a["modules"][0]["linear"]["plan"].update(bits=9), "AssertionError: 9"),
        (lambda a: a["modules"][0]["linear"]["plan"].update(bits=4), "tensor .*weight is another one"),
        (lambda a: a["modules"][0]["linear"]["plan"].pop("bits"), "KeyError: 'bits'"),
        (lambda a: a["modules"][0]["at"].pop(), "tensor blocks.* is another one"),
        (lambda a: a["modules"][0].update(sites={"os": {}}), "AssertionError: os"),
        (lambda a: a["config"].update(layers=3), "tensor blocks.2.* is missing"),
        (lambda a: a["config"].update(mitigations={"magic": {}}), "KeyError"),
        (lambda a: a["config"].update(width="wide"), "width is .wide."),
        (lambda a: a.pop("modules"), "KeyError: 'modules'"),
    ],
)
def test_what_describes_no_model(change: Any, says: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, says)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype"])
def test_tensors_that_are_not_the_models(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / packed.TENSORS)
    key = "blocks.0.attention.qkv.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["more"] = torch.zeros(3)
    else:
        tensors[key] = tensors[key][:5].contiguous() if damage == "shape" else tensors[key].float()
    save_file(tensors, tmp_path / packed.TENSORS)
    from hashlib import sha256

    found = sha256((tmp_path / packed.TENSORS).read_bytes()).hexdigest()
    rewrite(tmp_path, lambda about: about.update(sha256=found))
    refused(tmp_path, "tensor (more|blocks.0.attention.qkv.weight) is (missing|another one)")


@pytest.mark.parametrize(
    "changes",
    [{"layers": 100_000}, {"layers": "x"}, {"layers": -1}, {"heads": 0}, {"width": 2**40}, {"vocab_size": 2**40},
     {"mlp_width": 2**30}, {"mitigations": 5}, {"mitigations": [[]]}],
)  # fmt: skip
def test_a_description_of_what_cannot_be_is_told_before_it_is_built(changes: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda about: about["config"].update(changes))
    refused(tmp_path, "describes no model of this version")


def test_a_packed_file_of_terabytes_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in (packed.ABOUT, packed.TENSORS):
        with open(tmp_path / name, "r+b") as file:
            file.truncate(1 << 42)
        refused(tmp_path, "4,398,046,511,104 bytes, and at most .* can be read")


def test_only_a_model_that_can_be_made_again_is_saved(tmp_path: Path) -> None:
    entry = quantizer("w8a8-token")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=67, **shape))
    entry.quantize(llama, calibration())
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: only quantbench's own decoder is saved here"):
        packed.save(llama, "w8a8-token", entry, tmp_path / "a", {})
    model, _ = quantized(entry)
    model.blocks[1].mlp.add_module("rotation", nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"^the model is not built as its recipe says"):
        packed.save(model, "w8a8-token", entry, tmp_path / "a", {})
    assert not (tmp_path / "a").exists()


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_export_trains_quantizes_and_saves(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "relu-attn", "--track", "smoke", "--seed", "3"]
    assert main([*words, "--quantizer", "w4a4-token", "--to", "four"]) == 0
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (project / "four").iterdir())
    assert out == f"relu-attn seed 3, w4a4-token: 4.50 bits per weight of the blocks, {size:,} bytes in four\n"
    first = packed.load(project / "four")
    assert list(first.config.mitigations) == ["relu-attention"]
    assert main([*words, "--quantizer", "w4a4-token", "--to", "again"]) == 0
    assert "pretrain" not in capsys.readouterr().err  # it is in the store
    assert torch.equal(packed.load(project / "again")(IDS).logits, first(IDS).logits)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--quantizer", "w4a4-tokn"], "there is none; did you mean 'w4a4-token'?"),
        (["--quantizer", "w4a4-token", "--track", "smok"], "no track 'smok'"),
    ],
)
def test_export_refuses_in_a_line(project: Path, words: list[str], says: str, capsys: Any) -> None:
    assert main(["export", "baseline", "--track", "smoke", "--to", "x", *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (project / ".quantbench").exists()


def test_export_says_when_a_quantizer_saves_itself(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "baseline", "--track", "smoke", "--quantizer", "bnb-nf4", "--to", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("bitsandbytes saves its models by its own means")
    assert not (project / "x").exists()
