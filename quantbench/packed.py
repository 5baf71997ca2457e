"""A quantized model in a folder: low-bit tensors as they are, and what they are tensors of. No pickle, no calibration.

    model.safetensors   the model's state: int8 and packed int4 weights, scales, zero points, static ranges, and what
                        stayed in full precision
    quantized.json      the recipe as the model's config, the quantizer and its parameters, which module is of which
                        kind, the sha256 of the tensors and of itself

`load` makes the decoder anew, puts low-bit modules where they were, and fills in the tensors: its logits are those of
the model that was saved, bit for bit. Quantizers whose modules give no `plan`, as bitsandbytes' do not, save themselves
by their own means; what a mitigation has rebuilt after training is refused.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from quantbench import catalog, quantizers
from quantbench.anatomy import SITES
from quantbench.calibration import Exemption
from quantbench.model import QuantbenchConfig, QuantbenchModel
from quantbench.modelfiles import LAYERS, SIZE, TEXT, memory
from quantbench.quantizers import (
    ROUNDING_OF,
    IntegerEmbedding,
    LowBitLinear,
    Plan,
    Quantizer,
    Rounding,
    round_site,
)
from quantbench.store import atomic_write, digest, read_regular
from quantbench.strict import Entries, dump, loads, quote

SCHEMA = 1
TENSORS, ABOUT = "model.safetensors", "quantized.json"
CONFIG = tuple(name for name in inspect.signature(QuantbenchConfig).parameters if name != "kwargs")


@dataclass(frozen=True)
class _Named:
    """A quantizer as YAML has it."""

    quantizer: Annotated[dict[str, object], Entries("quantizers", catalog)]


def save(model: nn.Module, name: str, quantizer: Quantizer, folder: Path, report: Mapping[str, float] = {}) -> int:
    """Writes a quantized model into a folder, and returns the bytes on disk.

    `report` is what quantizing it returned, for the reader. ValueError where it cannot be rebuilt from this.
    """
    if type(model) is not QuantbenchModel:
        raise ValueError(f"{type(model).__name__}: only quantbench's own decoder is saved here, as its recipe built it")
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "config": json.loads(json.dumps({key: getattr(model.config, key) for key in (*CONFIG, "bos_token_id")})),
        **dump(_Named({name: quantizer})),
        "report": dict(report),
        "modules": _modules(model, name),
    }
    try:
        same = _structure(_build(about, quantizer)) == _structure(model)
    except AttributeError:  # a module where the decoder has none
        same = False
    if not same:
        raise ValueError("the model is not built as its recipe says: a mitigation has rebuilt it after training")
    tensors = bytes_of({key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()})
    about["sha256"] = sha256(tensors).hexdigest()
    text = json.dumps(about | {"digest": digest(about)}, indent=1, sort_keys=True, allow_nan=False).encode()
    atomic_write(folder / TENSORS, tensors)
    atomic_write(folder / ABOUT, text)  # last: without it, or with another one's, the tensors are no model
    return len(tensors) + len(text)


def load(folder: Path) -> QuantbenchModel:
    """The model of a folder, on the CPU and in eval mode.

    ValueError, in one line, where the files are not those that were saved or this version does not know what they name.
    """
    try:
        for name, most in ((ABOUT, TEXT), (TENSORS, memory())):
            if (size := (folder / name).stat().st_size) > most:
                raise ValueError(f"{folder}: {name} has {size:,} bytes, and at most {most:,} can be read")
        text, packed = read_regular(folder / ABOUT), read_regular(folder / TENSORS)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{folder}: no quantized model: {error}") from None
    try:
        about = json.loads(text)
        signed = {key: value for key, value in about.items() if key != "digest"}
        fine = about["digest"] == digest(signed) and about["sha256"] == sha256(packed).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise ValueError(f"{folder}: {ABOUT} or {TENSORS} is not as it was saved; export the model again")
    if about.get("schema") != SCHEMA:
        raise ValueError(f"{folder}: schema {about.get('schema')!r} is not this version's, {SCHEMA}")
    try:
        given = json.dumps({"quantizer": about["quantizer"]}, sort_keys=True)
        (quantizer,) = loads(given, ABOUT, _Named).quantizer.values()
        _check_size(about["config"], len(packed))
        model = _build(about, quantizer)
        _fill(model, tensors_of(packed))
    except Exception as error:  # whatever the parts raise over a description that somebody made
        reason = " ".join(str(error).split()) or "an assertion"
        raise ValueError(f"{folder}: describes no model of this version ({type(error).__name__}: {reason})") from error
    return model.requires_grad_(False).eval()


def _plan(name: str, module: nn.Module) -> Plan | None:
    """What rebuilds a module, or the roundings of what it puts out; None for one that is as it was."""
    found: Plan = {}
    if isinstance(module, LowBitLinear):
        plan = module.plan()
        if plan is None:
            raise ValueError(f"{name}: a {type(module).__name__} saves itself by its own means")
        found["linear"] = {"kind": type(module).__name__, "plan": plan}
    if isinstance(module, IntegerEmbedding):
        found["embedding"] = {"bits": module.bits}
    sites = {
        child.removeprefix(ROUNDING_OF): rounding.plan()
        for child, rounding in module.named_children()
        if isinstance(rounding, Rounding) and child.startswith(ROUNDING_OF)
    }
    return found | ({"sites": sites} if sites else {}) or None


def _modules(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """The plans of all modules, those of one plan together: most are alike."""
    low = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    parts = {part for module in low for part in module.children()}  # low-bit ones among them are made with their parent
    groups: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if module not in parts and (plan := _plan(name, module)):
            groups.setdefault(json.dumps(plan, sort_keys=True), {**plan, "at": []})["at"].append(path)
    return list(groups.values())


def _check_size(config: Mapping[str, Any], size: int) -> None:
    """ValueError where so many bytes cannot be the model's tensors; it is built without memory for them."""
    for name, most in {"layers": LAYERS, "heads": SIZE, "width": SIZE, "mlp_width": SIZE, "vocab_size": SIZE}.items():
        if type(config[name]) is not int or not 1 <= config[name] <= most:
            raise ValueError(f"{name} is {quote(config[name])}: a number from 1 to {most:,} is needed")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in QuantbenchModel(QuantbenchConfig(**config)).parameters())
    if wanted > 8 * size:  # a bit each
        raise ValueError(f"{wanted:,} parameters in {size:,} bytes")


