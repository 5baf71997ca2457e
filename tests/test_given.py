"""Tracks whose model is there already: what they refuse, and that their records hold what intervals are over."""

import json
import math
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint import folder_of
from tiny import ROOT, quantizer
from tiny import track as tiny_track

from quantbench import stats, tables
from quantbench.bench import Job, experiment, plain
from quantbench.board import board
from quantbench.cli import main
from quantbench.evaluate import Reference, full_precision, quantized
from quantbench.harness import standard
from quantbench.pretrained import open_model, tokenizer_of
from quantbench.recipe import Evaluate, Track, load_recipe, load_track
from quantbench.results import Record, validate
from quantbench.store import Store
from quantbench.strict import dump
from quantbench.tasks.passages import Documents, Passages

LENGTH = 24
WORDS = tuple("the cat sat on a mat and saw the dog that ran to a red house near old trees by day".split())  # noqa: SIM905


def document(number: int, words: int = 60) -> str:
    return " ".join(WORDS[(number * 7 + i * (number + 3)) % len(WORDS)] for i in range(words))


TEXTS = [document(n) for n in range(24)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, in a folder."""
    return folder_of("llama", tmp_path_factory.mktemp("given"), TEXTS)


@pytest.fixture
def documents(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`passages` reads TEXTS in the place of Wikipedia, which is not here."""
    monkeypatch.setattr("quantbench.corpora.documents", lambda name, cache: TEXTS)
    monkeypatch.setattr("quantbench.corpora.digest", lambda name, cache: "0" * 64)


def track(folder: Path, **changes: Any) -> Track:
    judged = Evaluate(sequences=12, traced=4, calibration=1, exemption=("w8a8-static",))
    named = ("w8a8-static", "w8a8-token", "w8a8-tensor")
    plain: dict[str, Any] = {
        "title": "given", "task": Passages(tokenizer=str(folder)), "pretrained": str(folder), "length": LENGTH,
        "quantizers": {name: quantizer(name) for name in named}, "metrics": ("residual-peak",),
        "rank_by": {"damage": "w8a8-static"}, "seeds": (0,), "evaluate": judged, "baseline_only": ("w8a8-tensor",),
    }  # fmt: skip
    return Track(**plain | changes)


def job(folder: Path, recipe: str = "baseline", **changes: Any) -> Job:
    name, loaded = load_recipe(recipe, ROOT)
    return Job(name, loaded, "given", track(folder, **changes), 0)


def test_a_measurement_says_whose_code_the_model_ran_through(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    asked = ["measure", str(llama), "--text", str(tmp_path / "text.txt"), "--length", "24", "--windows", "2", "--json"]
    assert main(asked) == 0
    here = json.loads(capsys.readouterr().out)["environment"]
    assert (here["transformers"], here["tokenizers"]) == tuple(map(metadata.version, ("transformers", "tokenizers")))


# --- the track -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_track_of_a_pretrained_model_says_nothing_of_pretraining(name: str) -> None:
    loaded = load_track(name, ROOT)[1]
    assert not {"steps", "lr", "model", "batch", "warmup", "betas"} & plain(loaded).keys()
    assert plain(loaded)["pretrained"] == name
    assert loaded.evaluate.sequences >= 48  # documents, over which intervals are: fewer tokens than other tracks have


def test_what_came_later_leaves_older_digests_as_they_were() -> None:
    """Else every committed record of `text` would be stale."""
    found = dump(load_track("text", ROOT)[1])
    assert "pretrained" not in found
    assert "lm-eval" not in found["evaluate"]
    assert found["task"]["text"].keys() == {"domain", "packages", "folder", "vocab"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 10}, "'steps' is for pretraining"),
        ({"lr": 1e-3}, "'lr' is for pretraining"),
        ({"seeds": (0, 1)}, "intervals are over documents"),
        ({"evaluate": Evaluate(lm_eval_items=8)}, "name tasks in 'lm-eval'"),
        ({"baseline_only": ("w8a8-tokens",)}, "'baseline-only' names 'w8a8-tokens', no quantizer of this track"),
        ({"baseline_only": ("w8a8-static",)}, "'baseline-only' has w8a8-static, by which every recipe is ranked"),
    ],
)
def test_a_track_of_a_pretrained_model_refuses_what_it_cannot_do(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        track(Path("somewhere"), **changes)


@pytest.mark.parametrize("missing", ["steps", "lr"])
def test_a_track_that_pretrains_says_how(missing: str) -> None:
    with pytest.raises(ValueError, match=f"missing key '{missing}'"):
        tiny_track(**{missing: 0})


@pytest.mark.parametrize("recipe", ["relu-attn", "sgd", "baseline-low-lr", "baseline-wd0"])
def test_a_recipe_that_changes_pretraining_is_refused_there(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{recipe} changes pretraining.*prefix-kv, smoothquant, hadamard"):
        job(tmp_path, recipe)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune", "baseline", "--track", "smollm2"], "track smollm2 pretrains nothing"),
        (["export", "baseline", "--track", "smollm2", "--quantizer", "w4a16-rtn", "--to", "x"], "is there already"),
    ],
)
def test_what_is_for_models_trained_here_is_refused_there(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


# --- passages --------------------------------------------------------------------------------------------------------


def test_a_window_is_bos_and_the_beginning_of_a_document_of_its_own(llama: Path) -> None:
    tokenizer, bos, _ = tokenizer_of(str(llama), llama)
    data = Documents(tokenizer, bos, TEXTS, "0" * 64)
    held_out, calibration = data.held_out(20, LENGTH), data.calibration(8, LENGTH)
    assert (held_out[:, 0] == bos).all()
    others = [n for n in range(24) if n % 6]
    for row, number in zip(held_out, others, strict=True):
        assert row[1:].tolist() == tokenizer.encode(TEXTS[number], add_special_tokens=False)[:LENGTH]
    kept = [tokenizer.encode(TEXTS[n], add_special_tokens=False) for n in range(0, 24, 6)]
    for row in calibration:
        window = row[1:].tolist()
        assert any(window == ids[i : i + LENGTH] for ids in kept for i in range(0, len(ids), LENGTH))
    assert data.bytes_of(held_out[:, 1:]) == sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in held_out)
    assert data.bytes_of(held_out) is None  # no windows of its documents


