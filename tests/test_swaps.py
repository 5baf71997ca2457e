"""What takes a module's place computes what that module computed, and stays what it is in the hands of libraries."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_anatomy import CONFIGS, IDS, STREAMLESS, architectures, close, error, logits
from test_anatomy import model as theirs
from tiny import ENTRIES, MODELS, VOCAB, gaussian, quantizer
from tiny import model as ours
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from quantbench import catalog, harness
from quantbench.anatomy import anatomy
from quantbench.calibration import Calibration
from quantbench.mitigations import fold_projection
from quantbench.quantizers import IntegerEmbedding, LowBitLinear
from quantbench.quantizers.bnb import BnbInt8

DATA = Calibration([(IDS[:2], None), (IDS[2:], None)])
WHOLE = torch.ones(IDS.shape, dtype=torch.bool)
TABLES = ("embeddings", "head")
WORDS = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "a": 1})), bos_token="<s>", unk_token="a"
)


def by_hand(decoder: Any, low: Any) -> Any:
    """The model in full precision with the weights that a quantized copy of it has, its modules as they were."""
    exact, quantized = anatomy(decoder), anatomy(low)
    exact.head.weight = nn.Parameter(exact.head.weight.detach().clone())  # no longer tied
    with torch.no_grad():
        for name, (layer, linear) in exact.linears().items():
            module = quantized.blocks[layer].get_submodule(name.partition(".")[2])
            assert isinstance(module, LowBitLinear)
            linear.weight = nn.Parameter(module.dequantized_NK().to(linear.weight.dtype))
        if isinstance(quantized.head, LowBitLinear):
            exact.head.weight.copy_(quantized.head.dequantized_NK())
        if isinstance(quantized.table, IntegerEmbedding):
            table = quantized.table
            rows = nn.Parameter(table(torch.arange(table.num_embeddings)))
            exact.table.weight = rows if table.multiplier is None else nn.Parameter(rows / table.multiplier)
    return decoder


# --- every architecture, site and quantizer --------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_tables_and_linears_are_those_of_the_model_with_rounded_weights(
    architecture: str, tied: bool, bits: int
) -> None:
    if architecture == "gpt-oss":
        pytest.skip("its experts are no Linears: it is refused")

    config = CONFIGS[architecture]()
    config.tie_word_embeddings = tied
    decoder = theirs(architecture, config=config)
    full = logits(decoder)
    for sites in (("inputs", "embeddings"), ("inputs", "head"), ("inputs", *TABLES)):
        low = copy.deepcopy(decoder)
        quantizer("w8a8-token", weights=bits, activations=16, sites=sites).quantize(low, DATA)
        expected = logits(by_hand(copy.deepcopy(decoder), low))
        assert error(logits(low), expected) < 1e-5
        assert error(expected, full) > 1e-3
        before = logits(low)
        harness._lm(low, WORDS, None, 8)
        assert torch.equal(logits(low), before)
    assert torch.equal(logits(decoder), full)


@pytest.mark.parametrize("name", catalog.names("quantizers"))
@pytest.mark.parametrize("architecture", ["gemma3", "ours"])
def test_every_quantizer_spares_the_function_where_every_position_is_exempt(architecture: str, name: str) -> None:
    """What is left is the rounding of the weights."""

    def made() -> Any:
        if architecture == "ours":
            return ours(mlp_width=128)
        config = CONFIGS[architecture]()
        config.intermediate_size = 128  # in groups and blocks of 64
        return theirs(architecture, config=config)

    low = made()
    quantizer(name).quantize(low, DATA)
    with DATA.exemption.of(WHOLE):
        assert error(logits(low), logits(by_hand(made(), low))) < 1e-4


@pytest.mark.parametrize("change", MODELS)
def test_tables_of_every_mitigation_are_rounded_and_no_more(change: str) -> None:
    def made() -> Any:
        decoder = ours(MODELS[change])
        fold_projection(decoder)
        return decoder

    low = made()
    quantizer("w8a8-token", activations=16, sites=("inputs", *TABLES)).quantize(low, DATA)
    assert error(logits(low), logits(by_hand(made(), low))) < 1e-5


@pytest.mark.parametrize("name", ["smoothquant", "hadamard"])
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in (*STREAMLESS, "olmo")])
def test_a_rewritten_model_that_was_tied_survives_lm_eval(architecture: str, name: str) -> None:
    config = CONFIGS[architecture]()
    config.tie_word_embeddings = True
    decoder = theirs(architecture, config=config)
    before = logits(decoder)
    prepared = ENTRIES[name]().prepare(decoder, DATA).model
    close(logits(prepared), before, 2e-3)
    rewritten = logits(prepared)
    harness._lm(prepared, WORDS, None, 8)
    assert torch.equal(logits(prepared), rewritten)


# --- modules that do more than their class ---------------------------------------------------------------------------


class Adapted(nn.Linear):
    """A low-rank update beside the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.mean(-1, keepdim=True)


