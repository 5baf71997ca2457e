"""How good a model is on held-out sequences, and what a quantizer costs it: nats, bits per byte, KL, agreement.

Every sequence is one window of the track's length that begins with BOS, scored whole in one pass: window = stride =
length, so each held-out token counts once. Damage is the quantized minus the model's own full-precision loss; KL is
of the full-precision distribution to the quantized one; both are means over tokens. Bits per byte divide by the UTF-8
bytes of text that the predicted tokens stand for, however a window cuts it (tokenbytes.py).

Shapes: B sequences of a batch, N all held-out sequences, T positions, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.anatomy import check_ids, device_of
from quantbench.calibration import Calibration
from quantbench.mitigations import Mitigation, fold_projection
from quantbench.quantizers import Quantizer
from quantbench.recipe import Track
from quantbench.tasks import Data
from quantbench.trace import ExtremeRule, block_outputs, extreme_tokens, measure, random_mask, sqnr

BATCH = 32  # held-out sequences a pass, at most
PASS = 1 << 28  # bytes of log-probabilities a pass
MEMORY = 1 << 29  # bytes of full-precision log-probabilities that are kept rather than computed again
CALIBRATION_BATCH = 8  # sequences of one calibration batch
CONTROL_SEED = 0  # of the random positions that are exempt as a control

Figures = dict[str, Any]
Masks = Sequence[Tensor]  # of each batch, bool [B, T]


@dataclass
class Reference:
    """The full-precision model on the held-out sequences: what every quantized one is compared with."""

    model: nn.Module  # of a recipe with a post-hoc mitigation: as it was prepared
    data: Data
    track: Track
    mitigation: Mitigation = field(default_factory=Mitigation)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.ids_NT = self.data.held_out(self.track.evaluate.sequences, self.track.length)
        self.batch = max(1, min(BATCH, PASS // (4 * self.track.length * self.data.vocab)))
        self.batches = [ids.to(self.device) for ids in torch.from_numpy(self.ids_NT).split(self.batch)]
        calibration_NT = self.data.calibration(CALIBRATION_BATCH * self.track.evaluate.calibration, self.track.length)
        self.calibration = list(
            torch.from_numpy(calibration_NT)[:, :-1].to(self.device).split(min(CALIBRATION_BATCH, self.batch))
        )
        for whose, ids in (("held-out sequences", self.ids_NT), ("calibration sequences", calibration_NT)):
            check_ids(self.model, ids, whose)
        self._kept: dict[int, Tensor] = {}
        self._likeliest: dict[int, Tensor] = {}
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
        return list(torch.cat(self.batches)[: self.track.evaluate.traced, :-1].split(self.batch))

    @cached_property
    def rule(self) -> ExtremeRule:
        """Which tokens are extreme, found on the calibration split."""
        return extreme_tokens(self.model, self.calibration)

    @cached_property
    def exempt(self) -> dict[str, tuple[Masks, Masks]]:
        """`extreme` and, as many, `random` positions, of calibration and of held-out batches (design: Exemption)."""
        inputs = [ids_BT[:, :-1] for ids_BT in self.batches]
        extreme = tuple([self.rule.mask(self.model, x) for x in xs] for xs in (self.calibration, inputs))
        generator = torch.Generator().manual_seed(CONTROL_SEED)
        control = tuple([random_mask(mask_BT, generator) for mask_BT in side] for side in extreme)
        return {"extreme": (extreme[0], extreme[1]), "random": (control[0], control[1])}

    def log_probabilities(self, index: int) -> Tensor:
        """Of batch `index`, [B, T, V]."""
        if index in self._kept:
            return self._kept[index]
        found = log_probabilities(self.model, self.batches[index])
        if found.nbytes * len(self.batches) <= MEMORY:
            self._kept[index] = found
        return found

    def likeliest(self, index: int) -> Tensor:
        """The id that the model holds for the likeliest at every position of batch `index`, [B, T]."""
        if index not in self._likeliest:
            self._likeliest[index] = self.log_probabilities(index).argmax(-1)
        return self._likeliest[index]

    @cached_property
    def traced_outputs(self) -> list[list[Tensor]] | None:
        """The residual stream after each block, [B, T, D], of every traced batch; None where they are too large."""
        found, size = [], 0
        for ids_BT in self.traced:
            found.append(block_outputs(self.model, ids_BT))
            size += sum(hidden_BTD.nbytes for hidden_BTD in found[-1])
            if size * len(self.traced) > MEMORY * len(found):
                return None
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
    variants = {"all": Variant(reference, quantizer)}
    if exempting := exemption and quantizer.quantizes_activations:
        variants |= {name: Variant(reference, quantizer, *masks) for name, masks in reference.exempt.items()}
    figures = _compare(reference, list(variants.values()))
    found = dict(zip(variants, figures, strict=True))
    whole = found["all"] | {"report": variants["all"].report, "exemption": None}
    whole["sqnr"] = sqnr(
        reference.model, variants["all"].model, reference.traced, reference.rule, outputs=reference.traced_outputs
    )
    if exempting:
        tokens = int(sum(mask_BT.sum() for mask_BT in reference.exempt["extreme"][1]))
        kept = ("damage", "kl", "sequence-losses")
        costs = {name: {key: found[name][key] for key in kept} for name in reference.exempt}
        whole["exemption"] = {"tokens": tokens, **costs}
    return variants["all"].model, whole


class Variant:
    """A quantized copy of the reference's model: as it is, or with positions of each batch left in full precision."""

    def __init__(
        self,
        reference: Reference,
        quantizer: Quantizer,
        calibration: Masks | None = None,
        evaluation: Masks | None = None,
    ) -> None:
        self.model = copy.deepcopy(reference.model)
        self.calibration = reference.calibrate(calibration)
        self.report = quantizer.quantize(self.model, self.calibration)
        self.masks: list[Tensor | None] = [None] * len(reference.batches) if evaluation is None else list(evaluation)

    def log_probabilities(self, index: int, ids_BT: Tensor) -> Tensor:
        """Of batch `index`, [B, T, V]."""
        with self.calibration.exemption.of(self.masks[index]):
            return log_probabilities(self.model, ids_BT)


def _compare(reference: Reference, variants: list[Variant]) -> list[Figures]:
    """Each variant's quality on the held-out sequences, beside the reference's, whose pass they share."""
    losses: list[list[Tensor]] = [[] for _ in variants]
    divergences: list[list[Tensor]] = [[] for _ in variants]
    agreed = [0] * len(variants)
    for index, ids_BT in enumerate(reference.batches):
        exact_BTV = reference.log_probabilities(index)
        for i, variant in enumerate(variants):
            approximate_BTV = variant.log_probabilities(index, ids_BT)
            losses[i].append(nll(approximate_BTV, ids_BT))
            divergences[i].append((exact_BTV.exp() * (exact_BTV - approximate_BTV)).sum(-1))
            agreed[i] += int((reference.likeliest(index) == approximate_BTV.argmax(-1)).sum())
    exact_loss = float(reference.nll_NT.double().mean())
    found = []
    for nll_NT, kl_NT, same in zip(map(torch.cat, losses), map(torch.cat, divergences), agreed, strict=True):
        figures = quality(nll_NT, reference)
        loss = figures["loss"]
        found.append({
            **figures,
            "damage": None if loss is None else loss - exact_loss,
            "kl": _finite(float(kl_NT.double().mean())),
            "top1-agreement": same / nll_NT.numel(),
            "sequence-losses": _rounded(nll_NT.mean(-1)),
            "sequence-kl": _rounded(kl_NT.mean(-1)),
        })  # fmt: skip
    return found


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
