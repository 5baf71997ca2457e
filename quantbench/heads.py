"""The attention of transformers' own models, shown at sites inside it, as our own model shows its.

transformers' AttentionInterface lets a model's attention be replaced by name. `show` names one that calls the model's
former attention as it is while nobody watches; else it computes softmax attention step by step, through `Sites`:

    scores = q.k scaling (soft-capped where the model does it),  probabilities = softmax over what the mask leaves,
    products = probabilities values

Keys are those after positions turned them; keys and values pass their sites on the way to the cache, as in our model,
and so in the heads that queries share. Learned sinks are a last column of scores and probabilities, which meets no
value. The mask alone says who sees whom (padding, windows): scores are those before it, so that a static range of them
counts earlier keys that a window hides.

Shapes: B sequences, H heads, G heads of keys and values (H or, where queries share them, fewer), T queries, S keys
(cached ones first), E features of a head.
"""

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Site(nn.Module):
    """A named place where a tensor passes and can be read or replaced by a forward hook; else the identity."""

    def __init__(self, appended: int = 0) -> None:
        super().__init__()
        self.appended = appended  # of scores and probabilities: the last columns, whose keys are learned ones

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def watched(self) -> bool:
        """Whether anybody listens: what is dear to compute explicitly is computed only then."""
        return bool(self._forward_hooks)


class Sites(nn.Module):
    """The sites of one attention module."""

    def __init__(self, appended: int = 0) -> None:
        super().__init__()
        self.keys, self.values = Site(), Site()  # of the tokens that are read, [B, G, T, E]
        self.spread = Site()  # the same values, as each query head has them, [B, H, T, E]
        self.scores, self.probabilities = Site(appended), Site(appended)  # [B, H, T, S or more]
        self.products = Site()  # [B, H, T, E]

    @property
    def explicit(self) -> bool:
        """Whether somebody watches what only explicit attention has."""
        return self.scores.watched or self.probabilities.watched or self.spread.watched

    def spread_own(self, value_BHSE: Tensor, queries: int) -> Tensor:
        """The values, of which those that are not cached have passed `spread`."""
        if not self.spread.watched:
            return value_BHSE
        past = value_BHSE.shape[2] - queries
        own_BHTE = self.spread(value_BHSE[:, :, past:])
        return torch.cat((value_BHSE[:, :, :past], own_BHTE), 2) if past else own_BHTE


# What models hand on and the result does not depend on, given the mask. All else may change it, so it is refused.
NEUTRAL = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "sliding_window",
    "use_cache",
}

OVER = {"sdpa": "quantbench", "eager": "quantbench-explicit"}  # a model's own attention -> the name of what shows it
SHOWING: set[str] = set()  # other names of attention that goes through `Sites`: interface.py's


def show(model: Any, attentions: list[Any]) -> bool:
    """Puts `Sites` into the attention modules of a model, and names an attention that goes through them; idempotent.

    False, and nothing is changed, where its attention is none of transformers' `sdpa` and `eager` or of the forms of
    interface.py. Who names another attention afterwards takes the anatomy anew, or the sites see nothing.
    """
    former = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not attentions or None in attentions or former not in {*OVER, *OVER.values(), *SHOWING}:
        return False
    if former in OVER:
        _register()
        model.set_attn_implementation(OVER[former])
    for attention in attentions:
        if not hasattr(attention, "sites"):
            attention.sites = Sites(appended=int(hasattr(attention, "sinks")))
            attention.register_forward_pre_hook(_into_the_cache, with_kwargs=True)
    return True


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for former, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(OVER[former], partial(attention, former))
        AttentionMaskInterface.register(OVER[former], mask)


class _Cache:
    """Stands for a model's cache, or for none: what enters it passes the sites first."""

    def __init__(self, sites: Sites, cache: Any) -> None:
        self.sites, self.cache = sites, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.sites.keys(keys), self.sites.values(values)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)


def _into_the_cache(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if attention.sites.keys.watched or attention.sites.values.watched:
        name = "layer_past" if "layer_past" in kwargs else "past_key_values"
        kwargs = kwargs | {name: _Cache(attention.sites, kwargs.get(name))}
    return args, kwargs


def attention(
    former: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: outputs [B, T, H, E], and weights [B, H, T, S] where there are some.

    query: [B, H, T, E]; key, value: [B, G, S, E]; mask: as `former` gets it.
    """
    sites = getattr(module, "sites", None)
    if sites is not None and sites.explicit:
        return _explicit(sites, module, query, key, value, mask, **kwargs)
    y_BTHE, weights = _plain(former, module)(module, query, key, value, mask, **kwargs)
    if sites is not None and sites.products.watched:
        y_BTHE = sites.products(y_BTHE.transpose(1, 2)).transpose(1, 2).contiguous()
    return y_BTHE, weights


def _plain(former: str, module: Any) -> Any:
    """What the model calls when this is not there."""
    if former == "eager":
        if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2 has two
            return lambda module, *heads, **kwargs: module._upcast_and_reordered_attn(*heads)
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    from transformers import AttentionInterface

    return AttentionInterface()[former]


def _explicit(
    sites: Sites,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention through the sites. mask: bool, True where the query may look, floats to add, or None."""
    unknown = [k for k, x in kwargs.items() if k not in NEUTRAL and x is not None and x is not False]
    if unknown:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(unknown)}, which quantbench cannot watch")
    H, T, E = query.shape[1:]
    key, value = per_query_head(key, H), per_query_head(value, H)
    if mask is None and T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        key, value = key[:, :, :T], value[:, :, :T]  # what follows are empty places of a static cache
        mask = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
    value = sites.spread_own(value, T)

    scores_BHTS = query @ key.transpose(2, 3) * (E**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BHTS = (scores_BHTS / softcap).tanh() * softcap
    if s_aux is not None:
        scores_BHTS = torch.cat((scores_BHTS, s_aux.view(1, -1, 1, 1).expand(*scores_BHTS.shape[:3], 1)), -1)
    scores_BHTS = sites.scores(scores_BHTS)
    learned = scores_BHTS.shape[-1] - key.shape[2]
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        visible = F.pad(mask, (0, learned), value=True)
        blind = ~visible.any(-1, keepdim=True)  # queries that see nobody, which padding is
        scores_BHTS = scores_BHTS.masked_fill(~visible, -torch.inf)
    elif mask is not None:
        scores_BHTS = scores_BHTS + F.pad(mask, (0, learned))
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
    if blind is not None:
        weights_BHTS = weights_BHTS.masked_fill(blind, 0.0)
    weights_BHTS = sites.probabilities(weights_BHTS)[..., : key.shape[2]]
    weights_BHTS = F.dropout(weights_BHTS, dropout, module.training)
    return sites.products(weights_BHTS @ value).transpose(1, 2).contiguous(), weights_BHTS


def per_query_head(x_BGSE: Tensor, heads: int) -> Tensor:
    """Keys or values, repeated so that every query head has its own, [B, H, S, E]."""
    shared = heads // x_BGSE.shape[1]
    return x_BGSE if shared == 1 else x_BGSE.repeat_interleave(shared, 1)
