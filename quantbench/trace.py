"""Forward passes that are watched: metrics, extreme tokens, and the error of a quantized model, layer by layer.

Every pass is in full precision (no autocast), in eval mode and without gradients; hooks stand only where
somebody looks and are always removed, and nothing but running statistics outlives a batch. The model is seen
through `anatomy` alone.

Shapes: L layers (blocks), B sequences, T tokens, D residual features, H query heads, E features of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from quantbench.anatomy import Anatomy, Heads, Prefixed, anatomy, device_of
from quantbench.calibration import peak_layer
from quantbench.catalog import entry_name, load
from quantbench.metrics import Activations, Metric, Reading, finite

Watcher = Callable[[Tensor], None]

SCORED = 128  # positions whose logits are turned into losses at once


def measure(
    model: nn.Module, batches: Iterable[Tensor], names: Sequence[str], parts: Anatomy | None = None
) -> dict[str, Reading]:
    """What the named metrics of the catalog find over batches of ids [B, T], in one pass a batch.

    `parts` stands in for `anatomy(model)`. ValueError where a metric looks at what this model does not show.
    """
    metrics: dict[str, Metric] = {name: load("metrics", name)() for name in names}
    observe(model, batches, list(metrics.values()), parts)
    parts = anatomy(model) if parts is None else parts
    return {name: at_layers(metric, parts) for name, metric in metrics.items()}


def at_layers(metric: Metric, parts: Anatomy) -> Reading:
    """Its reading, in which figures of the attention stand at their layers: None at those that have none."""
    reading = metric.result()
    if _inside([metric]) and reading.per_layer and len(parts.heads) < len(parts.blocks):
        figures = dict(zip(parts.heads, reading.per_layer, strict=True))
        reading = replace(reading, per_layer=[figures.get(layer) for layer in range(len(parts.blocks))])
    return reading


def observe(
    model: nn.Module, batches: Iterable[Tensor], metrics: Sequence[Metric], parts: Anatomy | None = None
) -> None:
    """Shows the metrics one pass a batch; as `measure`, for metrics with parameters of their own.

    All sequences have one length, or ValueError: a figure of a position would mean nothing. Behind a cached prefix, a
    metric of the attention sees the whole sequence, prefix included; any other sees what is behind it.
    """
    parts = anatomy(model) if parts is None else parts
    if isinstance(model, Prefixed):
        batches = list(batches)
        if inside := _inside(metrics):
            observe(model.inner, map(model.whole, batches), inside, parts)
        metrics = [metric for metric in metrics if metric not in inside]
    for metric in metrics:
        metric.front = 0 if isinstance(model, Prefixed) else parts.front
    length = None
    with full_precision(model), hooked(_wires(parts, metrics)):
        for ids_BT in batches:
            if length not in (None, ids_BT.shape[1]):
                raise ValueError(
                    f"sequences of {length} and {ids_BT.shape[1]} tokens in one measurement: give them one length"
                )
            length = ids_BT.shape[1]
            ids_BT = ids_BT.to(device_of(model))
            for metric in metrics:
                metric.tokens(ids_BT)
            model(ids_BT)


def signatures(model: nn.Module, batches: Iterable[Tensor], parts: Anatomy | None = None) -> dict[str, float | None]:
    """The three signatures of extreme tokens; None where the model shows nothing of its attention."""
    parts = anatomy(model) if parts is None else parts
    names = ["residual-peak", "bos-attention", "value-drain"]
    readings = measure(model, batches, names if parts.heads else names[:1], parts)
    return {name: readings[name].value if name in readings else None for name in names}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, no cache; leaves every module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache:
        config.use_cache = False  # a block that is run twice would add to it twice
    try:
        with torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        if cache:
            config.use_cache = cache


def remedy(dtype: str) -> str:
    """What to do about a model that gives NaN or infinity in a dtype."""
    return "measure it in float32" if dtype != "float32" else "take shorter windows (--length)"


@contextmanager
def hooked(wires: Iterable[tuple[nn.Module, Watcher, bool]]) -> Iterator[None]:
    """Within it, (module, watcher, input?) are wired: a watcher gets the module's first input or its output."""
    handles = []
    try:
        for module, watch, at_input in wires:
            handles.append(_hook(module, watch, at_input))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, watch: Watcher, at_input: bool) -> torch.utils.hooks.RemovableHandle:
    def before(module: nn.Module, args: tuple) -> None:
        watch(args[0].detach().float())

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        watch((output[0] if isinstance(output, tuple) else output).detach().float())

    return module.register_forward_pre_hook(before) if at_input else module.register_forward_hook(after)