def _build(about: Mapping[str, Any], quantizer: Any) -> QuantbenchModel:
    """The model that was described; its tensors' values mean nothing yet."""
    with torch.random.fork_rng(devices=[]):
        model, exemption = QuantbenchModel(QuantbenchConfig(**about["config"])).eval(), Exemption()
        for group in about["modules"]:
            for path in group["at"]:
                old = model.get_submodule(path)
                if "linear" in group:
                    new = _kind(group["linear"]["kind"], quantizer).blank(old, exemption, group["linear"]["plan"])
                    model.set_submodule(path, new, strict=True)
                if "embedding" in group:
                    model.set_submodule(path, IntegerEmbedding(old, group["embedding"]["bits"]), strict=True)
                for site, plan in group.get("sites", {}).items():
                    assert site in SITES, site
                    round_site(model.get_submodule(path), site, Rounding.blank(plan), exemption)
    return model


def _kind(name: str, quantizer: Any) -> type[LowBitLinear]:
    """A kind of low-bit Linear: of every quantizer, or of this one's file."""
    for home in (quantizers, import_module(type(quantizer).__module__)):
        kind = vars(home).get(name)
        if isinstance(kind, type) and issubclass(kind, LowBitLinear):
            return kind
    raise ValueError(f"no low-bit Linear is called {name!r}")


def _structure(model: nn.Module) -> tuple[dict[str, type], dict[str, tuple[torch.Size, torch.dtype]]]:
    """What two models share that compute the same from the same tensors."""
    modules = {path: type(module) for path, module in model.named_modules()}
    return modules, {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    due = _structure(model)[1]
    for key in sorted(due.keys() | tensors.keys()):
        got = tensors.get(key)
        if key not in due or got is None or (got.shape, got.dtype) != due[key]:
            raise ValueError(f"tensor {key} is {'missing' if got is None else 'another one'}")
    model.load_state_dict(tensors)