@pytest.mark.parametrize("length", [5, 16, 64])
def test_bytes_are_those_of_the_tokens_and_not_of_half_characters(length: int, llama: Path) -> None:
    """Of a character of three bytes each byte is a token, in a tokenizer that has never seen it."""
    tokenizer, bos, _ = tokenizer_of(str(llama), llama)
    data = Documents(tokenizer, bos, ["的一是在不了有和人这中大为上个国" * 4] * 8, "0" * 64)
    held_out = data.held_out(6, length)
    assert data.bytes_of(held_out[:, 1:]) == 6 * length


def test_a_tokenizer_without_offsets_gives_no_bits_per_byte(llama: Path) -> None:
    class Slow:
        def __len__(self) -> int:
            return 320

        def encode(self, text: str, **how: Any) -> list[int]:
            return list(text.encode())

    data = Documents(Slow(), 0, TEXTS, "0" * 64)
    assert data.bytes_of(data.held_out(20, LENGTH)[:, 1:]) is None


def test_too_few_documents_or_too_short_ones_are_told(llama: Path) -> None:
    tokenizer, bos, _ = tokenizer_of(str(llama), llama)
    data = Documents(tokenizer, bos, TEXTS, "0" * 64)
    with pytest.raises(ValueError, match="20 documents have 24 tokens, 21 are asked for"):
        data.held_out(21, LENGTH)
    with pytest.raises(ValueError, match="no document for calibration has 5,000 tokens"):
        data.calibration(1, 5000)


# --- a record --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def records(llama: Path, store: Store) -> dict[str, Record]:
    """Of the model as it is, and behind a prefix."""
    patch = pytest.MonkeyPatch()
    patch.setattr("quantbench.corpora.documents", lambda name, cache: TEXTS)
    patch.setattr("quantbench.corpora.digest", lambda name, cache: "0" * 64)
    found = {}
    for recipe in ("baseline", "prefix-kv"):
        made = experiment(job(llama, recipe), store)
        assert made is not None
        found[recipe] = made[0]
    again = experiment(job(llama), store, compute=False)
    assert again is not None
    assert again[0] == found["baseline"]
    patch.undo()
    return found


@pytest.mark.usefixtures("documents")
def test_cells_are_of_every_file_of_the_model(
    records: dict[str, Record], llama: Path, store: Store, tmp_path: Path
) -> None:
    """Another place is the same model; another rope theta, activation or BOS is not."""
    folder = Path(shutil.copytree(llama, tmp_path / "elsewhere"))
    found = experiment(job(folder), store, compute=False)
    assert found is not None
    assert found[0]["full-precision"] == records["baseline"]["full-precision"]
    for name, changes in (
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}}),
        ("tokenizer_config.json", {"bos_token": "</s>"}),
        ("generation_config.json", {"max_length": 5}),
    ):
        written = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(written) | changes))
        assert experiment(job(folder), store, compute=False) is None
        (folder / name).write_text(written)
    assert experiment(job(folder), store, compute=False) is not None
    (other := Path(shutil.copytree(folder, tmp_path / "other"))).joinpath("README.md").write_text("x")
    told = json.loads((other / "tokenizer_config.json").read_text())
    read_by_another = replace(track(folder), task=Passages(tokenizer=str(other)))
    name, baseline = load_recipe("baseline", ROOT)
    assert experiment(Job(name, baseline, "given", read_by_another, 0), store, compute=False) is not None
    (other / "tokenizer_config.json").write_text(json.dumps(told | {"bos_token": "</s>"}))
    assert experiment(Job(name, baseline, "given", read_by_another, 0), store, compute=False) is None


