"""Where a causal language model keeps its layers, heads, values and residual stream.

Everything after pretraining (trace, quantizers, evaluation) sees a model through this file alone, so that a
downloaded Llama runs through the same code as what we pretrain. A new architecture is a few lines of ARCHITECTURES.

Taking the anatomy of a model of transformers leaves its function as it is, to the bit, and changes its modules: its
attention gets sites (heads.py), the first block one at its entrance, and GPT-2's Conv1Ds become Linears. The sum after
the attention, before the MLP, passes no module of theirs: `residual` is there the output of each block alone.

What takes a module's place (`replace`) computes what that module's class is known to compute. So whoever replaces one,
or reads its weights as all that it does, first asks `check_plain`: a subclass whose forward does more (LoRA, a scale),
a forward of the instance's own and a hook are refused in one line, since they would be lost without a word.

Shapes: B sequences, T tokens, D residual features, H query heads, E features of a head.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from quantbench.heads import Site as Site
from quantbench.heads import show

# Where a tensor passes that can be quantized, kind by kind. A place of a kind is called `layer.name`.
HEADS = ("keys", "values", "scores", "probabilities", "products")  # [B, H, T, ...], where the model shows its heads
SITES = ("inputs", "residual", "norms", *HEADS)  # inputs: of the Linears inside the blocks, which are swapped
SUBLAYERS = ("attention", "mlp")  # of a block, which the residual stream passes by


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
    values: nn.Module  # its output: value states, repeated to the query heads, [B, H, T, E]
    output: nn.Linear  # W_O: its columns h*E..(h+1)*E are those of head h

    def output_HED(self, heads: int) -> Tensor:
        """W_O as what each head multiplies its values by, where the layer computes.

        ValueError where W_O does more than multiply by its weights.
        """
        if more := _own_forward(self.output, nn.Linear):
            raise ValueError(f"the attention's output projection {more}: its weights alone do not say what it adds")
        with brought(self.output):
            weight_DF = self.output.weight.detach()
        return weight_DF.T.unflatten(0, (heads, -1))


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
    heads: dict[int, Heads]  # layer -> of a block that has attention, in order; empty where the model does not show it
    places: dict[str, dict[str, nn.Module]]  # kind of site -> place -> the module whose output passes there
    stream: Stream | None = None  # None where norms do not stand in front of the sublayers
    front: int = 0  # learned tokens before every sequence: positions of the stream, the last of them before BOS
    room: int | None = None  # how many tokens learned positions are for; None where there are none
    # Of SUBLAYERS: layer -> the module whose output, or the first of a tuple, joins the stream.
    joins: dict[str, dict[int, nn.Module]] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Architecture:
    """Where the models of a kind keep their parts: paths from the model or, of what each block has, from the block."""

    blocks: str = "model.layers"
    table: str = "model.embed_tokens"
    positions: str = ""  # a table of learned ones
    last: str = "model.norm"  # what the head reads
    head: str = "lm_head"
    attention: str = "self_attn"
    output: str = "self_attn.o_proj"  # W_O
    reads: dict[str, list[str]] = field(  # the norms in front of attention and MLP, each with the Linears that read it
        default_factory=lambda: {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }
    )
    down: str = "mlp.down_proj"  # the MLP's last Linear
    joins: tuple[str, str] = ("self_attn", "mlp")  # whose outputs join the stream: of the SUBLAYERS, norms behind them
    behind: bool = False  # whether there are norms behind the sublayers, too
    conv1d: bool = False  # whether its Linears are Conv1Ds


LLAMA = Architecture()
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
GEMMA = changed(
    LLAMA,
    reads={
        "input_layernorm": LLAMA.reads["input_layernorm"],
        "pre_feedforward_layernorm": LLAMA.reads["post_attention_layernorm"],
    },
    behind=True,
    joins=BEHIND,
)
ARCHITECTURES = {  # a config's model_type -> what is known of it
    "llama": LLAMA,  # SmolLM and SmolLM2 are Llamas, too
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "olmo": LLAMA,
    "olmo2": changed(LLAMA, reads={}, behind=True, joins=BEHIND),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_oss": LLAMA,  # its experts are no Linears, so that nobody knows who reads and writes the stream
    "gpt2": Architecture(
        blocks="transformer.h",
        table="transformer.wte",
        positions="transformer.wpe",
        last="transformer.ln_f",
        attention="attn",
        output="attn.c_proj",
        reads={"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]},
        down="mlp.c_proj",
        conv1d=True,
        joins=("attn", "mlp"),
    ),
    "opt": Architecture(
        blocks="model.decoder.layers",
        table="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        last="model.decoder.final_layer_norm",
        output="self_attn.out_proj",
        reads={"self_attn_layer_norm": LLAMA.reads["input_layernorm"], "final_layer_norm": ["fc1"]},
        down="fc2",
        joins=("self_attn", "fc2"),
    ),
    "gpt_neox": Architecture(  # Pythia; both norms may read one stream
        blocks="gpt_neox.layers",
        table="gpt_neox.embed_in",
        last="gpt_neox.final_layer_norm",
        attention="attention",
        output="attention.dense",
        reads={
            "input_layernorm": ["attention.query_key_value"],
            "post_attention_layernorm": ["mlp.dense_h_to_4h"],
        },
        down="mlp.dense_4h_to_h",
        joins=("attention", "mlp"),
    ),
}


def anatomy(model: Any) -> Anatomy:
    """The anatomy of a causal LM; see above for what it changes. ValueError for an architecture that is not known."""
    if isinstance(model, Prefixed):
        return anatomy(model.inner)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind == "quantbench":
        return _ours(model)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: True)():
        raise ValueError(f"{type(model).__name__} is no causal language model of a decoder alone")
    check_known(kind)
    flags = {"add_cross_attention": True, "use_bidirectional_attention": True, "is_causal": False}
    for name, refused in flags.items():
        if getattr(config, name, None) is refused:
            why = f"with {name}: {refused} is no causal language model of a decoder alone"
            raise ValueError(f"{type(model).__name__} {why}")
    return _theirs(model, kind, ARCHITECTURES[kind])


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Within it a module has its weights: accelerate may keep them elsewhere, and bring them for a pass."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where ids go to. Of a model that accelerate spreads over devices, its first part takes them from there."""
    there = (p.device for p in itertools.chain(model.parameters(), model.buffers()) if not p.is_meta)
    return next(there, torch.device("cpu"))


