"""Heads that were planted dormant or active are found so; interventions equal models changed by hand."""

import copy
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
from scipy import stats
from shown import without_torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantbench import dormant
from quantbench.anatomy import anatomy
from quantbench.dormant import _candidates, pictures, survey, tables, verdict
from quantbench.gallery import compose
from quantbench.interventions import windows_of
from quantbench.markup import escape, markdown
from quantbench.pretrained import Given
from quantbench.results import canonical

LENGTH = 48
TOKENIZER = tokenizer_of(["the cat sat on the mat and saw the dog that ran to the red house near old trees"] * 4)
WORDS = ["the", "cat", "saw", "a", "dog", "near", "old", "red", "house", "and", "ran", "to", "trees", "that", "sat"]
PROSE = [" ".join(WORDS[(i * step + 1) % len(WORDS)] for i in range(90)) for step in (1, 3, 5, 7)]
CODE = ["".join("XYZQ[]()"[(i * i + step) % 8] for i in range(60)) for step in (0, 1, 3)]
DOMAINS = {"prose": PROSE, "code": CODE}


def given(model: Any, bos: int | None = 0) -> Given:
    return Given(model, TOKENIZER, bos, {"name": "tiny", "dtype": "float32"})


def shaken(kind: str, **changes: Any) -> Any:
    """A random model of which every part matters."""
    model = tiny.model(vocab_size=VOCAB, max_position_embeddings=64) if kind == "ours" else model_of(kind, **changes)
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            parameter.data = 0.2 * tiny.gaussian(*parameter.shape, seed=index)
    return model


def ids_of(domain: str, bos: int | None = 0, length: int = LENGTH) -> list[Tensor]:
    return windows_of(given(model_of("llama"), bos), DOMAINS[domain], length, 3, None, each=1)


@torch.no_grad()
def loss(model: nn.Module, ids_T: Tensor) -> float:
    logits_TV = model(ids_T[None]).logits[0].double()
    return float(F.cross_entropy(logits_TV[:-1], ids_T[1:]))


KINDS = [*SHAPES, "ours"]

# --- what was planted is found ---

BOS_AT, A_AT, B_AT, TOLD_AT = range(4)  # features of the stream
TO_BOS, TO_B = 5, 6  # features of head 0 that positions hardly turn


@torch.no_grad()
def planted() -> Any:
    """One layer whose head 0 looks at BOS from every token but X and Y, and from those at them, which says X or Y."""
    still = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}
    model = model_of("llama", num_hidden_layers=1, num_key_value_heads=4, **still)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    x, y = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "XY")
    embedding = model.model.embed_tokens.weight
    embedding[:, A_AT] = 1.0
    embedding[[0, x, y]] = 0.0
    embedding[0, BOS_AT] = embedding[x, B_AT] = embedding[y, B_AT] = 1.0
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[TO_BOS, A_AT] = attention.k_proj.weight[TO_BOS, BOS_AT] = 1.0
    attention.q_proj.weight[TO_B, B_AT] = attention.k_proj.weight[TO_B, B_AT] = 1.0
    attention.v_proj.weight[0, B_AT] = 1.0
    attention.o_proj.weight[TOLD_AT, 0] = 1.0
    model.lm_head.weight[[x, y], TOLD_AT] = 5.0
    return model


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    domains = {"prose": PROSE, "letters": ["XY" * 60, "XXY" * 50, "YYXX" * 40]}
    return survey(given(planted()), domains, LENGTH, 3, 4)


