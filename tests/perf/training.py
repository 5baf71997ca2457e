"""A training step of the track `text` (on CUDA: `text-gpu`) under each attention form, against a plain loop.

The peer is a plain loop in the manner of nanoGPT (its README's recipe, written anew): the same decoder from torch's
own parts, SDPA, fused AdamW, bf16 autocast, batches sliced out of a memory map. All take turns on one thread.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.face import root
from quantbench.mitigations import Settings
from quantbench.model import initialise
from quantbench.pretrain import build, steady_memory, update
from quantbench.recipe import Track, load_recipe, load_track
from quantbench.speed import bf16_is_slow, step_times
from quantbench.strict import dump
from tests.perf.contest import Row, contest, threads

RECIPES = ("baseline", "relu-attn", "softmax1", "sink-logit", "sgd")


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (a * cos_TE + torch.cat((-a.chunk(2, -1)[1], a.chunk(2, -1)[0]), -1) * sin_TE for a in (q, k))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x_BTD = x_BTD + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, h = self.up(self.norm2(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * h)


class Plain(nn.Module):
    def __init__(self, track: Track, vocab: int) -> None:
        super().__init__()
        shape, E = track.model, track.model.width // track.model.heads
        self.embed = nn.Embedding(vocab, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape.width, shape.heads, shape.mlp_width) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width, eps=1e-6), nn.Linear(shape.width, vocab, bias=False)
        angle = torch.outer(torch.arange(track.length), 10_000 ** (-torch.arange(0, E, 2) / E))
        self.register_buffer("cos", torch.cat((angle, angle), -1).cos())
        self.register_buffer("sin", torch.cat((angle, angle), -1).sin())

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def plain_loop(track: Track, vocab: int, folder: Path, device: str) -> Callable[[], None]:
    """A step of the peer."""
    torch.manual_seed(0)
    model = Plain(track, vocab).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), track.lr, track.betas, weight_decay=track.weight_decay, fused=True
    )
    np.random.default_rng(0).integers(0, vocab, 1_000_000).astype(np.uint16).tofile(folder / "ids.bin")

    def step() -> None:
        ids = np.memmap(folder / "ids.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(ids) - track.length - 1, (track.batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(ids[i + s : i + s + track.length].astype(np.int64)) for i in starts]).to(
                device
            )
            for s in (0, 1)
        )
        with torch.autocast(device, torch.bfloat16, enabled=track.precision == "bf16"):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), track.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def our_loop(recipe: str, track: Track, data: object, device: str) -> Callable[[], None]:
    """A step of `pretrain` under a recipe."""
    mitigations = {
        name: {key.replace("-", "_"): value for key, value in parameters.items()}
        for name, parameters in dump(load_recipe(recipe, root())[1])["mitigations"].items()
    }
    model = build(mitigations, track, data)  # type: ignore[arg-type]
    initialise(model, 0)
    nn.Module.to(model, device)
    mitigation = model.train().config.mitigation()
    optimizer = mitigation.optimizer(model, Settings(track.lr, track.betas, track.lr * track.weight_decay))
    count = iter(range(1 << 30))

    def step() -> None:
        ids = data.training(0, next(count) * track.batch, track.batch, track.length)  # type: ignore[attr-defined]
        update(model, mitigation, optimizer, torch.from_numpy(ids).to(device), track)

    return step


def opened(device: str) -> tuple[str, Track, Any]:
    """The track whose step is measured on this device: its name, itself, its data. In fp32 where bf16 is slow."""
    name, track = load_track("text" if device == "cpu" else "text-gpu", root())
    if device == "cpu" and bf16_is_slow(step_times(track)):
        track = replace(track, precision="fp32")
    return name, track, track.task.open(root() / ".quantbench")  # type: ignore[attr-defined]


def rows(device: str) -> list[Row]:
    steady_memory()  # for all: the ratios should not owe anything to it
    _, track, data = opened(device)
    # On a CPU also the prototype's, and one where products are long.
    lengths = dict.fromkeys((track.length, 128, 512) if device == "cpu" else (track.length,))
    found = []
    with tempfile.TemporaryDirectory() as folder, threads(1):
        for length in lengths:
            shape = replace(track, length=length)
            contestants = {"plain loop": plain_loop(shape, data.vocab, Path(folder), device)}
            contestants |= {name: our_loop(name, shape, data, device) for name in RECIPES}
            case = f"{shape.batch} x {length} tokens, {track.precision}"
            found += contest("Training step", case, contestants, "plain loop", device=device)
    return found
