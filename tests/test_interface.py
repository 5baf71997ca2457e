"""Forms on transformers' own models: against formulas of their own, causality, padding, caches, training, reloading."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, VOCAB, ids
from tiny import model as our_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from quantbench import interface
from quantbench.mitigations import seams
from quantbench.model import QuantbenchConfig
from quantbench.recipe import available, load_recipe

T, H, PLACES, WINDOW = 12, 4, 48, 4
IDS = ids(length=T).clamp(min=1)  # 0 is padding
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "vocab_size": VOCAB}
LLAMA: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "max_position_embeddings": PLACES,
}
GROUPED: dict[str, Any] = {**LLAMA, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": H, "n_positions": PLACES}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WINDOWED: dict[str, Any] = {**GROUPED, "head_dim": 16, "sliding_window": WINDOW}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-scaled-by-layer": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled": lambda: GPT2Config(**GPT2, scale_attn_weights=False),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "opt": lambda: OPTConfig(**LLAMA, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "gpt-neox": lambda: GPTNeoXConfig(**LLAMA),
    "gemma3": lambda: Gemma3TextConfig(
        **WINDOWED, query_pre_attn_scalar=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**WINDOWED),
    "deepseek-v3": lambda: DeepseekV3Config(  # values of another width than keys
        **LLAMA,
        num_key_value_heads=H,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    ),
}

NAMES = interface.register()
# Every form on one architecture, every architecture with one form, in turn.
PAIRS = [("llama", name) for name in NAMES]
PAIRS += [(architecture, NAMES[i % len(NAMES)]) for i, architecture in enumerate(CONFIGS) if architecture != "llama"]

architectures = pytest.mark.parametrize("architecture", CONFIGS)
names = pytest.mark.parametrize("name", NAMES)
pairs = pytest.mark.parametrize(("architecture", "name"), PAIRS)


def model(architecture: str, name: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A tiny random decoder whose scores are far apart."""
    made = AutoModelForCausalLM.from_config(config or CONFIGS[architecture](), attn_implementation=name).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25, generator=generator)
    return made


