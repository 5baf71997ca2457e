"""Interventions: each against the model that was built without it, on a planted sink, and the records of a real run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_records import Record, synthetic
from test_bench import project_in, run
from test_cli import HEAVY, child
from test_evaluate import Fixed, sampled, with_sink
from test_evaluate import track as toy_track
from tiny import VOCAB, model, quantizer, track
from torch import Tensor

from quantbench import claims, leaderboard, probe
from quantbench.anatomy import anatomy
from quantbench.cli import main
from quantbench.evaluate import Reference
from quantbench.mitigations.prefix_kv import PrefixKV
from quantbench.probe import estimate, interventions, replaced
from quantbench.recipe import Evaluate
from quantbench.results import ResultsError, path_of, read_all, read_probes, write
from quantbench.tasks.bigram_backcopy import BigramBackcopy
from quantbench.watch import look

BACKCOPY = BigramBackcopy().open(Path())
IDS = BACKCOPY.held_out(3, 16)
PAPER = {"layers": 3, "heads": 1, "norm": "layernorm", "positions": "learned", "mlp": "relu"}


def logits(built: Any, name: str | None = None) -> Tensor:
    hooks = [] if name is None else interventions(anatomy(built), built.config.heads)[name]
    with replaced(hooks), torch.no_grad():
        found: Tensor = built(torch.from_numpy(IDS[:, :-1])).logits
    return found


def seen(built: Any, name: str) -> dict[str, list[float]]:
    parts = anatomy(built)
    with replaced(interventions(parts, built.config.heads)[name]):
        return look(built, IDS, BACKCOPY, parts)


# --- each intervention ------------------------------------------------------------------------------------------------


def test_removing_is_what_a_weight_of_zero_does() -> None:
    for name, path in (("attention.1", "attention.out"), ("mlp.0", "mlp.down")):
        built, without = model(), model()
        without.blocks[int(name[-1])].get_submodule(path).weight.data.zero_()
        assert torch.equal(logits(built, name), logits(without))
        assert not torch.equal(logits(built, name), logits(built))


def test_without_a_block_what_enters_it_leaves_it() -> None:
    built, shorter = model(**PAPER), model(**PAPER)
    del shorter.blocks[0]
    assert torch.allclose(logits(built, "block.0"), logits(shorter), atol=1e-6)
    halves = model(layers=2, sublayers=["mlp", "attention"])
    assert torch.equal(logits(halves, "block.0"), logits(halves, "mlp.0"))


@pytest.mark.parametrize("mitigations", [{}, {"relu-attention": {}}, {"kv-bias": {}}, {"registers": {}}], ids=str)
def test_a_moved_head_sees_bos_alone(mitigations: Any) -> None:
    built = model(mitigations)
    found = seen(built, "bos.1")
    for name in ("bos-attention.1", "trigger-attention.1"):
        assert found[name] == [1.0] * 3
    one = seen(built, "bos.0.2")["bos-attention.0"]
    before = look(built, IDS, BACKCOPY)["bos-attention.0"]
    assert all(after > 0.25 for after in one)  # one head of four
    assert one != pytest.approx(before)
    out = built.blocks[1].attention.out
    with torch.no_grad():  # and adds BOS's value, whoever asks
        added: list[Tensor] = []
        handle = out.register_forward_hook(lambda _, __, y: added.append(y))
        logits(built, "bos.1")
        handle.remove()
    behind = added[0][:, built.registers :]
    assert torch.allclose(behind, behind[:, :1].expand_as(behind), atol=1e-5)


@pytest.mark.parametrize("built", [model(**PAPER), model({"registers": {}})], ids=["paper", "registers"])
def test_the_peak_alone_is_scaled_away(built: Any) -> None:
    last, before = len(built.blocks) - 1, look(built, IDS, BACKCOPY)
    for layer in range(last + 1):
        found = seen(built, f"peak.{layer}")
        assert found[f"residual-bos.{layer}"] == pytest.approx(found[f"residual-median.{layer}"], rel=1e-5)
        assert found[f"residual-others.{layer}"] == before[f"residual-others.{layer}"]
    every = seen(built, "peak.all")
    for layer in range(last + 1):
        assert every[f"residual-bos.{layer}"] == pytest.approx(every[f"residual-median.{layer}"], rel=1e-5)
    # The last norm does not see the size of what it reads.
    assert seen(built, f"peak.{last}")["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_a_block_is_taken_away_at_bos_alone() -> None:
    built = model(**PAPER)
    before, after = look(built, IDS, BACKCOPY), seen(built, "first.1")
    assert after["residual-bos.1"] == pytest.approx(before["residual-bos.0"])
    for name in ("residual-others.1", "residual-largest.1", "bos-attention.1"):
        assert after[name] == before[name], name
    assert after["bos-attention.2"] != before["bos-attention.2"]
    registers = model({"registers": {}})
    found = seen(registers, "first.0")
    assert found["residual-others.0"] == look(registers, IDS, BACKCOPY)["residual-others.0"]


def test_what_stands_before_an_intervention_does_not_change() -> None:
    built = model(**PAPER)
    before, after = look(built, IDS, BACKCOPY), seen(built, "block.1")
    for name in ("residual-bos.0", "bos-attention.0", "value-drain.1", "delta-logit.1"):
        assert after[name] == before[name], name
    assert after["residual-bos.1"] == before["residual-bos.0"]
    assert after["bos-attention.2"] != before["bos-attention.2"]


def test_a_model_has_the_interventions_that_it_has_places_for() -> None:
    names = set(interventions(anatomy(model(layers=2, sublayers=["mlp", "block"])), 4))
    assert names == {
        *(
            "mlp.0",
            "mlp.1",
            "attention.1",
            "block.0",
            "block.1",
            "bos.1",
            "first.0",
            "first.1",
            "peak.0",
            "peak.1",
            "peak.all",
        ),
        *(f"bos.1.{head}" for head in range(4)),
    }
    wide = interventions(anatomy(model(layers=5)), 4)  # 20 heads: a layer at a time
    assert [name for name in wide if name.startswith("bos.")] == [f"bos.{layer}" for layer in range(5)]


def test_hooks_are_gone_even_where_a_pass_fails() -> None:
    built = model()
    with pytest.raises(RuntimeError, match="stop"), replaced(interventions(anatomy(built), 4)["peak.all"]):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in built.modules())


# --- what is told of them ---------------------------------------------------------------------------------------------


def reference(built: Any, sequences: int = 24) -> Reference:
    return Reference(built, BACKCOPY, track(evaluate=Evaluate(sequences=sequences, traced=4, calibration=1)))


def test_changes_are_paired_and_those_of_every_sequence() -> None:
    built = model(**PAPER)
    found = probe.probe(reference(built))
    ids_NT = BACKCOPY.held_out(24, 16)
    before = look(built, ids_NT, BACKCOPY)
    with replaced(interventions(anatomy(built), 1)["attention.0"]):
        after = look(built, ids_NT, BACKCOPY)
    for name in ("loss", "excess-risk-trigger", "delta-logit.1", "residual-bos.2"):
        pairs = [b - a for a, b in zip(before[name], after[name], strict=True) if not math.isnan(a)]
        assert found["interventions"]["attention.0"][name] == estimate(pairs)
        mean, low, high = found["untouched"][name]
        assert low <= mean <= high
    assert found["interventions"].keys() == interventions(anatomy(built), 1).keys()


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, half-width 4.303 / sqrt(3)."""
    assert estimate([1.0, 2.0, 3.0, math.nan]) == [
        2.0,
        pytest.approx(-0.48414, abs=1e-5),
        pytest.approx(4.4841, abs=1e-4),
    ]
    assert estimate([1.5]) == [1.5, None, None]
    assert estimate([math.nan]) is None
    assert estimate([1.0, math.inf]) is None


