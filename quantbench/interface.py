"""Forms without parameters on transformers' own models: continue the pretraining of a checkpoint with one.

    from quantbench import interface

    interface.register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="relu-attn")
    model.set_attn_implementation("softpick")  # or later, at any time

A saved config.json does not hold the name: register and name it at every from_pretrained, or the model comes back with
softmax.

A model whose `anatomy` is taken shows the form's scores and weights as our own model does.

The names are those of the recipes. The model's mask says who sees whom (padding, sliding windows, packed sequences),
n_i of ReLU and sigmoid attention is the number of keys that it leaves to query i, and a query that sees nobody gets 0.
The model's scale and dropout are kept. T of clipped softmax is config.max_position_embeddings: set it to the length
that is trained at, where the model could take more, or gamma is next to 0.

Refused, with a ValueError, is whatever would change the result and is no part of a form: softcap, learned sinks,
biases of positions, masks of floats; and models that do not take their attention from transformers' AttentionInterface
(BLOOM, MPT, XGLM, ...).

Shapes: B sequences, H heads, G heads of keys and values (H or, where queries share them, fewer), T queries, S keys, E
features of a head.
"""

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from quantbench.attention import attend, causal
from quantbench.heads import NEUTRAL, SHOWING, Sites, per_query_head
from quantbench.mitigations import Mitigation
from quantbench.mitigations.clipped_softmax import ClippedSoftmax
from quantbench.mitigations.relu_attention import ReluAttention
from quantbench.mitigations.sigmoid_attention import SigmoidAttention
from quantbench.mitigations.sink_logit import Softmax1
from quantbench.mitigations.softpick import Softpick

# As in recipes/, which a user of the package need not have.
FORMS: dict[str, Mitigation] = {
    "relu-attn": ReluAttention(),
    "relu-attn-sqrt": ReluAttention(normaliser="sqrt-keys"),
    "softmax1": Softmax1(),
    "clipped-softmax": ClippedSoftmax(),
    "sigmoid-attn": SigmoidAttention(),
    "sigmoid-attn-log": SigmoidAttention(bias="log"),
    "softpick": Softpick(),
}
UNWATCHED = Sites()  # of a model whose anatomy nobody has taken


def register() -> list[str]:
    """Makes the forms known to transformers, in this process, and returns their names. Twice is as once."""
    for name in FORMS:
        AttentionInterface.register(name, partial(attention, name))
        AttentionMaskInterface.register(name, mask)  # without one, a model drops its padding and windows
    SHOWING.update(FORMS)
    return list(FORMS)


def mask(*args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> Tensor | None:
    """Who sees whom, bool [B, 1, T, S], or None as `attention` has it; by transformers' own `sdpa_mask`.

    ValueError for a model that takes the mask from its interface, but not the attention: it would add the booleans
    to its scores, and see its future.
    """
    package, _, module = type(config).__module__.rpartition(".")
    if package.startswith("transformers.models."):
        model = sys.modules.get(f"{package}.{module.replace('configuration', 'modeling')}")
        if model is not None and not hasattr(model, "ALL_ATTENTION_FUNCTIONS"):
            name = type(config).__name__.removesuffix("Config")
            raise ValueError(f"{name} models do not take their attention from transformers' AttentionInterface")
    return sdpa_mask(*args, config=config, **kwargs)


def attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A form, as transformers calls it: outputs [B, T, H, E], and weights [B, H, T, S] where somebody asks for them.

    query: [B, H, T, E]; key, value: [B, G, S, E], the values' E may be another. scaling: of q.k, None for 1/sqrt(E).
    attention_mask: bool [B, 1 or H, T, S], True where the query may look. None means what it means to `sdpa`: a single
    query sees every key; several see causally, keys after the last of them being empty places of a static cache.
    """
    unknown = [k for k, x in kwargs.items() if k not in NEUTRAL and x is not None and x is not False]
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}, which {type(module).__name__} asks for")
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.ndim != 4):
        got = f"{attention_mask.dtype} {list(attention_mask.shape)}"
        raise ValueError(f"{name} takes an attention mask of torch.bool [B, 1 or H, T, S], not {got}")
    H, T, E = query.shape[1:]
    q_BHTE = query if scaling in (None, E**-0.5) else query * (scaling * E**0.5)  # a form divides by sqrt(E)
    k_BHSE, v_BHSE = per_query_head(key, H), per_query_head(value, H)
    form = FORMS[name].weights(module.config)  # type: ignore[arg-type]  # all that is read is its length
    dropout = dropout if module.training else 0.0
    # Not every model hands on that its weights are asked for; transformers then watches what the module returns.
    watched = bool(kwargs.get("output_attentions")) or len(module._forward_hooks) > 0
    sites = getattr(module, "sites", UNWATCHED)

    visible = attention_mask
    if visible is None and T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        k_BHSE, v_BHSE = k_BHSE[:, :, :T], v_BHSE[:, :, :T]
        plain = not (watched or dropout or sites.explicit)
        if plain and q_BHTE.shape == k_BHSE.shape == v_BHSE.shape:
            y_BHTE = form.attend(q_BHTE, k_BHSE, v_BHSE, None)
            return sites.products(y_BHTE).transpose(1, 2).contiguous(), None
        visible = causal(T, query.device)
    elif visible is None:
        visible = query.new_ones(T, k_BHSE.shape[2], dtype=torch.bool)
    blind = ~visible.any(-1, keepdim=True)  # queries that see nobody, which padding is: no form knows such
    seen: list[Tensor] = []

    def see_weights(weights_BHTS: Tensor) -> Tensor:
        weights_BHTS = sites.probabilities(weights_BHTS)
        if dropout:
            weights_BHTS = F.dropout(weights_BHTS, dropout)
        if watched:
            seen.append(weights_BHTS.masked_fill(blind, 0.0).to(value.dtype))
        return weights_BHTS

    v_BHSE = sites.spread_own(v_BHSE, T)
    y_BHTE = attend(form, q_BHTE, k_BHSE, v_BHSE, visible | blind, sites.scores, see_weights)
    y_BHTE = sites.products(y_BHTE.masked_fill(blind, 0.0))
    return y_BHTE.transpose(1, 2).contiguous(), seen[0] if watched else None
