"""Where a causal language model keeps its layers, heads, values and residual stream.

Everything after pretraining (trace, quantizers, evaluation) sees a model through this file alone, so that a
downloaded Llama runs through the same code as what we pretrain. A new architecture is a few lines here.

Shapes: B sequences, T tokens, D residual features, H query heads, E features of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where a tensor passes that can be quantized, kind by kind. A place of a kind is called `layer.name`.
HEADS = ("keys", "values", "scores", "probabilities", "products")  # [B, H, T, ...], where the model shows its heads
SITES = ("inputs", "residual", "norms", *HEADS)  # inputs: of the Linears inside the blocks, which are swapped


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


class Prefixed(nn.Module):
    """A model behind tokens whose keys and values stand in its cache, in the place of the sequences' own BOS.

    It is given sequences of T tokens as any model is, and has logits for all T; its parts see the T - 1 behind BOS.
    """

    inner: nn.Module
    prefix_R: Tensor  # ids, BOS first

    def whole(self, ids_BT: Tensor) -> Tensor:
        """The sequences as `inner` reads them when nothing is cached, [B, R + T - 1]."""
        return torch.cat((self.prefix_R.expand(len(ids_BT), -1), ids_BT[:, 1:]), 1)


@dataclass(frozen=True)
class Heads:
    """The attention of one layer."""

    scores: nn.Module  # its output: logits before masking, [B, H, T, T]
    weights: nn.Module  # its output, after scores': what multiplies the values, [B, H, T, T or more]
    values: nn.Module  # its output: value states, [B, H, T, E]
    output: nn.Linear  # W_O: its columns h*E..(h+1)*E are those of head h


@dataclass(frozen=True)
class Stream:
    """Who writes the residual stream and who reads it, where every reader has a norm in front."""

    tables: list[nn.Embedding]  # whose rows enter it: tokens, learned positions
    norms: list[
        tuple[nn.Module, list[nn.Linear]]
    ]  # of the blocks, in order, each with the Linears that read its output
    last: nn.Module  # the norm that the head reads
    writers: list[nn.Linear]  # whose outputs join it
    downs: list[nn.Linear]  # of these, the last of each MLP


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model: its own modules, not copies."""

    table: nn.Embedding  # of the tokens
    embedding: nn.Module  # its output is the residual stream before the first block
    blocks: list[nn.Module]  # a block's output (or the first of a tuple) is the residual stream after it
    head: nn.Linear
    heads: list[Heads]  # one a block; empty where the model has no sites inside its attention
    places: dict[str, dict[str, nn.Module]]  # kind of site -> place -> the module whose output passes there
    stream: Stream | None = None  # None where norms do not stand in front of the sublayers
    front: int = 0  # learned tokens before every sequence: positions of the stream, the last of them before BOS

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
    if isinstance(model, Prefixed):
        return anatomy(model.inner)
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
        tables = [model.embed] if model.places is None else [model.embed, model.places]
        width = model.config.width
        gates = [
            name for name, m in blocks[0].attention.output.named_modules() if getattr(m, "in_features", 0) == width
        ]
        reads = {"attention_norm": ["attention.qkv", *(f"attention.output.{name}" for name in gates)],
                 "mlp_norm": ["mlp.up"]}  # fmt: skip
        stream = _stream(blocks, tables, reads, model.norm, ["attention.out"], "mlp.down")
        found = _places(blocks, places)
        return Anatomy(model.embed, model.embedded, blocks, model.head, heads, found, stream, model.registers)
    if kind in ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2"):
        blocks = list(model.model.layers)
        places = {
            "residual": {"residual": ""},
            "norms": {"attention.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"},
            "keys": {"self_attn.keys": "self_attn.k_proj"},  # before the positions turn them
            "values": {"self_attn.values": "self_attn.v_proj"},
        }
        if kind == "olmo2":  # its norms follow the sublayers; it has no input_layernorm
            del places["norms"]
        table, last = model.model.embed_tokens, getattr(model.model, "norm", None)
        reads = {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }
        stream = _stream(blocks, [table], reads, last, ["self_attn.o_proj"], "mlp.down_proj")
        return Anatomy(table, table, blocks, model.lm_head, [], _places(blocks, places), stream)
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


def _stream(
    blocks: list[nn.Module],
    tables: list[nn.Embedding],
    reads: dict[str, list[str]],
    last: Any,
    writers: list[str],
    down: str,
) -> Stream | None:
    """From paths inside a block: its norms, each with its readers, and its writers. None where a block lacks one."""
    inside: list[dict[str, Any]] = [dict(block.named_modules()) for block in blocks]
    wanted = [*reads, *(path for readers in reads.values() for path in readers), *writers, down]
    if not all(path in modules for path in wanted for modules in inside):
        return None
    return Stream(
        tables,
        [(modules[norm], [modules[path] for path in paths]) for modules in inside for norm, paths in reads.items()],
        last,
        [modules[path] for modules in inside for path in (*writers, down)],
        [modules[down] for modules in inside],
    )
