"""Bigram-Backcopy: the task on which attention sinks were taken apart (arXiv:2410.13835).

Characters follow the statistics of Tiny Shakespeare, save after a trigger, one of its k most frequent characters:

    s_0 = BOS;   s_1 ~ pi without triggers;   s_{i+1} = s_{i-1} where s_i is a trigger, else ~ P(s_i, .)

A head that looks two back is of use at triggers alone, and dormant elsewhere. pi and P are the counts in
bigram-counts.json, normalised and not smoothed. Ids are the 65 characters in code-point order, then BOS, then a
delimiter that is never emitted. `start` asks what BOS is needed for: sequences without it, with two, or with the
delimiter in its place.

The oracle knows the rule: its risk is 0 at triggers, -log P(x, y) at other characters. Excess risk is the
cross-entropy minus the oracle's. BOS is scored apart.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from quantbench.strict import Added, Range
from quantbench.tasks import Data, Ids, Task, random_bits

VERSION = 1  # bumped by hand when other ids come out of the same counts
COUNTS = Path(__file__).with_name("bigram-counts.json")
BITS = 40  # of a draw: with totals below 2^21, products stay below 2^64
CALIBRATION_SEED = 0x63616C6962726174  # streams of their own, far from the seeds that people choose
HELD_OUT_SEED = 0x68656C646F757421


@dataclass(frozen=True)
class BigramBackcopy(Task):
    """Next-character prediction where triggers copy."""

    triggers: Annotated[int, Range(1, 32)] = 3  # k; 3: space, e, t
    start: Annotated[Literal["bos", "none", "two", "delimiter"], Added()] = "bos"  # two: BOS twice

    def open(self, cache: Path) -> "Sequences":
        return Sequences(self.triggers, self.start)


class Sequences(Data):
    """Sequences without end, made where they are asked for: nothing is kept."""

    def __init__(self, triggers: int, start: str = "bos"):
        content = COUNTS.read_bytes()
        counts = json.loads(content)
        self.unigrams_V = np.array(counts["unigrams"], np.int64)
        self.bigrams_VV = np.array(counts["bigrams"], np.int64)
        characters = len(self.unigrams_V)
        assert self.bigrams_VV.shape == (characters, characters)
        self.start, self.vocab = start, characters + 2
        self.bos = characters + (start == "delimiter")
        kind = f"{VERSION} {triggers} " + ("" if start == "bos" else f"{start} ")
        self.digest = hashlib.sha256(kind.encode() + content).hexdigest()
        self.is_trigger_V = np.zeros(self.vocab, bool)
        self.is_trigger_V[np.argsort(-self.unigrams_V, kind="stable")[:triggers]] = True
        self.triggers = tuple(np.flatnonzero(self.is_trigger_V).tolist())
        # Draws compare integers with cumulated counts: no character of probability 0 comes of a rounded sum,
        # and every machine draws the same. The last row is BOS's.
        first = np.where(self.is_trigger_V[:characters], 0, self.unigrams_V)
        self._cumulated_SV = np.cumsum(np.vstack([self.bigrams_VV, first]), axis=1).astype(np.uint64)

    def training(self, seed: int, first: int, count: int, length: int) -> Ids:
        if self.start == "none":
            return self._from_bos(seed, first, count, length + 1)[:, 1:]
        if self.start == "two":
            return np.pad(self._from_bos(seed, first, count, length - 1), ((0, 0), (1, 0)), constant_values=self.bos)
        return self._from_bos(seed, first, count, length)

    def _from_bos(self, seed: int, first: int, count: int, length: int) -> Ids:
        """Sequences that begin with BOS, or with the delimiter in its place."""
        numbers_B = np.arange(first, first + count)
        draws_BT = random_bits(seed, numbers_B[:, None], np.arange(length)) >> np.uint64(64 - BITS)
        ids = np.full((count, length + 1), self.bos, np.int64)
        for t in range(length):
            state_B = ids[:, t] if t else np.full(count, len(self.unigrams_V))
            cumulated_BV = self._cumulated_SV[state_B]
            draw_B = (draws_BT[:, t] * cumulated_BV[:, -1]) >> np.uint64(BITS)  # uniform in 0..total-1
            ids[:, t + 1] = (cumulated_BV <= draw_B[:, None]).sum(1)
            if t > 0:
                ids[:, t + 1] = np.where(self.is_trigger_V[state_B], ids[:, t - 1], ids[:, t + 1])
        return ids

    def calibration(self, count: int, length: int) -> Ids:
        return self.training(CALIBRATION_SEED, 0, count, length)

    def held_out(self, count: int, length: int) -> Ids:
        return self.training(HELD_OUT_SEED, 0, count, length)

    def figures(self, ids_BT: Ids, nll_BT: NDArray[np.float32]) -> dict[str, float]:
        """Mean excess risk at triggers and at other characters, and the mean risk at BOS, in nats.

        Left out where the sequences have no such position.
        """
        x_BT = ids_BT[:, :-1]
        excess_BT = nll_BT.astype(np.float64) - self.oracle(ids_BT)
        positions = {
            "excess-risk-trigger": self.is_trigger_V[x_BT],
            "excess-risk-bigram": ~self.is_trigger_V[x_BT] & (x_BT != self.bos),
            "risk-bos": x_BT == self.bos,
        }
        return {name: float(excess_BT[chosen].mean()) for name, chosen in positions.items() if chosen.any()}

    def oracle(self, ids_BT: Ids) -> NDArray[np.float64]:
        """The oracle's risk at every position, nats, [B, T]; 0 at BOS, so that its excess there is the risk."""
        x_BT, y_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        known_BT = self.is_trigger_V[x_BT] | (x_BT == self.bos)
        bigram_BT = (np.where(known_BT, 0, x_BT), np.where(known_BT, 0, y_BT))
        share_BT = self.bigrams_VV[bigram_BT] / self.bigrams_VV.sum(1)[bigram_BT[0]]
        return -np.log(share_BT, out=np.zeros(x_BT.shape), where=~known_BT)