def padded(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """IDS, the second sequence without its first or last tokens, as every model wants it."""
    mask = torch.ones_like(IDS)
    mask[1, :left] = 0
    mask[1, T - right :] = 0
    return {"input_ids": IDS * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(decoder: PreTrainedModel, input_ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return decoder(input_ids, **kwargs).logits


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# The forms again, as their papers write them, in doubles, with the masks of floats that eager attention gets.

FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda z, see, n: see * z.exp() / (see * z.exp()).sum(-1, keepdim=True),
    "relu-attn": lambda z, see, n: see * z.relu() / n,
    "relu-attn-sqrt": lambda z, see, n: see * z.relu() / n.sqrt(),
    "softmax1": lambda z, see, n: see * z.exp() / (1 + (see * z.exp()).sum(-1, keepdim=True)),
    "clipped-softmax": lambda z, see, n: ((1 + 12 / PLACES) * FORMULAS["softmax"](z, see, n) - 12 / PLACES).clamp(0, 1),
    "sigmoid-attn": lambda z, see, n: see / (1 + (-z).exp()),
    "sigmoid-attn-log": lambda z, see, n: see / (1 + n * (-z).exp()),
    "softpick": lambda z, see, n: (
        see * (z.exp() - 1).relu() / ((see * (z.exp() - 1).abs()).sum(-1, keepdim=True) + 1e-8)
    ),
}


def reference(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Heads one by one; a query that sees nobody gets 0."""
    weights_TS, outputs_TE = [], []
    shared = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        z = (query[:, head].double() @ key[:, head // shared].double().mT) * scaling
        see = (mask[:, 0] == 0).double()
        weights = FORMULAS[name](z, see, see.sum(-1, keepdim=True)).nan_to_num(0.0)
        weights_TS.append(weights)
        outputs_TE.append(weights @ value[:, head // shared].double())
    return torch.stack(outputs_TE, 2).to(query.dtype), torch.stack(weights_TS, 1)


for formula in FORMULAS:
    AttentionInterface.register(f"reference-{formula}", partial(reference, formula))
    AttentionMaskInterface.register(f"reference-{formula}", eager_mask)


@architectures
def test_the_reference_with_softmax_is_the_models_own_attention(architecture: str) -> None:
    close(logits(model(architecture, "reference-softmax")), logits(model(architecture, "eager")))


@names
@architectures
def test_it_is_its_formula(architecture: str, name: str) -> None:
    decoder, other = model(architecture, name), model(architecture, f"reference-{name}")
    for inputs in (padded(), padded(left=5), padded(right=5)):
        real = inputs["attention_mask"].bool()
        got, expected = logits(decoder, **inputs), logits(other, **inputs)
        close(got[real], expected[real])
        assert got.isfinite().all()
    assert (expected - logits(model(architecture, "eager"), **inputs))[real].abs().max() > 0.05


@names
@architectures
def test_no_token_learns_of_a_later_one(architecture: str, name: str) -> None:
    decoder = model(architecture, name)
    for mask in (None, padded(left=5)["attention_mask"]):
        embedded_BTD = decoder.get_input_embeddings()(IDS).detach().requires_grad_()
        predicted_BTV = decoder(inputs_embeds=embedded_BTD, attention_mask=mask).logits
        for t in (5, 8):
            (gradient_BTD,) = torch.autograd.grad(predicted_BTV[:, t].square().sum(), embedded_BTD, retain_graph=True)
            assert not gradient_BTD[:, t + 1 :].any()
            assert gradient_BTD[0, t - 1].any(), "attention is at work"
            if mask is not None:
                assert gradient_BTD.isfinite().all()
                assert not gradient_BTD[1, :5].any(), "nobody sees padding"


@pairs
def test_padding_on_the_left_changes_nothing(architecture: str, name: str) -> None:
    decoder = model(architecture, name)
    close(logits(decoder, **padded(left=5))[1:2, 5:], logits(decoder, IDS[1:2, 5:]))


@pairs
def test_a_cache_changes_nothing(architecture: str, name: str) -> None:
    """Filled with 5 tokens, then one, then one, then several at once."""
    decoder = model(architecture, name)
    for inputs in (padded(), padded(left=3)):
        cache = DynamicCache(config=decoder.config)
        parts = []
        for start, end in pairwise((0, 5, 6, 7, 10, T)):
            new = {key: inputs[key][:, start:end] for key in ("input_ids", "position_ids")}
            parts.append(
                logits(decoder, **new, attention_mask=inputs["attention_mask"][:, :end], past_key_values=cache)
            )
        real = inputs["attention_mask"].bool()
        close(torch.cat(parts, 1)[real], logits(decoder, **inputs)[real])


@names
def test_a_static_cache_has_empty_places_that_nobody_sees(name: str) -> None:
    decoder = model("llama", name)
    cache = StaticCache(config=decoder.config, max_cache_len=20)
    parts = [logits(decoder, IDS[:, a:b], past_key_values=cache) for a, b in pairwise((0, 5, 6, 7, T))]
    close(torch.cat(parts, 1), logits(decoder))


@pairs
def test_generation_takes_the_most_likely_token_of_each_step(architecture: str, name: str) -> None:
    decoder = model(architecture, name)
    inputs = padded(left=5)
    whole, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(5):
        mask = F.pad(mask, (0, whole.shape[1] - mask.shape[1]), value=1)
        likely = logits(decoder, whole, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        whole = torch.cat((whole, likely[:, -1:].argmax(-1)), 1)
    got = decoder.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
    )
    assert got.equal(whole)


@pairs
def test_two_steps_change_the_loss(architecture: str, name: str) -> None:
    decoder = model(architecture, name).train()
    inputs = padded(left=5)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = decoder(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())
        moved = [n for n, p in decoder.named_parameters() if p.grad is not None and p.grad.any()]
        assert any(re.search("q_proj|q_a_proj|query|c_attn", n) for n in moved)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


# What the mask says


@pytest.mark.parametrize("name", ["relu-attn", "softpick"])
def test_a_window_hides_what_is_further_back(name: str) -> None:
    decoder = model("mistral", name, MistralConfig(**WINDOWED | {"num_hidden_layers": 1}))
    embedded_BTD = decoder.get_input_embeddings()(IDS).detach().requires_grad_()
    decoder(inputs_embeds=embedded_BTD).logits[:, 8].square().sum().backward()
    seen_T = embedded_BTD.grad.abs().sum((0, 2)) > 0
    assert seen_T.tolist() == [8 - WINDOW < t <= 8 for t in range(T)]


@names
def test_packed_sequences_do_not_see_one_another(name: str) -> None:
    decoder = model("llama", name)
    places = torch.tensor([[*range(5), *range(T - 5)]])
    packed = logits(decoder, IDS[:1], position_ids=places, use_cache=False)
    close(packed, torch.cat((logits(decoder, IDS[:1, :5]), logits(decoder, IDS[:1, 5:])), 1))


def test_a_mask_of_ones_own_is_honoured() -> None:
    decoder = model("llama", "relu-attn")
    see = torch.eye(T, dtype=torch.bool).expand(3, 1, T, T)
    alone = logits(decoder, IDS.reshape(-1, 1), position_ids=torch.arange(T).repeat(3)[:, None])
    close(logits(decoder, attention_mask=see), alone.view(3, T, VOCAB))


@names
def test_a_layer_that_is_not_causal_sees_everybody(name: str) -> None:
    module, heads = attention_of(model("llama", name)), torch.randn(2, H, T, 8)
    y_BTHE, _ = AttentionInterface()[name](module, heads, heads, heads, None, is_causal=False)
    everybody = torch.ones(2, 1, T, T, dtype=torch.bool)
    close(y_BTHE, AttentionInterface()[name](module, heads, heads, heads, everybody)[0])
    close(y_BTHE.flip(1), AttentionInterface()[name](module, *[heads.flip(2)] * 3, None, is_causal=False)[0])


@names
def test_a_query_that_sees_nobody_gets_nothing(name: str) -> None:
    module, heads = attention_of(model("llama", name)), torch.randn(2, H, T, 8, requires_grad=True)
    see = torch.ones(2, 1, T, T, dtype=torch.bool).tril().index_fill(2, torch.tensor([0, 3]), False)
    y_BTHE, _ = AttentionInterface()[name](module, heads, heads, heads, see)
    y_BTHE.sum().backward()
    assert not y_BTHE[:, [0, 3]].any()
    assert y_BTHE[:, 4:].all(-1).any()
    assert heads.grad.isfinite().all()


# What it returns


def attention_of(decoder: PreTrainedModel) -> nn.Module:
    return next(m for m in decoder.modules() if type(m).__name__.endswith("Attention"))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_lie_inside_tokens_and_the_dtype_stays(name: str, dtype: torch.dtype) -> None:
    module = attention_of(model("llama", name).to(dtype))
    q, k = torch.randn(2, H, T, 8, dtype=dtype), torch.randn(2, 2, T, 8, dtype=dtype)
    for mask in (None, torch.ones(2, 1, T, T, dtype=torch.bool).tril()):
        y_BTHE, weights = AttentionInterface()[name](module, q, k, k, mask)
        assert y_BTHE.shape == (2, T, H, 8)
        assert y_BTHE.is_contiguous()
        assert y_BTHE.dtype == dtype
        assert weights is None


@pairs
def test_weights_are_there_for_who_asks(architecture: str, name: str) -> None:
    inputs = padded(left=5)
    decoder, other = model(architecture, name), model(architecture, f"reference-{name}")
    unasked = logits(decoder)
    for kwargs in ({"input_ids": IDS}, inputs):
        with torch.no_grad():
            got = decoder(**kwargs, output_attentions=True).attentions
            expected = other(**kwargs, output_attentions=True).attentions
        assert len(got) == len(expected) == decoder.config.num_hidden_layers
        for weights, formula in zip(got, expected):
            assert weights.dtype == torch.float32
            close(weights.double(), formula)
    close(logits(decoder), unasked)


def test_dropout_is_of_the_weights_in_training_alone() -> None:
    decoder = model("llama", "relu-attn", LlamaConfig(**GROUPED | {"num_hidden_layers": 1}, attention_dropout=0.5))
    torch.manual_seed(0)
    (kept,) = decoder(IDS, output_attentions=True).attentions
    (dropped,) = decoder.train()(IDS, output_attentions=True).attentions
    share = ((dropped == 0) & (kept > 0)).sum() / (kept > 0).sum()
    assert 0.4 < share < 0.6
    close(dropped, torch.where(dropped == 0, 0.0, 2 * kept))


# What is refused, in one line


def refused(why: str, decoder: PreTrainedModel, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        decoder(IDS, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_is_no_part_of_a_form_is_refused() -> None:
    refused("relu-attn has no softcap", model("gemma2", "relu-attn", Gemma2Config(**WINDOWED)))
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    sinks = GptOssConfig(**WINDOWED, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope)
    refused("softmax1 has no s_aux", model("gpt-oss", "softmax1", sinks))
    decoder = model("llama", "softpick")
    refused("softpick has no cu_seq_lens_q", decoder, cu_seq_lens_q=torch.tensor([0, 5, T], dtype=torch.int32))
    refused("not torch.float32 [3, 1, 12, 12]", decoder, attention_mask=torch.zeros(3, 1, T, T))


def test_a_model_that_only_takes_the_mask_is_refused() -> None:
    """transformers itself says nothing, and the model would see its future."""
    bloom = model("bloom", "relu-attn", BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=H))
    refused("Bloom models do not take their attention", bloom)
    with pytest.raises(KeyError, match="relu-attn"):  # transformers' own refusal
        model("gpt-j", "relu-attn", GPTJConfig(**GPT2, rotary_dim=4))


# Names


def test_the_names_are_those_of_the_recipes() -> None:
    expected = {}
    for name in available(ROOT / "recipes"):
        mitigations = list(load_recipe(name, ROOT)[1].mitigations.values())
        if len(mitigations) == 1 and seams(mitigations[0]) == ["weights"]:
            form = mitigations[0].weights(QuantbenchConfig())
            if not list(form.parameters()):
                expected[name] = mitigations[0]
    assert expected == interface.FORMS
    assert interface.register() == NAMES == list(interface.FORMS)


@names
def test_transformers_reads_nothing_else_into_a_name(name: str) -> None:
    """It looks for kernels on a hub behind a slash or a colon, and for its own kinds of attention in the words."""
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert not re.search("flash|flex|sdpa|eager|paged", name)


def test_registering_twice_is_as_once() -> None:
    decoder = model("llama", "relu-attn")
    before = logits(decoder)
    interface.register()
    assert logits(decoder).equal(before)


def test_a_checkpoint_is_reloaded_by_name(tmp_path: Path) -> None:
    decoder = model("llama", "relu-attn")
    decoder.save_pretrained(tmp_path)
    assert "relu-attn" not in (tmp_path / "config.json").read_text()
    forgetful = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert forgetful.config._attn_implementation == "sdpa"
    assert not torch.allclose(logits(forgetful), logits(decoder))
    forgetful.set_attn_implementation("relu-attn")
    assert logits(forgetful).equal(logits(decoder))
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="relu-attn")).equal(
        logits(decoder)
    )


def test_our_own_model_does_not_notice() -> None:
    decoder = our_model({"sigmoid-attention": {}})
    before = logits(decoder)
    interface.register()
    decoder.set_attn_implementation("relu-attn")  # transformers logs that it cannot be
    assert logits(decoder).equal(before)


def test_the_package_does_not_load_it() -> None:
    code = "import quantbench, quantbench.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "torch", "quantbench.interface"} & set(loaded)