def test_a_head_that_works_in_one_domain_and_rests_in_the_other_is_named(body: dict[str, Any]) -> None:
    (at, *_) = body["candidates"]
    assert (at["layer"], at["head"]) == (0, 0)
    assert at["contrasts"] == [{"dormant": "prose", "active": "letters"}]
    rest, work = at["domains"]["prose"], at["domains"]["letters"]
    assert rest["attention"]["mean"] > 0.999 > 0.001 > work["attention"]["mean"]
    assert rest["zeroed"] == pytest.approx({"mean": 0, "low": 0, "high": 0}, abs=1e-6)
    assert rest["moved"] == pytest.approx({"mean": 0, "low": 0, "high": 0}, abs=1e-6)
    saved = math.log(VOCAB) - math.log(2)  # it knows that one of two letters comes
    assert work["zeroed"]["mean"] == pytest.approx(saved, rel=0.03)  # but for what follows BOS
    assert work["moved"]["mean"] == pytest.approx(work["zeroed"]["mean"], rel=1e-5)  # BOS says nothing


def test_the_tables_name_it_first(body: dict[str, Any]) -> None:
    (_, overview), (title, (header, rows)) = tables(body)
    assert rows[0][0] == "L0H0"
    assert rows[0][-2:] == ["dormant", "active"]
    assert header[-2:] == ["prose", "letters"]
    assert "1 of " in title
    assert [row[0] for row in overview[1]] == ["prose", "letters"]


def test_a_record_is_shown_without_torch(body: dict[str, Any], tmp_path: Path) -> None:
    assert without_torch("dormant", body, tmp_path) == ["2", "2", "False"]


@pytest.mark.parametrize(
    ("attention", "low", "high", "expected"),
    [
        (0.9, -0.001, 0.002, "dormant"),
        (0.9, 0.001, 0.009, "dormant"),  # it costs something, but next to nothing
        (0.9, 0.001, 0.011, "active"),
        (0.4, 0.001, 0.002, "active"),
        (0.4, -0.001, 0.002, "undecided"),  # does nothing, and is not parked
        (0.9, -0.02, 0.02, "undecided"),
        (0.5, 0.0, 0.0, "undecided"),
        (0.1, -0.3, -0.1, "undecided"),  # the model is better off without it
        (0.51, -0.01, 0.01, "dormant"),
    ],
)
def test_verdicts(attention: float, low: float, high: float, expected: str) -> None:
    assert verdict(attention, {"mean": (low + high) / 2, "low": low, "high": high}) == expected


def test_candidates_are_taken_from_both_ways_in_turn() -> None:
    attention = {"a": [[[0.9, 0.8, 0.1, 0.2, 0.5]]], "b": [[[0.1, 0.2, 0.9, 0.3, 0.5]]]}
    order = [(0, 0), (0, 2), (0, 1), (0, 3)]  # head 4 does not differ
    assert [_candidates(attention, top) for top in (1, 2, 3, 9)] == [order[:1], order[:2], order[:3], order]


def test_of_three_domains_every_pair_counts() -> None:
    attention = {"a": [[[0.5, 0.5, 0.5]]], "b": [[[0.5, 0.9, 0.5]]], "c": [[[0.1, 0.5, 0.5]]]}
    assert set(_candidates(attention, 9)) == {(0, 0), (0, 1)}


