"""Which site pays: by hand on a toy, on planted sinks, against whole passes, and the records of a real run."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic_records import Record, synthetic
from test_bench import job, project_in, run
from test_cli import HEAVY, child
from test_evaluate import LENGTH, VOCAB, Fixed, sampled, track, with_sink
from tiny import quantizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantbench import figures, leaderboard, sites
from quantbench.bench import training
from quantbench.cli import main
from quantbench.evaluate import Reference
from quantbench.mitigations.prefix_kv import PrefixKV
from quantbench.quantizers.integer import Integer
from quantbench.results import ResultsError, load, path_of, read_all, read_sites, sealed, unsealed, write
from quantbench.store import Store
from quantbench.trace import ExtremeRule

torch.set_num_threads(1)

LINEARS = [f"{layer}.{name}" for layer in (0, 1) for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]
PARTS = ("accumulated", "local", "interaction")


# --- error propagation by hand ---------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A block of one feature: scale h + shift."""

    def __init__(self, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * h + self.shift


class Chain(nn.Module):
    """Blocks after one another, in the anatomy of a Llama. A token's embedding is 100 for BOS, 1 for any other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama")
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.tensor([[100.0], [1.0]]))
        self.model.layers = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(1, 2, bias=False)

    def forward(self, ids_BT: Tensor) -> SimpleNamespace:
        h = self.model.embed_tokens(ids_BT)
        for block in self.model.layers:
            h = block(h)
        return SimpleNamespace(logits=self.lm_head(h))


def test_error_propagation_of_two_linear_blocks_by_hand() -> None:
    """Exact: 2h, 5h. Quantized: 2h + 1, 4h. The second block is given 2 where it should be, and 3 where it is."""
    model, low = Chain(Affine(2), Affine(5)), Chain(Affine(2, 1), Affine(4))
    found = sites.propagation(model, low, [torch.tensor([[0, 1]])], ExtremeRule(0, math.inf))
    first, second = found["non-sink"]
    assert first == {"total": 0.25, "accumulated": 0.0, "local": 0.25, "interaction": 0.0}
    # f(h) = 10, f_q(h_q) = 12, f_q(h) = 8, f(h_q) = 15: a = (4 + 5) / 2, b = (-3 - 2) / 2
    assert second == pytest.approx({"total": 0.04, "accumulated": 0.2025, "local": 0.0625, "interaction": -0.225})
    assert found["all"][0]["total"] == pytest.approx(2 / (200**2 + 2**2))  # BOS has the same error, and the signal


def test_a_block_that_gives_nothing_has_no_relative_error() -> None:
    (found,) = sites.propagation(Chain(Affine(0)), Chain(Affine(1)), [torch.tensor([[0, 1]])], ExtremeRule(0, 1e9))[
        "all"
    ]
    assert found == dict.fromkeys(("total", *PARTS))


# --- planted sinks ---------------------------------------------------------------------------------------------------


def reference(change: Any = None, sequences: int = 32) -> Reference:
    """A decoder whose BOS carries 300 in feature 0, changed, on sequences of its own."""
    model = with_sink()
    if change is not None:
        change(model)
    return Reference(model, Fixed(sampled(model, sequences), VOCAB), track(quantizer("w8a8-static"), LENGTH, sequences))


@pytest.fixture(scope="module")
def sink() -> Reference:
    return reference()


@pytest.fixture(scope="module")
def residual(sink: Reference) -> tuple[dict[str, Any], dict[str, Any]]:
    return sites.measure(sink, quantizer("w8a8-static-residual"))


def test_the_residual_stream_that_carries_the_sink_pays(residual: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found, _ = residual
    whole = found["all"]
    assert whole["damage"][0] > 0.2
    for figure in ("damage", "kl"):
        mean, low, high = whole[figure]
        assert low < mean < high
        assert found["kinds"]["residual"]["alone"][figure][0] > 0.7 * mean
        assert found["kinds"]["residual"]["spared"][figure][0] > 0.9 * mean
        for other in ("inputs", "weights"):
            assert abs(found["kinds"][other]["alone"][figure][0]) < 0.1 * mean
    for place, paid in found["places"]["residual"].items():  # it passes all of them: none alone is to blame
        assert paid["spared"]["kl"][0] < found["kinds"]["residual"]["spared"]["kl"][0] / 2, place


def test_every_place_is_told_apart(residual: tuple[dict[str, Any], dict[str, Any]]) -> None:
    places = residual[0]["places"]
    assert places["weights"].keys() == places["inputs"].keys() == set(LINEARS)
    assert places["residual"].keys() == {"0.attention.residual", "0.residual", "1.attention.residual", "1.residual"}
    for kind, by_place in places.items():
        for paid in by_place.values():
            assert paid["alone"]["kl"][0] > 0
            assert (paid["sqnr"] is None) == (kind == "weights")


def test_a_site_that_the_sink_passes_serves_the_sink_alone(residual: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for paid in residual[0]["places"]["residual"].values():
        assert paid["sqnr"]["sink"] > 30
        assert paid["sqnr"]["non-sink"] < 10
    assert residual[0]["extreme"]["tokens"] == 32  # BOS of every sequence, and nothing else


def loud_norm(model: Any) -> None:
    """The input of the first block's qkv carries 800 at BOS, in a feature that nobody reads."""
    model.embed.weight[0, 1:] = 1.0  # else BOS is on the grid, without an error of its own
    model.blocks[0].attention_norm.weight[0] = 100.0
    model.blocks[0].attention.qkv.weight[:, 0] = 0.0


def test_the_input_that_carries_the_sink_pays_and_sparing_it_removes_the_damage() -> None:
    found, _ = sites.measure(reference(loud_norm), quantizer("w8a8-static"))
    whole, inputs = found["all"]["kl"][0], found["places"]["inputs"]
    worst = max(inputs, key=lambda place: inputs[place]["spared"]["kl"][0])
    assert worst == max(inputs, key=lambda place: inputs[place]["alone"]["kl"][0]) == "0.attention.qkv"
    assert inputs[worst]["spared"]["kl"][0] > 0.9 * whole
    assert inputs[worst]["sqnr"]["sink"] > 20 + inputs[worst]["sqnr"]["non-sink"]
    by_token, _ = sites.measure(reference(loud_norm), quantizer("w8a8-token"))
    assert by_token["places"]["inputs"]["0.attention.qkv"]["sqnr"]["non-sink"] > 30


# --- against whole passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8-static-qualcomm", "w4a4-token-residual", "head", "prefix", "registers"])
def test_a_pass_that_begins_at_a_block_is_a_whole_pass(sink: Reference, name: str) -> None:
    schemes = {
        "head": Integer(sites=("inputs", "head", "embeddings")),
        "prefix": quantizer("w8a8-static-residual"),
        "registers": Integer(sites=("inputs", "residual", "probabilities")),
    }
    scheme = schemes[name] if name in schemes else quantizer(name)
    if name == "prefix":  # the sink stands in the cache
        sink = Reference(with_sink(), sink.data, sink.track, PrefixKV())
    if name == "registers":
        sink = Reference(with_sink({"registers": {}, "kv-bias": {}}), sink.data, sink.track)
    before = {path: id(module) for path, module in sink.model.named_modules()}
    _, kept = sites.measure(sink, scheme)

    def whole(chosen: Any) -> dict[str, Any]:
        model = copy.deepcopy(sink.model)
        scheme.quantize(model, sink.calibrate(), chosen)
        return sites._listed(sites.cost(model, sink))

    assert kept["all"] == whole(lambda site, place: True)
    for kind, by_place in kept["places"].items():
        place = list(by_place)[-1]
        assert by_place[place]["alone"] == whole(lambda site, at, one=(kind, place): (site, at) == one)
        assert by_place[place]["all-but"] == whole(lambda site, at, one=(kind, place): (site, at) != one)
    assert {path: id(module) for path, module in sink.model.named_modules()} == before


def test_figures_do_not_depend_on_what_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = quantizer("w8a8-static")
    kept = sites.measure(reference(), scheme)
    monkeypatch.setattr("quantbench.evaluate.MEMORY", 0)
    assert sites.measure(reference(), scheme) == kept


def test_the_error_of_a_block_is_the_sum_of_its_parts(residual: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for layers in residual[0]["propagation"].values():
        assert len(layers) == 2
        assert layers[0]["total"] == layers[0]["local"] > 0  # what enters the first block is exact
        assert layers[0]["accumulated"] == layers[0]["interaction"] == 0
        for layer in layers:
            assert sum(layer[part] for part in PARTS) == pytest.approx(layer["total"], rel=1e-5)


def test_intervals_are_over_sequences_and_paired() -> None:
    """By hand: differences 1, 2, 3 have the mean 2 and the half-width 4.303 / sqrt(3)."""
    found = sites.Paid(sites.Cost(*torch.tensor([[1.0, 2, 3]] * 2)), sites.Cost(*torch.tensor([[9.0, 8, 7]] * 2)))
    paid = found.figures(sites.Cost(*torch.tensor([[10.0, 10, 10]] * 2)))
    for how in ("alone", "spared"):
        assert paid[how]["kl"] == pytest.approx([2, 2 - 2.484138, 2 + 2.484138], abs=1e-5)
    nothing = sites.estimated(sites.Cost(torch.tensor([1.0, math.nan]), torch.tensor([1.0])))
    assert nothing == {"damage": None, "kl": [1.0, None, None]}


def test_a_site_that_the_model_does_not_show_is_refused_in_a_line() -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).eval()
    assert list(sites.rounded(model, quantizer("w8a8-static-residual"))) == ["weights", "inputs", "residual"]
    model.set_attn_implementation("flex_attention")  # it shows nothing of that
    with pytest.raises(ValueError, match=r"^this model does not show its scores: leave the site out[^\n]*$"):
        sites.rounded(model, quantizer("w8a8-static-qualcomm"))


# --- records ---------------------------------------------------------------------------------------------------------


def paid(alone: float, spared: float, **more: Any) -> Record:
    both = {"alone": alone, "spared": spared}
    return {how: {"damage": [x, x / 2, 2 * x], "kl": [x, x / 2, 2 * x]} for how, x in both.items()} | more


def imagined(recipe: str = "baseline", seed: int = 0, scale: float = 1.0, **changes: Any) -> Record:
    """A record of sites whose every number is chosen."""
    head = {
        k: v for k, v in synthetic(recipe, seed).items() if k not in ("cost", "training", "full-precision", "quantized")
    }
    layer = {"total": 0.01 * scale, "accumulated": 0.005, "local": 0.006, "interaction": -0.001}
    return {
        **head,
        "quantizer": {"name": "w8a8-static", "resolved": {"weights": 8}},
        "sequences": 256,
        "extreme": {"layer": 1, "threshold": 30.5, "tokens": 256},
        "all": {"damage": [0.1 * scale, 0.09 * scale, 0.11 * scale], "kl": [0.1, None, None]},
        "kinds": {"inputs": paid(0.08 * scale, 0.09 * scale), "weights": paid(0.001, 0.002)},
        "places": {
            "inputs": {
                "0.mlp.down": paid(0.07 * scale, 0.06 * scale, sqnr={"sink": 42.0, "non-sink": 3.5}),
                "1.mlp.down": paid(0.01, 0.02, sqnr={"sink": 40.0, "non-sink": None}),
            },
            "weights": {"0.mlp.down": paid(0.001, 0.001, sqnr=None)},
        },
        "propagation": {"all": [layer, layer], "non-sink": [layer, layer]},
        **changes,
    }


def test_records_are_kept_beside_the_others_and_are_none_of_them(tmp_path: Path) -> None:
    record = imagined()
    assert write(tmp_path, record, {"commit": None}) == "written"
    assert write(tmp_path, record, {"commit": None}) == "identical"
    assert path_of(tmp_path, record) == tmp_path / "text/baseline/sites-w8a8-static-seed-0.json"
    assert path_of(tmp_path, record).with_suffix(".run.json").is_file()
    assert read_sites(tmp_path) == [record]
    assert read_all(tmp_path) == []
    assert write(tmp_path, imagined(scale=2), {}) == "differs"
    assert write(tmp_path, imagined(scale=2, sequences=128), {}) == "replaced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all": {"damage": [0.1, 0.2], "kl": None}}, r"all.damage: \[mean, low, high\]"),
        ({"all": None}, "all: a finished run has it"),
        ({"kinds": {}}, "places: its kinds"),
        ({"propagation": {"all": [{}], "non-sink": []}}, r"propagation.all\[0\]: missing key"),
        ({"sequences": "many"}, "sequences: an integer"),
        ({"quantizer": {"name": "../evil", "resolved": {}}}, "quantizer.name"),
        ({"surplus": 1}, "surplus"),
        ({"extreme": {"layer": 0, "threshold": math.nan, "tokens": 1}}, "finite"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, change: Record, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        write(tmp_path, imagined(**change), {})
    assert list(tmp_path.iterdir()) == []


def test_what_was_edited_moved_or_renamed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, imagined(), {})
    path = path_of(tmp_path, imagined())
    good = path.read_bytes()
    for bad in (good.replace(b"0.07", b"0.070"), good[:-2], good.replace(b'"seed": 0', b'"seed": 1')):
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(ResultsError, match=r"sites-w8a8-static-seed-0\.json"):
            leaderboard.render(tmp_path)
    for name in ("sites-w8a8-token-seed-0.json", "seed-0.json"):
        path.with_name(name).write_bytes(good)
        path.unlink(missing_ok=True)
        with pytest.raises(ResultsError, match="not those of its path"):
            leaderboard.render(tmp_path)
        path.with_name(name).unlink()


