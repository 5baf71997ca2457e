"""Models and tracks small enough for tests, and every mitigation there is."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantbench import catalog
from quantbench.mitigations import SEAMS, seams
from quantbench.model import QuantbenchConfig, QuantbenchModel, initialise
from quantbench.recipe import Shape, Track, available, load_recipe
from quantbench.tasks.bigram_backcopy import BigramBackcopy

Mitigations = dict[str, dict[str, Any]]

ROOT = Path(__file__).parents[1]
VOCAB = 67  # Bigram-Backcopy's

PEERS = ROOT / ".venv" / "peers"  # hqq and torchao

torch.set_num_threads(1)
sys.path.append(str(PEERS))  # transformers, which would import them into every process, has looked by now


def _resolved(mitigations: Mapping[str, object]) -> Mitigations:
    return {name: asdict(mitigation) for name, mitigation in mitigations.items()}  # type: ignore[call-overload]


def _distinct(named: dict[str, Mitigations]) -> dict[str, Mitigations]:
    return {name: m for i, (name, m) in enumerate(named.items()) if m not in list(named.values())[:i]}


# What every committed recipe changes; that, and every entry of the catalog with its own defaults; what of it is
# a change of the model's parts.
RECIPES = {name: _resolved(load_recipe(name, ROOT)[1].mitigations) for name in available(ROOT / "recipes")}
ENTRIES = {name: catalog.load("mitigations", name) for name in catalog.names("mitigations")}
EVERY = _distinct(RECIPES | {f"{name}, defaults": _resolved({name: entry()}) for name, entry in ENTRIES.items()})
MODELS = _distinct(
    {
        name: {entry: kw for entry, kw in mitigations.items() if set(seams(ENTRIES[entry]())) & set(SEAMS[:7])}
        for name, mitigations in EVERY.items()
    }
)


def model(mitigations: Mitigations | None = None, seed: int = 0, **changes: Any) -> QuantbenchModel:
    shape = {"vocab_size": VOCAB, "layers": 2, "heads": 4, "width": 64, "mlp_width": 64, "max_position_embeddings": 32}
    built = QuantbenchModel(QuantbenchConfig(**shape | changes, mitigations=mitigations)).eval()
    initialise(built, seed)
    return built


def quantizer(name: str, **changes: Any) -> Any:
    """An entry under its name in the catalog; the test is skipped where its package is missing."""
    package = {"w4a16-hqq": "hqq", "torchao-int8dyn": "torchao"}.get(name)
    if package and not find_spec(package):
        pytest.skip(f"{package} is not installed: `make test` puts it into .venv/peers")
    return catalog.load("quantizers", name)(**catalog.preset("quantizers", name) | changes)


def ids(sequences: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def track(**changes: Any) -> Track:
    plain: dict[str, Any] = {
        "title": "tiny",
        "task": BigramBackcopy(),
        "quantizers": {"w8a8-token": quantizer("w8a8-token")},
        "metrics": (),
        "rank_by": {"damage": "w8a8-token"},
        "steps": 10,
        "lr": 4e-3,
        "model": Shape(layers=2, heads=4, width=64, mlp_width=64),
        "length": 16,
        "batch": 4,
        "warmup": 3,
        "timeline": 3,
        "checkpoint": 5,
    }
    return Track(**plain | changes)
