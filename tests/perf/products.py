"""The exact product of INT8 integers against float32's product of as many numbers, and against its own float32 way."""

from unittest.mock import patch

import torch
import torch.nn.functional as F

from quantbench.ops import integers
from tests.perf.contest import Goal, Row, contest

SHAPES = [(2048, 64, 192), (512, 576, 1536), (512, 1536, 576)]  # rows, features in and out: of `text`, of SmolLM2


def rows(device: str) -> list[Row]:
    found = []
    for M, K, N in SHAPES:
        x_MK, w_NK = (torch.randint(-127, 128, shape, device=device).float() for shape in ((M, K), (N, K)))

        def in_float32(x_MK: torch.Tensor = x_MK, w_NK: torch.Tensor = w_NK) -> torch.Tensor:
            with patch.object(integers, "_multiplies_int8", lambda: False):
                return integers.product(x_MK, w_NK)

        contestants = {
            "F.linear, float32": lambda x_MK=x_MK, w_NK=w_NK: F.linear(x_MK, w_NK),
            "product": lambda x_MK=x_MK, w_NK=w_NK: integers.product(x_MK, w_NK),
            "product, in float32": in_float32,
        }
        goals = {"product": [Goal("F.linear, float32", 1.0)]} if device == "cpu" else {}
        found += contest("Exact product of INT8 integers", f"{M} x {K} x {N}", contestants, "F.linear, float32",
                         device=device, goals=goals)  # fmt: skip
    return found