def check_ids(model: Any, ids: Any, whose: str) -> None:
    """ValueError, one line, where one of the ids (a list, array or tensor) has no row in the model's table.

    A table may have more rows than the vocabulary has tokens; ids beyond it, or below 0, are another vocabulary's.
    """
    decoder: Any = model.inner if isinstance(model, Prefixed) else model
    kind = decoder.config.model_type
    check_known(kind)
    table = decoder.embed if kind == "quantbench" else _at(decoder, ARCHITECTURES[kind].table)
    found = torch.as_tensor(ids)
    if not found.numel():
        return
    for number in (int(found.min()), int(found.max())):
        if not 0 <= number < table.num_embeddings:
            raise ValueError(
                f"{whose}: token id {number:,} is none of this model, whose table has {table.num_embeddings:,} rows: "
                "ids of another vocabulary mean nothing to it; give it its own tokenizer"
            )


def check_known(kind: str) -> None:
    """ValueError for a model_type whose anatomy is not known."""
    if kind not in (*ARCHITECTURES, "quantbench"):
        raise ValueError(
            f"quantbench does not know where a {kind!r} model keeps its layers: add the paths of its parts to "
            f"ARCHITECTURES in anatomy.py (known: {', '.join(ARCHITECTURES)})"
        )


def _ours(model: Any) -> Anatomy:
    blocks, attentive = list(model.blocks), list(model.config.attentive)
    attentions = {layer: blocks[layer].attention for layer in attentive}
    heads = {layer: Heads(a.scores, a.probabilities, a.values, a.out) for layer, a in attentions.items()}
    places = {
        "residual": {"attention.residual": "attention_join", "residual": ""},
        "norms": {"attention.norm": "attention_norm", "mlp.norm": "mlp_norm"},
        **{at: {f"attention.{at}": f"attention.{at}"} for at in HEADS},
    }
    tables = [model.embed] if model.places is None else [model.embed, model.places]
    width = model.config.width
    outputs = attentions[attentive[0]].output.named_modules()
    gates = [name for name, module in outputs if getattr(module, "in_features", 0) == width]
    reads = {
        "attention_norm": ["attention.qkv", *(f"attention.output.{name}" for name in gates)],
        "mlp_norm": ["mlp.up"],
    }
    parts = {"attention": attentive, "mlp": [n for n in range(len(blocks)) if model.config.has("mlp", n)]}

    def had(path: str) -> list[int]:
        """The blocks that have what is at a path."""
        return [*parts.get(path.partition(".")[0].partition("_")[0], range(len(blocks)))]

    # What joins after an attention is the block's output, where no MLP follows.
    whole = [layer for layer in attentive if layer in parts["mlp"]]
    found = _places(blocks, places, lambda path: whole if path == "attention_join" else had(path))
    stream = _stream(blocks, tables, reads, model.norm, ["attention.out"], "mlp.down", had)
    room = None if model.places is None else model.config.max_position_embeddings
    front, joins = model.registers, _joins(blocks, SUBLAYERS)
    return Anatomy(model.embed, model.embedded, blocks, model.head, heads, found, stream, front, room, joins)


