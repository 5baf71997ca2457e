"""Checkpoints in folders, with peaks that were planted, are followed in order; a broken one is a line of its own."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import model_of, tokenizer_of

from quantbench.dynamics import counted_in_steps, follow, pictures, step_of, steps, tables
from quantbench.gallery import compose
from quantbench.interventions import windows_of
from quantbench.markup import escape, markdown
from quantbench.pretrained import Given, open_model
from quantbench.results import canonical
from quantbench.trace import measure

LENGTH, WINDOWS = 24, 3
TOKENIZER = tokenizer_of(["the cat sat on the mat and saw the dog that ran to the red house near old trees"] * 4)
TEXTS = ["the cat saw a dog near the old red house and ran to the trees " * 8, "that sat on mat by day or night " * 9]
SHOWN = ("residual-peak", "bos-attention", "value-drain", "first-norm")
NORMS = {"step0": 1.0, "step100": 50.0, "step1000": 400.0}


@torch.no_grad()
def planted(norm: float, kind: str = "llama") -> Any:
    """A model whose stream is its embedding, in which BOS has a norm of its own and all others have 1."""
    model = model_of(kind)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    weight = model.model.embed_tokens.weight
    weight /= weight.norm(dim=-1, keepdim=True).clamp(min=1e-9)  # that of padding is 0
    weight[0] *= norm
    return model


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, one that was cut off, one without weights, one of NaN."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, norm in NORMS.items():
        save(planted(norm), root / name)
    save(planted(9.0), root / "step200")
    weights = root / "step200" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "step300").mkdir()
    broken = planted(7.0)
    broken.model.norm.weight.data.fill_(torch.nan)
    save(broken, root / "step400")
    return root


@pytest.fixture
def opened(folder: Path) -> Callable[[str], Given]:
    return lambda revision: open_model(str(folder / revision), folder)


@pytest.fixture(scope="module")
def body(folder: Path) -> dict[str, Any]:
    names = ["step1000", "step200", "step0", "step300", "step400", "step100"]
    return follow(lambda revision: open_model(str(folder / revision), folder), names, TEXTS, LENGTH, WINDOWS)


def test_the_planted_peaks_are_found_in_the_order_of_steps(body: dict[str, Any]) -> None:
    sound = [at for at in body["revisions"] if at["failed"] is None]
    assert [at["revision"] for at in sound] == list(NORMS)
    assert [at["step"] for at in sound] == [0, 100, 1000]
    assert [at["first-norm"] for at in sound] == pytest.approx(list(NORMS.values()), rel=1e-5)
    assert [at["residual-peak"] for at in sound] == pytest.approx(list(NORMS.values()), rel=1e-5)
    assert all(at["first-norms"] == pytest.approx([at["first-norm"]] * 3) for at in sound)
    assert len({at["digest"] for at in sound}) == 3


def test_a_checkpoint_that_cannot_be_measured_says_why_and_the_rest_goes_on(body: dict[str, Any]) -> None:
    failed = {at["revision"]: at["failed"] for at in body["revisions"] if at["failed"] is not None}
    assert list(failed) == ["step200", "step300", "step400"]
    assert "no config.json" in failed["step300"]
    assert "NaN or infinity" in failed["step400"]
    assert all(reason and "\n" not in reason for reason in failed.values())
    ((title, (header, rows)),) = tables(body)
    assert [row[0] for row in rows] == ["step0", "step100", "step200", "step300", "step400", "step1000"]
    assert all(failed[name] in title for name in failed)
    assert all(set(row[2:]) == {"–"} for row in rows if row[0] in failed)
    assert all(len(row) == len(header) for row in rows)


def test_figures_are_those_of_the_metrics(opened: Callable[[str], Given]) -> None:
    names = ["residual-peak", "bos-attention", "value-drain", "delta-logit", "sink-rate"]
    body = follow(opened, ["step100"], TEXTS, LENGTH, WINDOWS)
    given = opened("step100")
    read = windows_of(given, TEXTS, LENGTH, WINDOWS, None)
    expected = {n: found.value for n, found in measure(given.model, [ids_T[None] for ids_T in read], names).items()}
    (at,) = body["revisions"]
    assert {name: at[name] for name in names} == pytest.approx(expected, nan_ok=False)
    with torch.no_grad():
        loss = sum(float(given.model(ids_T[None], labels=ids_T[None]).loss) for ids_T in read) / WINDOWS
    assert at["loss"] == pytest.approx(loss, rel=1e-5)


def test_one_model_at_a_time_is_held() -> None:
    alive: list[Any] = []

    def opened(revision: str) -> Given:
        assert not [model for model in alive if model() is not None]
        model = model_of("llama")
        model.circle = [model]
        alive.append(weakref.ref(model))
        return Given(model, TOKENIZER, 0, {"name": "tiny", "digest": revision, "dtype": "float32"})

    body = follow(opened, ["a", "b", "c"], TEXTS, LENGTH, 2)
    assert [at["digest"] for at in body["revisions"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("revision", "step"),
    [
        ("step1000", 1000),
        ("stage1-step1000-tokens3B", 1000),
        ("step1000-tokens4B", 1000),
        ("1000-unsharded", 1000),
        ("step1000-unsharded", 1000),
        ("checkpoint-500", 500),
        ("runs/olmo/checkpoint_500", 500),
        ("global_step10", 10),
        ("iter_0000700", 700),
        ("iteration-7", 7),
        ("143000", 143000),
        ("step0", 0),
        ("main", None),
        ("v1.1", None),
        ("tokens3B", None),
        ("step5k", None),  # of thousands: not 5
        ("step12k", None),
        ("footstep", None),
    ],
)
def test_steps_in_names(revision: str, step: int | None) -> None:
    assert step_of(revision) == step


@pytest.mark.parametrize(
    ("revisions", "expected"),
    [
        (["step10", "step2"], [10, 2]),
        (["step10", "main"], [0, 1]),
        (["stage1-step10", "stage2-step10"], [0, 1]),
        (["main"], [0]),
        (["step7"], [7]),
    ],
)
def test_without_steps_of_their_own_revisions_are_counted(revisions: list[str], expected: list[int]) -> None:
    assert steps(revisions) == expected
    assert counted_in_steps(revisions) is (expected != list(range(len(revisions))))


def test_where_nothing_can_be_measured_the_first_reason_is_given(opened: Callable[[str], Given]) -> None:
    with pytest.raises(ValueError, match=r"no revision could be measured: .*step300: no config.json") as told:
        follow(opened, ["step300", "step200"], TEXTS, LENGTH, WINDOWS)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no document has 200 tokens"):
        follow(opened, ["step0"], TEXTS, 200, WINDOWS)


def test_a_hub_that_does_not_answer_is_a_reason(opened: Callable[[str], Given]) -> None:
    def flaky(revision: str) -> Given:
        if revision == "step100":
            raise OSError("We couldn't connect\nto the hub")
        return opened(revision)

    body = follow(flaky, ["step0", "step100"], TEXTS, LENGTH, WINDOWS)
    assert [at["failed"] for at in body["revisions"]] == [None, "We couldn't connect"]


def sound(body: dict[str, Any]) -> None:
    record = compose("dynamics", {"name": "tiny"}, {}, {}, {k: v for k, v in body.items() if k != "run"})
    assert json.loads(canonical(record)) == record
    for title, (header, rows) in tables(record):
        assert all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in rows)
        assert escape(title)
        assert "nan" not in markdown((header, rows)).lower()
    (picture,) = pictures(record).values()
    assert picture.startswith(b"<?xml")
    known = {name for at in body["revisions"] for name in SHOWN if at["failed"] is None and at[name] is not None}
    assert picture.count(b'id="axes_') == len(known) >= 3


def test_a_record_is_json_and_drawn(body: dict[str, Any]) -> None:
    sound(body)


@pytest.mark.parametrize("names", [["step100"], ["step1000", "step0"]])
def test_few_revisions_and_names_without_steps(opened: Callable[[str], Given], names: list[str]) -> None:
    sound(follow(opened, names, TEXTS, LENGTH, WINDOWS))
    by_name = dict(zip("ab", names, strict=False))
    body = follow(lambda name: opened(by_name[name]), list(by_name), TEXTS, LENGTH, WINDOWS)
    assert [at["revision"] for at in body["revisions"]] == list(by_name)  # in the order given
    assert "counted in the order given" in body["notes"][0]
    sound(body)


def test_the_same_checkpoints_give_the_same_bytes(opened: Callable[[str], Given]) -> None:
    once, again = (follow(opened, ["step0", "step100"], TEXTS, LENGTH, WINDOWS) for _ in range(2))
    assert once.pop("run").keys() == again.pop("run").keys()
    assert canonical(once) == canonical(again)
    assert pictures(once) == pictures(again)


def test_other_kinds_of_models(tmp_path: Path) -> None:
    for step, kind in enumerate(("gpt2", "opt", "gpt_neox", "gemma3_text")):
        save(model_of(kind), tmp_path / f"step{step}")
    body = follow(lambda r: open_model(str(tmp_path / r), tmp_path), [f"step{n}" for n in range(4)], TEXTS, LENGTH, 2)
    assert [at["failed"] for at in body["revisions"]] == [None] * 4
    assert all(at["first-norm"] == max(at["first-norms"]) > min(at["first-norms"]) for at in body["revisions"])
    sound(body)
