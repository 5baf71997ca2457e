"""Portraits of models whose extreme tokens were planted, against figures known by hand or computed anew."""

import copy
import gc
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from checkpoint import SHAPES, VOCAB, model_of, tokenizer_of
from shown import without_torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantbench import catalog, figures
from quantbench.gallery import compose
from quantbench.markup import escape, markdown
from quantbench.metrics import median
from quantbench.portrait import _text_of, pictures, portrait, tables
from quantbench.pretrained import Given
from quantbench.results import canonical

LENGTH = 12
# A byte-level BPE that has read small letters alone: of capitals each is a token.
TOKENIZER = tokenizer_of(["the cat sat on the mat and saw the dog that ran to the red house near old trees"] * 4)
USUAL, LATE = "ABCZEFGHIJKL", "ABCDEZGHIJKL"  # Z stands at 3 and at 5
Z = TOKENIZER.convert_tokens_to_ids("Z")
FEATURE, VALUE = 5, 300.0
STILL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}  # the last pair of features hardly turns


def given(model: Any, bos: int | None = 0, dtype: str = "float32") -> Given:
    return Given(model, TOKENIZER, bos, {"name": "tiny", "dtype": dtype})


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@torch.no_grad()
def planted(value: float = VALUE, **changes: Any) -> Any:
    """A Llama whose stream is its embedding, in which Z is far larger than all others, and draws all attention."""
    model = model_of("llama", attention_bias=True, **STILL, **changes)
    model.model.embed_tokens.weight[Z, FEATURE] = value
    features = model.config.head_dim
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        last = slice(features // 2 - 1, None, features)  # of every head, the feature of the slowest pair
        attention.q_proj.bias[last] = 10.0
        attention.k_proj.weight[last, FEATURE] = 1.0  # which reads about sqrt(64) at Z
    return model


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    return portrait(given(planted()), [USUAL, LATE, USUAL * 2, "too short"], LENGTH, 8)


# --- what was planted is found ---


def test_who_carries_the_peak_is_known_by_position_token_and_feature(body: dict[str, Any]) -> None:
    assert body["windows"] == 4
    for at in body["per-layer"]:
        found = {name: at[name] for name in ("position", "token", "text", "feature", "value")}
        assert found == {"position": 3, "token": Z, "text": "Z", "feature": FEATURE, "value": VALUE}
        assert (at["position-share"], at["token-share"], at["feature-share"]) == (0.75, 1.0, 1.0)
    assert [body["with-bos"][name] for name in ("position", "text", "feature")] == [3, "Z", FEATURE]


def test_the_norms_are_those_of_the_embedding(body: dict[str, Any]) -> None:
    norms_V = planted().model.embed_tokens.weight.detach().double().norm(dim=-1)
    expected = []
    for text in (USUAL, LATE, USUAL, USUAL):
        norms_T = norms_V[[0, *ids_of(text)[1:]]]
        expected.append([norms_T.max(), median(norms_T), norms_T.max() / median(norms_T), norms_T[0],
                         norms_T[0] - norms_T[1:].mean()])  # fmt: skip
    names = ("norm", "median", "ratio", "bos-norm", "excess")
    for at in body["per-layer"]:
        assert [at[name] for name in names] == pytest.approx(torch.tensor(expected).mean(0).tolist(), rel=1e-6)
    assert body["residual-peak"] == body["metrics"]["residual-peak"]["value"] == body["with-bos"]["residual-peak"]


def test_the_sink_is_found_where_it_stands_and_not_assumed_first() -> None:
    body = portrait(given(planted()), [USUAL * 3], LENGTH, 3)
    first, *_ = body["sinks"]["positions"]
    assert (first["position"], first["text"], first["token-share"]) == (3, "Z", 1.0)
    assert (first["share"], first["heads"], body["sinks"]["heads"]) == (1.0, 12, 12)
    assert body["sinks"]["k"] == body["with-bos"]["sink"] == body["without-bos"]["sink"] == 3
    assert body["sinks"]["searched"] == LENGTH // 2 + 1
    assert all(at["sink-attention"] > 0.99 > 0.3 > at["bos-attention"] for at in body["per-layer"])
    assert all(at["sink-rate"] == 1 and at["delta-logit"] > 10 for at in body["per-layer"])


def test_two_sinks_are_listed_with_the_windows_in_which_they_are_one(body: dict[str, Any]) -> None:
    listed = {at["position"]: at for at in body["sinks"]["positions"]}
    assert [listed[k]["share"] for k in (3, 5)] == [0.75, 0.25]
    assert [listed[k]["token-share"] for k in (3, 5)] == [0.75, 0.75]  # F stands at 5 where Z does not
    assert (listed[3]["text"], listed[5]["text"]) == ("Z", "F")
    assert (listed[3]["heads"], listed[5]["heads"]) == (12, 0)  # .25 on average is no sink


def test_extreme_tokens_are_counted_with_their_positions(body: dict[str, Any]) -> None:
    extreme = body["sinks"]["extreme"]
    assert extreme["tokens"] == [{"token": Z, "text": "Z", "count": 4, "of": 4, "first": 3, "last": 5}]
    assert (extreme["per-window"], extreme["ids"]) == (1.0, 1)
    assert extreme["positions"] == [{"position": 3, "count": 3}, {"position": 5, "count": 1}]


@pytest.mark.parametrize(("value", "fits"), [(300.0, True), (65504.0, True), (65536.0, False), (-1e5, False)])
def test_what_float16_cannot_hold_is_told(value: float, fits: bool) -> None:
    body = portrait(given(planted(value)), [USUAL], LENGTH, 1)
    overflow = body["overflow"]
    assert overflow["largest"] == body["with-bos"]["largest"] == abs(value)
    assert overflow["site"] in ("embedding", "residual")
    assert overflow["sites"]["residual"] == {"largest": abs(value), "place": "model.layers.0", "layer": 0}
    assert overflow["float16"] == {"fits": fits, "room": 65504 / abs(value)}
    assert overflow["bfloat16"]["fits"]
    (told,) = [title for title, _ in tables(body) if title.startswith("Largest")]
    assert ("float16 overflows" in told) is not fits


def test_every_kind_of_site_is_looked_at() -> None:
    """A number is planted at each in turn, which only that site sees so large."""
    sizes = {}
    for site in ("norm", "linear-output", "scores", "linear-input"):
        model = planted()
        layer = model.model.layers[1]
        with torch.no_grad():
            if site == "norm":
                model.model.norm.weight[7] = 1e6
                model.lm_head.weight[:, 7] = 0.0
            elif site == "linear-output":
                layer.mlp.up_proj.weight[:] = 1e5
                layer.mlp.gate_proj.weight.zero_()
            elif site == "scores":
                layer.self_attn.q_proj.bias.mul_(1e3)
            else:
                layer.mlp.up_proj.weight[:], layer.mlp.gate_proj.weight[:] = 1e3, 1e3
        overflow = portrait(given(model), [USUAL], LENGTH, 1)["overflow"]
        sizes[site] = (overflow["site"], overflow["layer"])
    assert sizes == {
        "norm": ("norm", None), "linear-output": ("linear-output", 1), "scores": ("scores", 1),
        "linear-input": ("linear-input", 1),
    }  # fmt: skip


def test_a_sum_that_no_module_gives_is_seen_where_a_norm_reads_it() -> None:
    """The attention puts a number into the stream, which the MLP takes out again."""
    model = planted()
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight[9] = 1e6
        layer.self_attn.v_proj.bias[:] = 1.0
    seen: list[float] = []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.append(float(args[0].abs().max())))
    layer.register_forward_hook(lambda m, args, y: torch.zeros_like(y))
    overflow = portrait(given(model), [USUAL], LENGTH, 1)["overflow"]
    found = overflow["sites"]["norm-input"]
    assert found["largest"] == max(seen) > 65504
    assert (found["layer"], found["place"]) == (1, "model.layers.1.post_attention_layernorm")
    assert not overflow["float16"]["fits"]


