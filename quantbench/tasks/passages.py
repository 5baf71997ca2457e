"""Passages that a model which is there already is judged on: one window a document, so that documents are independent.

A window is BOS (where the model has one) and the first `length` tokens of a document, in the model's own tokenizer; a
document that is shorter is left out. One document in six is kept for calibration. Nothing is trained on: there are no
training sequences. Documents come from the sets of `quantbench data`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quantbench import corpora
from quantbench.store import digest as digest_of
from quantbench.strict import KeyedError, Place, nearest, place, quote
from quantbench.tasks import Data, Ids, Task
from quantbench.tokenbytes import bytes_up_to

VERSION = 1  # bumped by hand when other ids come out of the same text
CALIBRATION = 6  # one document in so many


@dataclass(frozen=True)
class Passages(Task):
    """Documents, read by the tokenizer of a model."""

    reads_with_a_model: ClassVar[bool] = True

    tokenizer: Annotated[str, Place()] = "smollm2"  # a model as `quantbench measure` takes it
    sets: tuple[str, ...] = ("wikipedia",)  # names of `quantbench data`

    def __post_init__(self) -> None:
        for name in self.sets:
            if name not in corpora.DOCUMENTS:
                raise KeyedError(f"'sets' has {quote(name)}{nearest(name, corpora.DOCUMENTS)}", "sets")

    def open(self, cache: Path) -> "Documents":
        from quantbench.pretrained import SHORT, tokenizer_of

        tokenizer, bos, digest = tokenizer_of(place(self.tokenizer, SHORT), cache)
        texts = [text for name in self.sets for text in corpora.documents(name, cache)]
        read = [corpora.digest(name, cache) for name in self.sets]
        return Documents(tokenizer, bos, texts, digest_of([VERSION, list(self.sets), digest, read]))

    def check_model(self, model: str, cache: Path) -> None:
        from quantbench.pretrained import SHORT, tokenizer_of

        places = [place(name, SHORT) for name in (self.tokenizer, model)]
        if places[0] == places[1]:
            return
        mine, theirs = (_reading(tokenizer_of(at, cache)[0]) for at in places)
        if mine != theirs:
            raise ValueError(
                f"passages: the tokenizer of {self.tokenizer} is not that of {model}, to which its ids mean other "
                f"tokens: set `tokenizer: {model}`"
            )


def _reading(tokenizer: Any) -> Any:
    """All that decides which ids a text becomes."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    if whole is None:
        return tokenizer.get_vocab()
    parts = json.loads(whole.to_str())
    return [parts.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")]


class Documents(Data):
    """The documents as ids; each is tokenized when it is first asked for."""

    def __init__(self, tokenizer: Any, bos: int | None, texts: list[str], digest: str) -> None:
        self.vocab = len(tokenizer)
        if bos is None:
            raise ValueError("passages: this model has no BOS, which every sequence begins with")
        self.bos, self.digest = bos, digest
        self._tokenizer, self._texts = tokenizer, texts
        self._ids: dict[int, list[int]] = {}
        self._up_to: dict[int, NDArray[np.int64] | None] = {}  # bytes of text before each token
        self._bytes: dict[tuple[int, ...], int] = {}  # of the windows that were held out

    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        """ValueError: there are none."""
        raise ValueError("passages: nothing is trained on them; take the task `text`")

    def calibration(self, count: int, length: int) -> Ids:
        """Windows of the documents kept for it, one after the other; again from the first where they are too few."""
        kept = [number for number in range(len(self._texts)) if number % CALIBRATION == 0]
        windows = [
            ids[start : start + length]
            for ids in map(self._encoded, kept)
            for start in range(0, len(ids) - length + 1, length)
        ]
        if not windows:
            raise ValueError(f"passages: no document for calibration has {length:,} tokens: take shorter sequences")
        # Spread over all of them, so that no one article sets the ranges.
        return self._behind([windows[i * len(windows) // count % len(windows)] for i in range(count)], length)

    def held_out(self, count: int, length: int) -> Ids:
        others = (number for number in range(len(self._texts)) if number % CALIBRATION)
        long = [number for number in others if len(self._encoded(number)) >= length]
        windows = [self._encoded(number)[:length] for number in long]
        for number, window in zip(long, windows, strict=True):
            if (up_to := self._up_to[number]) is not None:
                self._bytes[tuple(window)] = int(up_to[length])
        if len(windows) < count:
            raise ValueError(
                f"passages: {len(windows):,} documents have {length:,} tokens, {count:,} are asked for: "
                "evaluate fewer sequences, or shorter ones"
            )
        return self._behind(windows[:count], length)

    def bytes_of(self, ids: Ids) -> int | None:
        """Of the first tokens of held-out documents, as `held_out` gives them, without BOS; None for any other ids."""
        total = 0
        for window in ids.reshape(-1, ids.shape[-1]).tolist():
            if (up_to := self._bytes.get(tuple(window))) is None:
                return None
            total += up_to
        return total

    def _encoded(self, number: int) -> list[int]:
        if number not in self._ids:
            self._ids[number], self._up_to[number] = bytes_up_to(self._tokenizer, self._texts[number])
        return self._ids[number]

    def _behind(self, windows: list[list[int]], length: int) -> Ids:
        ids = np.full((len(windows), length + 1), self.bos, np.int64)
        ids[:, 1:] = windows
        return ids
