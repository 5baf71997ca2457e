"""Which sublayer makes the sink: the output of one MLP or one attention is zeroed, and the sink's norm is looked at.

Guo et al. (arXiv:2410.13835) find that a few early sublayers write the peak: on Llama-3.1-8B the norm of BOS at layer
24, 496, falls to 34 without MLP 0 and to 27 without MLP 1; without attention 0 or 1 it is 500. What is zeroed is what
joins the residual stream: of models with norms behind their sublayers, what leaves those. Of every ablation:

    sink norm    ||h_sink|| after the block of the peak, and the largest over blocks; mean over windows. Sink and block
                 are those of the whole model: the position k <= T/2 that most heads park at (sink_rate.py), or BOS
                 where attention is not shown; the block with the largest residual peak
    peak         largest over median token norm, mean over windows, at the worst block (residual_peak.py): a peak that
                 moved to another token shows here
    sink rate    share of heads that put more than .3 on one position, which is searched anew (sink_rate.py)
    drain        ||W_O^h v_sink|| over the mean of the others', mean over heads (value_drain.py)
    loss         nats per token; its change is paired over windows, with Student's limits at 95%

What stands before the ablated block is as in the whole model, and is not computed again.

Shapes: B windows, T tokens, H query heads, E features of a head, K positions that are searched.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from quantbench.markup import Table
from quantbench.numerals import plain, spread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantbench.anatomy import Anatomy, Heads
    from quantbench.metrics import LayerMean
    from quantbench.pretrained import Given
    from quantbench.trace import Watcher

Body = dict[str, Any]
Say = Callable[[str, int, int, str], None]

WITHOUT = "nothing"  # is zeroed: the whole model


# --- measuring -------------------------------------------------------------------------------------------------------


def ablate(
    given: "Given",
    documents: list[str],
    length: int,
    windows: int,
    layers: list[int] | None,
    say: Say = lambda *_: None,
) -> Body:
    """The body of a record, fit for JSON; `run` in it are the facts of this run.

    `layers` (default: all) are ablated one at a time, on at most `windows` windows of `length` tokens. ValueError where
    a layer is none of the model's, where there is no window, and where the whole model gives no numbers.
    """
    from quantbench.anatomy import SUBLAYERS, anatomy
    from quantbench.interventions import Relay, silenced, windows_of
    from quantbench.trace import full_precision, hooked, remedy

    started = time.perf_counter()
    parts = anatomy(given.model)
    chosen = sorted(set(range(len(parts.blocks)) if layers is None else layers))
    if outside := [layer for layer in chosen if layer >= len(parts.blocks)]:
        raise ValueError(f"--layers {outside[0]}: this model has layers 0 to {len(parts.blocks) - 1}")
    targets = [(layer, part) for layer in chosen for part in SUBLAYERS if layer in parts.joins.get(part, {})]
    if not targets:
        raise ValueError("this model does not show where attention and MLP join the residual stream")
    read = windows_of(given, documents, length, windows, parts.room)

    whole, before = _Course(parts), []
    for done, ids_T in enumerate(read):
        say("look", done, len(read), "the whole model")
        with full_precision(given.model), hooked(whole.wires(0)):
            before.append(_loss(Relay(given.model, parts, ids_T[None]).losses()))
    if not all(map(math.isfinite, before)):
        raise ValueError(f"the model gives NaN or infinity in {given.about['dtype']}: {remedy(given.about['dtype'])}")
    sink, peak = whole.sink(), whole.peak()

    courses = {target: _Course(parts) for target in targets}
    losses: dict[tuple[int, str], list[float]] = {at: [] for at in courses}
    count, done = len(read) * len(courses), 0
    for ids_T in read:
        with full_precision(given.model):
            relay = Relay(given.model, parts, ids_T[None])
            for (layer, part), course in courses.items():
                say("ablate", done, count, f"{part} {layer}")
                relay.advance(layer)
                with silenced(parts.joins[part][layer]), hooked(course.wires(layer)):
                    losses[layer, part].append(_loss(relay.losses()))
                done += 1
    say("ablate", done, count, "")

    notes = [] if parts.heads else ["this model shows nothing of its attention: sink rate and drain are not known, the "
                                    "sink is BOS"]  # fmt: skip
    if len(read) < windows:
        notes.append(f"the text has {len(read)} windows of {length} tokens, {windows} were asked for")
    return {
        "length": length,
        "windows": len(read),
        "layers": len(parts.blocks),
        "sink": sink,
        "layer": peak,
        "whole": {**whole.found(sink, peak, whole, 0), "loss": _mean(before)},
        "ablations": [
            {
                "layer": layer,
                "part": part,
                **course.found(sink, peak, whole, layer),
                "loss": _mean(losses[layer, part]),
                "loss-change": _change(losses[layer, part], before),
            }
            for (layer, part), course in courses.items()
        ],
        "notes": notes,
        "run": {"seconds": round(time.perf_counter() - started, 1)},
    }


class _Course:
    """What becomes of stream and attention from some block on, at every position; running means over windows."""

    def __init__(self, parts: "Anatomy") -> None:
        from quantbench.metrics import LayerMean

        self.parts = parts
        self.norms, self.ratios = LayerMean(), LayerMean()  # [T] and []
        self.hits, self.alphas, self.drains = (
            LayerMean(),
            LayerMean(),
            LayerMean(),
        )  # means over heads, [K], [K] and [T]

    def wires(self, first: int) -> "Iterator[tuple[nn.Module, Watcher, bool]]":
        """For `trace.hooked`: of the blocks from `first` on."""
        for layer in range(first, len(self.parts.blocks)):
            yield self.parts.blocks[layer], partial(self._residual, layer), False
            if (heads := self.parts.heads.get(layer)) is not None:
                yield heads.weights, partial(self._attention, layer), False
                yield heads.values, partial(self._values, layer, heads), False

    def _residual(self, layer: int, hidden_BTD: "Tensor") -> None:
        from quantbench.metrics import median

        norms_BT = hidden_BTD.double().norm(dim=-1)
        median_B = median(norms_BT)
        self.norms.add(layer, norms_BT)
        self.ratios.add(layer, norms_BT.amax(-1) / median_B, median_B != 0)

    def _attention(self, layer: int, weights_BHTS: "Tensor") -> None:
        from quantbench.metrics.sink_rate import EPSILON, received

        alphas_BHK = received(weights_BHTS)
        self.alphas.add(layer, alphas_BHK.mean(1))
        self.hits.add(layer, (alphas_BHK > EPSILON).double().mean(1))

    def _values(self, layer: int, heads: "Heads", values_BHTE: "Tensor") -> None:
        import torch

        values_BHTE = values_BHTE.double()
        _, count, length, _ = values_BHTE.shape
        output_HED = heads.output_HED(count).double()
        # ||W v||^2 = v' (W' W) v, in E features in place of D; of rounding it may fall below 0.
        gram_HEE = output_HED @ output_HED.transpose(1, 2)
        norms_BHT = ((values_BHTE @ gram_HEE) * values_BHTE).sum(-1).clamp_min(0).sqrt()
        others_BHT = (norms_BHT.sum(-1, keepdim=True) - norms_BHT) / max(length - 1, 1)
        drains_BHT = norms_BHT / others_BHT.where(others_BHT > 0, torch.nan)
        self.drains.add(layer, drains_BHT.nanmean(1), drains_BHT.isfinite().any(1))

    def peak(self) -> int:
        """The block with the largest residual peak. ValueError where there is none."""
        from quantbench.metrics import largest

        _, layer = largest(self.ratios.per_layer())
        if layer is None:
            raise ValueError("the residual stream is zero or not finite: the model has diverged")
        return layer

    def sink(self) -> int:
        """The position that most heads park at, of several that which draws most; BOS where attention is not shown."""
        if not self.parts.heads:
            return self.parts.front
        return _searched(self.hits.stacked(), self.alphas.stacked())[0]

    def found(self, sink: int, peak: int, whole: "_Course", first: int) -> Body:
        """The figures; of the blocks before `first` those of the whole model."""
        from quantbench.metrics import finite, largest

        def merged(name: str) -> "list[Tensor]":
            means: list[LayerMean] = [getattr(whole, name), getattr(self, name)]
            return [means[layer >= first].mean(layer) for layer in sorted(means[0].sums)]

        norms = [float(norms_T[sink]) for norms_T in merged("norms")]
        body: Body = {
            "sink-norm": finite(norms[peak]),
            "largest-sink-norm": finite(largest(norms)[0]),
            "residual-peak": finite(largest([float(ratio) for ratio in merged("ratios")])[0]),
            "sink-rate": None,
            "searched-sink": None,
            "value-drain": None,
            "sink-norms": [finite(norm) for norm in norms],
        }
        if self.parts.heads:
            import torch

            k, rate = _searched(torch.stack(merged("hits")), torch.stack(merged("alphas")))
            drain = torch.stack(merged("drains"))[:, sink].nanmean()
            body |= {"sink-rate": finite(rate), "searched-sink": k, "value-drain": finite(float(drain))}
        return body


def _searched(hits_LK: "Tensor", alphas_LK: "Tensor") -> tuple[int, float]:
    """The position with the highest sink rate (of equal rates, the one that draws more), and the rate."""
    from quantbench.metrics.sink_rate import searched

    rates_K = hits_LK.mean(0)
    k = searched(rates_K, alphas_LK.mean(0))
    return k, float(rates_K[k])


def _loss(losses_B: "Tensor") -> float:
    (found,) = losses_B.tolist()
    return float(found)


def _mean(values: list[float]) -> float | None:
    from quantbench.metrics import finite

    return finite(math.fsum(values) / len(values)) if all(map(math.isfinite, values)) else None


def _change(after: list[float], before: list[float]) -> Body:
    """Mean and limits of the paired differences; of one window no limits."""
    from quantbench.stats import t_interval

    if not all(map(math.isfinite, after)):
        return {"mean": None, "low": None, "high": None}
    differences = [a - b for a, b in zip(after, before, strict=True)]
    found = t_interval(differences)
    if found is None:
        return {"mean": differences[0], "low": None, "high": None}
    return asdict(found)


# --- showing ---------------------------------------------------------------------------------------------------------


def tables(record: Body) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of a record, for the terminal and for the page."""
    header = ["zeroed", f"sink norm after block {record['layer']}", "largest over blocks", "residual peak", "sink rate",
              "value drain", "loss", "change of the loss"]  # fmt: skip
    rows = []
    for at in [{**record["whole"], "part": WITHOUT, "layer": "", "loss-change": None}, *record["ablations"]]:
        numbers = ("sink-norm", "largest-sink-norm", "residual-peak", "sink-rate", "value-drain", "loss")
        rows.append([f"{at['part']} {at['layer']}".strip(), *(plain(at[name]) for name in numbers),
                     spread(at["loss-change"])])  # fmt: skip
    return [(_heading(record), (header, rows))]


def pictures(record: Body) -> dict[str, bytes]:
    """file name -> SVG."""
    from quantbench import figures

    if not record["ablations"]:
        return {}
    return {"ablate-layers.svg": figures.ablations(record["whole"], record["ablations"], record["layer"])}


def _heading(record: Body) -> str:
    told = [
        f"What becomes of the sink (position {record['sink']}) where the output of one sublayer is zeroed: "
        f"{record['windows']} windows of {record['length']} tokens; loss in nats per token, ± 95% over windows"
    ]
    known = [at for at in record["ablations"] if at["sink-norm"] is not None]
    if known and record["whole"]["sink-norm"] is not None:
        at = min(known, key=lambda at: at["sink-norm"])
        told.append(f"Least is left without {at['part']} {at['layer']}: {plain(record['whole']['sink-norm'])} → "
                    f"{plain(at['sink-norm'])}")  # fmt: skip
    return ". ".join([*told, *record["notes"]])
