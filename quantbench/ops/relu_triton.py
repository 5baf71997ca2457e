"""ReLU attention on CUDA, in Triton: three kernels, no atomics, no matrix stored (the formulas: `relu`).

    attend            a program owns rows of Y:        Y = (R V) n^-power / sqrt(E)
    differentiate_q   a program owns rows of dQ:       dQ = (dS K) n^-power / sqrt(E), dS of dY;   G = dY n^-power
    differentiate_kv  a program owns rows of dK, dV:   dV = (R^T G) / sqrt(E),   dK = (dS^T Q) / sqrt(E)

Unlike softmax nothing is carried from one block of keys to the next but the sum itself: no maximum, no exponential,
no rescaling, and the backward needs no row sums first. What lies above the diagonal is skipped, only the blocks on it
are masked. sqrt(E) leaves G alone, so that gradients of float16 vanish no sooner than the formula's.

Sums are float32; scores and their gradients are rounded to the inputs' dtype between two products. Every sum has its
order from the block sizes alone: results are bit-equal when computed again, on the same kind of device.

Shapes: B sequences, H heads, T tokens, E features of a head (a power of two from 16). Any strides, features adjacent.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How one kernel cuts its work. `own` is a multiple of `other`."""

    own: int  # rows a program owns
    other: int  # rows that it reads at a time
    warps: int
    stages: int


# By compute capability: 9 (sm_90), and 8, which every other device gets. Chosen by what compiles without spills and by
# what FlexAttention's tuned kernels of the same shape use; timed on no device yet.
TILES = {
    9: {
        "attend": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 3)},
        "differentiate_q": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3)},
        "differentiate_kv": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3)},
    },
    8: {
        "attend": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3)},
        "differentiate_q": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3)},
        "differentiate_kv": {64: Tiles(128, 64, 8, 3), 128: Tiles(64, 64, 8, 2)},
    },
}


def forward(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, power: float, y_BHTE: Tensor) -> None:
    """Writes Y."""
    tensors = *(adjacent(x) for x in (q_BHTE, k_BHTE, v_BHTE)), y_BHTE
    launch(attend, tensors, tensors, power)