def test_a_record_keeps_the_figures_of_every_document(records: dict[str, Record]) -> None:
    for record in records.values():
        validate(json.loads(json.dumps(record)))
        full, static = record["full-precision"], record["quantized"]["w8a8-static"]
        assert len(full["sequence-losses"]) == 12
        assert np.mean(full["sequence-losses"]) == pytest.approx(full["loss"], rel=1e-6)
        assert np.mean(static["sequence-kl"]) == pytest.approx(static["kl"], rel=1e-5)
        assert record["cost"]["added-parameters"] == 0
        assert record["training"]["timeline"] == []
    assert "sequence-losses" in records["baseline"]["quantized"]["w8a8-static"]["exemption"]["extreme"]


def test_a_reference_is_run_for_the_baseline_alone(records: dict[str, Record]) -> None:
    assert [*records["baseline"]["quantized"]] == ["w8a8-static", "w8a8-token", "w8a8-tensor"]
    assert [*records["prefix-kv"]["quantized"]] == ["w8a8-static", "w8a8-token"]
    (header, rows), *_ = tables.map_tables(board(list(records.values()))).values()
    (column,) = (i for i, title in enumerate(header) if "tensor" in title and "static" not in title)
    cells = {row[0]: row[column] for row in rows}
    assert cells["prefix-kv"] == "–"
    assert float(cells["baseline"].replace("−", "-")) == pytest.approx(
        records["baseline"]["quantized"]["w8a8-tensor"]["damage"], rel=0.01
    )


def test_its_row_has_intervals_over_documents(records: dict[str, Record]) -> None:
    track = board(list(records.values()))
    rows = {row.name: row for row in track.rows}
    record = records["baseline"]
    damage = rows["baseline"].quantized("w8a8-static", "damage")
    static = record["quantized"]["w8a8-static"]
    differences = np.array(static["sequence-losses"]) - np.array(record["full-precision"]["sequence-losses"])
    expected = stats.t_interval(differences.tolist())
    assert damage is not None
    assert damage.interval == expected
    assert damage.value == pytest.approx(static["damage"], abs=2e-6)
    kls = [np.log(r["quantized"]["w8a8-static"]["sequence-kl"]) for r in records.values()]
    ratio = rows["prefix-kv"].comparisons["w8a8-static"].difference.mean
    assert ratio == pytest.approx(float(np.mean(kls[1] - kls[0])))
    assert rows["baseline"].notes.count("best") + rows["prefix-kv"].notes.count("best") == 1


def test_the_share_spared_is_a_ratio_of_sums_with_a_jackknife_interval() -> None:
    left, whole = [0.1, 0.3, 0.2], [1.0, 2.0, 1.0]
    found = stats.share_spared(left, whole)
    assert found is not None
    without = [1 - 0.5 / 3, 1 - 0.3 / 2, 1 - 0.4 / 3]
    spread = math.sqrt(2 / 3 * sum((x - sum(without) / 3) ** 2 for x in without))
    assert found.mean == pytest.approx(1 - 0.6 / 4)
    assert found.half_width == pytest.approx(4.302653 * spread, rel=1e-6)
    assert stats.share_spared([None, 0.1], [1.0, 1.0]) is None
    assert stats.share_spared([0.1, 0.1], [1.0, -1.0]) is None


def test_one_full_precision_pass_serves_all_variants(llama: Path, documents: None) -> None:
    """What is compared is the same whether positions are exempt beside it or not."""
    asked = track(llama)
    given = open_model(str(llama), llama)
    reference = Reference(given.model, asked.task.open(llama), asked)  # type: ignore[attr-defined]
    full_precision(reference)
    passes = 0
    inner = reference.log_probabilities

    def counted(index: int) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return inner(index)

    reference.log_probabilities = counted  # type: ignore[method-assign]
    alone = quantized(reference, asked.quantizers["w8a8-static"], False)[1]  # type: ignore[arg-type]
    first = passes
    both = quantized(reference, asked.quantizers["w8a8-static"], True)[1]  # type: ignore[arg-type]
    # Once a batch for the comparison; the likeliest tokens, asked for once a batch too, are kept from then on.
    assert (first, passes) == (2 * len(reference.batches), 3 * len(reference.batches))
    assert {**both, "exemption": None} == alone