# --- against recomputation ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [0, None], ids=["with BOS", "without"])
def test_a_zeroed_head_is_a_model_without_its_columns(kind: str, bos: int | None) -> None:
    model = shaken(kind)
    body = survey(given(model, bos), DOMAINS, LENGTH, 3, 4)
    assert len({at["layer"] for at in body["candidates"]}) > 1  # the later layers' passes are resumed
    for at in body["candidates"]:
        changed = copy.deepcopy(model)
        heads = anatomy(changed).heads[at["layer"]]
        size = heads.output.in_features // (body["heads"] // body["layers"])
        heads.output.weight.data[:, at["head"] * size : (at["head"] + 1) * size] = 0
        for name in DOMAINS:
            expected = [loss(changed, ids_T) - loss(model, ids_T) for ids_T in ids_of(name, bos)]
            interval = stats.t.interval(0.95, len(expected) - 1, sum(expected) / len(expected), stats.sem(expected))
            found = at["domains"][name]["zeroed"]
            assert found["mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
            assert (found["low"], found["high"]) == pytest.approx(interval, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3_text"])
def test_moved_attention_gives_every_query_the_value_of_the_sink(kind: str) -> None:
    model = shaken(kind)
    body = survey(given(model), DOMAINS, LENGTH, 3, 3)
    for at in body["candidates"]:
        changed = copy.deepcopy(model)
        decoder = changed.model.decoder if kind == "opt" else changed.model
        attention = decoder.layers[at["layer"]].self_attn
        size = attention.head_dim
        group = at["head"] // (4 // getattr(changed.config, "num_key_value_heads", 4))
        own, theirs = slice(at["head"] * size, (at["head"] + 1) * size), slice(group * size, (group + 1) * size)
        values: list[Tensor] = []

        def keep(m: Any, args: Any, out: Tensor, values: list[Tensor] = values, theirs: slice = theirs) -> None:
            values[:] = [out[:, :1, theirs]]

        def replace(m: Any, args: Any, values: list[Tensor] = values, own: slice = own) -> Any:
            x = args[0].clone()
            x[..., own] = values[0]
            return (x,)

        attention.v_proj.register_forward_hook(keep)
        (attention.out_proj if kind == "opt" else attention.o_proj).register_forward_pre_hook(replace)
        for name in DOMAINS:
            expected = [loss(changed, ids_T) - loss(model, ids_T) for ids_T in ids_of(name)]
            assert at["domains"][name]["moved"]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("mitigations", [{"relu-attention": {}}, {"kv-bias": {}}, {"registers": {"count": 2}}], ids=str)
def test_moved_attention_keeps_its_mass(mitigations: Any) -> None:
    """Of a form whose weights do not sum to one, of learned keys, behind learned tokens."""
    model = tiny.model(mitigations, vocab_size=VOCAB, max_position_embeddings=64)
    body = survey(given(model), DOMAINS, LENGTH, 3, 2)
    sink = body["sink"]
    assert sink == model.registers
    for at in body["candidates"]:
        changed = copy.deepcopy(model)

        def replace(m: Any, args: Any, weights: Tensor, head: int = at["head"]) -> Tensor:
            found = weights.clone()
            for query in range(sink, weights.shape[2]):
                found[0, head, query] = 0
                found[0, head, query, sink] = weights[0, head, query].sum()
            return found

        changed.blocks[at["layer"]].attention.probabilities.register_forward_hook(replace)
        for name in DOMAINS:
            expected = [loss(changed, ids_T) - loss(model, ids_T) for ids_T in ids_of(name)]
            assert at["domains"][name]["moved"]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_attention_is_what_transformers_says_from_query_32_on(kind: str) -> None:
    model = shaken(kind)
    body = survey(given(model), DOMAINS, LENGTH, 3, 1)
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("eager")
    for name in DOMAINS:
        found_NLH = []
        for ids_T in ids_of(name):
            with torch.no_grad():
                attentions = exact(ids_T[None], output_attentions=True, use_cache=False).attentions
            found_NLH.append(torch.cat(attentions)[:, :, 32:, 0].mean(-1).double().numpy())
        mean = sum(found_NLH) / 3
        attention = body["domains"][name]["attention"]
        half = stats.t.ppf(0.975, 2) * stats.sem(found_NLH)
        for key, expected in (("mean", mean), ("low", mean - half), ("high", mean + half)):
            assert list(itertools.chain(*attention[key])) == pytest.approx(expected.flatten().tolist(), abs=5e-6)


def test_losses_are_those_of_the_domain() -> None:
    model = shaken("llama")
    body = survey(given(model), DOMAINS, LENGTH, 3, 1)
    for name, found in body["domains"].items():
        assert found["loss"]["mean"] == pytest.approx(sum(loss(model, ids_T) for ids_T in ids_of(name)) / 3, rel=1e-6)
        assert found["texts"] == 3


# --- records, edges, refusals ---


def sound(body: dict[str, Any]) -> None:
    body.pop("run")
    record = compose("heads", {"name": "tiny"}, {}, {}, body)
    assert json.loads(canonical(record)) == record
    for title, (header, rows) in tables(record):
        assert rows
        assert all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in rows)
        assert "NaN" not in escape(title) + markdown((header, rows))
    for picture in pictures(record).values():
        assert picture.startswith(b"<?xml")


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_every_kind_of_model(kind: str) -> None:
    body = survey(given(shaken(kind)), DOMAINS | {"more": PROSE[1:]}, LENGTH, 3, 2)
    assert list(body["candidates"][0]["domains"]) == ["prose", "code", "more"]
    sound(body)


def test_a_model_whose_heads_do_not_differ_has_no_candidates() -> None:
    body = survey(given(model_of("llama")), {"one": PROSE, "same": PROSE}, LENGTH, 3, 4)
    assert body["candidates"] == []
    sound(body)


def test_fewer_texts_than_asked_for_are_told() -> None:
    body = survey(given(model_of("llama")), DOMAINS, LENGTH, 50, 1)
    assert [found["texts"] for found in body["domains"].values()] == [4, 3]
    assert len([note for note in body["notes"] if "50 were asked for" in note]) == 2


def test_no_bos_and_a_sink_elsewhere_are_told() -> None:
    model = planted()
    body = survey(given(model, None), {"prose": PROSE, "letters": ["XY" * 60] * 2}, LENGTH, 3, 1)
    assert "no BOS" in " ".join(body["notes"])
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER.convert_tokens_to_ids("Q"), BOS_AT] = 2.0
        model.model.embed_tokens.weight[0, BOS_AT] = 0.0
    texts = [f"AB{'CQ'[n % 2]}Q" + text for n, text in enumerate(PROSE)]
    body = survey(given(model), {"one": texts[::2], "same": texts[::2]}, LENGTH, 3, 1)
    assert body["searched-sink"] == 4
    assert "park at position 4" in " ".join(body["notes"])