def test_logits_count_as_what_the_head_gives() -> None:
    model = planted()
    model.lm_head.weight.data[7] = 1e6
    overflow = portrait(given(model), [USUAL], LENGTH, 1)["overflow"]
    assert (overflow["site"], overflow["place"]) == ("linear-output", "lm_head")


def test_weights_that_float16_cannot_hold_count_though_nothing_large_passes() -> None:
    model = planted()
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = 7e4
    model.model.layers[2].mlp.up_proj.weight.data[4] = 0.0
    overflow = portrait(given(model), [USUAL], LENGTH, 1)["overflow"]
    assert (overflow["site"], overflow["layer"], overflow["place"]) == ("weight", 2, "model.layers.2.mlp.down_proj")
    assert not overflow["float16"]["fits"]
    assert overflow["sites"]["residual"]["largest"] == VALUE


def test_later_keys_are_no_scores() -> None:
    """The keys behind a query may be as large as they like: nobody looks at them."""
    late = USUAL[:-1].replace("Z", "D") + "Z"
    model = planted()
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data *= 100
    ids = ids_of(late)
    x_TD = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([0, *ids[1:]])))
    keys_T = x_TD[:, FEATURE].detach().double()
    seen = max(float(keys_T[: i + 1].abs().max()) for i in range(LENGTH))
    overflow = portrait(given(model), [late], LENGTH, 1)["overflow"]
    assert overflow["sites"]["scores"]["largest"] == pytest.approx(1000 * seen / 4, rel=1e-3)
    early = portrait(given(model), [late.replace("Z", "A")], LENGTH, 1)["overflow"]["sites"]["scores"]["largest"]
    assert early < overflow["sites"]["scores"]["largest"]