class Twice(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Embedding):
    """Says that it scales, and does more."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(*table.weight.shape, _weight=table.weight)
        self.embed_scale = torch.tensor(3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale + 1


def adapt(module: Any) -> None:
    module.__class__ = Adapted


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, y: 2 * y)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def own(module: Any) -> None:
    former = module.forward
    module.forward = lambda x: 2 * former(x)


def weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module)


@pytest.mark.parametrize("more", [adapt, hook, pre_hook, own, weight_norm])
@pytest.mark.parametrize("name", ["w8a8-token", "w4a16-gptq", "bnb-int8"])
def test_a_linear_that_does_more_is_refused_before_anything_is_changed(more: Callable[[Any], None], name: str) -> None:
    decoder = theirs("llama")
    more(decoder.model.layers[1].mlp.down_proj)
    before = logits(decoder)
    with pytest.raises(ValueError, match=r"^1\.mlp\.down_proj: this Linear [^\n]*would be lost[^\n]*$"):
        quantizer(name, **{"group": 32} if name.startswith("w4") else {}).quantize(decoder, DATA)
    assert torch.equal(logits(decoder), before)


@pytest.mark.parametrize("more", [adapt, hook, own])
def test_so_is_a_head(more: Callable[[Any], None]) -> None:
    decoder = theirs("llama")
    more(decoder.lm_head)
    with pytest.raises(ValueError, match=r"^head: this Linear [^\n]*$"):
        quantizer("w8a8-token", sites=("inputs", "head")).quantize(decoder, DATA)


def limited(table: Any) -> None:
    table.max_norm = 1.0


@pytest.mark.parametrize("more", [hook, own, limited])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_so_is_a_table(more: Callable[[Any], None], architecture: str) -> None:
    decoder = theirs(architecture)
    more(decoder.model.embed_tokens)
    with pytest.raises(ValueError, match=r"^embeddings: this Embedding [^\n]*$"):
        quantizer("w8a8-token", sites=("inputs", "embeddings")).quantize(decoder, DATA)


def test_a_scale_that_is_no_scale_alone_is_refused() -> None:
    decoder = theirs("llama")
    decoder.model.embed_tokens = Shifted(decoder.model.embed_tokens)
    with pytest.raises(ValueError, match="embeddings: this Embedding is a Shifted with a forward of its own"):
        quantizer("w8a8-token", sites=("inputs", "embeddings")).quantize(decoder, DATA)


def test_a_conv1d_that_does_more_is_refused() -> None:
    decoder = theirs("gpt2")
    decoder.transformer.h[0].mlp.c_fc.__class__ = Twice
    with pytest.raises(ValueError, match=r"^mlp\.c_fc: this Conv1D is a Twice with a forward of its own"):
        anatomy(decoder)


def test_a_projection_whose_weights_are_not_all_is_no_figure_of_a_head() -> None:
    decoder = theirs("llama")
    adapt(decoder.model.layers[0].self_attn.o_proj)
    with pytest.raises(ValueError, match="output projection is a Adapted with a forward of its own"):
        anatomy(decoder).heads[0].output_HED(4)


def test_a_parametrised_weight_is_read_as_it_computes() -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    decoder, plain = theirs("llama"), theirs("llama")
    linear = decoder.model.layers[0].mlp.up_proj
    parametrize.register_parametrization(linear, "weight", Negated())
    plain.model.layers[0].mlp.up_proj.weight.data.neg_()
    for low in (decoder, plain):
        quantizer("w8a8-token").quantize(low, DATA)
    assert torch.equal(logits(decoder), logits(plain))


def test_a_module_at_two_places_is_replaced_at_both() -> None:
    decoder = theirs("llama")
    for layer in decoder.model.layers:
        layer.mlp.up_proj = layer.mlp.gate_proj
    quantizer("w8a8-token", activations=16).quantize(decoder, DATA)
    for layer in decoder.model.layers:
        assert isinstance(layer.mlp.up_proj, LowBitLinear)
        assert layer.mlp.up_proj is layer.mlp.gate_proj


# --- libraries -------------------------------------------------------------------------------------------------------

DOINGS: dict[str, Callable[[Any], Any]] = {
    "tie_weights": lambda decoder: decoder.tie_weights(),
    "post_init": lambda decoder: decoder.post_init(),
    "init_weights": lambda decoder: decoder.init_weights(),
    "to": lambda decoder: decoder.to("cpu"),
    "train, eval": lambda decoder: decoder.train().eval(),
    "resize to the same": lambda decoder: decoder.resize_token_embeddings(VOCAB),
    "generate": lambda decoder: decoder.generate(IDS[:, :3], max_new_tokens=2, do_sample=False),
}
LOW: dict[str, dict[str, Any]] = {
    "w8a8-token": {"sites": ("inputs", *TABLES)},
    "w4a4-token": {"sites": ("inputs", "head"), "group": 0},
    "w8a8-static": {"sites": ("inputs", "residual", "keys", "embeddings")},
    "w4a16-awq": {"group": 32},
    "llm-int8": {},
    "bnb-int8": {},
}


@pytest.mark.parametrize("name", LOW)
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_the_same_whatever_a_library_does_with_it(name: str) -> None:
    config = CONFIGS["llama-tied-biased"]()
    low = theirs("llama-tied-biased", config=config)
    quantizer(name, **LOW[name]).quantize(low, DATA)
    before = logits(low)
    for doing, do in DOINGS.items():
        do(low)
        assert torch.equal(logits(low), before), doing
        low = copy.deepcopy(low)
        assert torch.equal(logits(low), before), doing


def test_a_quantized_or_rotated_model_is_not_saved_as_what_it_was(tmp_path: Any) -> None:
    low, rotated = theirs("llama"), theirs("llama")
    quantizer("w8a8-token").quantize(low, DATA)
    ENTRIES["hadamard"]().prepare(rotated, DATA)
    for decoder in (low, copy.deepcopy(low), rotated):
        with pytest.raises(ValueError, match=r"saved by quantbench\.packed\.save"):
            decoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_lm_eval_changes_is_refused() -> None:
    decoder = theirs("llama-tied-biased")
    anatomy(decoder).head.weight = nn.Parameter(gaussian(*decoder.lm_head.weight.shape, seed=9))  # and says it is tied
    with pytest.raises(ValueError, match="lm-eval changed the model that it was given"):
        harness._lm(decoder, WORDS, None, 8)


# --- above float16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["input", "weight", "output"])
def test_what_float16_cannot_hold_of_a_product_is_counted(what: str) -> None:
    decoder = theirs("llama")
    block = decoder.model.layers[-1]
    with torch.no_grad():
        if what == "input":
            block.post_attention_layernorm.weight[:] = 1e6
            block.mlp.up_proj.weight *= 1e-6
            block.mlp.gate_proj.weight *= 1e-6
        elif what == "weight":
            block.mlp.down_proj.weight[3, 5] = 7e4
            block.mlp.up_proj.weight *= 1e-6
        else:
            block.mlp.down_proj.weight *= 1e4
            assert float(block.mlp.down_proj.weight.abs().max()) < 65504
    largest: list[float] = []
    for module in [m for m in block.modules() if isinstance(m, nn.Linear)]:
        module.register_forward_hook(lambda m, args, y: largest.append(float(y.abs().max())))
    logits(decoder)
    for module in block.modules():
        module._forward_hooks.clear()
    assert (max(largest) > 65504) == (what == "output")
    share = BnbInt8().quantize(decoder, DATA)["above-fp16"]
    parts = 7 * decoder.config.num_hidden_layers
    expected = {"input": 2 / parts, "weight": 1 / parts}
    assert share == pytest.approx(expected.get(what, share), rel=1e-6)
    assert 0 < share <= 2 / parts


def test_ids_below_zero_are_no_rows_from_the_end() -> None:
    table = IntegerEmbedding(nn.Embedding(5, 8), 8)
    with pytest.raises(IndexError):
        table(torch.tensor([[-1]]))
    assert math.isfinite(float(table(torch.tensor([[4]])).sum()))