@pytest.mark.parametrize(
    ("domains", "length", "message"),
    [
        (DOMAINS, 20, "--length 20: attention counts from query 32 on"),
        (DOMAINS, 300, "domain prose: --length 300: this model has positions for 256"),
        (DOMAINS | {"short": ["cat"]}, LENGTH, "domain short: no document has 48 tokens"),
        (DOMAINS | {"one": PROSE[0:1]}, 90, "domain one: its text fills one window of 90 tokens, two are needed"),
    ],
)
def test_texts_that_do_not_suffice_are_refused(domains: dict[str, list[str]], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        survey(given(model_of("llama")), {"one" if "one" in domains else "prose": PROSE} | domains, length, 3, 1)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("words", "shortest"), [(["cat"], 36), (PROSE[0].split()[:40], 36)])
def test_shorter_windows_are_advised_where_they_can_be_had(words: list[str], shortest: int) -> None:
    for length, advised in ((shortest, False), (shortest + 1, True)):
        with pytest.raises(ValueError, match="give longer text") as told:
            survey(given(model_of("llama")), {"short": [" ".join(words)], "prose": PROSE}, length, 2, 1)
        assert ("shorter windows" in str(told.value)) is advised


def test_a_model_of_few_positions_is_told_that_no_length_will_do() -> None:
    with pytest.raises(ValueError, match="this model has positions for 32 tokens: its heads cannot be told apart"):
        survey(given(model_of("llama", max_position_embeddings=32)), DOMAINS, 36, 3, 1)


