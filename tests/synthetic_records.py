"""Records of imagined runs for the tests of results, leaderboard and relation: every number is chosen, none run."""

import math
from typing import Any

Record = dict[str, Any]
QUANTIZERS = ("w8a8-static", "w8a8-token")
METRICS = ("residual-peak", "bos-attention", "value-drain", "act-max")


def synthetic(
    recipe: str = "baseline",
    seed: int = 0,
    *,
    kl: float = 0.1,
    damage: float | None = 0.1,
    loss: float = 3.0,
    peak: float = 100.0,
    track: str = "text",
    mitigations: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    **changes: Any,
) -> Record:
    """A finished record. KL, damage, loss and residual peak are those given; `changes` replace top-level keys."""
    values = {"residual-peak": peak, "bos-attention": 0.5, "value-drain": 0.2, "act-max": peak / 2}
    quantized = {
        name: {
            "loss": None if damage is None else loss + damage * scale,
            "perplexity": None if damage is None else math.exp(loss + damage * scale),
            "bits-per-byte": None,
            "damage": None if damage is None else damage * scale,
            "kl": kl * scale,
            "top1-agreement": 0.9,
            "sqnr": {"all": [20.0, 15.0], "non-sink": [10.0, None]},
            "report": {"bits": 8},
            "exemption": None
            if damage is None
            else {
                "extreme": {"damage": 0.2 * damage * scale, "kl": 0.2 * kl * scale},
                "random": {"damage": 0.98 * damage * scale, "kl": 0.98 * kl * scale},
                "tokens": 512,
            },
            "lm-eval": None,
        }
        for name, scale in zip(QUANTIZERS, (1.0, 0.1), strict=True)
    }
    return {
        "schema": 1,
        "status": "finished",
        "reason": None,
        "recipe": {
            "name": recipe,
            "digest": "r" * 64,
            "title": recipe.title(),
            "resolved": {"mitigations": {name: {} for name in mitigations}},
        },
        "track": {
            "name": track,
            "digest": "t" * 64,
            "title": "Real text",
            "resolved": {"rank-by": {"damage": QUANTIZERS[0]}, "seeds": list(seeds)},
        },
        "seed": seed,
        "data": "d" * 64,
        "versions": {"pretrain": 1},
        "environment": {"torch": "2.13.0", "bitsandbytes": None, "threads": 1, "cpu": "AVX2", "device": "cpu"},
        "cost": {"parameters": 1000, "added-parameters": 0, "flops-per-token": 6000},
        "training": {
            "losses": [[0, 7.0], [100, loss]],
            "final-loss": loss,
            "timeline": [
                {"step": step, "residual-peak": 1 + step, "bos-attention": 0.1, "value-drain": 0.9, "loss": loss}
                for step in (0, 10, 100)
            ],
        },
        "full-precision": {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits-per-byte": None,
            "tokens": 65536,
            "task": {},
            "metrics": {name: {"value": values[name], "per-layer": [1.0, None], "extra": {}} for name in METRICS},
            "lm-eval": None,
        },
        "quantized": quantized,
        **changes,
    }


def diverged(recipe: str, seed: int = 0, reason: str = "loss is NaN at step 120") -> Record:
    record = synthetic(recipe, seed)
    training = {"losses": [[0, 7.0]], "final-loss": None, "timeline": []}
    empty: Record = {"full-precision": None, "quantized": {}, "training": training}
    return {**record, "status": "diverged", "reason": reason, **empty}