def _watching(metrics: Sequence[Metric], method: str) -> list[Metric]:
    return [metric for metric in metrics if getattr(type(metric), method) is not getattr(Metric, method)]


def _inside(metrics: Sequence[Metric]) -> list[Metric]:
    """Those that look inside the attention."""
    return list(dict.fromkeys(_watching(metrics, "attention") + _watching(metrics, "values")))


def _wires(parts: Anatomy, metrics: Sequence[Metric]) -> list[tuple[nn.Module, Watcher, bool]]:
    """The places that some metric overrides, and what becomes of the tensors that pass there."""

    def watching(method: str) -> list[Metric]:
        return _watching(metrics, method)

    inside = _inside(metrics)
    if inside and not parts.heads:
        names = ", ".join(sorted({entry_name("metrics", metric) for metric in inside}))
        raise ValueError(f"metrics {names}: this model shows nothing of its attention; leave them out of the track")

    wires: list[tuple[nn.Module, Watcher, bool]] = []
    if seers := watching("embedding"):
        wires.append((parts.embedding, _to_all([m.embedding for m in seers]), False))
    if seers := watching("residual"):
        for layer, block in enumerate(parts.blocks):
            wires.append((block, _to_all([m.residual for m in seers], layer), False))
    for layer, heads in parts.heads.items():
        if seers := watching("attention"):
            wires += _attention_wires(heads, [m.attention for m in seers], layer)
        if seers := watching("values"):
            wires.append((heads.values, _values_watcher(heads, [m.values for m in seers], layer), False))
    if seers := watching("linear_input"):
        linears: list[tuple[str, int | None, nn.Linear]] = [
            (name, layer, linear) for name, (layer, linear) in parts.linears().items()
        ]
        for name, at, linear in [*linears, ("head", None, parts.head)]:
            wires.append((linear, _to_all([m.linear_input for m in seers], name, at), True))
    return wires


def _to_all(methods: Sequence[Callable[..., None]], *place: object) -> Watcher:
    def watch(x: Tensor) -> None:
        seen = Activations(x)
        for method in methods:
            method(*place, seen)

    return watch


def _attention_wires(
    heads: Heads, methods: Sequence[Callable[[int, Tensor, Tensor], None]], layer: int
) -> list[tuple[nn.Module, Watcher, bool]]:
    pending: list[Tensor] = []  # this layer's scores, until its weights come

    def scores(scores_BHTT: Tensor) -> None:
        pending[:] = [scores_BHTT]

    def weights(weights_BHTT: Tensor) -> None:
        assert pending, "an attention shows its scores before its weights"
        scores_BHTT = pending.pop()
        for method in methods:
            method(layer, scores_BHTT, weights_BHTT)

    return [(heads.scores, scores, False), (heads.weights, weights, False)]


