"""Which site pays: the damage of rounding one place alone, and the damage spared by leaving that place alone out.

A place is where a scheme rounds: the weights or the inputs of one Linear (`0.attention.qkv`), or a site of the model
(`3.residual`). With D the damage when a set of places is rounded (loss, or KL(full || quantized), nats per token),

    alone(p) = D({p})        spared(p) = D(all) - D(all but p)

likewise for a kind of site: all inputs, all weights, the residual stream after every sublayer, ... The two differ where
places hide one another: two that clip the same sink spare nothing one by one. Intervals are over sequences, paired.

Beside it stand two errors of the stream, neither of which is a damage:

- of a place's own rounding, on the activations of the full-precision model, 10 log10(signal / noise) in dB, over
  extreme tokens (`sink`) and over the others apart: together the sink's signal hides what its neighbours suffer;
- *error propagation* (arXiv:2509.23500) through block l, f in full precision and f_q quantized, h and h_q what enters
  them in the one model and the other:

    R_l = |f_q(h_q) - f(h)|^2 / |f(h)|^2 = A + B + C
    a = [(f_q(h_q) - f_q(h)) + (f(h_q) - f(h))] / 2        A = |a|^2 / |f(h)|^2    accumulated: it was there before
    b = [(f_q(h_q) - f(h_q)) + (f_q(h) - f(h))] / 2        B = |b|^2 / |f(h)|^2    local: the block adds it
                                                           C = 2<a, b> / |f(h)|^2  how the two meet

  with norms over all tokens, or all that are not extreme, of the held-out sequences.

A place changes nothing before its block. So what enters each block of the full-precision and of the wholly quantized
model is kept, and a pass with another block begins there: half the work, the same bits.

Shapes: N held-out sequences, B of a batch, T tokens, D residual features, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantbench import bench
from quantbench.anatomy import anatomy
from quantbench.bench import Job, Say, from_json, to_json
from quantbench.calibration import PAIRS, Calibration, Exemption, learned_keys, places, spans, what_counts
from quantbench.evaluate import Reference, log_probabilities, nll
from quantbench.metrics import finite
from quantbench.quantizers import FULL, Chosen, Rounding
from quantbench.quantizers.integer import OF_WEIGHTS, Integer
from quantbench.recipe import Track
from quantbench.results import Record
from quantbench.stats import t_interval
from quantbench.store import Store
from quantbench.strict import dump, nearest, quote
from quantbench.trace import ExtremeRule, full_precision, hooked

VERSION = 1  # bumped by hand when the figures change: it is part of the cells' keys
SEQUENCES = 256  # of the track's held-out ones: a place costs a pass over half of the model

Figures = dict[str, Any]
Tell = Callable[[int, int, str], None]  # (done, of, detail)


# --- one record ------------------------------------------------------------------------------------------------------


def scheme(track: Track, name: str) -> Integer:
    """The track's quantizer of that name; ValueError where it has none, or one that rounds no sites."""
    if name not in track.quantizers:
        near = nearest(name, track.quantizers)
        raise ValueError(f"--quantizer {quote(name)}: the track has no such quantizer{near}")
    found = track.quantizers[name]
    if not isinstance(found, Integer):
        known = ", ".join(n for n, quantizer in track.quantizers.items() if isinstance(quantizer, Integer))
        raise ValueError(
            f"--quantizer {name}: it has no sites to tell apart; choose one that rounds to nearest: {known}"
        )
    return found


def experiment(
    job: Job,
    store: Store,
    compute: bool = True,
    say: Say = lambda *_: None,
    *,
    quantizer: str,
    sequences: int = SEQUENCES,
) -> tuple[Record, Record] | None:
    """What each place of a quantizer pays, as a record, and the facts of its run; as `bench.experiment`.

    At most `sequences` of the track's held-out sequences are judged.
    """
    rounds = scheme(job.track, quantizer)
    stages = bench.Stages(job, store, compute, say)
    count = min(sequences, job.track.evaluate.sequences)
    resolved = dump(job.track)["quantizers"][quantizer]
    found: Figures = {"extreme": None, "all": None, "kinds": {}, "places": {}, "propagation": None}
    try:
        checkpoint = stages.checkpoint()
        reason = from_json(checkpoint, "training.json")["reason"]
        if reason is None:
            inputs = stages.judged | {
                "version": VERSION, "quantizer": {quantizer: resolved}, "entry": rounds.version, "sequences": count,
            }  # fmt: skip
            fewer = replace(job.track, evaluate=replace(job.track.evaluate, sequences=count))
            lazy = bench.Lazy(replace(job, track=fewer), stages.data, checkpoint, store)
            found = from_json(stages.stage("sites", inputs, lambda _: _measure(lazy, rounds, say)), "figures.json")
    except bench.Missing:
        return None
    versions = {stages.made_by: bench.VERSIONS[stages.made_by], "sites": VERSION}
    head = stages.head(reason, versions, {quantizer: rounds.version})
    return head | {"quantizer": {"name": quantizer, "resolved": resolved}, "sequences": count} | found, stages.run()


