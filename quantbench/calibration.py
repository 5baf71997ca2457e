"""What passes the sites of a full-precision model over calibration sequences: ranges, outliers, moments.

Sites are the kinds of `anatomy.SITES`; each has places, such as `0.attention.qkv` (the input of that Linear) or
`3.residual`. Exempt positions count nowhere: neither the queries nor the keys of such a token among scores.

Shapes: B sequences, T tokens, H heads, S keys, M tokens of any sequences, K features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantbench.anatomy import Anatomy, anatomy, device_of
from quantbench.ops import Totals, median, outlier_stats
from quantbench.ops.ranges import Histogram, Span

Rule = Literal["absmax", "percentile", "mse"]  # how a range follows from what was seen

PAIRS = ("scores", "probabilities")  # of a query and a key, [B, H, T, S]
EXTREME = 3.0  # an extreme token's norm exceeds this many times the median


class Exemption:
    """Which token positions of the batch at hand stay in full precision: extreme tokens, or none."""

    mask_BT: Tensor | None = None

    @contextmanager
    def of(self, mask_BT: Tensor | None) -> Iterator[None]:
        """Within it, positions that are True are not quantized, and do not count for ranges."""
        before, self.mask_BT = self.mask_BT, mask_BT
        try:
            yield
        finally:
            self.mask_BT = before

    def __deepcopy__(self, memo: Any) -> "Exemption":
        return self  # what marks positions to a model marks them to its copies

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask, having checked that it speaks of the positions of x, [B, T, features] (or [B T, features])."""
        if self.mask_BT is None:
            return None
        mask = self.mask_BT.flatten() if x.ndim == 2 else self.mask_BT  # OPT's MLP flattens its sequences
        expected, got = tuple(mask.shape), tuple(x.shape[:-1])
        assert got == expected, f"positions {expected} are marked exempt, but a Linear or block sees {got}"
        return mask

    def spread(self, x: Tensor, kind: str, appended: int = 0) -> Tensor | None:
        """The mask as it broadcasts against a site's tensor: [B, T, K], [B, H, T, E] or, of pairs, [B, H, T, S].

        The last `appended` of the S keys are learned ones, which like cached ones (the first) are never exempt.
        """
        if self.mask_BT is None or x.ndim <= 3:
            mask_BT = self.mask_for(x)
            return None if mask_BT is None else mask_BT.unsqueeze(-1)
        queries_B1T1 = self.mask_BT[:, None, :, None]
        if kind not in PAIRS:
            return queries_B1T1
        cached = x.shape[-1] - appended - x.shape[-2]
        keys_BS = F.pad(self.mask_BT, (cached, appended), value=False)
        return queries_B1T1 | keys_BS[:, None, None, :]


@dataclass(frozen=True)
class Calibration:
    """Sequences of the training split on which ranges are set, with the exempt positions of each (or None)."""

    batches: list[tuple[Tensor, Tensor | None]]  # (ids_BT, exempt_BT)
    exemption: Exemption = field(default_factory=Exemption)  # shared by every module of the quantized model
    rule: Rule | None = None  # of every static range, in the place of the quantizer's own
    percent: float = 100.0  # under the rule `percentile`


def what_counts(x: Tensor, kind: str, exemption: Exemption, appended: int = 0) -> Tensor:
    """A site's tensor with 0 where a value counts for no range: see `uncounted`."""
    if kind in PAIRS:
        learned, x = x[..., x.shape[-1] - appended :], x[..., : x.shape[-1] - appended]
        x = x.tril(x.shape[-1] - x.shape[-2])
        x = torch.cat((x, learned), -1) if appended else x
    exempt = exemption.spread(x, kind, appended)
    return x if exempt is None else x.masked_fill(exempt, 0.0)


def uncounted(x: Tensor, kind: str, exemption: Exemption, appended: int = 0) -> Tensor | None:
    """Which values count for no range, as they broadcast: exempt positions, keys that come after the query."""
    exempt = exemption.spread(x, kind, appended)
    if kind not in PAIRS:
        return exempt
    T, S = x.shape[-2], x.shape[-1] - appended
    future_TS = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
    future_TS = F.pad(future_TS, (0, appended), value=False)
    return future_TS if exempt is None else exempt | future_TS


def learned_keys(module: nn.Module) -> int:
    """How many of the last columns that pass a site of pairs are those of learned keys."""
    return getattr(module, "appended", 0)


Show = Callable[[str, Tensor, Tensor | None], None]  # (place, x [..., K], what of it is `uncounted`)


@torch.no_grad()
def passes(model: nn.Module, calibration: Calibration, sites: Sequence[str], show: Show) -> None:
    """Shows what passes every place of the sites, batch by batch. To be called before anything is quantized.

    Values that count for nothing are 0. ValueError where the model does not show a site.
    """
    assert calibration.batches, "a calibration needs batches"
    parts, exemption = anatomy(model), Exemption()
    hooks = []
    try:
        for kind in sites:
            for place, module in places(parts, kind).items():
                hooks.append(_hook(module, kind, place, exemption, show))
        with _in_eval_mode(model):
            device = device_of(model)
            for ids_BT, exempt_BT in calibration.batches:
                with exemption.of(None if exempt_BT is None else exempt_BT.to(device)):
                    model(ids_BT.to(device))
    finally:
        for hook in hooks:
            hook.remove()


