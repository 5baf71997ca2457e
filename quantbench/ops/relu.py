"""ReLU attention without a stored T x T matrix, forward and backward (arXiv:2309.08586, arXiv:2410.13835).

    y_i = sum over j <= i of relu(q_i . k_j / sqrt(E)) / n_i^power v_j,    n_i = i + 1

relu(s x) = s relu(x) for s > 0, so scale and normaliser leave the scores: they are one factor of a row, f_i =
1 / (sqrt(E) n_i^power), applied once. With R = relu(Q K^T) and G = f dY, the gradients need neither the logsumexp
nor the sum over a row that softmax's need:

    Y = f (R V)        dV = R^T G        dS = (G V^T) where R > 0        dQ = dS K        dK = dS^T Q

The CPU's way is here: products of blocks of rows (backward: of columns) that leave out what lies above the diagonal;
the backward computes the scores again. `relu_triton` has the same in three kernels, for half precision on CUDA.

Shapes: B sequences, H heads, T tokens, E features of a head; N = B H.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # rows at a time; 64 and 256 are slower at nearly every T from 256 to 2048 (measured, 1 and 2 threads)
SCRATCH = 2**20  # scores at a time where a batch has many heads: 4 MiB of float32, so that a cache holds them


def relu_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, power: float) -> Tensor:
    """Causal ReLU attention, [B, H, T, E]; a row is divided by `power` of the number of keys it sees.

    Any strides, any floating dtype; under autocast in its dtype. Differentiable once; bit-equal when run again.
    ValueError where the three differ in shape.
    """
    if q_BHTE.ndim != 4 or not q_BHTE.shape == k_BHTE.shape == v_BHTE.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (q_BHTE, k_BHTE, v_BHTE))
        raise ValueError(f"relu_attention takes q, k and v of one shape [B, H, T, E], not {shapes}")
    q, k, v = autocast(q_BHTE, k_BHTE, v_BHTE)
    return _forward(q, k, v, power)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of the tensors, in one dtype: it does not reach into an op."""
    kind, dtype = tensors[0].device.type, tensors[-1].dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) for x in tensors)


@torch.library.custom_op("quantbench::relu_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, power: float) -> Tensor:
    y = empty(q)
    if fused(q):
        from quantbench.ops import relu_triton

        relu_triton.forward(q, k, v, power, y)
        return y
    f_T1 = row_factor(*q.shape[2:], power, wide(q.dtype), q.device)
    tensors_NTE = [x.flatten(0, 1) for x in (q, k, v, y)]
    for heads in groups(*tensors_NTE[0].shape[:2]):
        q_part, k_part, v_part, y_part = (x_NTE[heads] for x_NTE in tensors_NTE)
        forward(q_part, k_part, v_part, y_part, f_T1)
    return y


@torch.library.custom_op("quantbench::relu_attention_backward", mutates_args=())
def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty(q), empty(q), empty(q)
    if fused(q):
        from quantbench.ops import relu_triton

        relu_triton.backward(dy, q, k, v, power, *gradients)
        return gradients
    g = (dy * row_factor(*q.shape[2:], power, wide(q.dtype), q.device)).to(q.dtype)
    tensors_NTE = [x.flatten(0, 1) for x in (g, q, k, v, *gradients)]
    for heads in groups(*tensors_NTE[0].shape[:2]):
        backward(*(x_NTE[heads] for x_NTE in tensors_NTE))
    return gradients


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, power: float) -> Tensor:
    return empty(q)


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    return empty(q), empty(q), empty(q)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *qkv, ctx.power = inputs
    ctx.save_for_backward(*qkv)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward(dy, *ctx.saved_tensors, ctx.power), None


_forward.register_autograd(_differentiate, setup_context=_save)


def fused(q_BHTE: Tensor) -> bool:
    """Whether the Triton kernels take it."""
    half = q_BHTE.dtype in (torch.bfloat16, torch.float16)
    return q_BHTE.device.type == "cuda" and half and q_BHTE.shape[-1] in (16, 32, 64, 128)


def empty(q_BHTE: Tensor) -> Tensor:
    """Memory for an output; from the Triton kernels heads lie inside tokens, as the model reads them next."""
    B, H, T, E = q_BHTE.shape
    return q_BHTE.new_empty(B, T, H, E).transpose(1, 2) if fused(q_BHTE) else q_BHTE.new_empty(B, H, T, E)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is first asked for under inference mode must serve training, too
def row_factor(length: int, features: int, power: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 / (sqrt(E) n^power) of every row, [T, 1]."""
    return features**-0.5 / torch.arange(1, length + 1, dtype=dtype, device=device)[:, None] ** power


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def groups(heads: int, length: int) -> Iterator[slice]:
    """Heads that take their turn together."""
    size = max(4, SCRATCH // (BLOCK * length))  # fewer would leave threads without work
    return (slice(start, start + size) for start in range(0, heads, size))


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows that take their turn together."""
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def products(a_NIE: Tensor, b_NJE: Tensor, scratch: Tensor) -> Tensor:
    """a.b of all pairs, [N, I, J], in reused memory: fresh pages cost more than the product."""
    N, I, J = *a_NIE.shape[:2], b_NJE.shape[1]  # noqa: E741
    return torch.bmm(a_NIE, b_NJE.mT, out=scratch[: N * I * J].view(N, I, J))


def forward(q_NTE: Tensor, k_NTE: Tensor, v_NTE: Tensor, y_NTE: Tensor, f_T1: Tensor) -> None:
    """Writes y, one block of queries after the other, each with the keys up to its end."""
    N, T, _ = q_NTE.shape
    scratch = q_NTE.new_empty(N * min(BLOCK, T) * T)
    for start, end in blocks(T):
        r = products(q_NTE[:, start:end], k_NTE[:, :end], scratch).relu_()
        r[:, :, start:].tril_()
        torch.mul(torch.bmm(r, v_NTE[:, :end]), f_T1[start:end], out=y_NTE[:, start:end])


def backward(
    g_NTE: Tensor, q_NTE: Tensor, k_NTE: Tensor, v_NTE: Tensor, dq_NTE: Tensor, dk_NTE: Tensor, dv_NTE: Tensor
) -> None:
    """Writes dq, dk and dv, one block of keys after the other, each with the queries from its start on.

    So that only dq is a sum over blocks.
    """
    N, T, _ = q_NTE.shape
    scratch, other = q_NTE.new_empty(2, N * min(BLOCK, T) * T)
    exact = dq_NTE.dtype == wide(dq_NTE.dtype)
    sum_NTE = dq_NTE if exact else torch.zeros_like(dq_NTE, dtype=wide(dq_NTE.dtype))
    for start, end in blocks(T):
        r = products(k_NTE[:, start:end], q_NTE[:, start:], scratch).relu_()
        r[:, :, : end - start].triu_()
        dv_NTE[:, start:end] = torch.bmm(r, g_NTE[:, start:])
        ds = products(v_NTE[:, start:end], g_NTE[:, start:], other)
        torch.ops.aten.threshold_backward.grad_input(ds, r, 0, grad_input=ds)
        dk_NTE[:, start:end] = torch.bmm(ds, q_NTE[:, start:])
        if exact:
            sum_NTE[:, start:].baddbmm_(ds.mT, k_NTE[:, start:end], beta=min(start, 1))  # the first block writes all
        else:
            sum_NTE[:, start:] += torch.bmm(ds.mT, k_NTE[:, start:end])
    if not exact:
        dq_NTE.copy_(sum_NTE)