def backward(
    dy_BHTE: Tensor, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, power: float, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Writes dQ, dK and dV, which have the same strides."""
    dy, q, k, v = (adjacent(x) for x in (dy_BHTE, q_BHTE, k_BHTE, v_BHTE))
    g = torch.empty_like(dq)
    launch(differentiate_q, (dy, q, k, v, dq, g), (dy, q, k, v, g), power)
    launch(differentiate_kv, (g, q, k, v, dk, dv), (q, k, v, g))


def adjacent(x_BHTE: Tensor) -> Tensor:
    """The same with the features of a row side by side."""
    return x_BHTE if x_BHTE.stride(-1) == 1 else x_BHTE.contiguous()


def launch(kernel: Any, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], *numbers: float) -> None:
    """Runs a kernel, one program a block of rows of a head."""
    B, H, T, E = tensors[0].shape
    device = tensors[0].device
    cut = TILES[generation(device)][kernel.__name__][max(E, 64)]
    strides = [stride for x in strided for stride in x.stride()[:3]]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(B * H * triton.cdiv(T, cut.own),)](
            *tensors, *strides, H, T, E**-0.5, *numbers,
            E=E, OWN=cut.own, OTHER=cut.other, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip


@lru_cache
def generation(device: torch.device) -> int:
    """Whose tiles a device gets; without one, in Triton's interpreter, any will do."""
    return 9 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else 8


@triton.jit
def normaliser(rows, power):
    """n^-power of rows."""
    return tl.exp2(-power * tl.log2(rows + 1.0))


@triton.jit
def relu(x):
    """NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def address(pointer, stride_b, stride_h, stride_t, n, H, row):
    """Of a row of the n-th head of all sequences."""
    b, h = tl.cast(n // H, tl.int64), tl.cast(n % H, tl.int64)
    return pointer + b * stride_b + h * stride_h + tl.cast(row, tl.int64) * stride_t


@triton.jit
def tile(pointer, stride_t, ROWS: tl.constexpr, E: tl.constexpr):
    """The addresses of whole rows from one on, [ROWS, E]; 32 bits suffice inside of a tile."""
    return pointer + (tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, E)[None, :])


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, y_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
    H, T, scale, power,
    E: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    n = tl.program_id(0) // blocks
    start = (blocks - 1 - tl.program_id(0) % blocks) * OWN  # the rows with the most keys come first
    rows = start + tl.arange(0, OWN)
    keys = tl.arange(0, OTHER)
    inside = (rows < T)[:, None]
    k_ptr, v_ptr = address(k_ptr, k_b, k_h, k_t, n, H, 0), address(v_ptr, v_b, v_h, v_t, n, H, 0)
    q = tl.load(tile(address(q_ptr, q_b, q_h, q_t, n, H, start), q_t, OWN, E), mask=inside, other=0.0)
    y = tl.zeros((OWN, E), tl.float32)
    for _ in range(0, start, OTHER):
        r = relu(tl.dot(q, tl.trans(tl.load(tile(k_ptr, k_t, OTHER, E)))))
        y = tl.dot(r.to(q.dtype), tl.load(tile(v_ptr, v_t, OTHER, E)), y)
        k_ptr += OTHER * k_t
        v_ptr += OTHER * v_t
    for block in range(start, tl.minimum(start + OWN, T), OTHER):
        there = (block + keys < T)[:, None]
        r = relu(tl.dot(q, tl.trans(tl.load(tile(k_ptr, k_t, OTHER, E), mask=there, other=0.0))))
        r = tl.where(rows[:, None] >= block + keys[None, :], r, 0.0)
        y = tl.dot(r.to(q.dtype), tl.load(tile(v_ptr, v_t, OTHER, E), mask=there, other=0.0), y)
        k_ptr += OTHER * k_t
        v_ptr += OTHER * v_t
    y *= (scale * normaliser(rows, power))[:, None]
    tl.store(tile(address(y_ptr, y_b, y_h, y_t, n, H, start), y_t, OWN, E), y.to(q.dtype), mask=inside)


@triton.jit
def differentiate_q(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, g_ptr,
    dy_b, dy_h, dy_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    H, T, scale, power,
    E: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    n = tl.program_id(0) // blocks
    start = (blocks - 1 - tl.program_id(0) % blocks) * OWN
    rows = start + tl.arange(0, OWN)
    keys = tl.arange(0, OTHER)
    inside = (rows < T)[:, None]
    k_ptr, v_ptr = address(k_ptr, k_b, k_h, k_t, n, H, 0), address(v_ptr, v_b, v_h, v_t, n, H, 0)
    q = tl.load(tile(address(q_ptr, q_b, q_h, q_t, n, H, start), q_t, OWN, E), mask=inside, other=0.0)
    dy = tl.load(tile(address(dy_ptr, dy_b, dy_h, dy_t, n, H, start), dy_t, OWN, E), mask=inside, other=0.0)
    g = (dy * normaliser(rows, power)[:, None]).to(q.dtype)
    tl.store(tile(address(g_ptr, out_b, out_h, out_t, n, H, start), out_t, OWN, E), g, mask=inside)
    dq = tl.zeros((OWN, E), tl.float32)
    for _ in range(0, start, OTHER):
        k = tl.load(tile(k_ptr, k_t, OTHER, E))
        s = tl.dot(q, tl.trans(k))
        ds = tl.dot(dy, tl.trans(tl.load(tile(v_ptr, v_t, OTHER, E))))
        dq = tl.dot(tl.where(s <= 0.0, 0.0, ds).to(q.dtype), k, dq)
        k_ptr += OTHER * k_t
        v_ptr += OTHER * v_t
    for block in range(start, tl.minimum(start + OWN, T), OTHER):
        there = (block + keys < T)[:, None]
        k = tl.load(tile(k_ptr, k_t, OTHER, E), mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k))
        ds = tl.dot(dy, tl.trans(tl.load(tile(v_ptr, v_t, OTHER, E), mask=there, other=0.0)))
        ds = tl.where((s <= 0.0) | (rows[:, None] < block + keys[None, :]), 0.0, ds)
        dq = tl.dot(ds.to(q.dtype), k, dq)
        k_ptr += OTHER * k_t
        v_ptr += OTHER * v_t
    dq *= (scale * normaliser(rows, power))[:, None]
    tl.store(tile(address(dq_ptr, out_b, out_h, out_t, n, H, start), out_t, OWN, E), dq.to(q.dtype), mask=inside)


@triton.jit
def differentiate_kv(
    g_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    H, T, scale,
    E: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, OWN)
    n = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * OWN  # the keys that most rows see come first
    keys = start + tl.arange(0, OWN)
    queries = tl.arange(0, OTHER)
    inside = (keys < T)[:, None]
    q_ptr, g_ptr = address(q_ptr, q_b, q_h, q_t, n, H, start), address(g_ptr, out_b, out_h, out_t, n, H, start)
    k = tl.load(tile(address(k_ptr, k_b, k_h, k_t, n, H, start), k_t, OWN, E), mask=inside, other=0.0)
    v = tl.load(tile(address(v_ptr, v_b, v_h, v_t, n, H, start), v_t, OWN, E), mask=inside, other=0.0)
    dk = tl.zeros((OWN, E), tl.float32)
    dv = tl.zeros((OWN, E), tl.float32)
    for block in range(start, tl.minimum(start + OWN, T), OTHER):
        there = (block + queries < T)[:, None]
        seen = block + queries[None, :] >= keys[:, None]
        q = tl.load(tile(q_ptr, q_t, OTHER, E), mask=there, other=0.0)
        g = tl.load(tile(g_ptr, out_t, OTHER, E), mask=there, other=0.0)
        s = tl.where(seen, tl.dot(k, tl.trans(q)), 0.0)
        dv = tl.dot(relu(s).to(k.dtype), g, dv)
        ds = tl.where(s <= 0.0, 0.0, tl.dot(v, tl.trans(g)))
        dk = tl.dot(ds.to(k.dtype), q, dk)
        q_ptr += OTHER * q_t
        g_ptr += OTHER * out_t
    for block in range(start + OWN, T, OTHER):
        there = (block + queries < T)[:, None]
        q = tl.load(tile(q_ptr, q_t, OTHER, E), mask=there, other=0.0)
        g = tl.load(tile(g_ptr, out_t, OTHER, E), mask=there, other=0.0)
        s = tl.dot(k, tl.trans(q))
        dv = tl.dot(relu(s).to(k.dtype), g, dv)
        ds = tl.where(s <= 0.0, 0.0, tl.dot(v, tl.trans(g)))
        dk = tl.dot(ds.to(k.dtype), q, dk)
        q_ptr += OTHER * q_t
        g_ptr += OTHER * out_t
    tl.store(
        tile(address(dk_ptr, out_b, out_h, out_t, n, H, start), out_t, OWN, E), (dk * scale).to(k.dtype), mask=inside
    )
    tl.store(
        tile(address(dv_ptr, out_b, out_h, out_t, n, H, start), out_t, OWN, E), (dv * scale).to(k.dtype), mask=inside
    )
