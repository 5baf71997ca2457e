"""ReLU attention and softmax with a sink against SDPA's causal attention, forward and with the backward pass."""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quantbench.mitigations.relu_attention import Relu
from quantbench.ops.relu import relu_attention
from quantbench.ops.sink import sink_attention
from tests.perf.contest import Goal, Row, contest, threads

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(device: str) -> list[Row]:
    if device == "cuda":
        cases = [((4, 16, 4096, E), torch.bfloat16) for E in (64, 128)]
    else:
        cases = [((1, 4, T, 64), torch.float32) for T in (256, 512, 1024, 2048)]
    found = []
    for count in [1] if device == "cuda" else sorted({1, len(os.sched_getaffinity(0))}):
        with threads(count):
            for shape, dtype in cases:
                found += passes(device, shape, dtype, count)
    return found


def passes(device: str, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Row]:
    B, H, T, E = shape
    q, k, v, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    explicit, sink_H = Relu(1.0), torch.zeros(H, device=device)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super(Relu, explicit).attend(q, k, v, None)

    forms: dict[str, Attend] = {
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "relu_attention": lambda q, k, v: relu_attention(q, k, v, 1.0),
        "ReLU, explicit": formula,
        "sink_attention": lambda q, k, v: sink_attention(q, k, v, sink_H),
    }

    def forward(attend: Attend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return attend(q, k, v)

        return run

    def both(attend: Attend) -> Callable[[], None]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]

        def run() -> None:
            for x in inputs:
                x.grad = None
            attend(*inputs).backward(dy)

        return run

    def backward(attend: Attend) -> Callable[[], object]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    case = f"B{B} H{H} T{T} E{E} {str(dtype).removeprefix('torch.')}"
    if device == "cuda":
        settings = {"forward": (forward, 1 / 1.2), "backward": (backward, 1 / 1.05)}
    else:
        settings = {"forward": (forward, 1.35), "forward + backward": (both, 1.1 if T <= 1024 else None)}
        case += f", {count} threads"
    found = []
    for title, (wrap, goal) in settings.items():
        contestants = {name: wrap(attend) for name, attend in forms.items()}
        goals = {"relu_attention": [Goal("SDPA", goal)]} if goal else {}
        found += contest(f"Attention, {title}", case, contestants, "SDPA", device=device, goals=goals)
    return found
