"""`make perf`: how fast a training step of the track `text` is, as a ratio to a peer in the same run.

The peer is a plain loop in the manner of nanoGPT (its README's recipe, written anew): the same decoder from torch's
own parts, SDPA, fused AdamW, bf16 autocast, batches sliced out of a memory map. Both take turns in short chunks on
one thread; CPU time a step, median over the chunks. Writes results/perf/<machine>.json and a table beside it.
"""

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.bench import environment, source
from quantbench.cli import root
from quantbench.mitigations import Settings
from quantbench.model import initialise
from quantbench.pretrain import _step, build, steady_memory
from quantbench.recipe import Track, load_recipe, load_track
from quantbench.store import atomic_write
from quantbench.strict import dump

CHUNKS, STEPS = 5, 30  # chunks of each contestant, steps a chunk


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
        self.cos, self.sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def plain_loop(track: Track, vocab: int, folder: Path) -> Callable[[], None]:
    """A step of the peer."""
    torch.manual_seed(0)
    model = Plain(track, vocab)
    optimizer = torch.optim.AdamW(
        model.parameters(), track.lr, track.betas, weight_decay=track.weight_decay, fused=True
    )
    np.random.default_rng(0).integers(0, vocab, 1_000_000).astype(np.uint16).tofile(folder / "ids.bin")

    def step() -> None:
        ids = np.memmap(folder / "ids.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(ids) - track.length - 1, (track.batch,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(ids[i + s : i + s + track.length].astype(np.int64)) for i in starts])
            for s in (0, 1)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=track.precision == "bf16"):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), track.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def our_loop(recipe: str, track: Track, data: object) -> Callable[[], None]:
    """A step of `pretrain` under a recipe."""
    mitigations = {
        name: {key.replace("-", "_"): value for key, value in parameters.items()}
        for name, parameters in dump(load_recipe(recipe, root())[1])["mitigations"].items()
    }
    model = build(mitigations, track, data)  # type: ignore[arg-type]
    initialise(model, 0)
    mitigation = model.train().config.mitigation()
    optimizer = mitigation.optimizer(model, Settings(track.lr, track.betas, track.lr * track.weight_decay))
    count = iter(range(1 << 30))

    def step() -> None:
        ids = data.training(0, next(count) * track.batch, track.batch, track.length)  # type: ignore[attr-defined]
        _step(model, mitigation, optimizer, torch.from_numpy(ids), track)

    return step


def cpu_ms(step: Callable[[], None], steps: int) -> float:
    began = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - began) / steps * 1e3


def main() -> None:
    torch.set_num_threads(1)
    steady_memory()  # for both: the ratio should not owe anything to it
    _, track = load_track("text", root())
    # The shape in which the half-a-prototype figure was asked, and the track's own.
    shapes = {"text": track, "text at length 128": replace(track, length=128)}
    data = track.task.open(root() / ".quantbench")  # type: ignore[attr-defined]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, shape in shapes.items():
            contestants = {"plain loop": plain_loop(shape, data.vocab, Path(folder))}
            contestants |= {name: our_loop(name, shape, data) for name in ("baseline", "relu-attn", "sgd")}
            for step in contestants.values():
                cpu_ms(step, 5)
            times: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(CHUNKS):
                for name, step in contestants.items():
                    times[name].append(cpu_ms(step, STEPS))
            for name, measured in times.items():
                ratios = [mine / peer for mine, peer in zip(measured, times["plain loop"])]
                rows.append({
                    "setting": title, "loop": name, "tokens-a-step": shape.batch * shape.length,
                    "cpu-ms-a-step": round(statistics.median(measured), 2),
                    "ratio-to-plain-loop": round(statistics.median(ratios), 3),
                })  # fmt: skip
                print(rows[-1], flush=True)
    here = environment()
    folder_out = root() / "results" / "perf"
    name = re.sub("[^a-z0-9]+", "-", here["cpu"].lower()).strip("-")
    record = {"training-step": rows, "environment": here, "source": source()}
    atomic_write(folder_out / f"{name}.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    atomic_write(folder_out / "README.md", render(folder_out).encode())


def render(folder: Path) -> str:
    """The table of every machine's file."""
    lines = [
        "# Speed",
        "",
        "Rendered by `make perf`; CPU time of a training step on one thread, median over chunks that take turns with a",
        "plain loop of the same decoder. Below 1 is faster than the plain loop.",
        "",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        lines += [f"## {record['environment']['cpu']}, torch {record['environment']['torch']}", ""]
        lines += ["| setting | loop | tokens a step | CPU ms a step | ratio |", "| --- | --- | --: | --: | --: |"]
        for row in record["training-step"]:
            cells = (
                row["setting"],
                row["loop"],
                row["tokens-a-step"],
                row["cpu-ms-a-step"],
                row["ratio-to-plain-loop"],
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