def _measure(lazy: bench.Lazy, quantizer: Integer, say: Say) -> dict[str, bytes | Path]:
    figures, kept = measure(lazy.reference, quantizer, partial(say, "sites"))
    return {"figures.json": to_json(figures), "sequences.json": to_json(kept)}


# --- what a model pays -----------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a model costs, sequence by sequence: means over tokens, float64."""

    damage_N: Tensor  # its loss minus the reference's
    kl_N: Tensor


@dataclass(frozen=True)
class Paid:
    """What a place or a kind of site pays."""

    alone: Cost  # of rounding it alone
    but: Cost  # of rounding all but it

    def figures(self, whole: Cost) -> Figures:
        """Alone and spared, each with its interval."""
        spared = Cost(*(full - but for full, but in zip(whole, self.but, strict=True)))
        return {"alone": estimated(self.alone), "spared": estimated(spared)}

    def sequences(self) -> Figures:
        """What the cell keeps, so that new statistics need no rerun."""
        return {"alone": _listed(self.alone), "all-but": _listed(self.but)}


def measure(reference: Reference, quantizer: Integer, tell: Tell = lambda *_: None) -> tuple[Figures, Figures]:
    """(the figures of a record, damage and KL of every sequence). ValueError where the model does not show a site."""
    kinds = rounded(reference.model, quantizer)
    calibration = reference.calibrate()

    def variant(chosen: Chosen) -> nn.Module:
        model = copy.deepcopy(reference.model)
        quantizer.quantize(model, calibration, chosen)
        return model

    # A copy even of the model in full precision: the reference runs its own, whose blocks must stay what they are.
    exact = Judge(copy.deepcopy(reference.model), reference)
    whole = Judge(variant(lambda site, place: True), reference)
    by_kind: dict[str, Paid] = {}
    by_place: dict[str, dict[str, Paid]] = {}
    of = sum(map(len, kinds.values()))
    for kind, found in kinds.items():
        chosen = _these(kind, found)
        by_kind[kind] = Paid(cost(variant(chosen), reference), cost(variant(_all_but(chosen)), reference))
        by_place[kind] = {}
        for name in dict.fromkeys(_split(place)[1] for place in found):  # the same place of every block at once
            alike = [place for place in found if _split(place)[1] == name]
            chosen = _these(kind, alike)
            alone, but = variant(chosen), variant(_all_but(chosen))
            for place in alike:
                tell(sum(map(len, by_place.values())), of, f"{kind} {place}")
                layer, _ = _split(place)
                if layer is None:  # it is in no block, and the only one of its name
                    by_place[kind][place] = Paid(cost(alone, reference), cost(but, reference))
                    continue
                by_place[kind][place] = Paid(
                    exact.with_block_of(alone, layer),
                    whole.with_block_of(but, layer),
                )
    masks = [reference.rule.mask(reference.model, ids_BT[:, :-1]) for ids_BT in reference.batches]
    decibels = rounding_errors(reference, quantizer, calibration, masks)
    figures = {
        "extreme": {
            "layer": reference.rule.layer,
            "threshold": _digits(reference.rule.threshold),
            "tokens": int(sum(mask_BT.sum() for mask_BT in masks)),
        },
        "all": estimated(whole.cost),
        "kinds": {kind: paid.figures(whole.cost) for kind, paid in by_kind.items()},
        "places": {
            kind: {
                place: paid.figures(whole.cost) | {"sqnr": None if kind == "weights" else decibels.get(place)}
                for place, paid in paids.items()
            }
            for kind, paids in by_place.items()
        },
        "propagation": propagation(
            reference.model, whole.model, [b[:, :-1] for b in reference.batches], reference.rule
        ),
    }
    kept = {
        "all": _listed(whole.cost),
        "kinds": {kind: paid.sequences() for kind, paid in by_kind.items()},
        "places": {kind: {at: paid.sequences() for at, paid in paids.items()} for kind, paids in by_place.items()},
    }
    return figures, kept


def rounded(model: nn.Module, quantizer: Integer) -> dict[str, list[str]]:
    """Kind of site -> its places, of all that a quantizer rounds, weights included."""
    parts = anatomy(model)
    found = {"weights": list(parts.linears())} if quantizer.weights < FULL else {}
    for site in quantizer.sites:
        if site in OF_WEIGHTS:
            found[site] = [site]
        elif quantizer.quantizes_activations:
            found[site] = list(places(parts, site))
    return found


