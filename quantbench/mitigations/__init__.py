"""What a recipe changes about a model. One file, one mitigation; this file is the contract and the baseline.

A mitigation is a frozen dataclass of parameters and the seams it overrides. A seam that builds a part of the
model gets the model's config and returns a module; `prepare`, which comes after training, gets the model itself. Two
mitigations combine where they override different seams.

| seam | what it decides | who takes it |
|---|---|---|
| `inputs` | tokens in front of the sequence | registers |
| `embedding` | between embedding and stream, stream and head; foldable | embedding-projection |
| `norm` | a normalisation layer | single-scale-norm, outlier-protected-block |
| `block` | how a sublayer's output joins the residual | outlier-protected-block |
| `query_key` | queries and keys before positions | qk-norm, outlier-protected-block |
| `weights` | scores -> weights of the values | relu-attention, softmax1, clipped-softmax, kv-bias, ... |
| `output` | values before they are mixed, heads' outputs before the projection | gated-attention, value-gate, ... |
| `optimizer` | how parameters move | adamw (controls), sgd, muon, ortho-adam |
| `penalty` | a term of the training loss, left out of every loss that is logged or tuned on | peak-penalty |
| `prepare` | after training, before quantizing | prefix-kv, smoothquant, hadamard, percentile-clip |

`prepare` is no part of a checkpoint's key, so that post-hoc mitigations share the checkpoints of what they build on:
the baseline's, or those of the pretraining mitigations that the same YAML names. Bundles (osp) are only a YAML.

Shapes: B sequences, T tokens, D residual features, H heads, E features of a head, R tokens in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantbench.attention import Form, Softmax

if TYPE_CHECKING:
    from quantbench.calibration import Calibration, Rule
    from quantbench.model import QuantbenchConfig


@dataclass(frozen=True)
class Settings:
    """What an optimizer starts from: the track's figures and this recipe's learning rate."""

    lr: float
    betas: tuple[float, float]
    shrink: float  # a step at the peak learning rate shrinks matrices by this share: lr * weight_decay of the track

    @property
    def weight_decay(self) -> float:
        """Decoupled decay that gives the shrink at this lr (arXiv:1711.05101 decouples the two so).

        The regularisation is thus the same for every recipe and every point of a sweep: with norms, it sets how fast
        weights turn (arXiv:2305.17212), and whatever feeds on it would else be credited to a learning rate.
        """
        return self.shrink / self.lr


class Join(nn.Module):
    """A sublayer's output joins the residual stream by addition."""

    def forward(self, residual_BTD: Tensor, update_BTD: Tensor) -> Tensor:
        return residual_BTD + update_BTD


