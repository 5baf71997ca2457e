"""The decoder that every recipe trains: pre-norm, as a transformers PreTrainedModel whose config carries the recipe.

Its parts come from the mitigation (`mitigations/__init__.py`); nothing here knows one by name. A checkpoint
therefore reloads exactly, in transformers' own ways:

    import quantbench.model; AutoModelForCausalLM.from_pretrained(folder)

Shapes: B sequences, T tokens, S keys (cached ones included), D residual features, H heads, E features of a head,
R learned tokens in front, V vocabulary.
"""

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantbench import catalog
from quantbench.anatomy import Site
from quantbench.attention import attend, causal
from quantbench.mitigations import Mitigation, Projection, combine


class QuantbenchConfig(PreTrainedConfig):
    """Shape of the decoder and the recipe that trained it."""

    model_type = "quantbench"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers wants a list
    attribute_map = {  # noqa: RUF012 - and a dict
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    def __init__(
        self,
        vocab_size: int = 512,
        layers: int = 8,
        heads: int = 8,
        width: int = 64,
        mlp_width: int = 192,
        mlp: str = "swiglu",
        norm: str = "rmsnorm",
        positions: str = "rope",
        embedding_std: float = 1.0,
        sublayers: list[str] | None = None,
        max_position_embeddings: int = 128,
        mitigations: dict[str, dict[str, Any]] | None = None,
        folded: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.layers = layers
        self.heads = heads
        self.width = width
        self.mlp_width = mlp_width
        self.mlp = mlp
        self.norm = norm
        self.positions = positions
        self.embedding_std = embedding_std
        self.sublayers = list(sublayers or [])  # of each layer: block, attention or mlp; none named: blocks
        self.max_position_embeddings = max_position_embeddings
        self.mitigations = mitigations or {}
        self.folded = folded  # the embedding projection is in the table and the head already
        super().__init__(**{"bos_token_id": 0, "tie_word_embeddings": False, "use_cache": True} | kwargs)

    def has(self, part: str, layer: int) -> bool:
        """Whether a layer has its `attention`, its `mlp`."""
        return not self.sublayers or self.sublayers[layer] in ("block", part)

    @property
    def attentive(self) -> list[int]:
        """The layers that have attention, in order."""
        return [layer for layer in range(self.layers) if self.has("attention", layer)]

    def mitigation(self) -> Mitigation:
        """The recipe's mitigations as one; KeyError or TypeError where this version does not know them."""
        return combine({name: catalog.load("mitigations", name)(**kw) for name, kw in self.mitigations.items()})


class Attention(nn.Module):
    """Causal self-attention in three parts: `query_key`, the form (`weights`), `output`."""

    def __init__(self, config: QuantbenchConfig, mitigation: Mitigation, layer: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.cached = config.attentive.index(layer)  # a cache counts the layers that fill it
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.query_key = mitigation.query_key(config)
        self.form = mitigation.weights(config)
        self.output = mitigation.output(config)
        self.keys, self.values = Site(), Site()
        self.scores, self.probabilities = Site(self.form.appended), Site(self.form.appended)
        self.products = Site()

    def forward(self, x_BTD: Tensor, turn: Tensor | None, visible: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BT3HE = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads)
        q_BTHE, k_BTHE = self.query_key(qkv_BT3HE[:, :, 0], qkv_BT3HE[:, :, 1])
        if turn is not None:
            q_BTHE, k_BTHE = rotate(q_BTHE, turn), rotate(k_BTHE, turn)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, qkv_BT3HE[:, :, 2]))  # [B, H, T, E]
        k, v = self.keys(k), self.values(self.output.source(v))
        own_v = v
        if cache is not None:
            k, v = cache.update(k, v, self.cached)
        if self.scores.watched or self.probabilities.watched:
            y_BHTE = attend(self.form, q, k, v, visible, self.scores, self.probabilities)
        else:
            y_BHTE = self.form.attend(q, k, v, visible)
        y_BHTE = self.output(self.products(y_BHTE), x_BTD, own_v)
        return self.out(y_BHTE.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202), GELU, ReLU, or none of them: linear."""

    def __init__(self, config: QuantbenchConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.width, (2 if self.kind == "swiglu" else 1) * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.up(x_BTD)
        if self.kind == "swiglu":
            gate, h = h.chunk(2, -1)
            return self.down(F.silu(gate) * h)
        if self.kind == "linear":
            return self.down(h)
        return self.down(F.relu(h) if self.kind == "relu" else F.gelu(h))


class Block(nn.Module):
    """Attention, then MLP, each reading the normalised residual stream and joining it. A layer may lack one of them."""

    def __init__(self, config: QuantbenchConfig, mitigation: Mitigation, layer: int) -> None:
        super().__init__()
        with_attention, with_mlp = config.has("attention", layer), config.has("mlp", layer)
        self.attention_norm: Any = mitigation.norm(config) if with_attention else None
        self.mlp_norm: Any = mitigation.norm(config) if with_mlp else None
        self.attention = Attention(config, mitigation, layer) if with_attention else None
        self.mlp = MLP(config) if with_mlp else None
        self.attention_join: Any = mitigation.block(config) if with_attention else None
        self.mlp_join: Any = mitigation.block(config) if with_mlp else None

    def forward(self, x_BTD: Tensor, turn: Tensor | None, visible: Tensor | None, cache: Cache | None) -> Tensor:
        if self.attention is not None:
            x_BTD = self.attention_join(x_BTD, self.attention(self.attention_norm(x_BTD), turn, visible, cache))
        if self.mlp is not None:
            x_BTD = self.mlp_join(x_BTD, self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD


class QuantbenchModel(PreTrainedModel, GenerationMixin):
    """The decoder as a causal LM of transformers: `from_pretrained`, `generate`, `save_pretrained`."""

    config_class = QuantbenchConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: QuantbenchConfig) -> None:
        super().__init__(config)
        mitigation = config.mitigation()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.front = mitigation.inputs(config)
        places = config.max_position_embeddings + self.registers
        self.places = nn.Embedding(places, config.width) if config.positions == "learned" else None
        self.projection = Projection() if config.folded else mitigation.embedding(config)
        self.embedded = Site()
        self.blocks = nn.ModuleList(Block(config, mitigation, layer) for layer in range(config.layers))
        self.norm = mitigation.norm(config, last=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's defaults stand until `initialise` or a checkpoint sets every parameter."""

    @property
    def registers(self) -> int:
        """How many learned tokens stand in front of every sequence, and so in front of every cache."""
        return 0 if self.front is None else self.front(1).shape[1]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the next token. attention_mask: [B, S], 0 at padding (left or right)."""
        x_BTD = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x_BTD = self.projection.enter(x_BTD)
        front_BRD = None if self.front is None else self.front(len(x_BTD))
        if front_BRD is not None and past == 0:
            x_BTD = torch.cat((front_BRD, x_BTD), 1)
        T = x_BTD.shape[1]
        if attention_mask is not None and front_BRD is not None:
            attention_mask = F.pad(attention_mask, (front_BRD.shape[1], 0), value=1)
        if attention_mask is not None:
            positions_BT = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        else:
            positions_BT = torch.arange(past, past + T, device=x_BTD.device)[None]
        if self.places is not None:
            x_BTD = x_BTD + self.places(positions_BT)
            turn = None
        else:
            turn = rotation(positions_BT, self.config.width // self.config.heads)
        visible = visibility(attention_mask, past, T, x_BTD.device)
        x_BTD = self.embedded(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, turn, visible, past_key_values)
        x_BTD = self.projection.leave(self.norm(x_BTD))
        if front_BRD is not None and past == 0:
            x_BTD = x_BTD[:, front_BRD.shape[1] :]
        logits_BTV = self.head(x_BTD[:, -logits_to_keep:] if logits_to_keep else x_BTD)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, which takes every column of a cache that is gone on from to be an id's."""
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] += self.registers
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]