# --- tables and pictures ---------------------------------------------------------------------------------------------


def test_the_page_tells_which_site_pays(tmp_path: Path) -> None:
    for recipe, scale in (("relu-attn", 0.1), ("baseline", 1.0)):
        for seed in (0, 1):
            write(tmp_path, synthetic(recipe, seed, peak=100.0 + seed, kl=scale + seed), {})
            write(tmp_path, imagined(recipe, seed, scale), {})
    stale = imagined("sgd")
    write(tmp_path, {**stale, "data": "older"}, {})
    leaderboard.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "### Which site pays (`w8a8-static`)" in page
    section = page.partition("Which site pays")[2]
    assert (
        "| recipe | seeds | damage of all | inputs alone | inputs spared | weights alone | weights spared |" in section
    )
    line = next(line for line in section.splitlines() if line.startswith("| baseline"))
    assert line.endswith(
        "| 0.mlp.down inputs 0.0600; 1.mlp.down inputs 0.0200; 0.mlp.down weights 0.00100 | 42.0 / 3.50 |"
    )
    assert "sgd" not in section.partition("## Columns")[0]
    picture = (tmp_path / "text/sites-w8a8-static.svg").read_bytes()
    assert b"relu-attn" in picture
    assert figures.propagation(read_sites(tmp_path)[:2], []) == figures.propagation(read_sites(tmp_path)[:2], [])
    assert leaderboard.write(tmp_path) == []
    for path in tmp_path.rglob("sites-*.json"):
        path.unlink()
    assert leaderboard.write(tmp_path) == sorted([tmp_path / "README.md", tmp_path / "text/sites-w8a8-static.svg"])
    assert "Which site pays" not in (tmp_path / "README.md").read_text()


