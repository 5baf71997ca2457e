"""A prefix in the cache: the sink's keys and values stay in full precision, the sink itself is never quantized.

PrefixQuant (arXiv:2410.05265); CushionCache (arXiv:2406.12016) searches its prefix instead.

    K = [K_prefix, K(x)],  V = [V_prefix, V(x)],    prefix = BOS, then the most frequent other extreme tokens

The keys and values of the prefix are those of the full-precision model, computed once. It takes the place of the
sequence's own BOS, whose logits are the prefix's last: losses are over the same tokens as without, but no position that
is quantized, and none that a range is set on, is BOS.

What it changes: nothing but where the sink stands; a model without outliers loses nothing. Extreme tokens are those
whose norm exceeds 3 x the median at the layer of the residual peak, on the calibration split; where there are none
beside BOS, the prefix is BOS alone, and in full precision the model is what it was.
What it costs: R columns of the cache in full precision, less the BOS of each sequence; nothing is added or folded.

How it differs from PrefixQuant. BOS comes first, where our sequences have had it all along, not last; no block-wise
fine-tuning follows; ranges are those of the quantizer.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantbench.anatomy import Prefixed, anatomy, device_of
from quantbench.calibration import Calibration, peak_layer
from quantbench.mitigations import Mitigation, Prepared
from quantbench.strict import Range


@dataclass(frozen=True)
class PrefixKV(Mitigation):
    tokens: Annotated[int, Range(1, 64)] = 1  # in the prefix, at most, BOS included

    def prepare(self, model: nn.Module, calibration: Calibration) -> Prepared:
        ids_NT = torch.cat([ids_BT for ids_BT, _ in calibration.batches])
        bos = int(ids_NT[0, 0])
        if bool((ids_NT[:, 0] != bos).any()):
            raise ValueError("prefix-kv: not applicable: sequences begin with different tokens, none of which is BOS")
        others = extreme_ids(model, calibration, bos)[: self.tokens - 1] if self.tokens > 1 else []
        room = anatomy(model).room or math.inf
        if len(others) + ids_NT.shape[1] > room:
            raise ValueError(
                f"prefix-kv: not applicable: a prefix of {1 + len(others)} tokens and {ids_NT.shape[1] - 1} behind it "
                f"are more than the {room} learned positions; choose tokens: 1"
            )
        return Prepared(Behind(model, torch.tensor([bos, *others])))


class Behind(Prefixed):
    """The model with the prefix in its cache."""

    keys_LHRE: Tensor
    values_LHRE: Tensor
    logits_V: Tensor  # of what follows the prefix

    @torch.no_grad()
    def __init__(self, model: Any, prefix_R: Tensor) -> None:
        super().__init__()
        self.inner, self.config = model.eval(), model.config
        cache: Any = DynamicCache()
        prefix_R = prefix_R.to(device_of(model))
        logits_RV = model(prefix_R[None], past_key_values=cache, use_cache=True).logits[0]
        self.register_buffer("prefix_R", prefix_R)
        self.register_buffer("keys_LHRE", torch.cat([layer.keys for layer in cache.layers]))
        self.register_buffer("values_LHRE", torch.cat([layer.values for layer in cache.layers]))
        self.register_buffer("logits_V", logits_RV[-1])
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.prefix_R.device

    def tie_weights(self) -> None:
        """Nothing: for lm-eval, which asks every model to."""

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the next token; input_ids [B, T] begin with BOS, for which the prefix stands.

        Of so many last positions, where fewer than T are asked for.
        """
        assert bool((input_ids[:, 0] == self.prefix_R[0]).all()), "a prefix stands for BOS, and these do not begin so"
        B, T = input_ids.shape
        first_B1V = self.logits_V.expand(B, 1, -1)
        if T == 1:
            return CausalLMOutputWithPast(logits=first_B1V)
        cache = Standing([(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in self.layers()])
        kept = logits_to_keep if logits_to_keep < T else 0  # 0: all
        logits_BTV = self.inner(input_ids[:, 1:], past_key_values=cache, logits_to_keep=kept).logits
        return CausalLMOutputWithPast(logits=logits_BTV if kept else torch.cat((first_B1V, logits_BTV), 1))

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [H, R, E]."""
        return list(zip(self.keys_LHRE, self.values_LHRE, strict=True))


class Standing(DynamicCache):
    """Keys and values that stand in front of whatever comes, and keep nothing of it: a block may be run twice."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        stands: Any = self.layers[layer_idx]
        return torch.cat((stands.keys, key_states), -2), torch.cat((stands.values, value_states), -2)


@torch.no_grad()
def extreme_ids(model: nn.Module, calibration: Calibration, bos: int) -> list[int]:
    """Tokens but BOS that are extreme somewhere in the sequences, the most frequent first."""
    device, norms = device_of(model), list[list[Tensor]]()

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        norms[-1].append(hidden_BTD.double().norm(dim=-1).cpu())

    hooks = [block.register_forward_hook(watch) for block in anatomy(model).blocks]
    try:
        for ids_BT, _ in calibration.batches:
            norms.append([])
            model.eval()(ids_BT.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    ids_NT = torch.cat([ids_BT.cpu() for ids_BT, _ in calibration.batches])
    norms_LNT = torch.cat([torch.stack(layers) for layers in norms], 1)
    layer, threshold = peak_layer(norms_LNT)
    extreme_NT = norms_LNT[layer, :, -ids_NT.shape[1] :] > threshold  # tokens in front of a sequence have no id
    counts_V = torch.bincount(ids_NT[extreme_NT]).tolist()
    found = [(-count, token) for token, count in enumerate(counts_V) if count and token != bos]
    return [token for _, token in sorted(found)]