# --- against a recomputation in float64 ---

PROSE = "the cat saw a dog near the old red house and ran to the trees that sat on the mat by day " * 8


@torch.no_grad()
def recomputed(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """From the hidden states and attentions that transformers itself gives, in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    states: list[Tensor] = []
    values: list[Tensor] = []
    decoder = exact.model if hasattr(exact, "model") else exact.transformer
    hooks = []
    for block in decoder.layers if hasattr(decoder, "layers") else decoder.h:
        hooks.append(block.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)))  # fmt: skip
        if hasattr(block, "self_attn"):
            hooks.append(block.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out)))
    ids_NT = torch.tensor(rows)
    found = exact(ids_NT, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    norms_LNT = torch.stack(states).norm(dim=-1)
    medians_LN = median(norms_LNT)
    weights_LNHTT = torch.stack(found.attentions)
    queries_K = torch.arange(ids_NT.shape[1] - 1, 0, -1)
    alphas_LNHK = weights_LNHTT[..., :-1].tril(-1).sum(-2) / queries_K
    loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten())
    figures = {
        "norm": norms_LNT.amax(-1).mean(-1),
        "median": medians_LN.mean(-1),
        "ratio": (norms_LNT.amax(-1) / medians_LN).mean(-1),
        "bos-norm": norms_LNT[..., 0].mean(-1),
        "excess": (norms_LNT[..., 0] - norms_LNT[..., 1:].mean(-1)).mean(-1),
        "bos-attention": weights_LNHTT[..., 1:, 0].mean((1, 2, 3)),
        "alphas": alphas_LNHK,
        "loss": float(loss),
        "largest": torch.stack(states).abs().amax(),
    }
    if values:
        layers = exact.model.layers
        groups, heads = model.config.num_key_value_heads, model.config.num_attention_heads
        drains, plain = [], []
        for layer, value_NTF in zip(layers, values, strict=True):
            v_NGTE = value_NTF.unflatten(-1, (groups, -1)).transpose(1, 2)
            v_NHTE = v_NGTE.repeat_interleave(heads // groups, 1)
            output_HED = layer.self_attn.o_proj.weight.T.unflatten(0, (heads, -1))
            for kept, norms_NHT in ((drains, (v_NHTE @ output_HED).norm(dim=-1)), (plain, v_NHTE.norm(dim=-1))):
                others = (norms_NHT.sum(-1, keepdim=True) - norms_NHT) / (norms_NHT.shape[-1] - 1)
                kept.append((norms_NHT / others).mean((0, 1)))
        figures |= {"value-drain": torch.stack(drains), "value-drain-plain": torch.stack(plain)}
    return figures


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["with-bos", "without-bos"])
def test_figures_are_those_of_transformers_in_float64(kind: str, way: str) -> None:
    length, count = 24, 5
    model = model_of(kind)
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            parameter.data = 0.25 * tiny.gaussian(*parameter.shape, seed=index)
    bos = 0 if way == "with-bos" else None
    rows = [ids.tolist() for _, ids in itertools.islice(given(model).windows([PROSE], length, bos=False), count)]
    expected = recomputed(model, [[bos, *row[1:]] if bos is not None else row for row in rows])
    body = portrait(given(model, bos), [PROSE], length, count)
    side = body[way]
    assert side["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert side["tokens"] == count * (length - 1)
    assert side["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    for name in ("norm", "median", "ratio", "bos-norm", "excess", "bos-attention"):
        assert [at[name] for at in body["per-layer"]] == pytest.approx(expected[name].tolist(), rel=1e-4), name
    rates_K = (expected["alphas"] > 0.3).double().mean((0, 1, 2))
    for at in body["sinks"]["positions"]:
        assert at["share"] == pytest.approx(float(rates_K[at["position"]]))
    k = body["sinks"]["k"]
    assert rates_K[k] == rates_K[: length // 2 + 1].max()
    attention_L = expected["alphas"].mean((1, 2))[:, k]
    assert [at["sink-attention"] for at in body["per-layer"]] == pytest.approx(attention_L.tolist(), rel=1e-4)
    assert body["overflow"]["sites"]["residual"]["largest"] == pytest.approx(float(expected["largest"]), rel=1e-5)
    for name in ("value-drain", "value-drain-plain"):
        if name in expected:
            found = [at[name] for at in body["per-layer"]]
            assert found == pytest.approx(expected[name][:, k].tolist(), rel=1e-4), name


def test_both_ways_predict_the_same_tokens() -> None:
    body = portrait(given(model_of("llama")), [PROSE], 16, 4)
    assert body["with-bos"]["tokens"] == body["without-bos"]["tokens"] == 4 * 15
    assert body["with-bos"]["loss"] != body["without-bos"]["loss"]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [(1, "A"), (3, "ABD"), (4, "AABD"), (6, "AABBDD"), (7, "AAABBDD"), (9, "AAAABBDDD"), (99, "AAAABBDDD")],
)
def test_windows_are_spread_over_the_documents(windows: int, expected: str) -> None:
    """A document is one letter, over and over; C has too few for a window."""
    texts = ["A" * 4 * 4, "B" * 4 * 2 + "B", "C" * 3, "D" * 4 * 3]
    body = portrait(given(model_of("llama"), None), texts, 4, windows)
    assert (body["windows"], body["documents"]) == (len(expected), len(set(expected)))
    found = _text_of(given(model_of("llama"), None), texts, 4, windows, None)
    assert [TOKENIZER.decode(ids_T) for ids_T in found] == [4 * letter for letter in expected]


def test_bits_per_byte_by_hand() -> None:
    side = portrait(given(model_of("llama")), [USUAL * 2], LENGTH, 2)["with-bos"]  # a byte a token
    assert side["bits-per-byte"] == pytest.approx(side["loss"] / math.log(2))


@pytest.mark.parametrize("length", [4, 7, 16])
def test_bits_per_byte_of_windows_that_cut_characters(length: int) -> None:
    """Of characters that the tokenizer never saw each byte is a token."""
    text = "的一是在不了有和人这中大为上个国" * 8
    assert len(ids_of(text)) == len(text.encode())
    body = portrait(given(model_of("llama")), [text], length, 9)
    for side in (body["with-bos"], body["without-bos"]):
        assert side["bits-per-byte"] == pytest.approx(side["loss"] / math.log(2))


def test_without_offsets_there_are_no_bits_per_byte() -> None:
    class Slow:
        def __init__(self) -> None:
            self.decode = TOKENIZER.decode

        def encode(self, text: str, **how: Any) -> list[int]:
            return list(TOKENIZER.encode(text, **how))

    body = portrait(Given(model_of("llama"), Slow(), 0, {"name": "tiny", "dtype": "float32"}), [PROSE], 16, 2)
    assert body["with-bos"]["bits-per-byte"] is None
    assert any("bits per byte are not known" in note for note in body["notes"])
    sound(body)


# --- models and texts of every kind ---


def sound(body: dict[str, Any]) -> None:
    """As a record it is JSON without NaN, and it can be shown."""
    body.pop("run")
    record = compose("measure", {"name": "tiny"}, {}, {}, body)
    assert json.loads(canonical(record)) == record
    for title, (header, rows) in tables(record):
        assert title
        assert rows
        assert all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in rows)
        assert "NaN" not in escape(title) + markdown((header, rows))
    (picture,) = pictures(record).values()
    assert picture.startswith(b"<?xml")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_of_transformers(kind: str) -> None:
    body = portrait(given(model_of(kind)), [PROSE], 20, 3)
    assert body["layers"] == len(body["per-layer"]) == len(body["without-bos"]["per-layer"]["norm"])
    assert set(body["metrics"]) == set(catalog.names("metrics"))
    sound(body)


@pytest.mark.parametrize("mitigations", [None, {"registers": {"count": 2}}, {"kv-bias": {}}], ids=str)
def test_a_model_of_ours(mitigations: Any) -> None:
    model = tiny.model(mitigations, vocab_size=VOCAB)
    body = portrait(given(model), [PROSE], 20, 3)
    assert body.get("front", 0) == model.registers
    assert body["with-bos"]["tokens"] == 3 * 19
    sound(body)


def test_a_learned_token_in_front_carries_the_peak() -> None:
    model = tiny.model({"registers": {"count": 2}}, vocab_size=VOCAB)
    with torch.no_grad():
        next(model.front.parameters())[1, 3] = 1000.0
    at = portrait(given(model), [PROSE], 20, 3)["per-layer"][0]
    assert [at[name] for name in ("position", "token", "text", "feature")] == [1, None, None, 3]


@pytest.mark.parametrize(
    ("changes", "bos", "length", "windows"),
    [({"num_hidden_layers": 1}, 0, 16, 2), ({}, None, 16, 2), ({}, 0, 2, 3), ({}, 0, 16, 1000), ({}, 0, 3, 1)],
    ids=["one block", "no BOS", "two tokens", "fewer windows than asked", "three tokens"],
)
def test_edges(changes: dict[str, Any], bos: int | None, length: int, windows: int) -> None:
    body = portrait(given(model_of("llama", **changes), bos), [PROSE], length, windows)
    assert (body["with-bos"] is None) is (bos is None)
    assert body["windows"] <= windows
    told = " ".join(body["notes"])
    assert ("no BOS" in told) is (bos is None)
    assert ("were asked for" in told) is (body["windows"] < windows)
    sound(body)


def test_a_model_that_hides_its_attention_shows_the_rest() -> None:
    AttentionInterface.register("hidden", sdpa_attention_forward)
    AttentionMaskInterface.register("hidden", sdpa_mask)
    model = model_of("llama")
    model.set_attn_implementation("hidden")
    body = portrait(given(model), [PROSE], 16, 2)
    shown = portrait(given(model_of("llama")), [PROSE], 16, 2)
    assert body["residual-peak"] == pytest.approx(shown["residual-peak"], rel=1e-5)
    assert [body["with-bos"][name] for name in ("sink-rate", "sink", "value-drain", "sink-attention")] == [None] * 4
    assert body["sinks"]["positions"] is body["metrics"]["sink-rate"]["value"] is None
    assert "scores" not in body["overflow"]["sites"]
    assert "nothing of its attention" in body["notes"][0]
    sound(body)


def test_a_record_is_shown_without_torch(body: dict[str, Any], tmp_path: Path) -> None:
    """The leaderboard renders all pages at once, and answers before torch would be there."""
    assert without_torch("portrait", body, tmp_path) == ["6", "1", "False"]


def test_layers_are_drawn_in_as_many_panels_as_are_known() -> None:
    courses: dict[str, list[float | None]] = {"norm": [1.0, 2.0], "median": [1.0, 1.0], "value-drain": [None, None]}
    whole = courses | {"sink-attention": [0.0, 0.5], "value-drain": [0.1, None]}
    sizes = [
        figures.by_layer({"with BOS": some})
        for some in (whole, courses, courses | {"norm": [None, None]})  # type: ignore[dict-item]
    ]
    assert sizes[2] is None
    panels = [picture.count(b'id="axes_') for picture in sizes[:2] if picture is not None]
    assert panels == [3, 1]


# --- what is refused, and what does not grow ---


@pytest.mark.parametrize(
    ("length", "texts", "message"),
    [
        (300, [PROSE], "--length 300: this model has positions for 256 tokens"),
        (200, ["short"], "no document has 200 tokens"),
        (8, [], "no document has 8 tokens"),
        (1, [PROSE], "--length 1: 2 or more"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_that_does_not_fit_is_refused(kind: str, length: int, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        portrait(given(model_of(kind)), texts, length, 2)
    assert "\n" not in str(told.value)


def test_an_overflow_on_the_way_names_the_layer_and_the_dtype() -> None:
    model = planted()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(2e4)  # of which Z makes 160,000
    portrait(given(model), [USUAL], LENGTH, 1)
    with pytest.raises(ValueError, match=r"^layer 1 \(model.layers.1.self_attn.k_proj, linear-output\)") as told:
        portrait(given(model.half(), dtype="float16"), [USUAL], LENGTH, 1)
    assert "float16" in str(told.value)
    assert "measure it in float32" in str(told.value)
    assert "\n" not in str(told.value)
    hooks = [m for m in model.modules() if isinstance(m, nn.Module) and (m._forward_hooks or m._forward_pre_hooks)]
    assert len(hooks) == 1 + len(model.model.layers)  # those of the anatomy alone: the entrance, and the caches'


def test_no_hook_is_left_and_the_model_is_what_it_was() -> None:
    model = model_of("llama")
    ids_BT = torch.tensor([ids_of(PROSE)[:16]])
    before = model(ids_BT).logits
    portrait(given(model), [PROSE], 16, 2)
    assert torch.equal(model(ids_BT).logits, before)


def test_the_same_model_and_text_give_the_same_bytes() -> None:
    once, again = (portrait(given(model_of("llama")), [PROSE], 16, 5) for _ in range(2))
    assert {"seconds", "peak-memory-bytes"} == set(once.pop("run")) == set(again.pop("run"))
    assert canonical(once) == canonical(again)
    assert pictures(once) == pictures(again)


def test_memory_does_not_grow_with_the_windows() -> None:
    """The tensors alive after the second pass are those alive after the last, but for counters."""
    model, text = model_of("llama"), PROSE * 40

    def alive(windows: int) -> list[int]:
        found = []

        def say(stage: str, done: int, of: int, detail: str) -> None:
            gc.collect()
            storages = {
                x.untyped_storage().data_ptr(): x.nbytes
                for x in gc.get_objects()
                if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"  # some have no storage
            }
            found.append(sum(storages.values()))

        portrait(given(model), [text], 32, windows, say)
        return found

    few, many = alive(8), alive(24)
    assert len(many) > 2 * len(few)
    assert max(many) <= max(few) + 512
