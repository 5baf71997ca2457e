"""Where transformers' models keep their parts: against their own outputs, watched and not, quantized, rewritten."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import Fixed, track
from tiny import ENTRIES, VOCAB, gaussian, ids, quantizer
from tiny import model as our_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from quantbench import catalog, heads, interface, sites, trace
from quantbench.anatomy import HEADS, SITES, SUBLAYERS, Anatomy, Transposed, anatomy
from quantbench.calibration import Calibration, places
from quantbench.evaluate import Reference
from quantbench.quantizers import LowBitLinear

T, H, D, LAYERS, WINDOW, PLACES = 12, 4, 64, 3, 4, 48
IDS = ids(length=T).clamp(min=1)  # 0 is padding
IDS[:, 0] = 1
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "vocab_size": VOCAB}
SHAPE: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": D,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "max_position_embeddings": PLACES,
}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWED: dict[str, Any] = {**GROUPED, "head_dim": 32, "sliding_window": WINDOW, "layer_types": KINDS}
GPT2: dict[str, Any] = {**SPECIAL, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": PLACES}
OPT: dict[str, Any] = {**SHAPE, "ffn_dim": 96}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama-tied-biased": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=32),
    "smollm3": lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]),
    "olmo": lambda: OlmoConfig(**GROUPED, clip_qkv=1.0),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "gemma2": lambda: Gemma2Config(**WINDOWED, attn_logit_softcapping=3.0, query_pre_attn_scalar=9),
    "gemma3": lambda: Gemma3TextConfig(**WINDOWED, query_pre_attn_scalar=9),
    "gpt-oss": lambda: GptOssConfig(**WINDOWED, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE),
    "gpt2": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "opt": lambda: OPTConfig(**OPT, word_embed_proj_dim=D),
    "opt-350m": lambda: OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt-neox": lambda: GPTNeoXConfig(**SHAPE),
    "gpt-neox-sequential": lambda: GPTNeoXConfig(**SHAPE, use_parallel_residual=False),
}
EAGER = ("gemma2", "gpt-oss")  # transformers gives them no other
STREAMLESS = ("olmo2", "gemma2", "gemma3", "gpt-oss", "opt-350m")  # norms behind the sublayers, or experts

architectures = pytest.mark.parametrize("architecture", CONFIGS)
interface.register()


def model(architecture: str, implementation: str = "sdpa", config: PreTrainedConfig | None = None) -> Any:
    """A tiny random decoder whose scores are far apart, with gains and biases of its own."""
    name = "eager" if architecture in EAGER and implementation == "sdpa" else implementation
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config or CONFIGS[architecture](), attn_implementation=name).eval()
    for index, parameter in enumerate(made.parameters()):
        drawn = gaussian(*parameter.shape, seed=index)
        parameter.data = 0.25 * drawn if parameter.ndim > 1 else parameter.data + 0.2 * drawn
    for sinks in (m.sinks for m in made.modules() if hasattr(m, "sinks")):
        sinks.data = gaussian(H)
    return made.requires_grad_(False)


def padded(left: int = 0) -> dict[str, Tensor]:
    """IDS, the second sequence without its first tokens."""
    mask = torch.ones_like(IDS)
    mask[1, :left] = 0
    return {"input_ids": IDS * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(decoder: nn.Module, input_ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return decoder(input_ids, **kwargs).logits


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@contextmanager
def watching(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the modules give, by name."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


def everything(parts: Anatomy) -> dict[str, nn.Module]:
    named = {f"{kind} {place}": module for kind in parts.places for place, module in parts.sites(kind).items()}
    for layer, (block, own) in enumerate(zip(parts.blocks, parts.heads.values(), strict=True)):
        named |= {f"block {layer}": block, f"weights {layer}": own.weights, f"scores {layer}": own.scores}
        named |= {f"values {layer}": own.values, f"attention {layer}": attention_of(block)}
        named |= projections(block, layer)
    return named | {"embedding": parts.embedding}


def attention_of(block: nn.Module) -> nn.Module:
    (found,) = [m for m in block.modules() if type(m).__name__.endswith("Attention")]
    return found


def projections(block: nn.Module, layer: int) -> dict[str, nn.Module]:
    names = ("v_proj", "c_attn", "query_key_value")
    return {f"projected {layer}": m for name, m in block.named_modules() if name.rpartition(".")[2] in names}


def value_states(architecture: str, projected: Tensor, features: int) -> Tensor:
    """From what the projection gives, [B, H, T, E]."""
    if architecture == "gpt2":
        projected = projected.chunk(3, -1)[2]
    if architecture.startswith("gpt-neox"):
        return projected.view(*projected.shape[:2], H, 3 * features)[..., 2 * features :].transpose(1, 2)
    own = projected.view(*projected.shape[:2], -1, features).transpose(1, 2)
    return own.repeat_interleave(H // own.shape[1], 1)


def visible(config: Any, layer: int, real_BT: Tensor) -> Tensor:
    """Who sees whom, [B, 1, T, T]."""
    at = torch.arange(T)
    see = (at <= at[:, None]) & real_BT[:, None, None, :]
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "mistral" or (kinds and kinds[layer] == "sliding_attention"):
        see = see & (at > at[:, None] - WINDOW)
    return see


# --- what it is ------------------------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_taking_the_anatomy_changes_no_logit(architecture: str, implementation: str) -> None:
    decoder = model(architecture, implementation)
    before = [logits(decoder), logits(decoder, **padded(left=5))]
    weights = {name: x.clone() for name, x in decoder.state_dict().items()}
    parts = anatomy(decoder)
    again = anatomy(decoder)
    assert again.heads == parts.heads
    assert again.embedding is parts.embedding
    for taken in (decoder, copy.deepcopy(decoder)):
        assert torch.equal(logits(taken), before[0])
        assert torch.equal(logits(taken, **padded(left=5)), before[1])
        assert taken.state_dict().keys() == weights.keys()
        assert all(torch.equal(x, weights[name]) for name, x in taken.state_dict().items())


@architectures
@pytest.mark.parametrize("left", [0, 5])
def test_it_shows_what_the_model_says_of_itself(architecture: str, left: int) -> None:
    inputs, real_BT = padded(left), padded(left)["attention_mask"].bool()
    with torch.no_grad():
        expected = model(architecture, "eager")(**inputs, output_hidden_states=True, output_attentions=True)
    decoder = model(architecture)
    parts = anatomy(decoder)
    with watching(everything(parts)) as seen:
        close(logits(decoder, **inputs)[real_BT], expected.logits[real_BT])
    hidden = [seen["embedding"], *(seen[f"block {layer}"] for layer in range(LAYERS))]
    for got, states in zip(hidden[:-1], expected.hidden_states[:-1], strict=True):
        close(got[real_BT], states[real_BT])
    rows_BHT = real_BT[:, None].expand(-1, H, -1)
    for layer, (block, own) in enumerate(zip(parts.blocks, parts.heads.values(), strict=True)):
        weights, scores, values = (seen[f"{name} {layer}"] for name in ("weights", "scores", "values"))
        features = values.shape[-1]
        learned = int(architecture == "gpt-oss")
        assert own.weights.appended == own.scores.appended == learned
        assert weights.shape == scores.shape == (len(IDS), H, T, T + learned)
        close(weights[..., :T][rows_BHT], expected.attentions[layer][rows_BHT])
        see = nn.functional.pad(visible(decoder.config, layer, real_BT), (0, learned), value=True)
        close(weights[rows_BHT], scores.masked_fill(~see, -torch.inf).softmax(-1)[rows_BHT])
        assert torch.equal(values, value_states(architecture, seen[f"projected {layer}"], features))
        slices_HED = own.output.weight.T.unflatten(0, (H, features))
        update = (weights[..., :T] @ values @ slices_HED).sum(1)
        update = update if own.output.bias is None else update + own.output.bias
        close(update[real_BT], seen[f"attention {layer}"][real_BT])
        assert attention_of(block).sites.products is parts.places["products"][_place(parts, "products", layer)]
        close(seen[f"products {_place(parts, 'products', layer)}"], weights[..., :T] @ values)
        groups = getattr(decoder.config, "num_key_value_heads", None) or H
        for kind in ("keys", "values"):
            assert seen[f"{kind} {_place(parts, kind, layer)}"].shape == (len(IDS), groups, T, features)
    if architecture == "gemma2":
        assert 2.5 < scores.abs().max() <= 3.0
    assert parts.linears()
    assert (parts.stream is None) == (architecture in STREAMLESS)


def _place(parts: Anatomy, kind: str, layer: int) -> str:
    (found,) = [place for place in parts.sites(kind) if place.startswith(f"{layer}.") and place.endswith(kind)]
    return found


@architectures
def test_norms_read_the_stream_and_linears_the_norms(architecture: str) -> None:
    decoder = model(architecture)
    parts = anatomy(decoder)
    if parts.stream is None:
        return
    inputs: dict[nn.Module, Tensor] = {}
    norms = [norm for norm, _ in parts.stream.norms]
    modules = [*norms, parts.stream.last, parts.head]
    modules += [reader for _, readers in parts.stream.norms for reader in readers]
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m in modules]
    outputs = {str(index): norm for index, norm in enumerate([*norms, parts.stream.last, *parts.blocks])}
    with watching(outputs) as seen:
        logits(decoder)
    for handle in handles:
        handle.remove()
    for index, (_, readers) in enumerate(parts.stream.norms):
        assert readers
        assert all(torch.equal(inputs[reader], seen[str(index)]) for reader in readers)
    assert torch.equal(inputs[parts.head], seen[str(len(norms))])
    assert torch.equal(inputs[parts.stream.last], seen[str(len(outputs) - 1)])
    for layer, block in enumerate(parts.blocks[:-1]):
        assert torch.equal(inputs[norms[2 * layer + 2]], seen[str(len(norms) + 1 + layer)]), block
    assert len(parts.stream.downs) == LAYERS
    assert len(parts.stream.writers) == 2 * LAYERS


@architectures
def test_a_block_adds_what_its_sublayers_give_to_the_stream(architecture: str) -> None:
    decoder = model(architecture)
    parts = anatomy(decoder)
    _check_joins(decoder, parts, plain=architecture != "opt-350m")


@pytest.mark.parametrize("mitigations", [None, {"gated-attention": {}}, {"registers": {"count": 2}}], ids=str)
def test_so_do_our_own(mitigations: Any) -> None:
    decoder = our_model(mitigations)
    _check_joins(decoder, anatomy(decoder), plain=True)


def _check_joins(decoder: nn.Module, parts: Anatomy, plain: bool) -> None:
    """plain: no norm follows the sum."""
    read: dict[nn.Module, Tensor] = {}
    handles = [b.register_forward_pre_hook(lambda m, args: read.update({m: args[0].clone()})) for b in parts.blocks]
    places = {f"{at}.{layer}": m for at, modules in parts.joins.items() for layer, m in modules.items()}
    with watching(places | {f"block.{layer}": block for layer, block in enumerate(parts.blocks)}) as seen:
        logits(decoder)
    for handle in handles:
        handle.remove()
    assert list(parts.joins) == list(SUBLAYERS)
    for layer, block in enumerate(parts.blocks):
        added = [seen[f"{at}.{layer}"].view_as(read[block]) for at in SUBLAYERS]
        assert all(float(x.abs().max()) > 1e-3 for x in added)
        if plain:
            close(seen[f"block.{layer}"], read[block] + added[0] + added[1])


def test_our_own_is_as_it_was() -> None:
    decoder = our_model()
    before, weights = logits(decoder), set(decoder.state_dict())
    parts = anatomy(decoder)
    assert torch.equal(logits(decoder), before)
    assert set(decoder.state_dict()) == weights
    assert not any(m._forward_pre_hooks for m in decoder.modules())
    assert parts.embedding is decoder.embedded
    assert parts.heads[0].values is decoder.blocks[0].attention.values
    assert set(parts.places) == set(SITES[1:])


# --- what is done with it --------------------------------------------------------------------------------------------


@architectures
def test_every_metric_reads_it(architecture: str) -> None:
    decoder = model(architecture)
    before = logits(decoder)
    found = trace.measure(decoder, [IDS, IDS.flip(1)], catalog.names("metrics"))
    assert all(reading.value is not None for reading in found.values()), found
    assert all(len(reading.per_layer) in (0, LAYERS) for reading in found.values())
    assert torch.equal(logits(decoder), before)
    assert decoder.config.use_cache


@architectures
def test_all_its_sites_are_rounded_and_spared_where_every_position_is_exempt(architecture: str) -> None:
    decoder, data = model(architecture), Calibration([(IDS[:2], None), (IDS[2:], None)])
    full, parts = logits(decoder), anatomy(decoder)
    entry = quantizer("w8a8-static", sites=("inputs", *(kind for kind in SITES[1:] if kind in parts.places)))
    assert set(entry.sites) >= {"inputs", "residual", *HEADS}
    if architecture == "gpt-oss":
        with pytest.raises(
            ValueError, match=r"^only \d+% of the blocks' weights [^\n]* GptOssExperts, GptOssTopKRouter"
        ):
            entry.quantize(decoder, data)
        assert torch.equal(logits(decoder), full)
        return
    report = entry.quantize(decoder, data)
    assert report["share-of-weights"] == 1.0
    assert 0 < error(logits(decoder), full) < 0.4
    assert len(anatomy(decoder).linears()) == 0
    assert torch.equal(logits(copy.deepcopy(decoder)), logits(decoder))
    exact = model(architecture)
    quantizer("w8a8-static", weights=16, activations=3, sites=entry.sites).quantize(exact, data)
    assert error(logits(exact), full) > 0.02
    with data.exemption.of(torch.ones(IDS.shape, dtype=torch.bool)):
        close(logits(exact), full)


@architectures
@pytest.mark.parametrize("name", ["smoothquant", "hadamard", "prefix-kv"])
def test_it_is_rewritten_or_refused_in_a_line(architecture: str, name: str) -> None:
    decoder = model(architecture)
    decoder = decoder if architecture == "gpt-oss" else decoder.double()  # its experts know no doubles
    before = logits(decoder)
    if name != "prefix-kv" and (architecture in STREAMLESS or architecture == "olmo"):
        with pytest.raises(ValueError, match=rf"^{name}: not applicable: [^\n]*$"):
            ENTRIES[name]().prepare(decoder, Calibration([(IDS, None)]))
        return
    prepared = ENTRIES[name]().prepare(decoder, Calibration([(IDS, None)])).model
    close(logits(prepared), before)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gpt-neox", "gemma3"])
def test_a_cache_holds_rounded_keys_and_values(architecture: str) -> None:
    decoder, data = model(architecture), Calibration([(IDS, None)])
    full = logits(decoder)
    quantizer("w8a8-static", weights=16, activations=3, sites=("keys", "values")).quantize(decoder, data)
    whole = logits(decoder)
    assert error(whole, full) > 0.05
    cache = DynamicCache(config=decoder.config)
    close(
        torch.cat([logits(decoder, IDS[:, a:b], past_key_values=cache) for a, b in pairwise((0, 5, 6, 7, T))], 1), whole
    )
    assert all(len(layer.values.unique()) < 8 for layer in cache.layers)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-oss"])
def test_watched_with_a_cache_it_computes_the_same(architecture: str) -> None:
    decoder = model(architecture)
    whole, parts = logits(decoder), anatomy(decoder)
    cache = DynamicCache(config=decoder.config)
    with watching(everything(parts)) as seen:
        steps = [logits(decoder, IDS[:, a:b], past_key_values=cache) for a, b in pairwise((0, 3, 4))]
        assert seen["values 0"].shape[2] == 1
    steps += [logits(decoder, IDS[:, a:b], past_key_values=cache) for a, b in pairwise((4, 8, T))]
    close(torch.cat(steps, 1), whole)


def test_what_a_site_is_replaced_by_counts() -> None:
    for architecture in ("llama", "gpt2"):
        decoder = model(architecture)
        parts = anatomy(decoder)
        attention = attention_of(parts.blocks[0])
        kinds = {kind: parts.sites(kind)[_place(parts, kind, 0)] for kind in ("values", "probabilities", "products")}
        for module in [*kinds.values(), parts.heads[0].values]:
            handle = module.register_forward_hook(lambda m, args, x: torch.zeros_like(x))
            with watching({"attention": attention}) as seen:
                logits(decoder)
            handle.remove()
            bias = parts.heads[0].output.bias
            close(seen["attention"], torch.zeros(len(IDS), T, D) + (0.0 if bias is None else bias))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_errors_of_sites_are_those_of_its_tokens(architecture: str) -> None:
    data = Fixed(torch.cat((IDS, IDS[:, :1]), 1), VOCAB)
    reference = Reference(model(architecture), data, track(quantizer("w8a8-static"), T, len(IDS)))
    entry = quantizer("w8a8-token", sites=("inputs", *SITES[1:]))
    masks = [torch.eye(len(ids_BT), T, dtype=torch.bool) for ids_BT in reference.batches]
    found = sites.rounding_errors(reference, entry, reference.calibrate(), masks)
    kinds = [places(anatomy(reference.model), kind) for kind in entry.sites]
    assert set(found) == {place for kind in kinds for place in kind}
    assert all(10 < decibels < 80 for both in found.values() for decibels in both.values())


def test_a_block_that_is_run_twice_finds_no_cache() -> None:
    """Two equal models have no error, whichever block is given which input."""
    decoder = model("llama")
    found = sites.propagation(decoder, copy.deepcopy(decoder), [IDS], trace.ExtremeRule(0, 1e9))
    assert all(figure == 0 for layer in found["all"] for figure in layer.values())


# --- forms of interface.py -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "softpick"), ("mistral", "sigmoid-attn"), ("gpt2", "relu-attn"), ("gpt-neox", "softmax1")],
)
def test_a_form_shows_its_heads(architecture: str, name: str) -> None:
    inputs, real_BT = padded(left=5), padded(left=5)["attention_mask"].bool()
    decoder = model(architecture, name)
    before = logits(decoder, **inputs)
    with torch.no_grad():
        expected = decoder(**inputs, output_attentions=True).attentions
    parts = anatomy(decoder)
    assert decoder.config._attn_implementation == name
    assert torch.equal(logits(decoder, **inputs), before)
    with watching(everything(parts)) as seen:
        close(logits(decoder, **inputs), before)
    rows_BHT = real_BT[:, None].expand(-1, H, -1)
    for layer in range(LAYERS):
        close(seen[f"weights {layer}"][rows_BHT], expected[layer][rows_BHT])
        products = seen[f"weights {layer}"] @ seen[f"values {layer}"]
        close(seen[f"products {_place(parts, 'products', layer)}"][rows_BHT], products[rows_BHT])
    data, sites_of_heads = Calibration([(IDS, None)]), ("inputs", "residual", *HEADS)
    quantizer("w8a8-static", sites=sites_of_heads).quantize(decoder, data)
    assert 0 < error(logits(decoder), logits(model(architecture, name))) < 0.4


def test_the_attention_may_be_named_anew() -> None:
    decoder = model("llama")
    anatomy(decoder)
    decoder.set_attn_implementation("softpick")
    assert torch.equal(logits(decoder), logits(model("llama", "softpick")))
    with watching({"scores": anatomy(decoder).heads[0].scores}) as seen:
        logits(decoder)
    assert seen


def test_an_attention_of_somebody_elses_shows_nothing() -> None:
    AttentionInterface.register("somebodys", sdpa_attention_forward)
    AttentionMaskInterface.register("somebodys", sdpa_mask)
    decoder = model("llama", "somebodys")
    parts = anatomy(decoder)
    assert parts.heads == {}
    assert set(parts.places) == {"residual", "norms"}
    assert decoder.config._attn_implementation == "somebodys"


def test_what_cannot_be_watched_is_refused() -> None:
    decoder = model("llama")
    parts = anatomy(decoder)
    starts = torch.tensor([0, 5, T], dtype=torch.int32)
    logits(decoder, cu_seq_lens_q=starts)
    with watching({"scores": parts.heads[0].scores}), pytest.raises(ValueError, match="asks for cu_seq_lens_q, which"):
        logits(decoder, cu_seq_lens_q=starts)


# --- Conv1D ----------------------------------------------------------------------------------------------------------


def test_a_conv1d_becomes_a_linear_and_is_saved_as_it_was(tmp_path: Path) -> None:
    decoder = model("gpt2")
    before = logits(decoder)
    conv = decoder.transformer.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D)
    anatomy(decoder)
    linear = decoder.transformer.h[0].mlp.c_fc
    assert isinstance(linear, Transposed)
    assert linear.weight.shape == (4 * D, D)
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    x = gaussian(2, 5, D)
    assert torch.equal(linear(x), conv(x))
    decoder.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert isinstance(again.transformer.h[0].mlp.c_fc, Conv1D)
    assert torch.equal(logits(again), before)
    again.transformer.h[0].mlp.c_fc.weight.data.zero_()
    decoder.load_state_dict(again.state_dict())
    assert not linear.weight.any()


def test_gpt2s_other_eager_attention_stays() -> None:
    decoder = model("gpt2", "eager", GPT2Config(**GPT2, reorder_and_upcast_attn=True))
    before = logits(decoder)
    parts = anatomy(decoder)
    assert torch.equal(logits(decoder), before)
    with watching(everything(parts)):
        close(logits(decoder), before)


@pytest.mark.parametrize("name", ["w4a16-gptq", "w4a16-awq", "llm-int8", "bnb-int8", "bnb-nf4"])
def test_one_of_each_kind_quantizes_what_was_a_conv1d(name: str) -> None:
    decoder = model("gpt2")
    full = logits(decoder)
    report = quantizer(name).quantize(decoder, Calibration([(IDS, None)]))
    assert report["share-of-weights"] == 1.0
    assert 0 < error(logits(decoder), full) < 0.8
    assert sum(isinstance(m, LowBitLinear) for m in decoder.modules()) >= 4 * LAYERS


# --- what is refused, in one line ------------------------------------------------------------------------------------


def bidirectional() -> PreTrainedModel:
    return model("gemma3", config=Gemma3TextConfig(**WINDOWED, use_bidirectional_attention=True))


SMALL: dict[str, Any] = {**SPECIAL, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
NO_DECODER = "is no causal language model of a decoder alone"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config(**SMALL, decoder_start_token_id=0)), NO_DECODER),
    "encoder": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), NO_DECODER),
    "classifier": (lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE)), NO_DECODER),
    "no head": (lambda: GPT2Model(GPT2Config(**GPT2)), NO_DECODER),
    "cross-attention": (
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2, add_cross_attention=True)),
        "GPT2LMHeadModel with add_cross_attention: True is no causal language model of a decoder alone",
    ),
    "bidirectional": (bidirectional, "with use_bidirectional_attention: True is no causal"),
    "not causal": (
        lambda: model("llama", config=LlamaConfig(**SHAPE, is_causal=False)),
        "LlamaForCausalLM with is_causal: False is no causal",
    ),
    "unknown": (
        lambda: model("bloom", "eager", BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=H)),
        "quantbench does not know where a 'bloom' model keeps its layers: add the paths of its parts to ARCHITECTURES "
        "in anatomy.py (known: llama, mistral, ",
    ),
    "no transformers' at all": (nn.Identity, "quantbench does not know where a 'Identity' model keeps its layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_refused_in_a_line(kind: str) -> None:
    build, why = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        anatomy(build())
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_named() -> None:
    decoder = model("llama")
    decoder.lm_head = decoder.model.embed_tokens = None
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM has no model\.embed_tokens and no lm_head, where a 'llama'"
    ):
        anatomy(decoder)


def test_the_names_of_what_shows_the_heads_mean_nothing_to_transformers() -> None:
    for name in heads.OVER.values():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert not re.search("flash|flex|sdpa|eager|paged", name)
    assert set(heads.SHOWING) == set(interface.FORMS)


def test_learned_positions_are_for_so_many_tokens() -> None:
    assert anatomy(model("gpt2")).room == anatomy(model("opt")).room == PLACES
    assert anatomy(our_model(positions="learned")).room == 32
    assert anatomy(model("llama")).room is anatomy(our_model()).room is None


def test_inputs_are_those_of_linears_inside_the_blocks() -> None:
    assert len(places(anatomy(model("gpt2")), "inputs")) == 4 * LAYERS
    assert len(places(anatomy(model("gpt-neox")), "inputs")) == 4 * LAYERS
    assert len(places(anatomy(model("gpt-oss")), "inputs")) == 4 * LAYERS  # of the attention alone