def test_a_long_document_gives_windows_that_are_spread_over_it() -> None:
    """One text of 12 windows, of which 3 are asked for; a second domain has documents enough."""
    model = given(shaken("llama"))
    whole = " ".join(PROSE * 2)
    windows = [ids_T for _, ids_T in model.windows([whole], LENGTH)]
    assert len(windows) >= 12
    body = survey(model, {"file": [whole], "prose": PROSE}, LENGTH, 3, 1)
    chosen = [windows[i * len(windows) // 3] for i in range(3)]
    assert len({tuple(ids_T.tolist()) for ids_T in chosen}) == 3
    assert body["domains"]["file"]["loss"]["mean"] == pytest.approx(sum(loss(model.model, x) for x in chosen) / 3, 1e-5)
    assert (body["domains"]["file"]["texts"], body["domains"]["file"]["documents"]) == (3, 1)
    assert "documents" not in body["domains"]["prose"]
    (note,) = [note for note in body["notes"] if note.startswith("domain file")]
    assert note == "domain file: 3 windows of one document: limits are of that text"
    (title, _), *_ = tables(body)
    assert "windows of 48 tokens (3 of file, 3 of prose)" in title


def test_a_document_that_is_too_short_for_all_texts_gives_what_it_has() -> None:
    body = survey(given(model_of("llama")), {"file": ["cat", PROSE[0]], "prose": PROSE}, 40, 9, 1)
    assert [found["texts"] for found in body["domains"].values()] == [2, 4]
    assert any("domain file: 2 windows have 40 tokens, 9 were asked for" in note for note in body["notes"])
    assert any("domain prose: 4 documents have 40 tokens, 9 were asked for" in note for note in body["notes"])


def test_a_model_that_hides_its_attention_is_refused() -> None:
    AttentionInterface.register("hidden", sdpa_attention_forward)
    AttentionMaskInterface.register("hidden", sdpa_mask)
    model = model_of("llama")
    model.set_attn_implementation("hidden")
    with pytest.raises(ValueError, match="shows nothing of its attention"):
        survey(given(model), DOMAINS, LENGTH, 3, 1)


def test_a_model_that_overflows_is_refused() -> None:
    model = shaken("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"domain prose: the model gives NaN or infinity in float32"):
        survey(given(model), DOMAINS, LENGTH, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = shaken(kind)
    parts = anatomy(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    (ids_T, *_) = ids_of("prose")
    before = model(ids_T[None]).logits
    once, again = (survey(given(model), DOMAINS, LENGTH, 3, 3) for _ in range(2))
    assert torch.equal(model(ids_T[None]).logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not any("forward" in vars(block) for block in parts.blocks)
    assert {k: v for k, v in once.items() if k != "run"} == {k: v for k, v in again.items() if k != "run"}
    assert pictures(once) == pictures(again)


def test_an_own_forward_of_a_block_is_put_back() -> None:
    """As accelerate gives one to models that are spread over devices."""
    model = shaken("llama")
    block = model.model.layers[0]
    block.forward = own = block.forward
    survey(given(model), DOMAINS, LENGTH, 3, 2)
    assert block.forward is own


def test_progress_counts_up_to_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    survey(
        given(model_of("llama")), DOMAINS, LENGTH, 3, 2, lambda stage, done, of, detail: told.append((stage, done, of))
    )
    for stage in ("look", "intervene"):
        counts = [(done, of) for name, done, of in told if name == stage]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1] > 0


def test_every_block_is_run_once_a_text_on_the_way_to_the_interventions() -> None:
    """What a later head's layer reads is not computed anew for each of them."""
    model = shaken("llama")
    calls = [0, 0, 0]
    forward = type(model.model.layers[0]).forward
    layers = list(model.model.layers)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[layers.index(self)] += 1
        return forward(self, *args, **kwargs)

    heads = [(2, 0), (2, 1), (2, 2)]
    parts = anatomy(model)
    read = {"prose": ids_of("prose")[:1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.layers[0]), "forward", counting)
        dormant._intervene(given(model), parts, read, {"prose": [0.0]}, heads, [4, 4, 4], lambda *_: None)
    assert calls == [1, 1, 6]