class Projection(nn.Module):
    """Nothing between embedding and stream, nothing between stream and head."""

    def enter(self, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD

    def leave(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD

    def fold(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Puts the projection into the two matrices, so that inference does not pay for it."""


class QueryKey(nn.Module):
    """Queries and keys as they are projected, [B, T, H, E] each."""

    def forward(self, q_BTHE: Tensor, k_BTHE: Tensor) -> tuple[Tensor, Tensor]:
        return q_BTHE, k_BTHE


class Output(nn.Module):
    """Values and the heads' outputs as they are."""

    def source(self, v_BHTE: Tensor) -> Tensor:
        """Value states as they are cached and mixed."""
        return v_BHTE

    def forward(self, y_BHTE: Tensor, x_BTD: Tensor, v_BHTE: Tensor) -> Tensor:
        """The heads' outputs y as W_O reads them. x is what the attention read, v its tokens' own value states."""
        return y_BHTE


@dataclass(frozen=True)
class Mitigation:
    """The contract of an entry."""

    version: ClassVar[int] = 1  # bumped by hand when its numbers change: it is part of the cells' keys

    def inputs(self, config: QuantbenchConfig) -> nn.Module | None:
        """A module whose forward(batch size) gives learned tokens in front of the sequence, [B, R, D]; or None."""
        return None

    def embedding(self, config: QuantbenchConfig) -> Projection:
        return Projection()

    def norm(self, config: QuantbenchConfig, last: bool = False) -> nn.Module:
        """In front of each sublayer, and `last`, in front of the head."""
        # eps: 1e-5 for LayerNorm as in arXiv:2410.13835, 1e-6 for RMSNorm as in Llama.
        return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[config.norm](config.width)

    def block(self, config: QuantbenchConfig) -> nn.Module:
        return Join()

    def query_key(self, config: QuantbenchConfig) -> nn.Module:
        return QueryKey()

    def weights(self, config: QuantbenchConfig) -> Form:
        return Softmax()

    def output(self, config: QuantbenchConfig) -> nn.Module:
        return Output()

    def optimizer(self, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices, none on gains and biases."""
        return decoupled_adam(model, settings.lr, settings.weight_decay, settings.betas)

    def penalty(self, blocks_BTD: Sequence[Tensor]) -> Tensor | None:
        """A scalar to add to the loss, from the outputs of the blocks; None where there is none."""
        return None

    def prepare(self, model: nn.Module, calibration: Calibration) -> Prepared:
        """What is judged in full precision and then quantized. May change the model, which nobody else holds.

        ValueError where the model has no place for it ("not applicable: ...").
        """
        return Prepared(model)


@dataclass(frozen=True)
class Prepared:
    """What a post-hoc mitigation hands to the quantizer."""

    model: nn.Module  # it, or an `anatomy.Prefixed` around it
    rule: Rule | None = None  # how a static range follows from the calibration; None: as the quantizer says
    percent: float = 100.0  # of the values, under the rule `percentile`


SAME = 1e-3  # relative error of logits that rounding may explain

SEAMS = (
    "inputs",
    "embedding",
    "norm",
    "block",
    "query_key",
    "weights",
    "output",
    "optimizer",
    "penalty",
    "prepare",
)


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5, bias=True)


class NormalisedQueryKey(QueryKey):
    """Each head's queries and keys over their root mean square, times gains that the heads share."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query, self.key = RMSNorm(features), RMSNorm(features)

    def forward(self, q_BTHE: Tensor, k_BTHE: Tensor) -> tuple[Tensor, Tensor]:
        return _in_full(self.query, q_BTHE), _in_full(self.key, k_BTHE)


def _in_full(norm: RMSNorm, x: Tensor) -> Tensor:
    """A norm in fp32 at least, given back in the dtype that came, so that attention stays as fast as it was."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.eps).to(x.dtype)


def decoupled_adam(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only, one fused kernel a step."""
    matrices, others = by_shape(model)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def by_shape(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that are matrices, and the others (gains, biases, scalars)."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


@torch.no_grad()
def fold_projection(model: Any) -> None:
    """Puts a model's projection, where it has one, into its table and its head, for good: the same function."""
    projection = getattr(model, "projection", None)
    if isinstance(projection, Projection) and type(projection) is not Projection:
        projection.fold(model.get_input_embeddings(), model.get_output_embeddings())
        model.projection, model.config.folded = Projection(), True


@torch.no_grad()
def rewrite(name: str, model: nn.Module, calibration: Calibration, change: Callable[[], None]) -> None:
    """Changes a model in place into another form of the same function: `change` must leave its logits as they are.

    ValueError where it does not: the model has a part that reads or writes its stream unknown to `anatomy`.
    """
    device = next(model.parameters()).device
    ids_BT = calibration.batches[0][0].to(device)
    before = model.eval()(ids_BT).logits.double()
    change()
    error = float((model(ids_BT).logits.double() - before).norm() / before.norm())
    if not error < SAME:
        raise ValueError(
            f"{name}: not applicable: rewritten, this model computes something else (logits change by {error:.1%}); "
            "some part of it reads or writes the residual stream in a way of its own"
        )


def seams(mitigation: Mitigation) -> list[str]:
    """The seams that a mitigation overrides."""
    return [seam for seam in SEAMS if getattr(type(mitigation), seam) is not getattr(Mitigation, seam)]


def combine(mitigations: Mapping[str, Mitigation]) -> Mitigation:
    """One mitigation with the seams of all; ValueError, with both names, where two want the same seam."""
    combined, owner = Mitigation(), dict[str, str]()
    for name, mitigation in mitigations.items():
        for seam in seams(mitigation):
            if seam in owner:
                raise ValueError(f"{owner[seam]!r} and {name!r} both change {seam!r}: a recipe can have one of them")
            owner[seam] = name
            object.__setattr__(combined, seam, getattr(mitigation, seam))
    return combined
