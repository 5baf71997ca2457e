"""Sublayers that were planted as the writers of the peak are found; ablations equal models changed by hand."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from checkpoint import SHAPES, VOCAB, model_of, tokenizer_of
from scipy import stats
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantbench.ablation import ablate, pictures, tables
from quantbench.anatomy import ARCHITECTURES, SUBLAYERS, anatomy
from quantbench.dormant import survey
from quantbench.gallery import compose
from quantbench.interventions import windows_of
from quantbench.markup import escape, markdown
from quantbench.portrait import portrait
from quantbench.pretrained import Given
from quantbench.results import canonical
from quantbench.trace import measure

LENGTH, WINDOWS = 24, 3
TOKENIZER = tokenizer_of(["the cat sat on the mat and saw the dog that ran to the red house near old trees"] * 4)
TEXTS = ["the cat saw a dog near the old red house and ran to the trees " * 8, "that sat on mat by day or night " * 9]
LAST = {  # kind -> what writes the stream last, of attention and MLP; norms may follow
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3_text": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "ours": ("attention.out", "mlp.down"),
}
assert set(SHAPES) < set(LAST)


def given(model: Any, bos: int | None = 0) -> Given:
    return Given(model, TOKENIZER, bos, {"name": "tiny", "dtype": "float32"})


def shaken(kind: str, **changes: Any) -> Any:
    """A random model of which every part matters, biases included."""
    model = tiny.model(vocab_size=VOCAB, layers=3) if kind == "ours" else model_of(kind, **changes)
    for index, parameter in enumerate(model.parameters()):
        scale = 0.2 if parameter.ndim > 1 else 0.1
        offset = 0 if parameter.ndim > 1 else parameter.data
        parameter.data = offset + scale * tiny.gaussian(*parameter.shape, seed=index)
    return model


def rows(bos: int | None = 0) -> list[Tensor]:
    return windows_of(given(model_of("llama"), bos), TEXTS, LENGTH, WINDOWS, None)


@torch.no_grad()
def losses(model: Any) -> list[float]:
    return [float(F.cross_entropy(model(ids_T[None]).logits[0, :-1].double(), ids_T[1:])) for ids_T in rows()]


@torch.no_grad()
def without(model: Any, kind: str, layer: int, part: str) -> Any:
    """A copy of which one sublayer writes nothing, because its last weights are 0."""
    changed = copy.deepcopy(model)
    block = anatomy(changed).blocks[layer]
    last = block.get_submodule(LAST[kind][SUBLAYERS.index(part)])
    for parameter in last.parameters():
        parameter.zero_()
    return changed


# --- what was planted is found ---

BOS_AT, PEAK_AT, HEIGHT = 0, 5, 900.0


@torch.no_grad()
def planted() -> Any:
    """A Llama whose stream is its embedding, to which MLP 1 adds a peak at BOS, of which MLP 2 takes half away."""
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.q_proj.weight.zero_()  # of even attention the first position draws most
    embedding = model.model.embed_tokens.weight
    embedding[:, [BOS_AT, PEAK_AT]] = 0.0
    embedding[0] = 0.0
    embedding[0, BOS_AT] = 1.0
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.zero_()
    mlp.gate_proj.weight[0, BOS_AT] = 2.0  # of a normed 8: 16, at which SiLU is the identity but for 1e-6
    mlp.up_proj.weight.zero_()
    mlp.up_proj.weight[0, BOS_AT] = 1.0
    mlp.down_proj.weight[PEAK_AT, 0] = HEIGHT / 128
    mlp = model.model.layers[2].mlp
    mlp.gate_proj.weight.zero_()
    mlp.gate_proj.weight[0, PEAK_AT] = 2.0
    mlp.up_proj.weight.zero_()
    mlp.up_proj.weight[0, PEAK_AT] = 1.0
    mlp.down_proj.weight[PEAK_AT, 0] = -HEIGHT / 256
    return model


def test_the_mlp_that_writes_the_peak_is_found() -> None:
    body = ablate(given(planted()), TEXTS, LENGTH, WINDOWS, None)
    assert (body["sink"], body["layer"]) == (0, 1)
    high = (HEIGHT**2 + 1) ** 0.5
    assert body["whole"]["sink-norms"] == pytest.approx([1.0, high, HEIGHT / 2], rel=1e-3)
    for at in body["ablations"]:
        norm = 1.0 if (at["layer"], at["part"]) == (1, "mlp") else high
        assert at["sink-norm"] == at["largest-sink-norm"] == pytest.approx(norm, rel=1e-4)
    assert [(at["layer"], at["part"]) for at in body["ablations"]] == [
        (n, part) for n in range(3) for part in SUBLAYERS
    ]
    ((title, (_, shown)),) = tables(body)
    assert "Least is left without mlp 1: 900 → 1.00" in title
    assert [row[0] for row in shown] == ["nothing", *(f"{part} {n}" for n in range(3) for part in SUBLAYERS)]


# --- against recomputation ---


@pytest.mark.parametrize("kind", LAST)
def test_a_silenced_sublayer_is_one_whose_last_weights_are_0(kind: str) -> None:
    model = shaken(kind)
    if kind == "gemma3_text":  # a norm makes nothing of nothing
        assert "post_feedforward_layernorm" in dict(model.model.layers[0].named_modules())
    body = ablate(given(model), TEXTS, LENGTH, WINDOWS, None)
    before = losses(model)
    assert body["whole"]["loss"] == pytest.approx(sum(before) / WINDOWS, abs=1e-6)
    for at in body["ablations"]:
        changed = without(model, kind, at["layer"], at["part"])
        after = losses(changed)
        differences = [a - b for a, b in zip(after, before, strict=True)]
        mean = sum(differences) / WINDOWS
        assert at["loss"] == pytest.approx(sum(after) / WINDOWS, abs=2e-6)
        assert at["loss-change"]["mean"] == pytest.approx(mean, abs=2e-6)
        limits = stats.t.interval(0.95, WINDOWS - 1, mean, stats.sem(differences))
        assert (at["loss-change"]["low"], at["loss-change"]["high"]) == pytest.approx(limits, abs=2e-5)
        expected = {
            name: found.value
            for name, found in measure(changed, [row[None] for row in rows()], ["sink-rate", "residual-peak"]).items()
        }
        assert {name: at[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", LAST)
def test_figures_of_the_whole_model_are_those_of_the_metrics(kind: str) -> None:
    model = shaken(kind)
    body = ablate(given(model), TEXTS, LENGTH, WINDOWS, [0])
    readings = measure(model, [row[None] for row in rows()], ["residual-peak", "sink-rate", "value-drain"])
    whole = body["whole"]
    assert whole["residual-peak"] == pytest.approx(readings["residual-peak"].value, rel=1e-6)
    assert body["layer"] == readings["residual-peak"].extra["layer"]
    assert whole["sink-rate"] == readings["sink-rate"].value
    assert body["sink"] == whole["searched-sink"] == readings["sink-rate"].extra["k"]
    if body["sink"] == 0:
        assert whole["value-drain"] == pytest.approx(readings["value-drain"].value, rel=1e-6)
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in anatomy(model).blocks
    ]
    with torch.no_grad():
        for row in rows():
            model(row[None])
    for hook in hooks:
        hook.remove()
    norms_NL = torch.stack([state[0, body["sink"]].double().norm() for state in states]).view(WINDOWS, -1)
    assert whole["sink-norms"] == pytest.approx(norms_NL.mean(0).tolist(), rel=1e-6)
    assert whole["largest-sink-norm"] == max(whole["sink-norms"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "ours"])
def test_drain_is_that_of_the_changed_model(kind: str) -> None:
    model = shaken(kind)
    body = ablate(given(model), TEXTS, LENGTH, WINDOWS, None)
    sink = body["sink"]
    for at in body["ablations"]:
        if at["part"] == "mlp":  # without W_O there is no drain to compare
            changed = without(model, kind, at["layer"], "mlp")
            found = ablate(given(changed), TEXTS, LENGTH, WINDOWS, [0])
            if found["sink"] == sink:
                assert at["value-drain"] == pytest.approx(found["whole"]["value-drain"], rel=1e-5)
                assert at["sink-norms"] == pytest.approx(found["whole"]["sink-norms"], rel=1e-5)


def test_layers_that_are_named_are_the_same_as_among_all() -> None:
    model = shaken("llama")
    every, some = (ablate(given(model), TEXTS, LENGTH, WINDOWS, layers) for layers in (None, [2, 0, 2]))
    assert some["ablations"] == [at for at in every["ablations"] if at["layer"] in (0, 2)]


# --- records, edges, refusals ---


def sound(body: dict[str, Any]) -> None:
    body.pop("run")
    record = compose("ablate", {"name": "tiny"}, {}, {}, body)
    assert json.loads(canonical(record)) == record
    for title, (header, shown) in tables(record):
        assert all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in shown)
        assert "NaN" not in escape(title) + markdown((header, shown))
    for picture in pictures(record).values():
        assert picture.startswith(b"<?xml")


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize(("bos", "windows"), [(0, 3), (None, 2), (0, 1)])
def test_a_record_of_every_kind_of_model(kind: str, bos: int | None, windows: int) -> None:
    body = ablate(given(shaken(kind), bos), TEXTS, LENGTH, windows, [1])
    if windows == 1:
        assert body["ablations"][0]["loss-change"]["low"] is None
    sound(body)


@pytest.mark.parametrize("mitigations", [{"registers": {"count": 2}}, {"kv-bias": {}}, {"relu-attention": {}}], ids=str)
def test_a_model_of_ours_with_a_mitigation(mitigations: Any) -> None:
    model = tiny.model(mitigations, vocab_size=VOCAB)
    body = ablate(given(model), TEXTS, LENGTH, 2, None)
    assert len(body["ablations"]) == 4
    sound(body)


def test_a_model_that_hides_its_attention_shows_the_rest() -> None:
    AttentionInterface.register("hidden", sdpa_attention_forward)
    AttentionMaskInterface.register("hidden", sdpa_mask)
    model = planted()
    model.set_attn_implementation("hidden")
    body = ablate(given(model), TEXTS, LENGTH, 2, [1])
    assert body["whole"]["sink-norm"] == pytest.approx(HEIGHT, rel=1e-4)
    assert body["ablations"][1]["sink-norm"] == pytest.approx(1.0, rel=1e-4)
    assert [body["whole"][name] for name in ("sink-rate", "value-drain")] == [None, None]
    assert "nothing of its attention" in body["notes"][0]
    sound(body)


def test_an_ablation_that_overflows_is_a_line_without_numbers() -> None:
    """Without MLP 1 block 2 finds a stream of zeros, of which its norm, without an epsilon, makes NaN."""
    model = planted()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-30)
        model.model.layers[1].mlp.down_proj.weight.zero_()
    bias = torch.nn.Parameter(torch.ones(64))
    model.model.layers[1].mlp.down_proj.bias = bias
    model.model.layers[2].input_layernorm.variance_epsilon = 0.0
    body = ablate(given(model), TEXTS, LENGTH, 2, [1])
    attention, mlp = body["ablations"]
    assert attention["loss"] is not None
    assert mlp["loss"] is mlp["loss-change"]["mean"] is mlp["residual-peak"] is None
    sound(body)


@pytest.mark.parametrize(
    ("layers", "length", "message"),
    [
        ([0, 3], LENGTH, "--layers 3: this model has layers 0 to 2"),
        (None, 300, "--length 300: this model has positions for 256"),
        (None, 200, "no document has 200 tokens"),
    ],
)
def test_what_cannot_be_ablated_is_refused(layers: list[int] | None, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        ablate(given(model_of("llama")), TEXTS, length, 2, layers)
    assert "\n" not in str(told.value)


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    model = shaken("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="gives NaN or infinity in float32: take shorter windows"):
        ablate(given(model), TEXTS, LENGTH, 2, None)


@pytest.mark.parametrize("kind", LAST)
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = shaken(kind)
    parts = anatomy(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    (ids_T, *_) = rows()
    before = model(ids_T[None]).logits
    once, again = (ablate(given(model), TEXTS, LENGTH, 2, None) for _ in range(2))
    assert torch.equal(model(ids_T[None]).logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not any("forward" in vars(block) for block in parts.blocks)
    assert {k: v for k, v in once.items() if k != "run"} == {k: v for k, v in again.items() if k != "run"}
    assert pictures(once) == pictures(again)


def test_windows_are_the_first_of_each_document_and_then_more() -> None:
    texts = ["A" * 12, "B" * 4, "C" * 2, "D" * 8]
    for count, expected in ((1, "A"), (3, "ABD"), (5, "ABDAD"), (6, "ABDADA"), (9, "ABDADA")):
        found = windows_of(given(model_of("llama"), None), texts, 4, count, None)
        assert "".join(TOKENIZER.decode(ids_T)[0] for ids_T in found) == expected
    assert len(windows_of(given(model_of("llama"), None), texts, 4, 9, None, each=1)) == 3


# --- what accelerate keeps elsewhere ---


def spread(model: Any, folder: str) -> None:
    """Puts all blocks but the first on a disk, as accelerate does with what no device has room for."""
    prefix = ARCHITECTURES[model.config.model_type].blocks
    others = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(prefix)}
    places = dict.fromkeys(others, "cpu")
    places |= {f"{prefix}.{layer}": "disk" if layer else "cpu" for layer in range(model.config.num_hidden_layers)}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("verb", ["measure", "heads", "ablate"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_kept_elsewhere_is_measured_as_one_that_is_here(kind: str, verb: str, tmp_path: Any) -> None:
    body: dict[str, Callable[[Given], dict[str, Any]]] = {
        "measure": lambda it: portrait(it, TEXTS, LENGTH, WINDOWS),
        "heads": lambda it: survey(it, {"one": TEXTS, "other": [text.upper() for text in TEXTS]}, 40, 2, 4),
        "ablate": lambda it: ablate(it, TEXTS, LENGTH, WINDOWS, None),
    }
    here, elsewhere = shaken(kind), shaken(kind)
    spread(elsewhere, str(tmp_path))
    found, expected = body[verb](given(elsewhere)), body[verb](given(here))
    assert found | {"run": None} == expected | {"run": None}


@pytest.mark.filterwarnings("ignore")
def test_a_conv1d_that_is_kept_elsewhere_is_refused(tmp_path: Any) -> None:
    model = model_of("gpt2")
    spread(model, str(tmp_path))
    with pytest.raises(ValueError, match="which a Conv1D cannot be"):
        anatomy(model)