def _values_watcher(heads: Heads, methods: Sequence[Callable[[int, Tensor, Tensor], None]], layer: int) -> Watcher:
    def watch(values_BHTE: Tensor) -> None:
        output_HED = heads.output_HED(values_BHTE.shape[1]).float()
        for method in methods:
            method(layer, values_BHTE, output_HED)

    return watch


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The loss of every token, nats, [B, T] in fp32: some positions at a time, so that large logits are not copied."""
    parts = []
    for logits, targets in zip(logits_BTV.split(SCORED, 1), targets_BT.to(logits_BTV.device).split(SCORED, 1)):
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        parts.append(nll.view(targets.shape))
    return torch.cat(parts, 1)


def block_outputs(
    model: nn.Module, ids_BT: Tensor, layers: Sequence[int] | None = None, parts: Anatomy | None = None
) -> list[Tensor]:
    """The residual stream [B, T, D] after the layers asked for (default: all), of one batch."""
    blocks = (anatomy(model) if parts is None else parts).blocks
    found: list[Tensor] = []
    wanted = range(len(blocks)) if layers is None else layers
    with full_precision(model), hooked((blocks[layer], found.append, False) for layer in wanted):
        model(ids_BT.to(device_of(model)))
    return found


def peak_norms(model: nn.Module, ids_BT: Tensor, parts: Anatomy | None = None) -> Tensor:
    """Norms of the residual stream after each block, [L, B, T]."""
    return torch.stack([Activations(hidden_BTD).norms_BT for hidden_BTD in block_outputs(model, ids_BT, None, parts)])


@dataclass(frozen=True)
class ExtremeRule:
    """Which tokens are extreme: the norm after block `layer` exceeds `threshold`. BOS always is.

    Masks are those of the residual stream: learned tokens in front of a sequence are positions too, a cached prefix
    is none.
    """

    layer: int
    threshold: float
    bos: int | None = 0  # its position; None where it is in a cached prefix

    def of(self, hidden_BTD: Tensor) -> Tensor:
        """Bool [B, T] from the full-precision residual stream after block `layer`."""
        mask_BT = Activations(hidden_BTD).norms_BT > self.threshold
        if self.bos is not None:
            mask_BT[:, self.bos] = True
        return mask_BT

    def mask(self, model: nn.Module, ids_BT: Tensor, parts: Anatomy | None = None) -> Tensor:
        """Bool [B, T], by a pass of the full-precision model."""
        (hidden_BTD,) = block_outputs(model, ids_BT, [self.layer], parts)
        return self.of(hidden_BTD)


def extreme_tokens(
    model: nn.Module, calibration_batches: Iterable[Tensor], parts: Anatomy | None = None
) -> ExtremeRule:
    """The rule of a model: the layer of its residual peak on the calibration sequences, and 3 x the median there.

    ValueError where no layer has one (no sequences, all norms zero, or the model overflows).
    """
    parts = anatomy(model) if parts is None else parts
    norms = [peak_norms(model, ids_BT, parts).double().cpu() for ids_BT in calibration_batches]
    if not norms:
        raise ValueError("extreme tokens: no calibration sequences; raise evaluate.calibration of the track")
    return ExtremeRule(*peak_layer(torch.cat(norms, 1)), None if isinstance(model, Prefixed) else parts.front)


def random_mask(mask_BT: Tensor, generator: Generator) -> Tensor:
    """As many positions a sequence as the mask has, at random, none of them the mask's own: the control of exemption.

    A sequence of which the mask has more than half gives all its other positions: fewer than the mask.
    `generator` lives on the CPU.
    """
    draws_BT = torch.rand(mask_BT.shape, generator=generator).to(mask_BT.device)
    draws_BT[mask_BT] = 2.0  # after every other position
    ranks_BT = draws_BT.argsort(dim=-1).argsort(dim=-1)
    return (ranks_BT < mask_BT.sum(-1, keepdim=True)) & ~mask_BT


def sqnr(
    model: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Tensor],
    exempt: ExtremeRule,
    parts: Anatomy | None = None,
    quantized_parts: Anatomy | None = None,
    outputs: Sequence[list[Tensor]] | None = None,
) -> dict[str, list[float | None]]:
    """10 log10(sum h^2 / sum (h - h_q)^2) of each block's output, in dB, over `all` and over `non-sink` tokens.

    None where it is undefined: the layer has no error, no signal, or is not finite. An SQNR that includes the
    extreme tokens hides the damage to the others, whose signal is small beside theirs. `outputs`: the model's
    `block_outputs` of every batch, where they are known.
    """
    signal: dict[str, Tensor | float] = {"all": 0.0, "non-sink": 0.0}
    noise: dict[str, Tensor | float] = {"all": 0.0, "non-sink": 0.0}
    for index, ids_BT in enumerate(batches):
        exact = block_outputs(model, ids_BT, None, parts) if outputs is None else outputs[index]
        approximate = block_outputs(quantized, ids_BT, None, quantized_parts)
        signal_LBT = torch.stack([h.double().square().sum(-1) for h in exact])
        noise_LBT = torch.stack(
            [(h - q.to(h.device)).double().square().sum(-1) for h, q in zip(exact, approximate, strict=True)]
        )
        ordinary_BT = ~exempt.of(exact[exempt.layer])
        for name, chosen_BT in {"all": torch.ones_like(ordinary_BT), "non-sink": ordinary_BT}.items():
            signal[name] += signal_LBT[:, chosen_BT].sum(-1)
            noise[name] += noise_LBT[:, chosen_BT].sum(-1)
    decibels = {name: 10 * torch.log10(torch.as_tensor(signal[name]) / noise[name]) for name in signal}
    return {name: [finite(float(x)) for x in torch.atleast_1d(found)] for name, found in decibels.items()}