def test_a_planted_peak_goes_and_little_else() -> None:
    built = with_sink()
    last = len(built.blocks) - 1
    ids_NT = sampled(built, 12)
    held = toy_track(quantizer("w8a8-token"), ids_NT.shape[1] - 1, 12)
    found = probe.probe(Reference(built, Fixed(ids_NT, int(ids_NT.max()) + 1), held))
    assert found["untouched"][f"residual-bos.{last}"][0] > 250
    assert found["interventions"]["peak.all"][f"residual-bos.{last}"][0] < -200
    assert abs(found["interventions"]["peak.all"]["loss"][0]) < 0.05
    assert "trigger-attention.0" not in found["untouched"]  # this task has none


def test_a_model_whose_bos_is_cached_is_refused() -> None:
    built = with_sink()
    ids_NT = sampled(built, 8)
    held = toy_track(quantizer("w8a8-token"), ids_NT.shape[1] - 1, 8)
    with pytest.raises(ValueError, match=r"^probe: this recipe's BOS stands in a cache[^\n]*$"):
        probe.probe(Reference(built, Fixed(ids_NT, VOCAB), held, PrefixKV()))


# --- records ----------------------------------------------------------------------------------------------------------


def imagined(recipe: str = "baseline", seed: int = 0, **changes: Any) -> Record:
    """A record of interventions whose every number is chosen."""
    full = ("cost", "training", "full-precision", "quantized")
    head = {k: v for k, v in synthetic(recipe, seed).items() if k not in full}
    figures = {"loss": [2.0, 1.9, 2.1], "bos-attention.0": [0.9, None, None], "value-drain.0": None}
    return {**head, "sequences": 128, "untouched": figures, "interventions": {"block.0": figures}, **changes}


