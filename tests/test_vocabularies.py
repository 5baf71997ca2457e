"""Ids meet only the model whose vocabulary they are of: all else is refused in one line, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import folder_of, model_of
from checkpoint import tokenizer_of as tokenizer_from
from test_evaluate import Fixed
from test_evaluate import track as toy
from test_given import LENGTH, TEXTS, job, track
from tiny import quantizer

from quantbench.ablation import ablate
from quantbench.bench import experiment
from quantbench.dormant import survey
from quantbench.dynamics import follow
from quantbench.evaluate import Reference
from quantbench.harness import _lm
from quantbench.portrait import portrait
from quantbench.pretrained import Given, open_model, tokenizer_of
from quantbench.store import Store
from quantbench.strict import Placed
from quantbench.tasks.bigram_backcopy import BigramBackcopy
from quantbench.tasks.passages import Passages
from quantbench.tasks.text import Text

TOKENIZER = tokenizer_from(TEXTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("given"), TEXTS)


@pytest.fixture
def other(llama: Path, tmp_path: Path) -> Path:
    """The same model, whose tokenizer has as many tokens, of which two are exchanged."""
    folder = Path(shutil.copytree(llama, tmp_path / "other"))
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocab = whole["model"]["vocab"]
    one, two = sorted(token for token in vocab if len(token) == 1)[:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("task", [Text(vocab=300), BigramBackcopy()], ids=["text", "bigram-backcopy"])
def test_a_task_with_a_vocabulary_of_its_own_is_refused(task: Any, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'task' makes ids of its own"):
        track(llama, task=task).check_entries()
    with pytest.raises(ValueError, match=r"this task makes ids of its own, [^\n]*: take the task `passages`"):
        experiment(job(llama, task=task), Store(tmp_path))
    assert not list(tmp_path.iterdir())  # before any work


def test_so_is_the_tokenizer_of_another_model_though_it_has_as_many_tokens(
    llama: Path, other: Path, tmp_path: Path
) -> None:
    mine, theirs = (tokenizer_of(str(folder), llama)[0] for folder in (llama, other))
    assert len(mine) == len(theirs)
    with pytest.raises(ValueError, match=r"passages: the tokenizer of [^\n]*: set `tokenizer: "):
        experiment(job(other, task=Passages(tokenizer=str(llama))), Store(tmp_path / "store"))
    Passages(tokenizer=str(llama)).check_model(str(shutil.copytree(llama, tmp_path / "copy")), llama)
    # Paths of a track are relative to its file, wherever the command is given.
    beside = Placed(f"./{llama.name}", str(llama.parent))
    Passages(tokenizer=beside).check_model(Placed("copy", str(tmp_path)), tmp_path)


def trimmed(rows: int, bos: int | None = 0) -> Given:
    """A model whose table has so few rows, with a tokenizer of 320 tokens or less."""
    return Given(model_of("llama", vocab_size=rows), TOKENIZER, bos, {"name": "tiny", "dtype": "float32"})


READERS: dict[str, Callable[[Given], Any]] = {
    "measure": lambda it: portrait(it, TEXTS, LENGTH, 2),
    "heads": lambda it: survey(it, {"one": TEXTS, "other": TEXTS[::-1]}, 40, 2, 1),
    "ablate": lambda it: ablate(it, TEXTS, LENGTH, 2, [0]),
}


@pytest.mark.parametrize("verb", READERS)
def test_a_token_that_has_no_row_is_told_in_a_line(verb: str) -> None:
    with pytest.raises(
        ValueError, match=r"its tokenizer: token id \d+ is none of this model, whose table has 200 rows"
    ):
        READERS[verb](trimmed(200))
    with pytest.raises(ValueError, match=r"BOS: token id 999 is none of this model"):
        READERS[verb](trimmed(320, bos=999))


def test_a_table_with_rows_to_spare_is_fine() -> None:
    assert READERS["measure"](trimmed(512))["windows"] == 2


def test_dynamics_tells_it_of_every_revision() -> None:
    with pytest.raises(ValueError, match="no revision could be measured: its tokenizer: token id"):
        follow(lambda revision: trimmed(200), ["step1", "step2"], TEXTS, LENGTH, 2)


@pytest.mark.parametrize("spoiled", [-1, 320, 10**6])
def test_sequences_with_ids_that_are_none_are_refused_before_a_pass(spoiled: int) -> None:
    ids_NT = torch.zeros(4, LENGTH + 1, dtype=torch.int64)
    ids_NT[2, 5] = spoiled
    with pytest.raises(ValueError, match=rf"^held-out sequences: token id {spoiled:,} is none of this model"):
        Reference(model_of("llama"), Fixed(ids_NT, 320), toy(quantizer("w8a8-token"), LENGTH, 4))


def test_lm_eval_is_held_to_the_table_too(llama: Path) -> None:
    given = trimmed(200)
    with pytest.raises(ValueError, match=r"^lm-eval: token id"):
        _lm(given.model, TOKENIZER, 0, None).tok_encode(TEXTS[0])


def test_a_bos_beyond_the_table_is_told_when_the_model_is_opened(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "short", TEXTS)
    tokenizer = tokenizer_from(TEXTS)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(40)])
    tokenizer.bos_token = "<extra-39>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"its tokenizer gives ids up to [0-9]+, and it has 320 embeddings"):
        open_model(str(folder), tmp_path)