def _split(place: str) -> tuple[int | None, str]:
    """The layer of a place (None: it is in no block), and its name there."""
    layer, _, name = place.partition(".")
    return (int(layer), name) if name else (None, place)


def _these(kind: str, these: Sequence[str]) -> Chosen:
    return lambda site, place: site == kind and place in these


def _all_but(chosen: Chosen) -> Chosen:
    return lambda site, place: not chosen(site, place)


def cost(model: nn.Module, reference: Reference, before: Callable[[int], None] = lambda index: None) -> Cost:
    """What a model costs on the reference's held-out sequences; `before(index)` is called before each batch."""
    losses, divergences = [], []
    for index, ids_BT in enumerate(reference.batches):
        before(index)
        found_BTV, exact_BTV = log_probabilities(model, ids_BT), reference.log_probabilities(index)
        losses.append(nll(found_BTV, ids_BT))
        divergences.append((exact_BTV.exp() * (exact_BTV - found_BTV)).sum(-1))
    damage_NT = torch.cat(losses).double() - reference.nll_NT.double()
    return Cost(damage_NT.mean(-1), torch.cat(divergences).double().mean(-1))


class Judge:
    """A model on the held-out sequences. What enters its blocks is kept: a pass with another block begins there.

    The model is the reference's, or one that was made of it by quantizing.
    """

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        self.model, self.reference = model, reference
        self.blocks = _blocks(model, reference.model)
        self.entering: list[list[Tensor]] = [[] for _ in self.blocks]  # [layer][batch], [B, T, D]
        wires = zip((block for _, block in self.blocks), self.entering, strict=True)
        with hooked((block, kept.append, True) for block, kept in wires):
            self.cost = cost(model, reference)

    def with_block_of(self, donor: nn.Module, layer: int) -> Cost:
        """What the model costs with the block that another one has at a layer."""
        past = _Past()
        block = donor.get_submodule(self.blocks[layer][0])
        blocks = [past] * layer + [block] + [own for _, own in self.blocks[layer + 1 :]]
        try:
            self._put(blocks)
            return cost(self.model, self.reference, lambda index: past.gives(self.entering[layer][index]))
        finally:
            self._put([own for _, own in self.blocks])

    def _put(self, blocks: Sequence[nn.Module]) -> None:
        for (path, _), block in zip(self.blocks, blocks, strict=True):
            self.model.set_submodule(path, block)