def _theirs(model: Any, kind: str, known: Architecture) -> Anatomy:
    """The anatomy of a model of transformers."""
    wanted = {path: _at(model, path) for path in (known.blocks, known.table, known.head)}
    if missing := [path for path, part in wanted.items() if part is None]:
        raise ValueError(f"{type(model).__name__} has no {' and no '.join(missing)}, where a {kind!r} model keeps it")
    blocks, table, head = list(wanted[known.blocks]), wanted[known.table], wanted[known.head]
    if getattr(model.config, "do_layer_norm_before", True) is False:  # OPT-350m
        known = changed(known, reads={}, behind=True)
    if known.conv1d:
        _conv1d_to_linear(blocks)
    places = {"residual": {"residual": ""}}
    if known.reads:
        places["norms"] = dict(zip(("attention.norm", "mlp.norm"), known.reads, strict=True))
    heads = {}
    attentions = [_at(block, known.attention) for block in blocks]
    if show(model, attentions):
        outputs = [_at(block, known.output) for block in blocks]
        heads = {
            layer: Heads(a.sites.scores, a.sites.probabilities, a.sites.spread, output)
            for layer, (a, output) in enumerate(zip(attentions, outputs, strict=True))
        }
        places |= {at: {f"{known.attention}.{at}": f"{known.attention}.sites.{at}"} for at in HEADS}
    tables = [table, *([_at(model, known.positions)] if known.positions else [])]
    last, stream = _at(model, known.last), None
    whole = getattr(table, "embedding_dim", 0) == getattr(model.config, "hidden_size", None)  # else a Linear follows it
    if whole and last is not None and not known.behind:
        stream = _stream(blocks, tables, known.reads, last, [known.output], known.down)
    room = model.config.max_position_embeddings if known.positions else None
    found, joins = _places(blocks, places), _joins(blocks, known.joins)
    return Anatomy(table, _entrance(blocks[0]), blocks, head, heads, found, stream, 0, room, joins)


def _at(module: Any, path: str) -> Any:
    """What is at a path; None where there is nothing."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _entrance(block: Any) -> Site:
    """What the first block reads passes there: scaled embeddings, learned positions added."""
    if not hasattr(block, "entrance"):
        block.entrance = Site()
        block.register_forward_pre_hook(_enter)
    return block.entrance


def _enter(block: Any, args: tuple) -> tuple:
    return (block.entrance(args[0]), *args[1:])


class Transposed(nn.Linear):
    """A Conv1D of transformers as a Linear: the same function to the bit, its weight is the other's, seen transposed.

    It is saved and loaded as the Conv1D was, so that a checkpoint stays one of GPT-2.
    """

    def __init__(self, conv: Any) -> None:
        inputs, outputs = conv.weight.shape
        super().__init__(inputs, outputs, device="meta")
        self.weight = nn.Parameter(conv.weight.detach().T, conv.weight.requires_grad)
        self.bias = conv.bias
        self.train(conv.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        turned = {name: state_dict[name].T} if name in state_dict else {}
        super()._load_from_state_dict({**state_dict, **turned}, prefix, *args)


def _conv1d_to_linear(blocks: list[Any]) -> None:
    from transformers.pytorch_utils import Conv1D

    for block in blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, Conv1D):
                if module.weight.is_meta:
                    raise ValueError(
                        "its weights are kept on the CPU or a disk for want of room, which a Conv1D cannot be"
                    )
                check_plain(path, module, Conv1D)
                block.set_submodule(path, Transposed(module))


Having = Callable[[str], Sequence[int]]  # a path inside a block -> the blocks that are to have it


def _places(
    blocks: list[nn.Module], kinds: dict[str, dict[str, str]], having: Having | None = None
) -> dict[str, dict[str, nn.Module]]:
    """kind -> place -> module of every block, from kind -> name -> path inside the block; a place is `layer.name`.

    A kind of which a block lacks a module is not shown.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    modules = [dict(block.named_modules()) for block in blocks]
    for kind, paths in kinds.items():
        due = {path: range(len(blocks)) if having is None else having(path) for path in paths.values()}
        if all(path in modules[layer] for path, layers in due.items() for layer in layers):
            found[kind] = {
                f"{layer}.{name}": inside[path]
                for layer, inside in enumerate(modules)
                for name, path in paths.items()
                if layer in due[path]
            }
    return found


def _joins(blocks: list[Any], paths: tuple[str, ...]) -> dict[str, dict[int, nn.Module]]:
    """Sublayer -> layer -> the module whose output joins the stream, of the blocks that have it."""
    return {
        name: {layer: part for layer, block in enumerate(blocks) if (part := _at(block, path)) is not None}
        for name, path in zip(SUBLAYERS, paths, strict=True)
    }


