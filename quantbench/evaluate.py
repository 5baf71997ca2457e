"""How good a model is on held-out sequences, and what a quantizer costs it: nats, bits per byte, KL, agreement.

Every sequence is one window of the track's length that begins with BOS, scored whole in one pass: window = stride =
length, so each held-out token counts once. Damage is the quantized minus the model's own full-precision loss; KL is
of the full-precision distribution to the quantized one; both are means over tokens.

Shapes: B sequences of a batch, N all held-out sequences, T positions, V vocabulary.
"""

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.calibration import Calibration
from quantbench.mitigations import Mitigation, fold_projection
from quantbench.quantizers import Quantizer
from quantbench.recipe import Track
from quantbench.tasks import Data
from quantbench.trace import ExtremeRule, extreme_tokens, measure, random_mask, sqnr

BATCH = 32  # held-out sequences a pass
MEMORY = 1 << 29  # bytes of full-precision log-probabilities that are kept rather than computed again
CALIBRATION_BATCH = 8  # sequences of one calibration batch
CONTROL_SEED = 0  # of the random positions that are exempt as a control

Figures = dict[str, Any]


@dataclass
class Reference:
    """The full-precision model on the held-out sequences: what every quantized one is compared with."""

    model: nn.Module  # of a recipe with a post-hoc mitigation: as it was prepared
    data: Data
    track: Track
    mitigation: Mitigation = field(default_factory=Mitigation)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.ids_NT = self.data.held_out(self.track.evaluate.sequences, self.track.length)
        self.batches = [ids.to(self.device) for ids in torch.from_numpy(self.ids_NT).split(BATCH)]
        calibration_NT = self.data.calibration(CALIBRATION_BATCH * self.track.evaluate.calibration, self.track.length)
        self.calibration = list(torch.from_numpy(calibration_NT)[:, :-1].to(self.device).split(CALIBRATION_BATCH))
        self._kept: dict[int, Tensor] = {}
        fold_projection(self.model)
        self.prepared = self.mitigation.prepare(
            self.model, Calibration([(ids_BT, None) for ids_BT in self.calibration])
        )
        self.model = self.prepared.model

    def calibrate(self, exempt: Sequence[Tensor | None] | None = None) -> Calibration:
        """What a quantizer calibrates on, less the exempt positions of each batch, by the preparation's rule."""
        masks = [None] * len(self.calibration) if exempt is None else exempt
        batches = list(zip(self.calibration, masks, strict=True))
        return Calibration(batches, rule=self.prepared.rule, percent=self.prepared.percent)

    @property
    def traced(self) -> list[Tensor]:
        """The inputs of the sequences that the trace sees, [B, T] each."""
        return list(torch.cat(self.batches)[: self.track.evaluate.traced, :-1].split(BATCH))

    @cached_property
    def rule(self) -> ExtremeRule:
        """Which tokens are extreme, found on the calibration split."""
        return extreme_tokens(self.model, self.calibration)

    def log_probabilities(self, index: int) -> Tensor:
        """Of batch `index`, [B, T, V]."""
        if index in self._kept:
            return self._kept[index]
        found = log_probabilities(self.model, self.batches[index])
        if found.nbytes * len(self.batches) <= MEMORY:
            self._kept[index] = found
        return found

    @cached_property
    def nll_NT(self) -> Tensor:
        """Loss of every token, [N, T], nats."""
        return torch.cat([nll(self.log_probabilities(i), ids_BT) for i, ids_BT in enumerate(self.batches)])


def full_precision(reference: Reference) -> Figures:
    """Quality and metrics of the model as it was trained and prepared."""
    nll_NT = reference.nll_NT
    readings = measure(reference.model, reference.traced, reference.track.metrics)
    metrics = {n: {"value": r.value, "per-layer": r.per_layer, "extra": r.extra} for n, r in readings.items()}
    return {
        **quality(nll_NT, reference),
        "tokens": nll_NT.numel(),
        "task": reference.data.figures(reference.ids_NT, nll_NT.cpu().numpy()),
        "metrics": metrics,
        "sequence-losses": _rounded(nll_NT.mean(-1)),
    }


def quantized(reference: Reference, quantizer: Quantizer, exemption: bool) -> tuple[nn.Module, Figures]:
    """The quantized model, and what quantizing cost; with `exemption`, also with extreme tokens kept out of it."""
    plain: list[Tensor | None] = [None] * len(reference.batches)
    model, calibration, report = _quantize(reference, quantizer, None)
    found = _compare(reference, model, calibration, plain)
    found["report"] = report
    found["sqnr"] = sqnr(reference.model, model, reference.traced, reference.rule)
    found["exemption"] = None
    if exemption and quantizer.quantizes_activations:
        found["exemption"] = _exempt(reference, quantizer)
    return model, found


