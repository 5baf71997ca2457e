"""Every name a recipe or a track may use, and the entry behind it, loaded only when it is used.

The four axes are four folders. A line here is all it takes to add an entry:
`"name": "module:Class"`, the module relative to the axis' folder. An entry is a frozen dataclass whose
fields are its parameters in YAML (`weight-decay: 0.1` sets the field `weight_decay`).
"""

from importlib import import_module
from typing import Any

AXES: dict[str, dict[str, str]] = {
    "tasks": {
        "text": "text:Text",
        "bigram-backcopy": "bigram_backcopy:BigramBackcopy",
    },
    "mitigations": {
        "relu-attention": "relu_attention:ReluAttention",
        "softmax1": "sink_logit:Softmax1",
        "sink-logit": "sink_logit:SinkLogit",
        "adamw": "adamw:AdamW",
        "sgd": "sgd:SGD",
    },
    "quantizers": {
        "w8a8-static-residual": "integer:W8A8StaticResidual",
        "w8a8-static": "integer:W8A8Static",
        "w8a8-tensor": "integer:W8A8Tensor",
        "w8a8-token": "integer:W8A8Token",
        "w4a16-rtn": "integer:W4A16RTN",
        "w4a8-token": "integer:W4A8Token",
        "w4a4-token": "integer:W4A4Token",
        "llm-int8": "llm_int8:LLMInt8",
        "bnb-int8": "bnb:BnbInt8",
        "bnb-nf4": "bnb:BnbNF4",
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


def names(axis: str) -> list[str]:
    """The names of one axis, in the order of the catalog."""
    return list(AXES[axis])


def load(axis: str, name: str) -> Any:
    """The entry class behind a name. KeyError where the axis has no such name."""
    module, _, attribute = AXES[axis][name].partition(":")
    return getattr(import_module(f"quantbench.{axis}.{module}"), attribute)


def entry_name(axis: str, entry: object) -> str:
    """The catalog's name of an entry."""
    kind = type(entry)
    here = f"{kind.__module__.rpartition('.')[2]}:{kind.__name__}"
    return next(name for name, target in AXES[axis].items() if target == here)