def _stream(
    blocks: list[nn.Module],
    tables: list[nn.Embedding],
    reads: dict[str, list[str]],
    last: Any,
    writers: list[str],
    down: str,
    having: Having | None = None,
) -> Stream | None:
    """From paths inside a block: its norms, each with its readers, and its writers. None where a block lacks one."""
    inside: list[dict[str, Any]] = [dict(block.named_modules()) for block in blocks]
    wanted = [*reads, *(path for readers in reads.values() for path in readers), *writers, down]
    due = {path: range(len(blocks)) if having is None else having(path) for path in wanted}
    if not all(path in inside[layer] for path, layers in due.items() for layer in layers):
        return None
    numbered = list(enumerate(inside))
    return Stream(
        tables,
        [
            (modules[norm], [modules[path] for path in paths])
            for layer, modules in numbered
            for norm, paths in reads.items()
            if layer in due[norm]
        ],
        last,
        [modules[path] for layer, modules in numbered for path in (*writers, down) if layer in due[path]],
        [modules[down] for layer, modules in numbered if layer in due[down]],
    )


# --- what may be replaced --------------------------------------------------------------------------------------------


def check_plain(place: str, module: nn.Module, base: type[nn.Module]) -> None:
    """ValueError, one line, where a module computes more than its `base` class: what takes its place would not."""
    more = _own_forward(module, base)
    if getattr(getattr(module, "weight", None), "is_meta", False):
        raise ValueError(f"{place}: its weights are kept on the CPU or a disk for want of room: it cannot be replaced")
    if more is None and (module._forward_hooks or module._forward_pre_hooks):
        more = "has a forward hook"
    if more is not None:
        raise ValueError(
            f"{place}: this {base.__name__} {more}, which would be lost where it is replaced: "
            "merge that into its weights, or remove it"
        )


def _own_forward(module: nn.Module, base: type[nn.Module]) -> str | None:
    """What a module's forward is, where it is not that of its base class."""
    kind, own = type(module), vars(module).get("forward")
    hook = vars(module).get("_hf_hook")  # accelerate's, which brings inputs and weights together, is no part of it
    moved = type(hook).__name__ == "AlignDevicesHook" and getattr(module, "_old_forward", None) is not None
    if own is not None and not (moved and getattr(module._old_forward, "__func__", None) is kind.forward):
        return "has a forward of its own"
    if kind.forward is not base.forward or kind.__call__ is not nn.Module.__call__:
        return f"is a {kind.__name__} with a forward of its own"
    if getattr(module, "max_norm", None) is not None:
        return "shrinks the rows that it looks up (max_norm)"
    return None


def scale_of_table(table: Any) -> Tensor | None:
    """What a table of tokens multiplies its rows by, as Gemma's do (embed_scale); None: nothing.

    ValueError where it does anything else with them.
    """
    scale = getattr(table, "embed_scale", None)
    if isinstance(scale, Tensor) and type(table).forward is not nn.Embedding.forward:
        bare = table.max_norm is None and not (
            vars(table).keys() & {"forward"} or table._forward_hooks or table._forward_pre_hooks
        )
        rows = {0, 1, table.num_embeddings - 1, table.padding_idx or 0} & set(range(table.num_embeddings))
        ids = torch.tensor(sorted(rows), device=table.weight.device)
        with torch.no_grad():  # that it scales, and does no more, is known by a name alone: so it is asked
            if bare and torch.equal(table(ids), table.weight[ids] * scale.to(table.weight.dtype)):
                return scale.detach().clone()
    check_plain("embeddings", table, nn.Embedding)
    return None


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module wherever another one is, by identity; a library that initialises what it finds leaves it alone."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is old]
    for module in new.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    for path in paths:
        model.set_submodule(path, new)


def untie(model: Any) -> None:
    """From now on table and head are two, and no library ties them again: lm-eval asks every model to tie its weights.

    To be called where one of them is replaced, or is to be changed alone.
    """
    parts = anatomy(model)
    if getattr(parts.head, "weight", None) is getattr(parts.table, "weight", None):
        parts.head.weight = nn.Parameter(parts.head.weight.detach().clone(), parts.head.weight.requires_grad)
    decoder = model.inner if isinstance(model, Prefixed) else model
    decoder.config.tie_word_embeddings = False
    decoder.all_tied_weights_keys = {}


def bar_saving(model: Any) -> None:
    """From now on the model refuses `save_pretrained`: `from_pretrained` would read its integers as weights."""
    decoder = model.inner if isinstance(model, Prefixed) else model
    if hasattr(decoder, "save_pretrained"):
        decoder.save_pretrained = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "save_pretrained: this model's parts were replaced, and from_pretrained would load other ones: a quantized "
        "model of ours is saved by quantbench.packed.save"
    )