def _blocks(model: nn.Module, origin: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, block) of a model that was made of another one: quantizing leaves the blocks at their paths."""
    paths = {module: path for path, module in origin.named_modules()}
    return [(paths[block], model.get_submodule(paths[block])) for block in anatomy(origin).blocks]


class _Past(nn.Module):
    """Stands for all blocks before one: gives what entered it, without running them."""

    def gives(self, x_BTD: Tensor) -> None:
        self.x_BTD = x_BTD

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.x_BTD


# --- errors of the stream --------------------------------------------------------------------------------------------


def rounding_errors(
    reference: Reference, quantizer: Integer, calibration: Calibration, masks: Sequence[Tensor]
) -> dict[str, Figures]:
    """SQNR of what is rounded at every place, in the full-precision model, over `sink` tokens and the `non-sink` ones.

    masks: which tokens of each batch are extreme, [B, T]. Of heads and scores a token is the query.
    """
    kinds = [site for site in quantizer.sites if site not in OF_WEIGHTS and quantizer.quantizes_activations]
    ranges = {}
    if quantizer.range == "static" and kinds:
        how = (quantizer.activations, quantizer.symmetric, quantizer.rule, quantizer.percent)
        ranges = spans(reference.model, calibration, kinds, *how)
    energies: dict[str, Tensor] = {}  # place -> [sink or not, signal or noise]
    wires = []
    for kind in kinds:
        for place, module in places(anatomy(reference.model), kind).items():
            rounding = Rounding(quantizer.activations, quantizer.range, ranges.get(place), quantizer.symmetric)
            energies[place] = torch.zeros(2, 2, dtype=torch.float64)
            watch = partial(_add_energies, kind, learned_keys(module), rounding, energies[place])
            wires.append((module, watch, kind == "inputs"))
    for ids_BT, mask_BT in zip(reference.batches, masks, strict=True):
        seen = [(module, partial(watch, mask_BT), at_input) for module, watch, at_input in wires]
        with full_precision(reference.model), hooked(seen):
            reference.model(ids_BT[:, :-1])
    return {
        place: {name: _decibels(*both) for name, both in zip(("sink", "non-sink"), energy.tolist(), strict=True)}
        for place, energy in energies.items()
    }


def _add_energies(kind: str, appended: int, rounding: Rounding, energies: Tensor, mask_BT: Tensor, x: Tensor) -> None:
    counted = what_counts(x, kind, Exemption(), appended)
    noise = x - rounding(x, counted)
    if kind in PAIRS:  # keys that come after the query count for nothing
        noise = what_counts(noise, kind, Exemption(), appended)
    for column, tensor in enumerate((counted, noise)):
        energy = tensor.double().square().sum(-1)
        energy_BT = energy.view(mask_BT.shape) if energy.ndim <= 2 else energy.sum(1)  # over heads
        for row, chosen_BT in enumerate((mask_BT, ~mask_BT)):
            energies[row, column] += energy_BT[chosen_BT].sum().cpu()


def _decibels(signal: float, noise: float) -> float | None:
    return _digits(10 * math.log10(signal / noise)) if signal > 0 and 0 < noise < math.inf else None


def propagation(
    model: nn.Module, quantized: nn.Module, batches: Sequence[Tensor], rule: ExtremeRule
) -> dict[str, list[Figures]]:
    """R, A, B and C of every block, over `all` tokens of the ids [B, T] and over `non-sink` ones.

    None where the block's output is zero or not finite.
    """
    blocks, low = anatomy(model).blocks, [block for _, block in _blocks(quantized, model)]
    sums: dict[str, Tensor] = {}
    for ids_BT in batches:
        exact = _both(model, blocks, low, ids_BT)  # f(h), f_q(h)
        approximate = _both(quantized, low, blocks, ids_BT)  # f_q(h_q), f(h_q)
        ordinary_BT = ~rule.of(exact[rule.layer][0].float())
        for name, chosen_BT in {"all": torch.ones_like(ordinary_BT), "non-sink": ordinary_BT}.items():
            found = torch.stack(
                [_parts(*mine, *theirs, chosen_BT) for mine, theirs in zip(exact, approximate, strict=True)]
            )
            sums[name] = sums.get(name, torch.zeros_like(found)) + found
    names = ("total", "accumulated", "local", "interaction")
    return {
        name: [
            {part: _digits(value / signal) if signal else None for part, value in zip(names, values, strict=True)}
            for signal, *values in found.tolist()
        ]
        for name, found in sums.items()
    }


def _both(
    model: nn.Module, blocks: Sequence[nn.Module], others: Sequence[nn.Module], ids_BT: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What the model's blocks give, and what the other model's would from the same inputs; [B, T, D], float64."""
    found: list[tuple[Tensor, Tensor]] = []

    def beside(other: nn.Module, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        both = (output, other(*args, **kwargs))
        mine, theirs = ((y[0] if isinstance(y, tuple) else y).double() for y in both)
        found.append((mine, theirs))

    hooks = []
    try:
        for block, other in zip(blocks, others, strict=True):
            hooks.append(block.register_forward_hook(partial(beside, other), with_kwargs=True))
        with full_precision(model):
            model(ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _parts(f_h: Tensor, fq_h: Tensor, fq_hq: Tensor, f_hq: Tensor, chosen_BT: Tensor) -> Tensor:
    """Over the chosen tokens: |f(h)|^2, then |f_q(h_q) - f(h)|^2, |a|^2, |b|^2 and 2<a, b>."""
    a = (((fq_hq - fq_h) + (f_hq - f_h)) / 2)[chosen_BT]
    b = (((fq_hq - f_hq) + (fq_h - f_h)) / 2)[chosen_BT]
    error, signal = (fq_hq - f_h)[chosen_BT], f_h[chosen_BT]
    return torch.stack(
        [signal.square().sum(), error.square().sum(), a.square().sum(), b.square().sum(), 2 * (a * b).sum()]
    )


# --- small things ----------------------------------------------------------------------------------------------------


def estimated(found: Cost) -> Figures:
    """[mean, low, high] of damage and KL, 95% over sequences; None where one is not finite."""
    return {"damage": _interval(found.damage_N), "kl": _interval(found.kl_N)}


def _interval(x_N: Tensor) -> list[float | None] | None:
    if not bool(x_N.isfinite().all()):
        return None
    interval = t_interval(x_N.tolist())
    limits = [None, None] if interval is None else [_digits(interval.low), _digits(interval.high)]
    return [_digits(float(x_N.mean())), *limits]


def _listed(found: Cost) -> Figures:
    return {"damage": [_digits(x) for x in found.damage_N.tolist()], "kl": [_digits(x) for x in found.kl_N.tolist()]}


def _digits(x: float) -> float | None:
    """Seven digits; None where it is not finite."""
    return finite(float(f"{x:.7g}"))