def test_records_are_kept_beside_the_others_and_are_none_of_them(tmp_path: Path) -> None:
    record = imagined()
    assert write(tmp_path, record, {"commit": None}) == "written"
    assert write(tmp_path, record, {"commit": None}) == "identical"
    assert path_of(tmp_path, record) == tmp_path / "text/baseline/probe-seed-0.json"
    assert read_probes(tmp_path) == [record]
    assert read_all(tmp_path) == []
    assert write(tmp_path, imagined(interventions={"block.0": {}}), {}) == "differs"
    assert write(tmp_path, imagined(sequences=64), {}) == "replaced"
    assert claims.probe_table([record])[1][0][:2] == ["untouched", "2.00"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"untouched": None}, "untouched: a finished run has it"),
        ({"interventions": {}}, "untouched: a finished run has it, and interventions"),
        ({"interventions": {"block.0": {"loss": [1.0, 2.0]}}}, r"loss: \[mean, low, high\]"),
        ({"untouched": {"loss": [math.nan, 1.0, 1.0]}}, "finite"),
        ({"surplus": 1}, "surplus"),
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
    for bad in (good.replace(b"2.0", b"2.00"), good.replace(b'"seed": 0', b'"seed": 1')):
        path.write_bytes(bad)
        with pytest.raises(ResultsError, match=r"probe-seed-0\.json"):
            leaderboard.render(tmp_path)


# --- the verb ---------------------------------------------------------------------------------------------------------

PROBE = ("probe", "baseline", "--track", "tiny", "--seeds", "1")


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    for verb in ("probe", "claims"):
        code, err, loaded = child(tmp_path, verb, "--help")
        assert (code, err) == (0, "")
        assert not loaded & HEAVY


def test_the_command_from_nothing_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project_in(tmp_path)
    code, out, err = run(project, *PROBE, "--jobs", "1")
    assert code == 0, err
    assert "baseline on tiny" in out
    assert re.search(r"peak\.all +│", out)
    assert "baseline seed 0: 21 interventions on 16 sequences" in err  # 2 layers of 4 heads, on text
    (record,) = read_probes(project / "results")
    assert record["versions"]["stages"].keys() == {"pretrain", "probe"}
    assert not any(name.startswith("trigger-attention") for name in record["untouched"])

    monkeypatch.chdir(project)
    path = project / "results/tiny/baseline/probe-seed-0.json"
    first = path.read_bytes()
    path.unlink()
    assert main([*PROBE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"track": "tiny", "records": [record]}
    assert path.read_bytes() == first
