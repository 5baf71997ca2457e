"""The exact product of INT8 integers against float32's product of as many numbers, on one thread.

And against the two ways between which it chooses.
"""

import torch
import torch.nn.functional as F

from quantbench.ops import integers
from tests.perf.contest import Goal, Row, contest, threads

SHAPES = [(2048, 64, 192), (512, 576, 1536), (512, 1536, 576)]  # rows, features in and out: of `text`, of SmolLM2


def rows(device: str) -> list[Row]:
    found = []
    with threads(1):
        for shape in SHAPES:
            found += product(device, *shape)
    return found


def product(device: str, M: int, K: int, N: int) -> list[Row]:
    x_MK, w_NK = (torch.randint(-127, 128, shape, device=device).float() for shape in ((M, K), (N, K)))
    anchor = "F.linear, float32"
    contestants = {anchor: lambda: F.linear(x_MK, w_NK), "product": lambda: integers.product(x_MK, w_NK)}
    if device == "cpu":  # int8 is not exact on every one of them
        contestants["product, in float32"] = lambda: integers.in_float32(x_MK, w_NK, 128 * 128)
        contestants["product, in int8"] = lambda: integers.in_int8(x_MK, w_NK)
    # Where float32 is the fastest exact way, what chooses and what cuts K may cost a tenth.
    at_most = 1.0 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 1.1
    goals = {"product": [Goal(anchor, at_most)]} if device == "cpu" else {}
    case = f"{M} x {K} x {N}" + (", one thread" if device == "cpu" else "")
    return contest("Exact product of INT8 integers", case, contestants, anchor, device=device, goals=goals)
