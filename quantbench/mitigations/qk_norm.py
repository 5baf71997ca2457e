"""QK-norm: queries and keys of one size, so that logits cannot run away (arXiv:2010.04245; as in Qwen3 and OLMo2).

    q' = g_q q / rms(q),    k' = g_k k / rms(k)        over the features of a head, before the positions turn them

What it changes: queries and keys. It adds 2 E parameters a layer and a pass over both; nothing is to be folded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from quantbench.mitigations import Mitigation, NormalisedQueryKey

if TYPE_CHECKING:
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class QKNorm(Mitigation):
    def query_key(self, config: "QuantbenchConfig") -> nn.Module:
        return NormalisedQueryKey(config.width // config.heads)