def _exempt(reference: Reference, quantizer: Quantizer) -> Figures:
    """Damage with extreme tokens in full precision, and with as many random positions (design: Exemption)."""
    masks: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    inputs = [ids_BT[:, :-1] for ids_BT in reference.batches]
    extreme = tuple([reference.rule.mask(reference.model, x) for x in xs] for xs in (reference.calibration, inputs))
    masks["extreme"] = (extreme[0], extreme[1])
    generator = torch.Generator().manual_seed(CONTROL_SEED)
    control = tuple([random_mask(mask_BT, generator) for mask_BT in side] for side in extreme)
    masks["random"] = (control[0], control[1])
    found: Figures = {"tokens": int(sum(mask_BT.sum() for mask_BT in masks["extreme"][1]))}
    for name, (at_calibration, at_evaluation) in masks.items():
        model, calibration, _ = _quantize(reference, quantizer, list(at_calibration))
        figures = _compare(reference, model, calibration, list(at_evaluation))
        found[name] = {"damage": figures["damage"], "kl": figures["kl"]}
    return found


def _quantize(
    reference: Reference, quantizer: Quantizer, exempt: Sequence[Tensor | None] | None
) -> tuple[nn.Module, Calibration, dict[str, float]]:
    model = copy.deepcopy(reference.model)
    calibration = reference.calibrate(exempt)
    return model, calibration, quantizer.quantize(model, calibration)


def _compare(reference: Reference, model: nn.Module, calibration: Calibration, exempt: list[Tensor | None]) -> Figures:
    """A quantized model's quality on the held-out sequences, beside the reference's."""
    losses, divergences, agreed = [], [], 0
    for index, ids_BT in enumerate(reference.batches):
        exact_BTV = reference.log_probabilities(index)
        with calibration.exemption.of(exempt[index]):
            approximate_BTV = log_probabilities(model, ids_BT)
        losses.append(nll(approximate_BTV, ids_BT))
        divergences.append((exact_BTV.exp() * (exact_BTV - approximate_BTV)).sum(-1))
        agreed += int((exact_BTV.argmax(-1) == approximate_BTV.argmax(-1)).sum())
    nll_NT, kl_NT = torch.cat(losses), torch.cat(divergences)
    figures = quality(nll_NT, reference)
    exact_loss = float(reference.nll_NT.double().mean())
    loss = figures["loss"]
    return {
        **figures,
        "damage": None if loss is None else loss - exact_loss,
        "kl": _finite(float(kl_NT.double().mean())),
        "top1-agreement": agreed / nll_NT.numel(),
        "sequence-losses": _rounded(nll_NT.mean(-1)),
        "sequence-kl": _rounded(kl_NT.mean(-1)),
    }


@torch.no_grad()
def log_probabilities(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Of every next token, [B, T, V] for ids [B, T + 1], in fp32."""
    return F.log_softmax(model(ids_BT[:, :-1]).logits.float(), -1)


def nll(log_probabilities_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Loss of every token, [B, T], nats."""
    return -log_probabilities_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]


def quality(nll_NT: Tensor, reference: Reference) -> Figures:
    """Mean loss, perplexity and bits per byte; None where the model overflowed or the task is no text."""
    loss = _finite(float(nll_NT.double().mean()))
    with np.errstate(over="ignore"):
        perplexity = None if loss is None else _finite(float(np.exp(loss)))
    size = reference.data.bytes_of(reference.ids_NT[:, 1:])
    bits = None if loss is None or not size else loss * nll_NT.numel() / math.log(2) / size
    return {"loss": loss, "perplexity": perplexity, "bits-per-byte": bits}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _rounded(x_N: Tensor) -> list[float | None]:
    """Per-sequence figures for a cell: seven digits, from which new statistics need no rerun."""
    return [_finite(float(f"{x:.7g}")) for x in x_N.tolist()]


# --- lm-eval, in process ---------------------------------------------------------------------------------------------

CHOICES = 4


def harness(model: nn.Module, reference: Reference) -> Figures:
    """lm-eval's own scoring on two tasks made of held-out documents: rolling bits per byte, last-word choice.

    Its response cache is never used: it does not know one model from another.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    for noisy in ("lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    assert reference.data.tokenizer_file is not None, "lm-eval needs a task that is text"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(reference.data.tokenizer_file), bos_token="<bos>", eos_token="<sep>", pad_token="<sep>"
    )
    length, items = reference.track.length, reference.track.evaluate.lm_eval_items
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=BATCH,
        max_length=length,
        device=str(reference.device),
    )
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
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bars know no other way
        found = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=False)["results"]
    right = found["last-word"]["acc,none"]
    return {
        "held-out-bits-per-byte": found["passages"]["bits_per_byte,none"],
        "own-bits-per-byte": passage_bits(model, [tokenizer.encode(p["text"]) for p in passages], passages),
        "last-word": right,
        "last-word-stderr": math.sqrt(right * (1 - right) / (len(questions) - 1)),  # as lm-eval's mean_stderr
        "last-word-items": len(questions),
        "last-word-chance": 1 / CHOICES,
    }


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
        ids_BT = torch.tensor([[bos, *ids]], device=next(model.parameters()).device)
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
