"""Round to nearest: weights and activations as integers, with nothing learned or moved.

How it works. A Linear's weights take one scale per output channel, or per group of its input features. Its inputs
take one range for everything, set at calibration (`static`) or by the batch at hand (`tensor`), or one per token
(`token`). Which it is decides whether an extreme token hurts the others: one feature of 300 in a Gaussian
[256, 512] leaves its neighbours 3.5 dB under a shared scale, and 42.6 dB under their own. What else is rounded is named
by `sites`, at the bits of the activations and in the same scope: the residual stream after each sublayer, where the
peak itself lives; norm outputs; keys and values; attention scores, probabilities and their products with the values.

How it differs from bitsandbytes and torchao. Integer products are exact here and results float32: no fp16 cast in
front (which rounds inputs and overflows at 65,504), no fused kernels; what is measured is the rounding, not a backend.
The price is speed on large models.

`w8a8-static-qualcomm` is the scheme of arXiv:2306.12929: every activation of the blocks, asymmetric static ranges.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from quantbench.anatomy import anatomy, check_plain, replace, untie
from quantbench.calibration import Calibration, Rule, places, spans
from quantbench.quantizers import (
    FULL,
    Chosen,
    IntegerEmbedding,
    IntegerLinear,
    LowBitLinear,
    Quantizer,
    RoundedLinear,
    Rounding,
    Scope,
    check_groups,
    nearest,
    round_site,
    swap,
)

Where = Literal[
    "inputs", "residual", "norms", "keys", "values", "scores", "probabilities", "products", "embeddings", "head"
]
OF_WEIGHTS = ("embeddings", "head")  # sites of weights, at their bits


@dataclass(frozen=True)
class Integer(Quantizer):
    """Every scheme of this file; the lines of the catalog give other defaults."""

    version: ClassVar[int] = 2  # the residual stream is rounded after attention, too, and in the scope of the inputs

    weights: int = 8  # bits, 2 to 8; 16: full precision
    activations: int = 8  # bits, 2 to 8; 16: full precision
    group: int = 0  # input features that share a weight scale; 0: all, one scale per output channel
    range: Scope = "static"
    sites: tuple[Where, ...] = ("inputs",)  # what is rounded beside the weights
    symmetric: bool = True  # ranges of activations; else they reach from the least to the largest value
    symmetric_weights: bool = True
    rule: Rule = "absmax"  # how a static range follows from what the calibration saw
    percent: float = 99.99  # of the values, under the rule `percentile`

    @property
    def title(self) -> str:  # type: ignore[override]
        """What it is, in a line."""
        grouped = f" in groups of {self.group}" if self.group else ""
        weights = f"INT{self.weights} weights{grouped}" if self.weights < FULL else "weights in full precision"
        if tables := [site for site in self.sites if site in OF_WEIGHTS]:
            weights += f" ({' and '.join(tables)}, too)"
        if not self.quantizes_activations:
            return f"{weights}, activations in full precision"
        ranges = {"static": "static ranges", "tensor": "one range per batch", "token": "one range per token"}[
            self.range
        ]
        return f"{weights}, INT{self.activations} {', '.join(s for s in self.sites if s not in OF_WEIGHTS)}; {ranges}"

    @property
    def quantizes_activations(self) -> bool:  # type: ignore[override]
        return self.activations < FULL

    def check(self, widths: list[int]) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if not (2 <= bits <= 8 or bits == FULL):
                raise ValueError(f"{name}: {bits} bits; choose 2 to 8, or {FULL} for full precision")
        if self.weights == self.activations == FULL:
            raise ValueError(f"weights: {FULL} bits, and so are activations: nothing is quantized")
        rounded = set(self.sites) - set(OF_WEIGHTS)
        if self.activations == FULL and rounded - {"inputs"}:
            raise ValueError(f"sites: {', '.join(sorted(rounded))} need activations of 2 to 8 bits, not {FULL}")
        if self.weights == FULL and set(self.sites) & set(OF_WEIGHTS):
            raise ValueError(f"sites: {', '.join(OF_WEIGHTS)} need weights of 2 to 8 bits, not {FULL}")
        if len(set(self.sites)) < len(self.sites):
            raise ValueError("sites: one is named twice")
        if not self.symmetric_weights and self.quantizes_activations and "inputs" in self.sites:
            raise ValueError("symmetric-weights: false needs inputs in full precision; leave them out of the sites")
        if self.rule != "absmax" and (self.range != "static" or not self.quantizes_activations):
            raise ValueError(f"rule: {self.rule} sets static ranges of activations; this has none")
        if not 50 < self.percent <= 100:
            raise ValueError(f"percent: {self.percent} is no share of the values to keep; choose above 50, to 100")
        if self.weights < FULL:
            check_groups(self.weights, self.group, widths)

    def quantize(
        self, model: nn.Module, calibration: Calibration, chosen: Chosen = lambda site, place: True
    ) -> dict[str, float]:
        """`chosen(site, place)`, where the site may be `weights`, leaves all else in full precision."""
        parts = anatomy(model)
        self.check([linear.in_features for _, linear in parts.linears().values()])
        rounded = [site for site in self.sites if site not in OF_WEIGHTS and self.quantizes_activations]
        static = self.range == "static" and rounded
        at = {site: [place for place in places(parts, site) if chosen(site, place)] for site in rounded}
        ranges = (
            spans(model, calibration, rounded, self.activations, self.symmetric, self.rule, self.percent)
            if static
            else {}
        )

        def rounding(place: str) -> Rounding:
            return Rounding(self.activations, self.range, ranges.get(place), self.symmetric)

        def make(name: str, linear: nn.Linear) -> LowBitLinear | None:
            inputs = rounding(name) if name in at.get("inputs", ()) else None
            if self.weights < FULL and chosen("weights", name):
                codes = nearest(linear.weight, self.weights, self.group, self.symmetric_weights)
                return IntegerLinear(linear, calibration.exemption, codes, self.weights, inputs)
            return None if inputs is None else RoundedLinear(linear, calibration.exemption, inputs)

        report = swap(model, make)
        parts = anatomy(model)
        sites = {site: places(parts, site) for site in rounded if site != "inputs"}
        for site, modules in sites.items():
            for place in at[site]:
                round_site(modules[place], site, rounding(place), calibration.exemption)
        tables = [site for site in self.sites if site in OF_WEIGHTS and chosen(site, site)]
        if tables:
            untie(model)
        if "head" in tables:
            check_plain("head", parts.head, nn.Linear)
            codes = nearest(parts.head.weight, self.weights, self.group, self.symmetric_weights)
            replace(model, parts.head, IntegerLinear(parts.head, calibration.exemption, codes, self.weights))
        if "embeddings" in tables:
            replace(model, parts.table, IntegerEmbedding(parts.table, self.weights))
        return report