# --- standard tasks --------------------------------------------------------------------------------------------------

ROWS = {
    "lambada": [{"text": text} for text in TEXTS],
    "arc-easy": [
        {"id": str(n), "question": f"{document(n, 9)}?", "answerKey": "ABCD"[n % 4],
         "choices": {"text": [document(n + k, 3) for k in range(4)], "label": list("ABCD")}}
        for n in range(16)
    ],
    "hellaswag": [
        {"ind": n, "activity_label": "Walking", "ctx_a": document(n, 8) + ".", "ctx_b": "the dog",
         "ctx": document(n, 8), "endings": [document(n + k, 4) for k in range(4)], "label": str(n % 4)}
        for n in range(12)
    ],
    "piqa": [
        {"goal": document(n, 6), "sol1": document(n, 4), "sol2": document(n + 1, 4), "label": n % 2} for n in range(12)
    ],
}  # fmt: skip


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantbench.corpora.rows", lambda name, cache: ROWS[name])


@torch.no_grad()
def log_likelihood(given: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation behind BOS and its context, and whether it is what the model would have said."""
    ids = [given.bos, *given.encode(context + continuation)]
    start = 1 + len(given.encode(context))
    logits_TV = given.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    told = ids[start:]
    asked_TV = logits_TV[start - 1 :]
    total = sum(float(row[token]) for row, token in zip(asked_TV, told, strict=True))
    return total, asked_TV.argmax(-1).tolist() == told


def test_standard_tasks_are_scored_behind_bos_as_by_hand(llama: Path, rows: None) -> None:
    given = open_model(str(llama), llama)
    figures, items = standard(given.model, given.tokenizer, given.bos, {"arc-easy": 16, "lambada": 24}, llama)
    for n, row in enumerate(ROWS["arc-easy"]):
        question = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(given, question, f" {choice}")[0] for choice in row["choices"]["text"]]
        assert items["arc-easy"][n] == str(int(np.argmax(scores) == n % 4))
    for n, text in enumerate(TEXTS):
        context, _, word = text.rpartition(" ")
        assert items["lambada"][n] == str(int(log_likelihood(given, context, f" {word}")[1]))
    assert figures["arc-easy"] == pytest.approx(items["arc-easy"].count("1") / 16)
    assert figures["arc-easy-items"] == 16


def test_a_subset_is_one_fixed_draw(llama: Path, rows: None) -> None:
    given = open_model(str(llama), llama)
    names = dict.fromkeys(ROWS, 6)
    first = standard(given.model, given.tokenizer, given.bos, names, llama)
    assert first == standard(given.model, given.tokenizer, given.bos, names, llama)
    assert {name: len(right) for name, right in first[1].items()} == names


def test_another_model_never_shows_the_first_ones_figures(llama: Path, rows: None) -> None:
    """lm-eval's response cache would: it does not know one model from another."""
    given = open_model(str(llama), llama)
    exact = standard(given.model, given.tokenizer, given.bos, {"arc-easy": 16}, llama)
    with torch.no_grad():
        for parameter in given.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rough = standard(given.model, given.tokenizer, given.bos, {"arc-easy": 16}, llama)
    assert rough[1] != exact[1]


@pytest.mark.parametrize(
    ("name", "told"), [("arc-esy", "no task 'arc-esy'; did you mean 'arc-easy'"), ("wikitext", "no accuracy|not here")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_none_is_refused(name: str, told: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(offline, True)  # what the variable of that name says when they are imported
    given = open_model(str(llama), llama)
    with pytest.raises(ValueError, match=told):
        standard(given.model, given.tokenizer, given.bos, {name: 4}, llama)


def test_items_of_two_models_are_compared_one_by_one() -> None:
    def record(name: str, exact: str, rough: str) -> Record:
        exactly, roughly = ({"lm-eval-items": {"arc-easy": items}} for items in (exact, rough))
        return {"full-precision": exactly, "quantized": {"q": roughly}}

    shown = tables.accuracies(record("a", "1100", "1000"), "arc-easy", ["q"])
    assert shown == ["0.50 ± 0.92", "−0.25 ± 0.80"]  # Student's t of 3 degrees; of the differences 0, -1, 0, 0


def test_a_job_of_a_track_that_pretrains_is_as_it_was() -> None:
    name, recipe = load_recipe("relu-attn", ROOT)
    assert Job(name, recipe, "text", load_track("text", ROOT)[1], 0).lr > 0
    assert replace(tiny_track(), title="x").steps == 10
