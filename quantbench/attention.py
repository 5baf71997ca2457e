"""How the scores of a head become the weights of its values: the form of attention, and the baseline's softmax.

A form is written twice only where that pays: `forward` is the formula, on explicit scores, and is what tracing
and score quantization see; `attend` goes from queries to outputs by the fastest way that computes the same.

Shapes: B sequences, H heads, T queries, S keys, E features of a head.
Visibility is a bool tensor that broadcasts to [B, H, T, S]; every query sees at least itself.
"""

from collections.abc import Callable
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

    appended: int = 0  # keys that `extend` appends

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        """Weights of the values, 0 where not visible, [B, H, T, S]."""
        raise NotImplementedError

    def extend(self, k_BHSE: Tensor, v_BHSE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with what the form appends to them: everybody sees that, no cache holds it."""
        return k_BHSE, v_BHSE

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        """The heads' outputs, [B, H, T, E]; visible None means plainly causal, S = T."""
        return attend(self, q_BHTE, k_BHSE, v_BHSE, visible)


def attend(
    form: Form,
    q_BHTE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    visible: Tensor | None,
    see_scores: Callable[[Tensor], Tensor] = lambda x: x,
    see_weights: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """A form by its formula, with what its scores and its weights pass through; as `Form.attend`."""
    if visible is None:
        visible = causal(q_BHTE.shape[2], q_BHTE.device)
    k_BHSE, v_BHSE = form.extend(k_BHSE, v_BHSE)
    weights_BHTS = form(see_scores(scores(q_BHTE, k_BHSE)), with_appended(visible, k_BHSE.shape[2]))
    return see_weights(weights_BHTS).to(v_BHSE.dtype) @ v_BHSE


def with_appended(visible: Tensor, keys: int) -> Tensor:
    """Visibility [..., S] of as many keys as there are with the appended ones, which everybody sees."""
    return F.pad(visible, (0, keys - visible.shape[-1]), value=True)


class Softmax(Form):
    """The baseline: softmax over the visible keys."""

    def forward(self, scores_BHTS: Tensor, visible: Tensor) -> Tensor:
        return scores_BHTS.masked_fill(~visible, -torch.inf).softmax(-1)

    def attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, visible: Tensor | None) -> Tensor:
        k_BHSE, v_BHSE = self.extend(k_BHSE, v_BHSE)
        B, H, T, E = q_BHTE.shape
        S = k_BHSE.shape[2]
        if visible is not None or not (q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16):
            if visible is not None or S > T:
                visible = with_appended(causal(T, q_BHTE.device) if visible is None else visible, S)
            return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, visible, is_causal=visible is None)
        q, k, v = (x.reshape(B * H, -1, E) for x in (q_BHTE, k_BHSE, v_BHSE))
        with torch.autocast("cpu", enabled=False):  # else the softmax would be copied to fp32 and back
            bias_TS = F.pad(causal_bias(T, q.dtype, q.device), (0, S - T))
            weights = torch.baddbmm(bias_TS, q, k.transpose(1, 2), alpha=E**-0.5).softmax(-1)
            return torch.bmm(weights, v).view(B, H, T, E)