def places(parts: Anatomy, kind: str) -> dict[str, nn.Module]:
    """The modules at one kind of site: of `inputs` the Linears, whose inputs they are."""
    if kind == "inputs":
        linears: dict[str, nn.Module] = {name: linear for name, (_, linear) in parts.linears().items()}
        assert linears, "the model has no Linear: it is quantized already"
        return linears
    return parts.sites(kind)


def _hook(module: nn.Module, kind: str, place: str, exemption: Exemption, show: Show) -> Any:
    appended = learned_keys(module)

    def see(x: Tensor) -> None:
        show(place, what_counts(x, kind, exemption, appended), uncounted(x, kind, exemption, appended))

    def before(module: nn.Module, args: Any) -> None:
        see(args[0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_pre_hook(before) if kind == "inputs" else module.register_forward_hook(after)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def survey(
    model: nn.Module, calibration: Calibration, threshold: float = 0.0, sites: Sequence[str] = ("inputs",)
) -> dict[str, Totals]:
    """What each place carries over the calibration tokens: ranges, outliers, moments.

    An outlier is an element of at least `threshold`. Of sites of one tensor a token ([B, T, K]) exempt tokens are left
    out; of the others their values count as 0.
    """
    totals: dict[str, Totals] = {}
    before: tuple[Tensor, int, Totals] | None = None  # queries, keys and values read one tensor, one after the other

    def show(place: str, x: Tensor, exempt: Tensor | None) -> None:
        nonlocal before
        if before is None or before[0] is not x or before[1] != x._version:
            x_MK = x.flatten(0, -2) if exempt is None or x.ndim > 3 else x[~exempt.squeeze(-1)]
            if not len(x_MK):  # a batch may be exempt as a whole
                return
            before = x, x._version, Totals.of(outlier_stats(x_MK, threshold))
        totals[place] = totals[place].merge(before[2]) if place in totals else before[2]

    passes(model, calibration, sites, show)
    assert totals or not sites, "every calibration position is exempt"
    return totals


def spans(
    model: nn.Module,
    calibration: Calibration,
    sites: Sequence[str],
    bits: int,
    symmetric: bool = True,
    rule: Rule = "absmax",
    percent: float = 99.99,
) -> dict[str, Span]:
    """The static range of each place, by the calibration's rule where it has one.

    ValueError where a value is infinite or NaN.
    """
    if calibration.rule is not None:
        rule, percent = calibration.rule, calibration.percent
    kept = [exempt_BT is None or not exempt_BT.all() for _, exempt_BT in calibration.batches]
    assert any(kept), "every calibration position is exempt"
    extremes: dict[str, Span] = {}
    histograms: dict[str, Histogram] = {}

    def show(place: str, x: Tensor, out: Tensor | None) -> None:
        zero = x.new_zeros((), dtype=torch.float32)
        low, high = torch.minimum(x.amin().float(), zero), torch.maximum(x.amax().float(), zero)
        if place in extremes:
            low, high = torch.minimum(low, extremes[place].low), torch.maximum(high, extremes[place].high)
        extremes[place] = Span(low, high)
        if rule != "absmax":
            histograms.setdefault(place, Histogram()).add(x if out is None else x[~out.expand_as(x)])

    passes(model, calibration, sites, show)
    found = {place: _finite(place, span) for place, span in extremes.items()}
    if symmetric:
        found = {place: Span(-span.largest, span.largest) for place, span in found.items()}
    if rule == "percentile":
        return {place: histograms[place].percentile(percent, symmetric) for place in found}
    if rule == "mse":
        return {place: histograms[place].least_error(bits, symmetric) for place in found}
    return found


def _finite(place: str, span: Span) -> Span:
    if not (span.low.isfinite() and span.high.isfinite()):
        raise ValueError(f"site {place}: activations overflow on the calibration batches; look at this run's losses")
    return span


def peak_layer(norms_LNT: Tensor) -> tuple[int, float]:
    """The layer of the residual peak, and the norm above which a token is extreme there: 3 x the median.

    The layer has the largest max/median ratio of token norms, mean over sequences; the median is over all tokens.
    ValueError where no layer has one (all norms zero, or the model overflows).
    """
    medians_L = median(norms_LNT.flatten(1))
    ratios_L = (norms_LNT.amax(-1) / median(norms_LNT)).mean(-1)
    usable_L = ratios_L.isfinite() & (medians_L > 0)
    if not usable_L.any():
        raise ValueError("extreme tokens: the residual stream is zero or not finite; the model has diverged")
    layer = int(ratios_L.where(usable_L, torch.zeros_like(ratios_L)).argmax())
    return layer, EXTREME * float(medians_L[layer])
