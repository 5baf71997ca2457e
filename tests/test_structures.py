"""Decoders of which some layers lack their attention or their MLP, and Bigram-Backcopy with other beginnings."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint import VOCAB, tokenizer_of
from test_pretrain import DATA, interrupted, same, train
from tiny import ROOT, gaussian, ids, model, quantizer, track

from quantbench.ablation import ablate
from quantbench.anatomy import SITES, anatomy
from quantbench.calibration import Calibration
from quantbench.dormant import survey
from quantbench.gallery import compose, pictures, tables
from quantbench.interventions import losses, windows_of
from quantbench.mitigations.hadamard import Hadamard
from quantbench.model import cost
from quantbench.portrait import portrait
from quantbench.pretrain import timeline_steps
from quantbench.pretrained import Given
from quantbench.recipe import Shape, load_track
from quantbench.store import digest
from quantbench.strict import dump
from quantbench.tasks.bigram_backcopy import COUNTS, BigramBackcopy
from quantbench.trace import measure

PAPER = {"norm": "layernorm", "positions": "learned", "mlp": "relu", "heads": 1}
HALVES = {"layers": 3, "sublayers": ["mlp", "block", "attention"]}
OF_ATTENTION = ["bos-attention", "value-drain", "sink-rate", "delta-logit"]


# --- the model -------------------------------------------------------------------------------------------------------


def test_an_attention_and_an_mlp_are_a_block() -> None:
    whole, halves = model(layers=1, **PAPER), model(layers=2, sublayers=["attention", "mlp"], **PAPER)
    moved = {
        name.replace("blocks.0.mlp", "blocks.1.mlp").replace("blocks.0.norm", "blocks.1.norm"): tensor
        for name, tensor in whole.state_dict().items()
    }
    halves.load_state_dict(moved)
    assert torch.equal(halves(ids()).logits, whole(ids()).logits)


def test_a_linear_mlp_is_one_matrix() -> None:
    mlp, x_BTD = model(mlp="linear").blocks[0].mlp, gaussian(2, 5, 64)
    torch.testing.assert_close(mlp(x_BTD), x_BTD @ (mlp.down.weight @ mlp.up.weight).T)


@pytest.mark.parametrize("form", [{}, PAPER], ids=["rope", "paper"])
def test_a_cache_counts_the_layers_that_fill_it(form: dict[str, Any]) -> None:
    built, prompt_BT = model(**HALVES, **form), ids(2, 6)
    grown_BT = built.generate(prompt_BT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    again_BT = built.generate(prompt_BT, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(grown_BT, again_BT)
    assert grown_BT.shape == (2, 11)


def test_a_checkpoint_keeps_its_structure(tmp_path: Path) -> None:
    built = model(**HALVES)
    built.save_pretrained(tmp_path)
    again = type(built).from_pretrained(tmp_path)
    assert again.config.sublayers == HALVES["sublayers"]
    assert torch.equal(again(ids()).logits, built(ids()).logits)


def test_what_is_not_there_costs_nothing() -> None:
    whole, halves = (cost(model(layers=3, **more), 16) for more in ({}, {"sublayers": HALVES["sublayers"]}))
    attention, mlp = 4 * 64 * 64, 3 * 64 * 64  # the matrices of one
    assert whole["parameters"] - halves["parameters"] == attention + mlp + 2 * 64  # and its norm
    assert whole["flops-per-token"] - halves["flops-per-token"] == 6 * (attention + mlp + 16 * 64)


# --- what looks at it ------------------------------------------------------------------------------------------------


def test_figures_of_attention_stand_at_their_layers() -> None:
    found = measure(model(**HALVES), [ids(4, 10)], [*OF_ATTENTION, "residual-peak", "act-max"])
    for name in OF_ATTENTION:
        first, *others = found[name].per_layer
        assert first is None, name
        assert len(others) == 2
        assert None not in others
    for name in ("residual-peak", "act-max"):
        assert len(found[name].per_layer) == 3
        assert None not in found[name].per_layer


def test_the_figures_of_a_layer_are_those_that_it_has_alone() -> None:
    """[mlp, block]: the attention of layer 1 is the only one, so that means over layers are its own."""
    found = measure(model(layers=2, sublayers=["mlp", "block"]), [ids(4, 10)], OF_ATTENTION)
    for name in ("bos-attention", "value-drain", "delta-logit"):
        assert found[name].per_layer == [None, pytest.approx(found[name].value)]


def test_every_site_is_there_where_its_layer_is() -> None:
    parts = anatomy(model(**HALVES))
    assert list(parts.heads) == [1, 2]
    for kind in SITES[1:]:
        places = parts.sites(kind)
        if kind in ("residual", "norms"):
            continue
        assert list(places) == [f"1.attention.{kind}", f"2.attention.{kind}"]
    assert list(parts.sites("residual")) == ["0.residual", "1.attention.residual", "1.residual", "2.residual"]
    assert list(parts.sites("norms")) == ["0.mlp.norm", "1.attention.norm", "1.mlp.norm", "2.attention.norm"]
    assert parts.stream is not None
    assert (len(parts.stream.norms), len(parts.stream.writers), len(parts.stream.downs)) == (4, 4, 2)


TEXTS = ["the cat saw a dog near the old red house and ran to the trees " * 4, "that sat on mat by day or night " * 5]


def given() -> Given:
    """Of random weights that are large enough for every part to matter."""
    built = model(**HALVES, vocab_size=VOCAB, max_position_embeddings=64)
    for index, parameter in enumerate(built.parameters()):
        if parameter.ndim > 1:
            parameter.data = 0.2 * gaussian(*parameter.shape, seed=index)
    return Given(built, tokenizer_of(TEXTS), 0, {"name": "halves", "dtype": "float32"})


@torch.no_grad()
def loss_without(path: str, columns: slice) -> float:
    """Over the windows of TEXTS, where columns of a weight are 0."""
    changed = given()
    changed.model.get_submodule(path).weight[:, columns] = 0
    rows = windows_of(changed, TEXTS, 40, 2, None, each=1)
    return sum(float(losses(changed.model(ids_T[None]).logits, ids_T[None])) for ids_T in rows) / 2


def test_a_portrait_has_the_attention_of_each_layer_at_that_layer() -> None:
    body = portrait(given(), TEXTS, 24, 4)
    layers = body["per-layer"]
    for name in ("bos-attention", "sink-rate"):
        assert [at[name] for at in layers] == body["metrics"][name]["per-layer"]
    for name in ("bos-attention", "sink-rate", "sink-attention", "value-drain", "delta-logit"):
        assert [at[name] is None for at in layers] == [True, False, False]
    assert tables(compose("measure", {"name": "halves"}, {}, {}, body))


def test_heads_are_looked_for_in_the_layers_that_have_some() -> None:
    shown = given()
    body = survey(shown, {"one": TEXTS, "other": [text.upper() for text in TEXTS]}, 40, 2, 99)
    heads = shown.model.config.heads
    assert [len(layer) for layer in body["domains"]["one"]["attention"]["mean"]] == [0, heads, heads]
    assert {at["layer"] for at in body["candidates"]} == {1, 2}
    features = shown.model.config.width // heads
    whole = body["domains"]["one"]["loss"]["mean"]
    for at in body["candidates"]:
        columns = slice(at["head"] * features, (at["head"] + 1) * features)
        expected = loss_without(f"blocks.{at['layer']}.attention.out", columns) - whole
        assert at["domains"]["one"]["zeroed"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert pictures(compose("heads", {"name": "halves"}, {}, {}, body))


def test_what_a_layer_lacks_is_not_ablated() -> None:
    body = ablate(given(), TEXTS, 40, 2, None)
    there = {(0, "mlp"): "mlp.down", (1, "attention"): "attention.out", (1, "mlp"): "mlp.down",
             (2, "attention"): "attention.out"}  # fmt: skip
    assert [(at["layer"], at["part"]) for at in body["ablations"]] == list(there)
    for at in body["ablations"]:
        path = f"blocks.{at['layer']}.{there[at['layer'], at['part']]}"
        assert at["loss"] == pytest.approx(loss_without(path, slice(None)), abs=1e-5)


@pytest.mark.parametrize("name", ["w8a8-static-residual", "w8a8-static-qualcomm", "w4a16-gptq", "llm-int8"])
def test_it_can_be_quantized(name: str) -> None:
    built = model(**HALVES)
    exact = built(ids()).logits.detach()
    quantizer(name).quantize(built, Calibration([(ids(8, 12, seed=1), None)]))
    found = built(ids()).logits.detach()
    assert not torch.equal(found, exact)
    assert float((found - exact).norm() / exact.norm()) < 0.2


def test_its_stream_can_be_rotated() -> None:
    built = model(**HALVES)
    exact = built(ids()).logits
    prepared = Hadamard().prepare(built, Calibration([(ids(2, 8), None)]))
    torch.testing.assert_close(prepared.model(ids()).logits, exact, atol=1e-4, rtol=1e-4)


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sublayers", "message"),
    [(("block",), "each of the 2 layers, not 1"), (("mlp", "mlp"), "must leave a layer its attention")],
)
def test_structures_that_are_none_are_refused(sublayers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(layers=2, sublayers=sublayers)  # type: ignore[arg-type]


def test_what_came_later_is_in_no_digest_of_what_was_there() -> None:
    held = track()
    assert "sublayers" not in dump(held.model)
    assert "watched" not in dump(held)
    assert "start" not in dump(held)["task"]["bigram-backcopy"]
    assert "watched" in dump(track(watched=True))


PUBLISHED = {"batch": 512, "length": 256, "steps": 10_000, "clip": 0.0, "warmup": 0, "decay": 0.0, "lr": 3e-4,
             "betas": [0.9, 0.99], "weight-decay": 1e-4, "seeds": [42], "precision": "fp32"}  # fmt: skip


@pytest.mark.parametrize("layers", [1, 3])
def test_the_papers_tracks_are_as_published(layers: int) -> None:
    held = dump(load_track(f"bb-paper-{layers}layer", ROOT)[1])
    assert {key: held[key] for key in PUBLISHED} == PUBLISHED
    shape = {"layers": layers, "heads": 1, "width": 256, "mlp-width": 1024, "mlp": "relu", "norm": "layernorm",
             "positions": "learned", "embedding-std": 1.0}  # fmt: skip
    assert held["model"] == shape
    assert held["task"] == {"bigram-backcopy": {"triggers": 3}}


def test_the_papers_optimizer_is_torchs() -> None:
    built = model()
    held = load_track("bb-paper-3layer", ROOT)[1]
    from quantbench.mitigations import Mitigation, Settings

    found = Mitigation().optimizer(built, Settings(held.lr, held.betas, held.lr * held.weight_decay))
    assert isinstance(found, torch.optim.AdamW)
    matrices, _ = found.param_groups
    assert (matrices["lr"], matrices["betas"], matrices["eps"]) == (3e-4, (0.9, 0.99), 1e-8)
    assert matrices["weight_decay"] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["bb-paper-1layer", "bb-paper-3layer", "bb-2tf-mlp", "bb-attn-tf-mlp"])
def test_two_steps_of_a_track_learn(name: str, tmp_path: Path) -> None:
    from dataclasses import replace

    held = load_track(name, ROOT)[1]
    few = replace(held, steps=2, batch=4, length=32, timeline=2)
    done = train({}, few, tmp_path)
    assert done.reason is None
    assert done.losses[1] < done.losses[0]
    assert [entry["step"] for entry in done.timeline] == timeline_steps(few)
    assert len(done.timeline[-1]["watched"]["residual-bos"]) == held.model.layers


def test_watching_changes_nothing_but_the_timeline(tmp_path: Path) -> None:
    plain, watched = (train({}, track(watched=watch), tmp_path / str(watch)) for watch in (False, True))
    assert plain.losses == watched.losses
    for one, other in zip(plain.timeline, watched.timeline, strict=True):
        assert one == {key: value for key, value in other.items() if key != "watched"}
    first = watched.timeline[0]["watched"]
    assert first["task"].keys() == {"loss", "excess-risk-trigger", "excess-risk-bigram", "risk-bos"}
    assert DATA.triggers == (1, 43, 58)  # space, e, t


def test_a_watched_run_that_was_killed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    held = track(
        watched=True, timeline=6, model=Shape(layers=2, heads=4, width=64, mlp_width=64, sublayers=("mlp", "block"))
    )
    whole = train({}, held, tmp_path / "whole")
    interrupted({}, held, tmp_path / "killed", after=7)
    assert same(train({}, held, tmp_path / "killed"), whole)
    assert [entry["watched"]["bos-attention"][0] for entry in whole.timeline] == [None] * len(whole.timeline)


# --- the task ---------------------------------------------------------------------------------------------------------


def starting(start: str) -> Any:
    return BigramBackcopy(start=start).open(Path())  # type: ignore[arg-type]


def follows_the_rule(ids_BT: np.ndarray[Any, Any], triggers: tuple[int, ...]) -> bool:
    """After a trigger the character before it, from the third character on."""
    copied_BT = ids_BT[:, 2:] == ids_BT[:, :-2]
    return bool(copied_BT[np.isin(ids_BT[:, 1:-1], triggers)].all())


def test_sequences_without_bos_follow_the_rule() -> None:
    data = starting("none")
    ids_BT = data.training(0, 0, 200, 40)
    assert ids_BT.shape == (200, 41)
    assert ids_BT.max() < 65
    assert not np.isin(ids_BT[:, 0], data.triggers).any()
    assert follows_the_rule(ids_BT, data.triggers)
    assert np.isfinite(data.oracle(ids_BT)).all()
    assert "risk-bos" not in data.figures(ids_BT, np.ones((200, 40), np.float32))


def test_sequences_with_two_bos_and_with_a_delimiter_are_those_with_one_otherwise() -> None:
    one_BT = starting("bos").training(0, 0, 50, 40)
    two, delimited = starting("two"), starting("delimiter")
    two_BT = two.training(0, 0, 50, 41)
    assert (two_BT[:, 0] == two.bos).all()
    assert np.array_equal(two_BT[:, 1:], one_BT)
    other_BT = delimited.training(0, 0, 50, 40)
    assert delimited.bos == 66
    assert (other_BT[:, 0] == 66).all()
    assert np.array_equal(other_BT[:, 1:], one_BT[:, 1:])
    assert np.array_equal(delimited.oracle(other_BT), starting("bos").oracle(one_BT))


def test_the_digest_tells_beginnings_apart_and_keeps_that_of_bos() -> None:
    digests = {start: starting(start).digest for start in ("bos", "none", "two", "delimiter")}
    assert len(set(digests.values())) == 4
    assert digests["bos"] == hashlib.sha256(b"1 3 " + COUNTS.read_bytes()).hexdigest()
    assert digest(dump(track(task=BigramBackcopy(start="bos")))) == digest(dump(track()))


@pytest.mark.parametrize("start", ["none", "two", "delimiter"])
def test_a_model_trains_on_every_beginning(start: str, tmp_path: Path) -> None:
    done = train({}, track(task=BigramBackcopy(start=start), watched=True), tmp_path, data=starting(start))  # type: ignore[arg-type]
    assert done.losses[-1] < done.losses[0]
    assert done.timeline[-1]["watched"]["task"]["excess-risk-trigger"] > 0
