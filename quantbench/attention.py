"""How the scores of a head become the weights of its values: the form of attention, and the baseline's softmax.

A form is written twice only where that pays: `forward` is the formula, on explicit scores, and is what tracing
and score quantization see; `attend` goes from queries to outputs by the fastest way that computes the same.

Shapes: B sequences, H heads, T queries, S keys, E features of a head.
Visibility is a bool tensor that broadcasts to [B, H, T, S]; every query sees at least itself.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.ops.sink import causal_bias


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is first asked for under inference mode must serve training, too
def causal(length: int, device: torch.device) -> Tensor:
    """Plainly causal visibility, [T, T], True where the query may look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def scores(q_BHTE: Tensor, k_BHSE: Tensor) -> Tensor:
    """Logits before masking, q.k / sqrt(E), [B, H, T, S]."""
    return q_BHTE @ k_BHSE.transpose(-1, -2) / q_BHTE.shape[-1] ** 0.5


class Form(nn.Module):
    """The contract of an attention form."""

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        """Weights of the values, 0 where not visible, [B, H, T, S]."""
        raise NotImplementedError

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        """The heads' outputs, [B, H, T, E]; visible None means plainly causal, S = T."""
        if visible is None:
            visible = causal(q_BHTE.shape[2], q_BHTE.device)
        return self(scores(q_BHTE, k_BHSE), visible).to(v_BHSE.dtype) @ v_BHSE


class Softmax(Form):
    """The baseline: softmax over the visible keys."""

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        return scores_BHTS.masked_fill(~visible, -torch.inf).softmax(-1)

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None or not (q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16):
            return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, visible, is_causal=visible is None)
        B, H, T, E = q_BHTE.shape
        q, k, v = (x.reshape(B * H, T, E) for x in (q_BHTE, k_BHSE, v_BHSE))
        with torch.autocast("cpu", enabled=False):  # else the softmax would be copied to fp32 and back
            bias_TT = causal_bias(T, q.dtype, q.device)
            weights = torch.baddbmm(bias_TT, q, k.transpose(1, 2), alpha=E**-0.5).softmax(-1)
            return torch.bmm(weights, v).view(B, H, T, E)
