"""What a model learns to predict. One file, one task.

A task is a frozen dataclass of parameters; `open` reads or makes its data once and returns a `Data`.
A sequence is `length + 1` ids, the first of which is BOS: x = ids[:-1] predicts y = ids[1:].

Shapes: B sequences, T positions, ids are int64.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def random_bits(seed: int, *counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 random bits for every (seed, counter, ...), the counters broadcast against one another.

    A pure function, so that what a sequence draws depends on its number alone: splitmix64 (Steele, Lea and
    Flood, OOPSLA 2014), started anew from its own output for every counter.
    """
    z = _mix(np.array(seed % 2**64, np.uint64)[None])
    for counter in counters:
        z = _mix(z + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return z


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Data(ABC):
    """An opened task: sequences by index, so that any process can make any batch."""

    vocab: int  # ids are 0..vocab-1, special tokens included
    bos: int
    digest: str  # sha256 (hex) of everything that decides which ids come out
    triggers: tuple[int, ...] = ()  # ids at which a head is needed, where the task says which: elsewhere it may rest
    tokenizer_file: Path | None = None  # a `tokenizers` JSON file, where the task is text

    @abstractmethod
    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        """Training sequences number first..first+count-1 of a seed's stream, [count, length + 1].

        Sequence i depends on (seed, i) alone: not on the batch, the process, or what was drawn before.
        """

    @abstractmethod
    def calibration(self, count: int, length: int) -> Ids:
        """Sequences of the training split on which quantizers calibrate, the same for every model."""

    @abstractmethod
    def held_out(self, count: int, length: int) -> Ids:
        """Held-out sequences, [count, length + 1], the same for every model and seed.

        ValueError where the split is too small for `count` different ones.
        """

    def bytes_of(self, ids: Ids) -> int | None:
        """How many UTF-8 bytes of text the ids stand for (special tokens: 0); None: they are none, or nobody knows."""
        return None

    def figures(self, ids_BT: Ids, nll_BT: NDArray[np.float32]) -> dict[str, float]:
        """What the task itself makes of the held-out losses. ids_BT: [B, T + 1]; nll_BT: [B, T], nats."""
        return {}


@dataclass(frozen=True)
class Task:
    """The contract of an entry: parameters as fields, data through `open`."""

    reads_with_a_model: ClassVar[bool] = False  # its ids are those of the tokenizer of a model that is there already

    def open(self, cache: Path) -> Data:
        """The data, made on the first call and kept under `cache`; ValueError names what is missing."""
        raise NotImplementedError

    def check_model(self, model: str, cache: Path) -> None:
        """ValueError where its ids are of another vocabulary than a model's, which `quantbench measure` takes so."""
        raise ValueError(f"this task makes ids of its own, which mean nothing to {model}: take the task `passages`")

    def ready(self, cache: Path) -> bool:
        """Whether `open` has nothing to make."""
        return True

    def carry(self, cache: Path) -> Path:
        """The data as one file under `cache`; copied to the same place elsewhere, it is what `open` gives there.

        ValueError where there is nothing to carry, or too much.
        """
        raise ValueError("this task makes its data wherever it runs: there is nothing to carry")