# --- the whole command -----------------------------------------------------------------------------------------------

SITES = ("sites", "baseline", "--track", "tiny", "--quantizer", "w8a8-static-residual", "--seeds", "1")


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code, err, loaded = child(tmp_path, "sites", "--help")
    assert (code, err) == (0, "")
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a8-static-residul", "there is none; did you mean 'w8a8-static-residual'"),
        ("bnb-nf4", "--quantizer bnb-nf4: it has no sites to tell apart; choose .*w8a8-static-residual"),
    ],
)
def test_a_quantizer_without_sites_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.chdir(project_in(tmp_path))
    path = tmp_path / "recipes/tracks/tiny.yaml"
    path.write_text(path.read_text().replace("quantizers: {", "quantizers: {bnb-nf4: {}, "))
    with_name = [name if word == "w8a8-static-residual" else word for word in SITES]
    assert main(with_name) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(message, err)
    assert not (tmp_path / "results").exists()


def test_the_command_from_nothing_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project_in(tmp_path)
    code, out, err = run(project, *SITES, "--jobs", "1")
    assert code == 0, err
    assert "tiny, which site pays under w8a8-static-residual" in out
    assert re.search(r"baseline │ 1 +│", out)
    assert "baseline seed 0: KL under w8a8-static-residual 0." in err
    path = project / "results/tiny/baseline/sites-w8a8-static-residual-seed-0.json"
    first, (record,) = path.read_bytes(), read_sites(project / "results")
    assert record["versions"]["stages"].keys() == {"pretrain", "sites"}
    assert record["sequences"] == 16
    assert record["places"].keys() == {"inputs", "residual", "weights"}
    assert load(path.with_suffix(".run.json")).keys() >= {"commit", "date", "stages", "machine"}

    monkeypatch.chdir(project)
    store = Store(project / ".quantbench")
    cells = store.usage()
    assert {stage: count for stage, count, _ in cells} == {"pretrain": 1, "sites": 1, "text": 1}
    assert training(job(project), store, compute=False) is not None  # the checkpoint that `bench` would look for
    assert main([*SITES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "track": "tiny", "quantizer": "w8a8-static-residual", "records": [record],
    }  # fmt: skip
    assert (path.read_bytes(), store.usage()) == (first, cells)
    other = replace(job(project), seed=1)
    asked = sites.experiment(other, store, compute=False, quantizer="w8a8-token")
    assert asked is None

    altered = unsealed(first)
    altered["all"]["kl"][0] *= 1 + 1e-9
    path.write_bytes(sealed(altered))
    assert main([*SITES]) == 5
    assert "baseline seed 0: this run differs from the committed record" in capsys.readouterr().err
    path.write_bytes(first.replace(b'"seed": 0', b'"seed": 1'))
    assert main([*SITES]) == 5
    assert capsys.readouterr().err.count("\n") <= 2
    path.unlink()
    assert main([*SITES]) == 0
    assert path.read_bytes() == first
