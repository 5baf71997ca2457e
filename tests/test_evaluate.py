"""What quantizing costs: by hand on a bigram, against lm-eval on text, and on a model with a planted sink."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tiny import quantizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from quantbench import evaluate, trace
from quantbench.calibration import Calibration
from quantbench.evaluate import Reference, full_precision, quantized
from quantbench.harness import cut, harness, last_words
from quantbench.model import QuantbenchConfig, QuantbenchModel, initialise
from quantbench.quantizers import Quantizer
from quantbench.recipe import Evaluate, Track, load_track
from quantbench.tasks import Data, Ids
from quantbench.trace import random_mask

ROOT = Path(__file__).resolve().parent.parent
BOS = 0
LN2 = math.log(2)

torch.set_num_threads(1)


class Fixed(Data):
    """The same sequences whatever is asked for. A token's number is how many bytes of text it stands for."""

    bos = BOS
    digest = "0" * 64

    def __init__(self, ids_NT: Tensor, vocab: int, text: bool = True) -> None:
        self.ids_NT, self.vocab, self.text = ids_NT.numpy(), vocab, text

    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        return self.ids_NT[np.arange(first, first + count) % len(self.ids_NT)]

    def calibration(self, count: int, length: int) -> Ids:
        return self.training(0, 0, count, length)

    def held_out(self, count: int, length: int) -> Ids:
        return self.training(0, 0, count, length)

    def bytes_of(self, ids: Ids) -> int | None:
        return int(ids.sum()) if self.text else None

    def figures(self, ids_BT: Ids, nll_BT: NDArray[np.float32]) -> dict[str, float]:
        return {"first": float(nll_BT[:, 0].mean())}


def track(quantizer: Quantizer, length: int, sequences: int) -> Track:
    judged = Evaluate(sequences=sequences, traced=2, calibration=2)
    return Track(
        title="Toy", task=None, quantizers={"toy": quantizer}, metrics=("residual-peak",), rank_by={"damage": "toy"},
        steps=1, lr=1.0, warmup=0, length=length, evaluate=judged,
    )  # fmt: skip


# --- by hand ---------------------------------------------------------------------------------------------------------

# log2 of P[next | current], and of what a toy quantizer makes of it; every row sums to one.
P = [[-3, -1, -2, -3], [-2, -1, -3, -3], [-1, -3, -3, -2], [-3, -3, -2, -1]]
Q = [[-3, -2, -1, -3], [-1, -2, -3, -3], [-1, -3, -3, -2], [-1, -3, -2, -3]]
SEQUENCES = [[0, 1, 1, 3], [0, 2, 3, 3]]


