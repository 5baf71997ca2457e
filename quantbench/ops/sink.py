"""Softmax with one more logit in the denominator, through the fused kernels of plain softmax.

    P_ij = exp(s_ij) / (exp(b) + sum over j <= i of exp(s_ij)),    s = q.k / sqrt(E)

Softmax attention returns y and lse = log of that sum without b, row by row. With lse' = log(exp(lse) + exp(b)):

    y' = y exp(lse - lse') = y sigmoid(lse - b)

The extra logit is that of a key whose value is zero, so the gradient dS = P' (dP - rowsum(dY y')) is the one of plain
softmax, which its backward kernel computes from whatever y and lse it is given: from y' and lse' it gives the dq, dk
and dv of this. db is minus the sum over rows of exp(b - lse') rowsum(dY y'). Nothing T x T is stored, and a training
step costs a few passes over y more than plain softmax.

Where no fused kernel gives its lse (float32 on CUDA, narrow or odd heads there), or where plain products are faster
(bf16 on a CPU), the extra key is really appended, with a value of zero.

Shapes: B sequences, H heads, T tokens, E features of a head.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantbench.ops.relu import autocast

aten = torch.ops.aten


def sink_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, sink_H: Tensor) -> Tensor:
    """Causal attention with the logit sink_H of each head in the denominator, [B, H, T, E].

    Any strides, floating dtypes; under autocast in its dtype. Differentiable once. ValueError where the shapes do not
    fit.
    """
    if q_BHTE.ndim != 4 or not q_BHTE.shape == k_BHTE.shape == v_BHTE.shape or sink_H.shape != q_BHTE.shape[1:2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q_BHTE, k_BHTE, v_BHTE, sink_H))
        raise ValueError(f"sink_attention takes q, k and v of one shape [B, H, T, E] and a sink [H], not {shapes}")
    q, k, v = autocast(q_BHTE, k_BHTE, v_BHTE)
    with torch.autocast(q.device.type, enabled=False):
        return _Fused.apply(q, k, v, sink_H.float()) if fused(q) else appended(q, k, v, sink_H)


def fused(q_BHTE: Tensor) -> bool:
    """Whether a kernel that returns its lse takes it, and is worth it."""
    half = q_BHTE.dtype in (torch.bfloat16, torch.float16)
    if q_BHTE.device.type == "cuda":
        return half and q_BHTE.shape[-1] % 8 == 0 and q_BHTE.shape[-1] <= 256
    return q_BHTE.device.type == "cpu" and not half


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor) -> Tensor:
        kernel = aten._scaled_dot_product_flash_attention
        y, lse_BHT, *ctx.rest = (kernel if q.is_cuda else kernel_for_cpu)(q, k, v, 0.0, True)
        total_BHT = torch.logaddexp(lse_BHT, sink_H.to(lse_BHT.dtype)[:, None])
        y = y * (lse_BHT - total_BHT).exp_()[..., None].to(y.dtype)
        ctx.save_for_backward(q, k, v, y, total_BHT, sink_H)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, y, total_BHT, sink_H = ctx.saved_tensors
        if q.is_cuda:
            cum_q, cum_k, max_q, max_k, seed, offset, _ = ctx.rest
            kernel = aten._scaled_dot_product_flash_attention_backward
            dq, dk, dv = kernel(
                dy, q, k, v, y, total_BHT, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
            )  # fmt: skip
        else:
            kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
            dq, dk, dv = kernel(dy, q, k, v, y, total_BHT, 0.0, True)
        if not ctx.needs_input_grad[3]:
            return dq, dk, dv, None
        share_BHT = (sink_H[:, None] - total_BHT).exp_()  # of the sink
        return dq, dk, dv, -(share_BHT * (dy * y).sum(-1, dtype=share_BHT.dtype)).sum((0, 2)).to(sink_H.dtype)


kernel_for_cpu = aten._scaled_dot_product_flash_attention_for_cpu


def appended(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, sink_H: Tensor) -> Tensor:
    """The same with a last key of its own for the sink: its score is all bias, its value zero."""
    B, H, T, E = q_BHTE.shape
    q_NTE = q_BHTE.reshape(B * H, T, E)
    k_NSE, v_NSE = (F.pad(x, (0, 0, 0, 1)).view(B * H, T + 1, E) for x in (k_BHTE, v_BHTE))
    bias_TT = causal_bias(T, q_BHTE.dtype, q_BHTE.device).expand(H, T, T)
    bias_HTS = torch.cat([bias_TT, sink_H.to(q_BHTE.dtype)[:, None, None].expand(H, T, 1)], -1)
    scores_NTS = torch.baddbmm(bias_HTS.repeat(B, 1, 1), q_NTE, k_NSE.mT, alpha=E**-0.5)
    return torch.bmm(scores_NTS.softmax(-1), v_NSE).view(B, H, T, E)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where visible, -inf where not, [T, T]."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)
