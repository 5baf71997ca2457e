"""The outlier statistics against the time it takes to read their input, and against what people use today."""

import logging
import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from quantbench.calibration import Calibration, survey
from quantbench.ops import outlier_stats
from quantbench.ops.outliers import blocked
from tests.perf.contest import Goal, Row, contest, threads

SHAPE = (8192, 4096)  # 134 MB in fp32, 67 MB in bf16: more than any cache
THRESHOLD = 6.0


def rows(device: str) -> list[Row]:
    found = []
    for count in [1] if device == "cuda" else sorted({1, len(os.sched_getaffinity(0))}):
        with threads(count):
            for dtype in (torch.float32, torch.bfloat16):
                found += statistics(device, dtype, count)
            found += integers(device, count)
    return found + tracing(device)


def statistics(device: str, dtype: torch.dtype, count: int) -> list[Row]:
    x_MN = torch.randn(SHAPE, device=device).to(dtype)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    limit = "copy" if device == "cuda" else "read limit"
    contestants = {
        limit: _copy(x_MN) if device == "cuda" else (lambda: x_MN.view(torch.int64).sum()),
        "outlier_stats": lambda: outlier_stats(x_MN, THRESHOLD),
        "outlier_stats + int8": lambda: outlier_stats(x_MN, THRESHOLD, quantize=True),
        "torch.compile": compiled(x_MN),
        "chunked eager": lambda: blocked(x_MN, THRESHOLD, None, False),
    }
    # A copy moves every byte twice: three quarters of its bandwidth is 2/3 of its time. Threads share one memory.
    one = {"fp32": 1.3, "bf16": 1.8}[short]
    at_most = {"read limit": one if count == 1 else {"fp32": 3.0, "bf16": 4.0}[short], "copy": 2 / 3}[limit]
    goals = {"outlier_stats": [Goal(limit, at_most), Goal("torch.compile", 0.5)]}
    case = f"{list(SHAPE)} {short}" + ("" if device == "cuda" else f", {count} threads")
    return contest("Outlier statistics", case, contestants, limit, device=device, rounds=5, goals=goals)


def integers(device: str, count: int) -> list[Row]:
    """Beside bitsandbytes' int8 rows with outlier detection, which takes fp16."""
    if find_spec("bitsandbytes") is None:
        print("Statistics and int8 rows: left out, bitsandbytes is not installed", flush=True)
        return []
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.functional import int8_vectorwise_quant

    x_MN = torch.randn(SHAPE, device=device).half()
    contestants = {
        "bitsandbytes, threshold 6": lambda: int8_vectorwise_quant(x_MN, threshold=THRESHOLD),
        "bitsandbytes, threshold 0": lambda: int8_vectorwise_quant(x_MN, threshold=0.0),
        "outlier_stats + int8": lambda: outlier_stats(x_MN, THRESHOLD, quantize=True),
    }
    anchor = "bitsandbytes, threshold 6"
    at_most = 1 / 4 if device == "cuda" else 1 / 50 if count == 1 else 1 / 15
    goals = {"outlier_stats + int8": [Goal(anchor, at_most)]}
    case = f"{list(SHAPE)} fp16" + ("" if device == "cuda" else f", {count} threads")
    return contest("Statistics and int8 rows", case, contestants, anchor, device=device, rounds=3, goals=goals)


def tracing(device: str) -> list[Row]:
    """A forward pass of a Llama-shaped model with statistics of every Linear's input and every block's output."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=10,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(device)
    ids_BT = torch.randint(8192, (4, 256), device=device)
    calibration = Calibration([(ids_BT, None)])

    @torch.no_grad()
    def forward() -> Tensor:
        return model(ids_BT).logits

    def eager() -> None:
        handles = [m.register_forward_pre_hook(_eager_hook) for m in model.modules() if isinstance(m, nn.Linear)]
        handles += [block.register_forward_pre_hook(_eager_hook) for block in model.model.layers]
        forward()
        for handle in handles:
            handle.remove()

    def surveyed() -> object:
        return survey(model, calibration, THRESHOLD, ("inputs", "residual"))

    goals = {"forward, outlier_stats": [Goal("forward", 1.07)]}
    case, rounds = "Llama of 10 layers, width 576, 4 x 256 tokens, fp32", 15
    table = "Tracing a whole model"
    ours = {"forward": forward, "forward, outlier_stats": surveyed}
    found = contest(table, case, ours, "forward", device=device, rounds=rounds, goals=goals)
    # By itself: the pages that it takes and gives back would slow or quicken whoever comes next.
    theirs = {"forward": forward, "forward, eager statistics": eager}
    return found + contest(table, f"{case}, again", theirs, "forward", device=device, rounds=rounds)


def _eager_hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    eager_statistics(args[0].detach().flatten(0, -2))


def eager_statistics(x_MN: Tensor) -> tuple[Tensor, ...]:
    """The same figures as torch users write them (without care for offsets), all in fp32."""
    x_MN = x_MN.float()
    size_MN = x_MN.abs()
    outlier_MN = size_MN >= THRESHOLD
    d_MN = x_MN - x_MN.mean()
    square_MN = d_MN * d_MN
    return (
        size_MN.amax(1), x_MN.norm(dim=1), outlier_MN.sum(1), size_MN.amax(0), outlier_MN.sum(0),
        square_MN.sum(), (square_MN * d_MN).sum(), (square_MN * square_MN).sum(),
    )  # fmt: skip


def compiled(x_MN: Tensor) -> object:
    torch._dynamo.reset()
    run = torch.compile(eager_statistics, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(x_MN)
    return lambda: run(x_MN)


def _copy(x_MN: Tensor) -> object:
    y_MN = torch.empty_like(x_MN)
    return lambda: y_MN.copy_(x_MN)