class Bigram(nn.Module):
    """A model whose next token depends on the current one alone, in the anatomy of a Llama."""

    def __init__(self, log2_PP: list[list[int]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", bos_token_id=BOS)
        size = len(log2_PP)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.eye(size))
        self.model.layers = nn.ModuleList([nn.Identity()])
        self.lm_head = nn.Linear(size, size, bias=False)
        self.lm_head.weight = nn.Parameter(torch.tensor(log2_PP).float().T * LN2, requires_grad=False)

    def forward(self, ids_BT: Tensor) -> SimpleNamespace:
        (block,) = self.model.layers
        return SimpleNamespace(logits=self.lm_head(block(self.model.embed_tokens(ids_BT))))


@dataclass(frozen=True)
class Heads(Quantizer):
    """Puts another head into the model, scaled."""

    quantizes_activations: ClassVar[bool] = True

    log2: tuple[tuple[int, ...], ...] = tuple(map(tuple, Q))
    scale: float = 1.0

    def quantize(self, model: nn.Module, calibration: Calibration) -> dict[str, float]:
        model.lm_head.weight = Bigram([list(row) for row in self.log2]).lm_head.weight
        model.lm_head.weight.mul_(self.scale)
        return {"bits": 3.0}


def by_hand(quantizer: Quantizer, text: bool = True) -> Reference:
    data = Fixed(torch.tensor(SEQUENCES), 4, text)
    return Reference(Bigram(P), data, track(quantizer, length=3, sequences=2))


def test_quality_by_hand() -> None:
    found = full_precision(by_hand(Heads()))
    bits = [[1, 1, 3], [2, 2, 1]]  # -log2 P of 0->1, 1->1, 1->3; 0->2, 2->3, 3->3
    assert found["loss"] == pytest.approx(10 / 6 * LN2)
    assert found["perplexity"] == pytest.approx(2 ** (10 / 6))
    assert found["bits-per-byte"] == pytest.approx(10 / 13)  # 1 + 1 + 3 + 2 + 3 + 3 bytes; BOS is no text
    assert found["tokens"] == 6
    assert found["sequence-losses"] == pytest.approx([sum(row) / 3 * LN2 for row in bits])
    assert found["task"]["first"] == pytest.approx(1.5 * LN2)
    assert found["metrics"]["residual-peak"]["value"] == pytest.approx(1.0)
    assert full_precision(by_hand(Heads(), text=False))["bits-per-byte"] is None


def test_cost_by_hand() -> None:
    reference = by_hand(Heads())
    _, found = quantized(reference, Heads(), exemption=False)
    # -log2 Q: 2, 2, 3; 1, 2, 3. KL at the contexts 0, 1, 2, 3: 1/4, 1/4, 0, 3/4 bits.
    assert found["loss"] == pytest.approx(13 / 6 * LN2)
    assert found["damage"] == pytest.approx(3 / 6 * LN2)
    assert found["kl"] == pytest.approx(7 / 4 / 6 * LN2)
    assert found["top1-agreement"] == pytest.approx(1 / 6)  # after 2 alone
    assert found["bits-per-byte"] == pytest.approx(13 / 13)
    assert found["sequence-losses"] == pytest.approx([7 / 3 * LN2, 6 / 3 * LN2])
    assert found["sequence-kl"] == pytest.approx([3 / 4 / 3 * LN2, 4 / 4 / 3 * LN2])
    assert found["report"] == {"bits": 3.0}
    assert found["sqnr"]["all"] == [None]  # the stream has no error
    assert full_precision(reference)["loss"] == pytest.approx(10 / 6 * LN2)  # the reference is not changed


def test_a_quantizer_that_changes_nothing_costs_nothing() -> None:
    reference = by_hand(Heads())
    _, found = quantized(reference, Heads(tuple(map(tuple, P))), exemption=True)
    assert (found["damage"], found["kl"], found["top1-agreement"]) == (0.0, 0.0, 1.0)
    exact = pytest.approx(full_precision(reference)["sequence-losses"])
    assert found["exemption"]["extreme"] == found["exemption"]["random"]
    assert found["exemption"]["extreme"] == {"damage": 0.0, "kl": 0.0, "sequence-losses": exact}
    assert found["exemption"]["tokens"] == 2


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_an_overflow_is_null_and_never_nan(scale: float) -> None:
    _, found = quantized(by_hand(Heads()), Heads(scale=scale), exemption=True)
    assert found["loss"] is None
    assert found["damage"] is None
    assert found["perplexity"] is None
    assert found["bits-per-byte"] is None
    assert found["kl"] is None
    extreme = found["exemption"]["extreme"]
    assert (extreme["damage"], extreme["kl"]) == (None, None)
    assert None in extreme["sequence-losses"]
    assert None in found["sequence-losses"]
    json.dumps(found, allow_nan=False)


def test_a_huge_loss_is_a_number_and_its_perplexity_null() -> None:
    _, found = quantized(by_hand(Heads()), Heads(scale=1e6), exemption=False)
    assert found["loss"] > 1e5
    assert found["damage"] > 1e5
    assert found["perplexity"] is None
    json.dumps(found, allow_nan=False)


def test_figures_do_not_depend_on_what_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = quantized(by_hand(Heads()), Heads(), exemption=True)[1]
    monkeypatch.setattr("quantbench.evaluate.MEMORY", 0)
    assert quantized(by_hand(Heads()), Heads(), exemption=True)[1] == kept


# --- a planted sink --------------------------------------------------------------------------------------------------

VOCAB, LENGTH = 32, 12


def with_sink(mitigations: dict[str, dict[str, Any]] | None = None) -> QuantbenchModel:
    """An untrained decoder whose BOS carries 300 in one feature of the residual stream; others are of order 1."""
    config = QuantbenchConfig(
        vocab_size=VOCAB, layers=2, heads=4, width=64, mlp_width=64, max_position_embeddings=LENGTH, bos_token_id=BOS,
        mitigations=mitigations,
    )  # fmt: skip
    model = QuantbenchModel(config).eval().requires_grad_(False)
    initialise(model, 0)
    model.embed.weight[BOS] = 300 * F.one_hot(torch.tensor(0), 64)
    model.head.weight.mul_(6)  # so that it has something to say
    return model


def sampled(model: nn.Module, sequences: int) -> Tensor:
    """Sequences [N, T + 1] from the model's own distribution: of these no model predicts better."""
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.full((sequences, 1), BOS)
    while ids_NT.shape[1] <= LENGTH:
        logits_NV = model(ids_NT).logits[:, -1]
        logits_NV[:, BOS] = -torch.inf
        ids_NT = torch.cat((ids_NT, torch.multinomial(logits_NV.softmax(-1), 1, generator=generator)), 1)
    return ids_NT


@pytest.fixture(scope="module")
def sink() -> Reference:
    model = with_sink()
    return Reference(model, Fixed(sampled(model, 64), VOCAB), track(quantizer("w8a8-static-residual"), LENGTH, 64))


def test_exempting_the_planted_sink_removes_the_damage_and_random_tokens_do_not(sink: Reference) -> None:
    _, found = quantized(sink, quantizer("w8a8-static-residual"), exemption=True)
    exempt = found["exemption"]
    assert exempt["tokens"] == 64  # BOS of every sequence, and nothing else
    assert found["damage"] > 0.2
    for figure in ("damage", "kl"):
        assert abs(exempt["extreme"][figure]) < 0.02 * found[figure]
        assert exempt["random"][figure] > 0.7 * found[figure]


def test_the_random_control_has_as_many_positions_and_none_of_the_same(sink: Reference) -> None:
    generator = torch.Generator().manual_seed(0)
    for ids_BT in sink.batches:
        extreme_BT = sink.rule.mask(sink.model, ids_BT[:, :-1])
        random_BT = random_mask(extreme_BT, generator)
        assert extreme_BT.sum(-1).tolist() == random_BT.sum(-1).tolist() == [1] * len(ids_BT)
        assert extreme_BT[:, 0].all()
        assert not (extreme_BT & random_BT).any()


@pytest.mark.parametrize("moved", [False, True])
def test_exemption_finds_the_sink_before_and_among_registers(moved: bool) -> None:
    """BOS carries the sink behind the registers, or one of these does; a learned key is no position."""
    model = with_sink({"registers": {"count": 2}, "kv-bias": {}})
    if moved:
        model.front.tokens_RD[1] = model.embed.weight[BOS]
        model.embed.weight[BOS] = model.embed.weight[1]
    reference = Reference(model, Fixed(sampled(model, 32), VOCAB), track(quantizer("w8a8-static-residual"), LENGTH, 32))
    everywhere = quantizer("w8a8-static-residual", sites=("inputs", "residual", "embeddings", "head"))
    for entry in (quantizer("w8a8-static-residual"), quantizer("w8a8-static-qualcomm"), everywhere):
        _, found = quantized(reference, entry, exemption=True)
        exempt = found["exemption"]
        assert exempt["tokens"] == 32 * (2 if moved else 1)  # BOS always
        assert found["kl"] > 0.05
        assert exempt["extreme"]["kl"] < 0.1 * found["kl"]
        assert exempt["random"]["kl"] > 0.5 * found["kl"]
        assert None not in found["sqnr"]["non-sink"]


def test_exemption_is_measured_where_it_means_something(sink: Reference) -> None:
    assert (
        quantized(sink, quantizer("w4a16-rtn"), exemption=True)[1]["exemption"] is None
    )  # nothing of a token is quantized
    assert quantized(sink, quantizer("w8a8-token"), exemption=False)[1]["exemption"] is None
    assert quantized(sink, quantizer("w8a8-token"), exemption=True)[1]["exemption"] is not None


def test_sqnr_with_the_sink_hides_what_its_neighbours_suffer(sink: Reference) -> None:
    found = quantized(sink, quantizer("w8a8-static-residual"), exemption=False)[1]["sqnr"]
    for everyone, ordinary in zip(found["all"], found["non-sink"], strict=True):
        assert everyone > 15 + ordinary


def test_what_is_kept_of_the_reference_changes_no_figure(sink: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = quantizer("w8a8-static-residual")
    model, found = quantized(sink, entry, exemption=False)
    assert sink.traced_outputs is not None
    assert found["sqnr"] == trace.sqnr(sink.model, model, sink.traced, sink.rule)
    monkeypatch.setattr(evaluate, "MEMORY", 0)
    anew = Reference(sink.model, sink.data, sink.track)
    assert quantized(anew, entry, exemption=False)[1] == found
    assert anew.traced_outputs is None


# --- text and lm-eval ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An untrained decoder on the text of the track `smoke`."""
    _, smoke = load_track("smoke", ROOT)
    data = smoke.task.open(tmp_path_factory.mktemp("text"))  # type: ignore[attr-defined]
    return Reference(untrained(data.vocab, smoke.length), data, smoke)


def untrained(
    vocab: int, length: int, seed: int = 0, mitigations: dict[str, dict[str, Any]] | None = None
) -> QuantbenchModel:
    config = QuantbenchConfig(
        vocab_size=vocab, layers=2, heads=4, width=64, mlp_width=64, max_position_embeddings=length,
        mitigations=mitigations,
    )  # fmt: skip
    model = QuantbenchModel(config).eval().requires_grad_(False)
    initialise(model, seed)
    return model


@pytest.fixture(scope="module")
def tokenizer(text: Reference) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(text.data.tokenizer_file), bos_token="<bos>", eos_token="<sep>")


def log_likelihood(model: nn.Module, ids: list[int], first: int) -> float:
    """Of ids[first:] given what precedes, nats."""
    logits_TV = model(torch.tensor([ids[:-1]])).logits[0]
    return -float(F.cross_entropy(logits_TV[first - 1 :], torch.tensor(ids[first:]), reduction="sum"))


def test_lm_eval_finds_our_bits_per_byte_and_our_choices(text: Reference, tokenizer: Any) -> None:
    items = text.track.evaluate.lm_eval_items
    documents = text.data.documents(2 * items)  # type: ignore[attr-defined]
    passages = cut(documents[:items], tokenizer, text.track.length)
    questions = last_words(documents, tokenizer, text.track.length, items)
    results = []
    for seed, mitigations in ((0, {}), (1, {"registers": {}})):
        model = untrained(text.data.vocab, text.track.length, seed, mitigations)
        found = harness(model, text)
        nats = -sum(log_likelihood(model, [text.data.bos, *tokenizer.encode(p["text"])], 1) for p in passages)
        bits = nats / LN2 / sum(len(p["text"].encode()) for p in passages)
        assert found["held-out-bits-per-byte"] == pytest.approx(bits, abs=1e-3)
        assert found["own-bits-per-byte"] == pytest.approx(bits, abs=1e-5)
        right = 0
        for question in questions:
            context = tokenizer.encode(f"<bos>{question['context']}")
            whole = [tokenizer.encode(f"<bos>{question['context']} {choice}") for choice in question["choices"]]
            assert all(ids[: len(context)] == context for ids in whole)
            likely = [log_likelihood(model, ids, len(context)) for ids in whole]
            right += likely.index(max(likely)) == question["gold"]
        assert found["last-word"] == pytest.approx(right / items)
        assert found["last-word-stderr"] == pytest.approx(
            math.sqrt(found["last-word"] * (1 - found["last-word"]) / (items - 1))
        )
        assert (found["last-word-items"], found["last-word-chance"]) == (items, 0.25)
        results.append(found["held-out-bits-per-byte"])
    assert results[0] != results[1]


def test_passages_are_beginnings_that_fit_one_window(text: Reference, tokenizer: Any) -> None:
    documents = text.data.documents(16)  # type: ignore[attr-defined]
    passages = cut(documents, tokenizer, text.track.length)
    assert len(passages) == len(documents)
    for passage, document in zip(passages, documents, strict=True):
        assert 0 < len(tokenizer.encode(passage["text"])) <= text.track.length
        assert document.startswith(passage["text"].rstrip("\ufffd"))


def test_last_word_questions_are_fair(text: Reference, tokenizer: Any) -> None:
    documents = text.data.documents(16)  # type: ignore[attr-defined]
    items, length = 8, text.track.length
    questions = last_words(documents, tokenizer, length, items)
    assert len(questions) == items
    assert Counter(question["gold"] for question in questions) == dict.fromkeys(range(4), items // 4)
    texts = [" ".join(document.split()) for document in documents]
    for question in questions:
        assert len(set(question["choices"])) == len(question["choices"]) == 4
        assert all(choice.isalpha() and len(choice) >= 4 for choice in question["choices"])
        answer = question["choices"][question["gold"]]
        assert any(f"{question['context']} {answer}" in document for document in texts)
        for choice in question["choices"]:
            assert len(tokenizer.encode(f"<bos>{question['context']} {choice}")) <= length + 1  # its last is no input
    assert all(a["context"] != b["context"] for a, b in pairwise(questions))


def test_too_few_documents_are_refused(text: Reference, tokenizer: Any) -> None:
    documents = text.data.documents(8)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"give \d+ last-word questions, 1000 are asked for"):
        last_words(documents, tokenizer, text.track.length, 1000)


def test_bits_per_byte_count_no_byte_of_bos(text: Reference) -> None:
    found = full_precision(text)
    ids_NT = text.ids_NT
    size = len("".join(read_back(text, ids[1:].tolist()) for ids in ids_NT).encode("utf-8", "surrogateescape"))
    assert (ids_NT[:, 0] == text.data.bos).all()
    assert found["bits-per-byte"] == pytest.approx(found["loss"] * found["tokens"] / LN2 / size, rel=1e-6)


def read_back(text: Reference, ids: list[int]) -> str:
    """The text of ids, byte by byte: a window may begin or end within a character."""
    tokens = json.loads(text.data.tokenizer_file.read_bytes())["model"]["vocab"]  # type: ignore[union-attr]
    spelled = {number: token for token, number in tokens.items() if token not in ("<bos>", "<sep>")}
    return "x" * sum(len(spelled.get(number, "")) for number in ids)


def test_more_sequences_than_there_are_is_told(text: Reference) -> None:
    judged = replace(text.track.evaluate, sequences=1_000_000)
    with pytest.raises(ValueError, match="evaluate fewer sequences"):
        Reference(text.model, text.data, replace(text.track, evaluate=judged))
