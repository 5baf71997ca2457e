"""What a portrait keeps of the passes of a model, beside the metrics: who carries the residual peak, which tokens are
extreme, where the largest number of all passes, and what the text costs.

All of it is running counts and sums, bounded by the vocabulary, the length of a window and the width of the model:
nothing grows with the text.

Shapes: B sequences, T tokens, D residual features, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.anatomy import Anatomy, brought
from quantbench.calibration import EXTREME, Exemption, learned_keys, what_counts
from quantbench.metrics import Activations, LayerMean, Metric, median
from quantbench.trace import Watcher, remedy, token_losses

LEARNED = -1  # stands for the id of a learned token in front of a sequence, which has none
# At which a largest is sought. What enters a norm shows the sum after the attention, which passes no module of theirs.
# Weights do not pass, but a dtype must hold them, too.
SITES = ("embedding", "residual", "norm-input", "norm", "linear-input", "linear-output", "scores", "weight")


@dataclass
class Extreme:
    """The extreme tokens with one id, after one block."""

    count: int = 0
    first: int = 0  # the positions between which they stand
    last: int = 0


@dataclass
class Carried:
    """What is known of a layer: the token of each sequence that has the largest norm, and all extreme tokens."""

    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    features: Counter[int] = field(default_factory=Counter)  # the largest of that token
    values: dict[int, float] = field(default_factory=dict)  # feature -> the sum of its values
    extreme: dict[int, Extreme] = field(default_factory=dict)  # by id
    extreme_positions: Counter[int] = field(default_factory=Counter)

    def most_common(self) -> dict[str, Any]:
        """The usual carrier: its position, id and largest feature, each with the share of sequences that agree."""
        count = self.positions.total()
        position, token, feature = (first(c) for c in (self.positions, self.tokens, self.features))
        return {
            "position": position,
            "position-share": self.positions[position] / count,
            "token": None if token == LEARNED else token,
            "token-share": self.tokens[token] / count,
            "feature": feature,
            "feature-share": self.features[feature] / count,
            "value": self.values[feature] / self.features[feature],
        }


def first(counter: Counter[int]) -> int:
    """The most frequent, and of several the smallest: not the one that came first, which the batches decide."""
    return min(counter, key=lambda key: (-counter[key], key))


class Carriers(Metric):
    """Norms of the residual stream after each block, and the tokens that carry its peak there.

    A token is extreme where its norm exceeds 3 x the median of its sequence. Positions count the learned tokens in
    front.
    """

    title = "who carries the residual peak"

    def __init__(self) -> None:
        self.largest, self.median, self.bos = LayerMean(), LayerMean(), LayerMean()
        self.layers: dict[int, Carried] = {}
        self.occurrences: Counter[int] = Counter()  # of every id in the text
        self.sequences = 0
        self._ids_BT: Tensor | None = None

    def tokens(self, ids_BT: Tensor) -> None:
        ids_BT = ids_BT.cpu()
        self._ids_BT = F.pad(ids_BT, (self.front, 0), value=LEARNED)
        ids, counts = ids_BT.unique(return_counts=True)
        self.occurrences.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        self.sequences += len(ids_BT)

    def residual(self, layer: int, hidden: Activations) -> None:
        assert self._ids_BT is not None, "the ids of a batch come before its activations"
        norms_BT = hidden.norms_BT.double()
        median_B = median(norms_BT)
        largest_B, at_B = norms_BT.max(-1)
        self.largest.add(layer, largest_B)
        self.median.add(layer, median_B)
        self.bos.add(layer, norms_BT[:, self.front])

        carrier_BD = hidden.x_BTD[torch.arange(len(at_B), device=at_B.device), at_B]
        feature_B = carrier_BD.abs().argmax(-1)
        value_B = carrier_BD.gather(-1, feature_B[:, None])[:, 0].double()
        found = self.layers.setdefault(layer, Carried())
        for row, (position, feature, value) in enumerate(
            zip(at_B.tolist(), feature_B.tolist(), value_B.tolist(), strict=True)
        ):
            found.positions[position] += 1
            found.tokens[int(self._ids_BT[row, position])] += 1
            found.features[feature] += 1
            found.values[feature] = found.values.get(feature, 0.0) + value

        for row, position in (norms_BT > EXTREME * median_B[:, None]).nonzero().tolist():
            token = int(self._ids_BT[row, position])
            seen = found.extreme.setdefault(token, Extreme(0, position, position))
            seen.count += 1
            seen.first, seen.last = min(seen.first, position), max(seen.last, position)
            found.extreme_positions[position] += 1


class Largest:
    """The largest |x| at every kind of SITES, and where. ValueError at the first place that is NaN or infinite."""

    def __init__(self, model: nn.Module, parts: Anatomy, dtype: str) -> None:
        self.model, self.parts, self.dtype = model, parts, dtype
        self.found: dict[str, tuple[float, str, int | None]] = {}  # site -> (|x|, the module's path, its layer)

    def wires(self) -> Iterator[tuple[nn.Module, Watcher, bool]]:
        """For `trace.hooked`."""
        layers = {id(m): layer for layer, block in enumerate(self.parts.blocks) for m in block.modules()}
        for path, module in self.model.named_modules():
            with brought(module):
                for weight in filter(Tensor.numel, module.parameters(recurse=False)):
                    self._see(path, layers.get(id(module)), "weight", weight.detach())
        residual = {id(m) for m in (*self.parts.blocks, *self.parts.places.get("residual", {}).values())}
        scores = {id(heads.scores) for heads in self.parts.heads.values()}
        for path, module in self.model.named_modules():
            see = partial(self._see, path, layers.get(id(module)))
            if module is self.parts.embedding:
                yield module, partial(see, "embedding"), False
            elif id(module) in residual:
                yield module, partial(see, "residual"), False
            elif id(module) in scores:
                yield module, partial(self._see_scores, see, learned_keys(module)), False
            elif isinstance(module, nn.Linear):
                yield module, partial(see, "linear-input"), True
                yield module, partial(see, "linear-output"), False
            elif "norm" in type(module).__name__.lower():
                yield module, partial(see, "norm-input"), True
                yield module, partial(see, "norm"), False

    def _see_scores(self, see: Any, appended: int, scores_BHTS: Tensor) -> None:
        """Those alone that count: of keys a query may look at."""
        see("scores", what_counts(scores_BHTS, "scores", Exemption(), appended))

    def _see(self, path: str, layer: int | None, site: str, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        largest = max(-low, high)
        if not math.isfinite(low) or not math.isfinite(high):
            at = "outside the layers" if layer is None else f"layer {layer}"
            if site == "weight":
                told = "measure it in float32" if self.dtype != "float32" else "restore the model's files"
                raise ValueError(f"{at} ({path}) has a weight that is NaN or infinite in {self.dtype}: {told}")
            raise ValueError(
                f"{at} ({path}, {site}) gives NaN or infinity in {self.dtype} on this text: {remedy(self.dtype)}"
            )
        if site not in self.found or largest > self.found[site][0]:
            self.found[site] = (largest, path, layer)


@dataclass
class Loss:
    """The sum of the losses of all tokens that were predicted, nats, and their number."""

    total: float = 0.0
    tokens: int = 0

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within it, every pass of the model over ids counts."""
        with model.register_forward_hook(self._see):
            yield

    def _see(self, model: nn.Module, args: tuple, output: Any) -> None:
        ids_BT, logits_BTV = args[0], output.logits.detach()
        nll_BT = token_losses(logits_BTV[:, :-1], ids_BT[:, 1:])
        self.total += float(nll_BT.sum(dtype=torch.float64))
        self.tokens += nll_BT.numel()
