"""Whether a model that libraries made of somebody's files is one that can be measured; each fault is a ValueError."""

import copy
from typing import Any

from quantbench import modelfiles

PASS = 16  # tokens of the pass that shows whether the model computes


def check_config(config: Any) -> None:
    """ValueError where no model of it can be opened."""
    from quantbench.anatomy import check_known

    if getattr(config, "auto_map", None):
        raise ValueError(f"its config {modelfiles.REMOTE}")
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is no causal language model of a decoder alone")
    check_known(config.model_type)


def check_size(config: Any, elements: int, dtype: str) -> None:
    """ValueError where the weights are far fewer than the config's model has, or the machine has no room for it.

    The model is built without memory for its weights. One that is missing is told by its name when they are loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    wanted = sum(p.numel() for p in model.parameters())
    if wanted > 2 * elements:
        raise ValueError(
            f"its config describes {wanted:,} parameters, and its files hold {elements:,}: they are not of one model"
        )
    if (size := wanted * getattr(torch, dtype).itemsize) > (room := modelfiles.memory()):
        raise ValueError(f"in {dtype} it takes {size / 2**30:,.1f} GiB, and this machine has {room / 2**30:,.1f}")


def check_ids(model: Any, tokenizer: Any, bos: int | None) -> None:
    """ValueError where the tokenizer gives ids that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}  # as which no text is read
    ordinary = [number for number in tokenizer.get_vocab().values() if number not in special]
    if not ordinary:
        raise ValueError("its tokenizer has no tokens")
    if max(ordinary) >= rows:
        raise ValueError(f"its tokenizer gives ids up to {max(ordinary):,}, and it has {rows:,} embeddings")
    if bos is not None and bos >= rows:
        raise ValueError(f"its BOS is {bos:,}, and it has {rows:,} embeddings")


def check_finite(model: Any, dtype: str) -> None:
    """ValueError where a weight is NaN or infinite; a pass of few tokens may not touch it."""
    import torch

    for name, weight in model.named_parameters():
        # A sum is finite where all is, and cheap; where it is not, it may have overflowed.
        if weight.is_meta or bool(weight.detach().sum(dtype=torch.float32).isfinite()):
            continue
        if not bool(weight.detach().isfinite().all()):
            raise ValueError(f"in {dtype} it gives NaN or infinity, as its weight {name} does: {_remedy(dtype)}")


def check_pass(model: Any, tokens: int, bos: int | None, dtype: str) -> None:
    """ValueError where a short pass over ids below `tokens` gives no numbers."""
    import torch

    from quantbench.anatomy import device_of

    ids = torch.arange(1, PASS + 1) * 7919 % min(model.get_input_embeddings().num_embeddings, tokens)
    if bos is not None:
        ids[0] = bos
    with torch.no_grad():
        logits = model(ids[None].to(device_of(model))).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"in {dtype} it gives NaN or infinity: {_remedy(dtype)}")


def _remedy(dtype: str) -> str:
    return "measure it in float32" if dtype != "float32" else "its weights are broken"
