"""Where a causal language model keeps its layers, heads, values and residual stream.

Everything after pretraining (trace, quantizers, evaluation) sees a model through this file alone, so that a
downloaded Llama runs through the same code as what we pretrain. A new architecture is a few lines here.

Shapes: B sequences, T tokens, D residual features, H query heads, E features of a head.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Where a tensor passes that can be quantized, kind by kind. A place of a kind is called `layer.name`.
HEADS = ("keys", "values", "scores", "probabilities", "products")  # [B, H, T, ...], where the model shows its heads
SITES = ("inputs", "residual", "norms", *HEADS)  # inputs: of the Linears inside the blocks, which are swapped


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

    table: nn.Embedding  # of the tokens
    embedding: nn.Module  # its output is the residual stream before the first block
    blocks: list[nn.Module]  # a block's output (or the first of a tuple) is the residual stream after it
    head: nn.Linear
    heads: list[Heads]  # one a block; empty where the model has no sites inside its attention
    places: dict[str, dict[str, nn.Module]]  # kind of site -> place -> the module whose output passes there

    def sites(self, kind: str) -> dict[str, nn.Module]:
        """The places of one kind of SITES but `inputs`; ValueError where the model does not show it."""
        if kind not in self.places:
            raise ValueError(
                f"this model does not show its {kind}: leave the site out (it shows {', '.join(self.places)})"
            )
        return self.places[kind]

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
        places = {
            "residual": {"attention.residual": "attention_join", "residual": ""},
            "norms": {"attention.norm": "attention_norm", "mlp.norm": "mlp_norm"},
            **{at: {f"attention.{at}": f"attention.{at}"} for at in HEADS},
        }
        return Anatomy(model.embed, model.embedded, blocks, model.head, heads, _places(blocks, places))
    if kind in ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2"):
        blocks = list(model.model.layers)
        places = {
            "residual": {"residual": ""},
            "norms": {"attention.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"},
            "keys": {"self_attn.keys": "self_attn.k_proj"},  # before the positions turn them
            "values": {"self_attn.values": "self_attn.v_proj"},
        }
        if kind == "olmo2":  # its norms follow the sublayers
            del places["norms"]
        table = model.model.embed_tokens
        return Anatomy(table, table, blocks, model.lm_head, [], _places(blocks, places))
    raise ValueError(f"quantbench does not know where a {kind!r} model keeps its layers: add it to anatomy.py")


def _places(blocks: list[nn.Module], kinds: dict[str, dict[str, str]]) -> dict[str, dict[str, nn.Module]]:
    """kind -> place -> module of every block, from kind -> name -> path inside the block; a place is `layer.name`.

    A kind of which a block lacks a module is not shown.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for kind, paths in kinds.items():
        modules = [dict(block.named_modules()) for block in blocks]
        if all(path in inside for path in paths.values() for inside in modules):
            found[kind] = {
                f"{layer}.{name}": inside[path] for layer, inside in enumerate(modules) for name, path in paths.items()
            }
    return found
