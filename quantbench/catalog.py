"""Every name a recipe or a track may use, and the entry behind it, loaded only when it is used.

The four axes are four folders. A line here is all it takes to add an entry:
`"name": "module:Class"`, the module relative to the axis' folder. An entry is a frozen dataclass whose
fields are its parameters in YAML (`weight-decay: 0.1` sets the field `weight_decay`). Where a class stands for many
schemes, a line also says what its fields are under this name: `"name": ("module:Class", {field: value})`.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

Line = str | tuple[str, dict[str, Any]]


def _roundings() -> Iterator[tuple[str, Line]]:
    """Round to nearest at W8A8, W6A6 and W4A4, in each scope of a range, without and with the residual stream."""
    for bits in (8, 6, 4):
        for scope in ("static", "tensor", "token"):
            for name, sites in (("", ("inputs",)), ("-residual", ("inputs", "residual"))):
                fields = {"weights": bits, "activations": bits, "group": 64 if bits == 4 else 0, "range": scope}
                yield f"w{bits}a{bits}-{scope}{name}", ("integer:Integer", {**fields, "sites": sites})


def _decompositions() -> Iterator[tuple[str, Line]]:
    """LLM.int8() at each threshold, 0 being off, and by single elements."""
    for name, threshold, elementwise in (
        ("llm-int8", 6.0, False),
        ("llm-int8-3", 3.0, False),
        ("llm-int8-10", 10.0, False),
        ("llm-int8-off", 0.0, False),
        ("llm-int8-elementwise", 6.0, True),
    ):
        yield name, ("llm_int8:LLMInt8", {"threshold": threshold, "elementwise": elementwise})


QUALCOMM = ("inputs", "residual", "norms", "scores", "probabilities", "products")

AXES: dict[str, dict[str, Line]] = {
    "tasks": {
        "text": "text:Text",
        "bigram-backcopy": "bigram_backcopy:BigramBackcopy",
        "passages": "passages:Passages",
    },
    "mitigations": {
        "relu-attention": "relu_attention:ReluAttention",
        "softmax1": "sink_logit:Softmax1",
        "sink-logit": "sink_logit:SinkLogit",
        "clipped-softmax": "clipped_softmax:ClippedSoftmax",
        "sigmoid-attention": "sigmoid_attention:SigmoidAttention",
        "softpick": "softpick:Softpick",
        "kv-bias": "kv_bias:KVBias",
        "gated-attention": "gated_attention:GatedAttention",
        "gated-attention-qualcomm": "gated_attention_qualcomm:GatedAttentionQualcomm",
        "value-gate": "value_gate:ValueGate",
        "context-scale": "context_scale:ContextScale",
        "qk-norm": "qk_norm:QKNorm",
        "single-scale-norm": "single_scale_norm:SingleScaleNorm",
        "embedding-projection": "embedding_projection:EmbeddingProjection",
        "outlier-protected-block": "outlier_protected_block:OutlierProtectedBlock",
        "registers": "registers:Registers",
        "adamw": "adamw:AdamW",
        "sgd": "sgd:SGD",
        "muon": "muon:Muon",
        "ortho-adam": "ortho_adam:OrthoAdam",
        "peak-penalty": "peak_penalty:PeakPenalty",
        "prefix-kv": "prefix_kv:PrefixKV",
        "smoothquant": "smoothquant:SmoothQuant",
        "hadamard": "hadamard:Hadamard",
        "percentile-clip": "percentile_clip:PercentileClip",
    },
    "quantizers": {
        **dict(_roundings()),
        "w8a8-static-qualcomm": ("integer:Integer", {"sites": QUALCOMM, "symmetric": False}),
        "w8a16-rtn": ("integer:Integer", {"weights": 8, "activations": 16}),
        "w6a16-rtn": ("integer:Integer", {"weights": 6, "activations": 16}),
        "w4a16-rtn": ("integer:Integer", {"weights": 4, "activations": 16, "group": 64}),
        "w4a16-gptq": "gptq:GPTQ",
        "w4a16-awq": "awq:AWQ",
        "w4a16-hqq": "hqq:HQQ",
        "w4a8-token": ("integer:Integer", {"weights": 4, "activations": 8, "group": 64, "range": "token"}),
        "w4a4kv4": (
            "integer:Integer",
            {"weights": 4, "activations": 4, "group": 64, "range": "token", "sites": ("inputs", "keys", "values")},
        ),
        **dict(_decompositions()),
        "bnb-int8": "bnb:BnbInt8",
        "bnb-nf4": ("bnb:Bnb4", {"kind": "nf4"}),
        "bnb-fp4": ("bnb:Bnb4", {"kind": "fp4"}),
        "torchao-int8dyn": "ao:TorchaoInt8",
    },
    "metrics": {
        "residual-peak": "residual_peak:ResidualPeak",
        "act-max": "act_max:ActMax",
        "sink-rate": "sink_rate:SinkRate",
        "bos-attention": "bos_attention:BosAttention",
        "delta-logit": "delta_logit:DeltaLogit",
        "value-drain": "value_drain:ValueDrain",
        "inf-norm": "inf_norm:InfNorm",
        "massive-count": "massive_count:MassiveCount",
        "kurtosis-he": "kurtosis:KurtosisHe",
        "kurtosis-osp": "kurtosis:KurtosisOSP",
        "kurtosis-qualcomm": "kurtosis:KurtosisQualcomm",
        "mmr": "mmr:MMR",
    },
}


# Mitigations that come after pretraining and share the checkpoints of what they build on.
POST_HOC = ("prefix-kv", "smoothquant", "hadamard", "percentile-clip")

PACKAGES = {"bnb": "bitsandbytes", "hqq": "hqq", "ao": "torchao"}  # of modules of quantizers
# Mitigations whose attention has weights without a bound: the mass on a position may be above 1.
UNBOUNDED = ("relu-attention",)


def names(axis: str) -> list[str]:
    """The names of one axis, in the order of the catalog."""
    return list(AXES[axis])


def load(axis: str, name: str) -> Any:
    """The entry class behind a name. KeyError where the axis has no such name."""
    module, _, attribute = _target(AXES[axis][name]).partition(":")
    return getattr(import_module(f"quantbench.{axis}.{module}"), attribute)


def declared(axis: str, name: str) -> Any:
    """As `load`, the entry as its source declares it, for which no library is imported: enough to judge a file by."""
    from quantbench.light import light

    module, _, attribute = _target(AXES[axis][name]).partition(":")
    return getattr(light(f"quantbench.{axis}.{module}"), attribute)


def contract(axis: str) -> ModuleType:
    """The contract of an axis, for entries as `declared` gives them."""
    from quantbench.light import light

    return light(f"quantbench.{axis}")


def seams(mitigation: str) -> list[str]:
    """The seams that a mitigation overrides."""
    found: list[str] = contract("mitigations").seams(declared("mitigations", mitigation)())
    return found


def package(quantizer: str) -> str | None:
    """What a quantizer needs beside the project's own libraries: the name of a package that may not be installed."""
    return PACKAGES.get(_target(AXES["quantizers"][quantizer]).partition(":")[0])


def preset(axis: str, name: str) -> dict[str, Any]:
    """What the class' fields are under this name, where YAML does not say otherwise."""
    line = AXES[axis][name]
    return {} if isinstance(line, str) else dict(line[1])


def entry_name(axis: str, entry: object) -> str:
    """The catalog's name of an entry: the first one of its class that asks for no field to be otherwise."""
    kind = type(entry)
    here = f"{kind.__module__.rpartition('.')[2]}:{kind.__name__}"
    fits = (n for n, line in AXES[axis].items() if _target(line) == here and _agrees(entry, preset(axis, n)))
    return next(fits)


def _target(line: Line) -> str:
    return line if isinstance(line, str) else line[0]


def _agrees(entry: object, fields: dict[str, Any]) -> bool:
    return all(getattr(entry, name) == value for name, value in fields.items())