def rotation(positions_BT: Tensor, features: int) -> Tensor:
    """The turn of each pair of features at each position, complex, [B, T, 1, E/2] (arXiv:2104.09864, base 10,000)."""
    speed = 10_000.0 ** (-torch.arange(0, features, 2, device=positions_BT.device, dtype=torch.float32) / features)
    angle = positions_BT[..., None, None] * speed
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BTHE: Tensor, turn: Tensor) -> Tensor:
    """Turns neighbouring pairs of features; in fp32, given back in the dtype that came."""
    pairs = torch.view_as_complex(x_BTHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BTHE.dtype)


def visibility(attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
    """Who sees whom, bool [B or 1, 1, T, S]; None where it is plainly causal. A padding token sees itself."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and past == 0:
        return None
    visible = causal(past + length, device)[past:][None, None]
    if padded:
        assert attention_mask is not None
        itself = torch.eye(past + length, dtype=torch.bool, device=device)[past:]
        visible = visible & (attention_mask.bool()[:, None, None, :] | itself)
    return visible


@torch.no_grad()
def initialise(model: QuantbenchModel, seed: int) -> None:
    """Draws every parameter from a generator seeded by (seed, its name): an added gate shifts nothing else.

    Linear: uniform in +-1/sqrt(fan in), torch's default; embeddings: N(0, embedding_std); gains 1, biases 0. A module
    with parameters of its own kind says how in `initial(name, parameter, generator)`.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            digest = hashlib.sha256(f"{seed}:{path}.{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            fresh = torch.empty(parameter.shape)
            if hasattr(module, "initial"):
                module.initial(name, fresh, generator)
            elif isinstance(module, nn.Embedding):
                fresh.normal_(0, model.config.embedding_std, generator=generator)
            elif isinstance(module, nn.Linear) and name == "weight":
                bound = 1 / math.sqrt(module.in_features)
                fresh.uniform_(-bound, bound, generator=generator)
            elif name == "bias":
                fresh.zero_()
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                fresh.fill_(1)
            else:
                raise AssertionError(f"{path}.{name}: its module must say how it starts, in `initial`")
            parameter.copy_(fresh)


def cost(model: QuantbenchModel, length: int) -> dict[str, int]:
    """Parameters, and FLOPs of training on one token of a sequence of `length`: 6 a multiply-add of matrix products.

    Those of the Linears, of causal attention's two products, and of whatever module says that it has some
    (`multiply_adds()`, a token). Learned tokens in front of a sequence are paid for by its own.
    """
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    products += sum(m.multiply_adds() for m in model.modules() if hasattr(m, "multiply_adds"))
    tokens = length + model.registers
    head = model.head.weight.numel() * model.registers  # which does not read what stands in front
    attention = len(model.config.attentive) * model.config.width * tokens
    flops = 6 * ((products + attention) * tokens - head) // length
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops-per-token": flops}


AutoConfig.register("quantbench", QuantbenchConfig, exist_ok=True)
AutoModelForCausalLM.register(QuantbenchConfig, QuantbenchModel, exist_ok=True)
