"""Where a causal language model keeps its layers, heads, values and residual stream.

Everything after pretraining (trace, quantizers, evaluation) sees a model through this file alone, so that a
downloaded Llama runs through the same code as what we pretrain. A new architecture is a few lines here.

Shapes: B sequences, T tokens, D residual features, H query heads, E features of a head.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Site(nn.Module):
    """A named place where a tensor passes and can be read or replaced by a forward hook; else the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def watched(self) -> bool:
        """Whether anybody listens: what is dear to compute explicitly is computed only then."""
        return bool(self._forward_hooks)


@dataclass(frozen=True)
class Heads:
    """The attention of one layer."""

    scores: nn.Module  # its output: logits before masking, [B, H, T, T]
    weights: nn.Module  # its output, after scores': what multiplies the values, [B, H, T, T or more]
    values: nn.Module  # its output: value states, [B, H, T, E]
    output: nn.Linear  # W_O: its columns h*E..(h+1)*E are those of head h


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model: its own modules, not copies."""

    embedding: nn.Module  # its output is the residual stream before the first block
    blocks: list[nn.Module]  # a block's output (or the first of a tuple) is the residual stream after it
    head: nn.Linear
    heads: list[Heads]  # one a block; empty where the model has no sites inside its attention

    def linears(self) -> dict[str, tuple[int, nn.Linear]]:
        """Every Linear inside a block, as `block.name` -> (layer, module), in the order of the model."""
        return {
            f"{layer}.{name}": (layer, module)
            for layer, block in enumerate(self.blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }


def anatomy(model: Any) -> Anatomy:
    """The anatomy of a causal LM. ValueError for an architecture that this file does not know."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind == "quantbench":
        blocks = list(model.blocks)
        heads = [
            Heads(b.attention.scores, b.attention.probabilities, b.attention.values, b.attention.out) for b in blocks
        ]
        return Anatomy(model.embedded, blocks, model.head, heads)
    if kind in ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2"):
        return Anatomy(model.model.embed_tokens, list(model.model.layers), model.lm_head, [])
    raise ValueError(f"quantbench does not know where a {kind!r} model keeps its layers: add it to anatomy.py")
