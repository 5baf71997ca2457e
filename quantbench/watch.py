"""What a model does with its first token, sequence by sequence and layer by layer, in one pass.

The metrics of a record are means over the track's held-out sequences; a timeline and an intervention ask for more of a
few: the figures of arXiv:2410.13835 at every layer, queries apart at which the task needs the head (triggers) and at
which it may rest, and of each sequence its own, so that differences between two states of a model are paired.

    loss                 mean cross-entropy, nats a token; and the figures of the task, such as excess risks
    bos-attention.l      mean of A[i, 0] over heads and queries i >= 1 that are no triggers; absolute mass
    trigger-attention.l  the same over queries that are triggers, where the task has some
    delta-logit.l        logit(i, 0) - mean over 1 <= j < i of logit(i, j), mean over heads and queries i >= 2
    value-bos.l          ||W_O^h v_0||, mean over heads;  value-others.l  the mean of the others' over heads and tokens
    value-drain.l        ||W_O^h v_0|| over the mean of the others' of that head, mean over heads
    residual-bos.l       ||h_0|| after the block;  residual-others.l  the mean, residual-median.l  the median and
                         residual-largest.l  the largest of the other tokens' norms

What is undefined is NaN here, and null in a record. Learned tokens in front of BOS are among the others.

Shapes: N sequences, B of a batch, T tokens, D residual features, H heads, E features of a head.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.anatomy import Anatomy, Heads, anatomy, device_of
from quantbench.tasks import Data, Ids
from quantbench.trace import Watcher, full_precision, hooked, token_losses

OF_ATTENTION = ("bos-attention", "trigger-attention", "delta-logit", "value-bos", "value-others", "value-drain")
OF_STREAM = ("residual-bos", "residual-others", "residual-median", "residual-largest")
BATCH = 32  # sequences a pass

Sums = dict[str, list[Tensor]]


def look(model: nn.Module, ids: Ids, data: Data, parts: Anatomy | None = None) -> dict[str, list[float]]:
    """Figure -> its value in each of the sequences ids [N, T + 1]."""
    parts = anatomy(model) if parts is None else parts
    device = device_of(model)
    found: dict[str, list[float]] = {}
    for first in range(0, len(ids), BATCH):
        part = ids[first : first + BATCH]
        ids_BT = torch.from_numpy(part).to(device)
        pass_ = _Pass(parts, ids_BT[:, :-1], data.triggers)
        with full_precision(model), hooked(pass_.wires()):
            logits_BTV = model(ids_BT[:, :-1]).logits
        nll_BT = token_losses(logits_BTV, ids_BT[:, 1:]).cpu()
        figures = {"loss": nll_BT.double().mean(-1).tolist(), **_task(part, nll_BT, data), **pass_.figures()}
        for name, values in figures.items():
            found.setdefault(name, [math.nan] * first).extend(values)
        for values in found.values():
            values.extend([math.nan] * (first + len(part) - len(values)))
    return found


def _task(ids: Ids, nll_BT: Tensor, data: Data) -> dict[str, list[float]]:
    each = [data.figures(ids[n : n + 1], nll_BT[n : n + 1].numpy()) for n in range(len(ids))]
    names = dict.fromkeys(name for figures in each for name in figures)
    return {name: [figures.get(name, math.nan) for figures in each] for name in names}


class _Pass:
    """One batch on its way through the model."""

    def __init__(self, parts: Anatomy, ids_BT: Tensor, triggers: Sequence[int]) -> None:
        self.parts, self.front = parts, parts.front
        wanted = torch.tensor(triggers, dtype=ids_BT.dtype, device=ids_BT.device)
        trigger_BT = torch.isin(ids_BT, wanted)
        self.active_BT = F.pad(trigger_BT, (self.front, 0), value=False)
        self.resting_BT = ~self.active_BT
        places_T = torch.arange(self.active_BT.shape[1], device=ids_BT.device)
        for mask_BT in (self.active_BT, self.resting_BT):
            mask_BT &= places_T > self.front  # BOS sees nobody but itself
        self.has_triggers = len(triggers) > 0
        self.found: dict[str, list[float]] = {}

    def wires(self) -> list[tuple[nn.Module, Watcher, bool]]:
        wires: list[tuple[nn.Module, Watcher, bool]] = []
        for layer, block in enumerate(self.parts.blocks):
            wires.append((block, self._residual(layer), False))
        for layer, heads in self.parts.heads.items():
            wires.append((heads.scores, self._scores(layer), False))
            wires.append((heads.weights, self._weights(layer), False))
            wires.append((heads.values, self._values(layer, heads), False))
        return wires

    def figures(self) -> dict[str, list[float]]:
        order = {name: index for index, name in enumerate((*OF_ATTENTION, *OF_STREAM))}
        return dict(sorted(self.found.items(), key=lambda item: (order[item[0].partition(".")[0]], item[0])))

    def _keep(self, name: str, layer: int, values_B: Tensor) -> None:
        self.found[f"{name}.{layer}"] = values_B.double().cpu().tolist()

    def _residual(self, layer: int) -> Watcher:
        def watch(hidden_BTD: Tensor) -> None:
            norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float64)
            others_BT = torch.cat((norms_BT[:, : self.front], norms_BT[:, self.front + 1 :]), 1)
            self._keep("residual-bos", layer, norms_BT[:, self.front])
            self._keep("residual-others", layer, others_BT.mean(-1))
            self._keep("residual-median", layer, others_BT.median(-1).values)
            self._keep("residual-largest", layer, others_BT.amax(-1))

        return watch

    def _scores(self, layer: int) -> Watcher:
        def watch(scores_BHTT: Tensor) -> None:
            bos, length = self.front, scores_BHTT.shape[-2]
            rivals_BHTT = scores_BHTT[..., bos + 1 : length].double().tril(-bos - 2)  # earlier keys behind BOS
            count_T = (torch.arange(length, device=scores_BHTT.device) - bos - 1)[bos + 2 :]
            mean_BHT = rivals_BHTT.sum(-1)[..., bos + 2 :] / count_T
            self._keep("delta-logit", layer, (scores_BHTT[..., bos + 2 :, bos] - mean_BHT).mean((1, 2)))

        return watch

    def _weights(self, layer: int) -> Watcher:
        def watch(weights_BHTT: Tensor) -> None:
            mass_BT = weights_BHTT[..., self.front].mean(1, dtype=torch.float64)
            self._keep("bos-attention", layer, _masked_mean(mass_BT, self.resting_BT))
            if self.has_triggers:
                self._keep("trigger-attention", layer, _masked_mean(mass_BT, self.active_BT))

        return watch

    def _values(self, layer: int, heads: Heads) -> Watcher:
        def watch(values_BHTE: Tensor) -> None:
            output_HED = heads.output_HED(values_BHTE.shape[1]).float()
            each = [values_BHTE[:, h] @ output_HED[h] for h in range(len(output_HED))]  # one residual stream at a time
            norms_BHT = torch.stack([torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in each], 1)
            bos_BH = norms_BHT[..., self.front]
            others_BH = (norms_BHT.sum(-1) - bos_BH) / max(norms_BHT.shape[-1] - 1, 1)
            self._keep("value-bos", layer, bos_BH.mean(-1))
            self._keep("value-others", layer, others_BH.mean(-1))
            self._keep("value-drain", layer, (bos_BH / others_BH).nanmean(-1))

        return watch


def _masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (x_BT * mask_BT).sum(-1) / mask_BT.sum(-1)  # NaN where a sequence has none


def mean(values: Sequence[float]) -> float | None:
    """Over the sequences that have the figure; None where none has, or one is infinite."""
    kept = np.array([value for value in values if not math.isnan(value)])
    return float(kept.mean()) if len(kept) and np.isfinite(kept).all() else None


def timeline(model: nn.Module, ids: Ids, data: Data, parts: Anatomy | None = None) -> dict[str, object]:
    """The figures of `look` as means over the sequences, for an entry of a timeline: those of layers as lists.

    A list has an entry a layer, null where the layer has no attention.
    """
    parts = anatomy(model) if parts is None else parts
    found = look(model, ids, data, parts)
    layers = range(len(parts.blocks))
    names = [n for n in (*OF_ATTENTION, *OF_STREAM) if any(key.startswith(f"{n}.") for key in found)]
    task = {name: mean(values) for name, values in found.items() if "." not in name}
    return {"task": task} | {name: [mean(found.get(f"{name}.{layer}", [])) for layer in layers] for name in names}
