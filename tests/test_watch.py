"""What a model does with its first token, sequence by sequence: against the metrics, by hand, and in timelines."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import Fixed, with_sink
from tiny import VOCAB, ids, model

from quantbench import watch
from quantbench.anatomy import anatomy
from quantbench.metrics.bos_attention import BosAttention
from quantbench.results import ResultsError, validate
from quantbench.tasks.bigram_backcopy import BigramBackcopy
from quantbench.trace import measure, observe
from quantbench.watch import OF_ATTENTION, OF_STREAM, look, mean, timeline

BACKCOPY = BigramBackcopy().open(Path())
LENGTH = 12


def seen(built: Any, sequences: int = 5) -> tuple[dict[str, list[float]], torch.Tensor]:
    ids_NT = ids(sequences, LENGTH + 1)
    return look(built, ids_NT.numpy(), Fixed(ids_NT, VOCAB)), ids_NT[:, :-1]


@pytest.mark.parametrize("changes", [{}, {"layers": 3, "sublayers": ["block", "mlp", "attention"]}])
@pytest.mark.parametrize("mitigations", [{}, {"relu-attention": {}}, {"registers": {}}, {"kv-bias": {}}], ids=str)
def test_means_over_sequences_are_those_of_the_metrics(mitigations: Any, changes: dict[str, Any]) -> None:
    built = model(mitigations, **changes)
    found, inputs_NT = seen(built)
    readings = measure(built, [inputs_NT], ["bos-attention", "delta-logit", "value-drain", "residual-peak"])
    for name in ("bos-attention", "delta-logit", "value-drain"):
        for layer, value in enumerate(readings[name].per_layer):
            if value is None:
                assert f"{name}.{layer}" not in found
            else:
                assert mean(found[f"{name}.{layer}"]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for layer in range(len(built.blocks)):
        excess = readings["residual-peak"].extra[f"excess.{layer}"]
        pairs = zip(found[f"residual-bos.{layer}"], found[f"residual-others.{layer}"], strict=True)
        assert np.mean([bos - others for bos, others in pairs]) == pytest.approx(excess, rel=1e-4, abs=1e-6)


def test_queries_at_triggers_stand_apart() -> None:
    """Against the metric that leaves triggers out, on one sequence, and against the whole row."""
    built, ids_1T = model(), BACKCOPY.held_out(1, 24)
    found = look(built, ids_1T, BACKCOPY)
    metric = BosAttention(BACKCOPY.triggers)
    observe(built, [torch.from_numpy(ids_1T[:, :-1])], [metric])
    for layer, value in enumerate(metric.result().per_layer):
        assert found[f"bos-attention.{layer}"] == [pytest.approx(value)]
    whole = measure(built, [torch.from_numpy(ids_1T[:, :-1])], ["bos-attention"])["bos-attention"].per_layer
    count = int(np.isin(ids_1T[0, 1:-1], BACKCOPY.triggers).sum())
    for layer, value in enumerate(whole):
        parts = (found[f"trigger-attention.{layer}"][0] * count, found[f"bos-attention.{layer}"][0] * (23 - count))
        assert sum(parts) / 23 == pytest.approx(value)


def test_a_sequence_has_the_figures_that_it_has_alone() -> None:
    built, ids_NT = model(), BACKCOPY.held_out(40, 16)  # more than a pass takes
    together = look(built, ids_NT, BACKCOPY)
    assert {len(values) for values in together.values()} == {40}
    for n in (0, 33, 39):
        alone = look(built, ids_NT[n : n + 1], BACKCOPY)
        for name, values in alone.items():
            assert together[name][n] == pytest.approx(values[0], rel=1e-4, abs=1e-6), name


def test_a_planted_sink_is_told_from_the_others() -> None:
    built = with_sink()
    found, _ = seen_from_bos(built)
    last = len(built.blocks) - 1
    assert mean(found[f"residual-bos.{last}"]) > 250
    assert mean(found[f"residual-largest.{last}"]) < 100  # type: ignore[operator]
    assert mean(found[f"residual-median.{last}"]) <= mean(found[f"residual-largest.{last}"])  # type: ignore[operator]


def seen_from_bos(built: Any) -> tuple[dict[str, list[float]], torch.Tensor]:
    size = built.config.vocab_size
    ids_NT = torch.cat((torch.zeros(4, 1, dtype=torch.long), torch.randint(1, size, (4, LENGTH))), 1)
    return look(built, ids_NT.numpy(), Fixed(ids_NT, size)), ids_NT


def test_the_loss_and_the_figures_of_the_task_are_of_each_sequence() -> None:
    built, ids_NT = model(), BACKCOPY.held_out(6, 16)
    found = look(built, ids_NT, BACKCOPY)
    with torch.no_grad():
        logits_NTV = built(torch.from_numpy(ids_NT[:, :-1])).logits
    nll_NT = -logits_NTV.log_softmax(-1).gather(-1, torch.from_numpy(ids_NT[:, 1:, None])).squeeze(-1)
    assert found["loss"] == pytest.approx(nll_NT.mean(-1).tolist(), rel=1e-5)
    expected = BACKCOPY.figures(ids_NT[2:3], nll_NT[2:3].numpy())
    for name, value in expected.items():
        assert found[name][2] == pytest.approx(value, rel=1e-5)


def test_means_leave_out_what_is_undefined() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert mean([math.nan]) is None
    assert mean([]) is None
    assert mean([1.0, math.inf]) is None


def test_an_entry_of_a_timeline_has_a_value_a_layer() -> None:
    built = model(layers=3, sublayers=["block", "mlp", "attention"])
    entry = timeline(built, BACKCOPY.held_out(4, 16), BACKCOPY)
    assert entry.keys() == {"task", *OF_ATTENTION, *OF_STREAM}
    for name in OF_STREAM:
        assert None not in entry[name]  # type: ignore[operator]
    for name in OF_ATTENTION:
        assert [value is None for value in entry[name]] == [False, True, False]  # type: ignore[attr-defined]


def test_a_watched_timeline_is_a_record() -> None:
    from synthetic_records import synthetic

    record = synthetic()
    entry = record["training"]["timeline"][-1]
    entry["watched"] = timeline(model(), BACKCOPY.held_out(2, 16), BACKCOPY)
    validate(record)
    entry["watched"]["residual-bos"] = [math.inf]
    with pytest.raises(ResultsError, match=r"watched\.residual-bos\[0\]: a finite number"):
        validate(record)
    del entry["watched"]["task"], entry["watched"]["residual-bos"]
    with pytest.raises(ResultsError, match=r"watched\.task"):
        validate(record)


def test_looking_leaves_nothing_behind() -> None:
    built = model().train()
    parts = anatomy(built)
    look(built, BACKCOPY.held_out(2, 16), BACKCOPY)
    assert built.training
    assert not any(module._forward_hooks for module in built.modules())
    assert not any(heads.scores.watched for heads in parts.heads.values())  # type: ignore[attr-defined]
    assert watch.BATCH >= 16  # a timeline is one pass
