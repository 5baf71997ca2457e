"""Recipe and Track: a recipe is a difference from the baseline, a track is what is held equal.

Both are frozen dataclasses read by `strict`; a field `weight_decay` is the key `weight-decay` in YAML.
The recipe cannot touch what the track holds equal, so that fairness is a property of the file format.
Every key is explained in recipes/README.md.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from quantbench import catalog, strict
from quantbench.strict import Added, Entries, Entry, KeyedError, Place, Range

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TAKEN = ("models", "perf", "claims.md", "leaderboard.csv")  # in results/ by what is no track

SURVIVES = 0.01  # nats per token of damage, where a track says nothing else

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """What one row of the leaderboard changes about pretraining; the defaults are the baseline."""

    title: str
    why: str  # one sentence: why it might help
    paper: str = ""  # arXiv id or address
    mitigations: Annotated[dict[str, object], Entries("mitigations", catalog)] = field(default_factory=dict)
    lr: dict[str, Annotated[float, Range(1e-12, 100.0)]] = field(
        default_factory=dict
    )  # track -> tuned; else the track's

    def __post_init__(self) -> None:
        for track in self.lr:
            if not NAME.fullmatch(track):
                raise KeyedError(f"'lr' has {strict.quote(track)}, which is no track's name ({NAME.pattern})", "lr")

    def check_entries(self) -> None:
        """ValueError where two mitigations change the same thing."""
        if len(self.mitigations) > 1:
            try:
                catalog.contract("mitigations").combine(self.mitigations)
            except ValueError as error:
                raise KeyedError(str(error), "mitigations") from error


@dataclass(frozen=True)
class Shape:
    """The decoder that every recipe of a track trains."""

    layers: Annotated[int, Range(1, 1024)] = 8
    heads: Annotated[int, Range(1, 1024)] = 8
    width: Annotated[int, Range(64, 65536)] = 64  # a multiple of 64, so that group-wise 4 bits divide it
    mlp_width: Annotated[int, Range(64, 262144)] = 192
    mlp: Literal["swiglu", "gelu", "relu", "linear"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    positions: Literal["rope", "learned"] = "rope"
    embedding_std: Annotated[float, Range(0.0, 100.0)] = 1.0
    sublayers: Annotated[tuple[Literal["block", "attention", "mlp"], ...], Added()] = ()  # of each layer; (): blocks

    def __post_init__(self) -> None:
        if self.sublayers and len(self.sublayers) != self.layers:
            given = len(self.sublayers)
            raise KeyedError(
                f"'sublayers' must name one for each of the {self.layers} layers, not {given}", "sublayers"
            )
        if self.sublayers and set(self.sublayers) == {"mlp"}:
            raise KeyedError("'sublayers' must leave a layer its attention", "sublayers")
        if self.width % 64:
            raise KeyedError(f"'width' must be a multiple of 64, not {self.width}", "width")
        if self.width % self.heads:
            raise KeyedError(f"'heads' ({self.heads}) must divide 'width' ({self.width})", "heads", "width")
        if self.positions == "rope" and self.width // self.heads % 2:
            raise KeyedError("rope needs an even number of features in a head: halve 'heads'", "heads", "width")


@dataclass(frozen=True)
class Evaluate:
    """On how much of the held-out split a model is judged, and by what."""

    sequences: Annotated[int, Range(1, 1_000_000)] = 512  # held-out windows of `length` tokens
    traced: Annotated[int, Range(1, 1_000_000)] = 64  # of these, how many the metrics of the trace see
    calibration: Annotated[int, Range(1, 10_000)] = 16  # batches of the training split for static ranges
    exemption: tuple[str, ...] = ()  # quantizers of the track for which the extreme tokens' share is measured
    lm_eval_items: Annotated[int, Range(0, 100_000)] = 0  # documents and choices given to lm-eval; 0: not run
    lm_eval: Annotated[dict[str, Annotated[int, Range(1, 1_000_000)]], Added()] = field(
        default_factory=dict
    )  # tasks of lm-eval, by our names (`quantbench data`) or its own, each with how many items of a fixed draw


@dataclass(frozen=True)
class Track:
    """What is held equal among the rows of one table."""

    title: str
    task: Annotated[object, Entry("tasks", catalog)]
    quantizers: Annotated[dict[str, object], Entries("quantizers", catalog)]
    metrics: Annotated[tuple[str, ...], Entries("metrics", catalog)]
    rank_by: dict[Literal["damage"], str]  # the quantizer by whose damage rows are ranked
    steps: Annotated[int, Range(0, 100_000_000)] = 0  # of pretraining; 0 where the model is `pretrained`
    lr: Annotated[float, Range(0.0, 100.0)] = 0.0  # the baseline's; 0 likewise
    # nats per token of damage under that quantizer: a recipe whose interval lies below survives it
    survives: Annotated[float, Added(), Range(1e-9, 1e9)] = SURVIVES
    baseline_only: Annotated[tuple[str, ...], Added()] = ()  # quantizers that no other recipe goes through: references
    pretrained: Annotated[str, Added(), Place()] = ""  # a model that is there already, as `quantbench measure` takes it
    model: Shape = field(default_factory=Shape)
    length: Annotated[int, Range(2, 1_048_576)] = 128  # tokens of a sequence that are predicted
    batch: Annotated[int, Range(1, 1_048_576)] = 8  # sequences a step
    weight_decay: Annotated[float, Range(0.0, 100.0)] = (
        0.5  # on matrices; at every lr a step shrinks them by the track's lr * this
    )
    betas: tuple[Annotated[float, Range(0.0, 0.999999)], Annotated[float, Range(0.0, 0.999999)]] = (0.9, 0.95)
    clip: Annotated[float, Range(0.0, 1e9)] = 1.0  # gradient norm; 0: no clipping
    warmup: Annotated[int, Range(0, 100_000_000)] = 100  # steps
    decay: Annotated[float, Range(0.0, 1.0)] = 0.3  # the share of the steps, at the end, over which lr falls to 0
    precision: Literal["fp32", "bf16"] = "fp32"
    seeds: tuple[Annotated[int, Range(0, 2**31 - 1)], ...] = (0, 1, 2, 3, 4)
    extra_seeds: tuple[Annotated[int, Range(0, 2**31 - 1)], ...] = ()  # that a row may have beyond what is due
    evaluate: Evaluate = field(default_factory=Evaluate)
    timeline: Annotated[int, Range(0, 1000)] = 12  # how many log-spaced steps the three signatures are logged at
    watched: Annotated[bool, Added()] = False  # whether the timeline also has every layer's figures and the task's own
    checkpoint: Annotated[int, Range(1, 100_000_000)] = 500  # steps between checkpoints

    def __post_init__(self) -> None:
        ranking = tuple(self.rank_by.values())
        named = {"rank-by": ranking, "evaluate.exemption": self.evaluate.exemption, "baseline-only": self.baseline_only}
        for key, used in named.items():
            for name in used:
                if name not in self.quantizers:
                    near = strict.nearest(name, self.quantizers)
                    raise KeyedError(f"{key!r} names {strict.quote(name)}, no quantizer of this track{near}", key)
        if not self.rank_by:
            raise KeyedError("'rank-by' must be {damage: quantizer}", "rank-by")
        if set(ranking) & set(self.baseline_only):
            raise KeyedError(f"'baseline-only' has {ranking[0]}, by which every recipe is ranked", "baseline-only")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise KeyedError("'seeds' must be different, and at least one", "seeds")
        if len({*self.seeds, *self.extra_seeds}) < len(self.seeds + self.extra_seeds):
            raise KeyedError("'extra-seeds' must be different, and none of 'seeds'", "extra-seeds")
        if self.pretrained:
            self._check_pretrained()
        elif not self.steps or not self.lr:
            key = "lr" if self.steps else "steps"
            raise KeyedError(f"missing key {key!r}: it is above 0 unless the model is 'pretrained'", key)
        elif self.warmup > self.steps:
            raise KeyedError(f"'warmup' ({self.warmup}) must be at most 'steps' ({self.steps})", "warmup", "steps")

    def _check_pretrained(self) -> None:
        if self.steps or self.lr:
            key = "steps" if self.steps else "lr"
            raise KeyedError(f"{key!r} is for pretraining, and this model is 'pretrained': leave it out", key)
        if self.evaluate.lm_eval_items:
            raise KeyedError("'evaluate.lm-eval-items' is for a task that is text: name tasks in 'lm-eval'", "evaluate")
        if len(self.seeds + self.extra_seeds) > 1:
            raise KeyedError("'seeds': a model that is 'pretrained' has one; intervals are over documents", "seeds")

    def check_entries(self) -> None:
        """ValueError where task, model and quantizers do not fit one another: told before hours of pretraining."""
        task = catalog.entry_name("tasks", self.task)
        if self.pretrained and not self.task.reads_with_a_model:  # type: ignore[attr-defined]
            raise KeyedError(
                "'task' makes ids of its own, which mean nothing to a model that is 'pretrained': take `passages`",
                "task",
            )
        if self.pretrained:
            at = strict.place(self.pretrained)
            if at.startswith((".", "/")) and not Path(at).exists():
                raise KeyedError(f"'pretrained': there is no {at}", "pretrained")
            return  # its widths are known when it is opened
        if task == "passages":
            raise KeyedError(
                "nothing is trained on passages: name a model that is 'pretrained', or the task text", "task"
            )
        if self.evaluate.lm_eval:
            raise KeyedError("'evaluate.lm-eval' is for a model that is 'pretrained'", "evaluate.lm-eval", "evaluate")
        if self.evaluate.lm_eval_items and task != "text":
            message = f"'evaluate.lm-eval-items' needs a task that is text, not {task}"
            raise KeyedError(message, "evaluate.lm-eval-items", "evaluate")
        for name, quantizer in self.quantizers.items():
            try:
                quantizer.check([self.model.width, self.model.mlp_width])  # type: ignore[attr-defined]
            except ValueError as error:
                raise KeyedError(f"{name}: {error}", f"quantizers.{name}") from error


PRETRAINING = ("steps", "lr", "model", "batch", "weight-decay", "betas", "clip", "warmup", "decay", "precision",
               "timeline", "watched", "checkpoint")  # fmt: skip


def plain(track: Track) -> dict[str, Any]:
    """The plain form of a track, without the keys of pretraining where the model is there already."""
    found = strict.dump(track)
    return {key: value for key, value in found.items() if not (track.pretrained and key in PRETRAINING)}


def load_recipe(name: str | Path, root: Path, sets: Sequence[str] = (), declared: bool = False) -> tuple[str, Recipe]:
    """A recipe and its name, by the name (recipes/<name>.yaml under the root) or by a path that ends in .yaml.

    `sets` are the `key=value` of `--set`. With `declared`, entries are as their sources declare them: all is checked,
    and nothing heavy imported. ValueError, one line, for an unknown name or whatever is wrong inside.
    """
    return _load(str(name), root / "recipes", "recipe", Recipe, sets, declared)


def load_track(name: str | Path, root: Path, sets: Sequence[str] = (), declared: bool = False) -> tuple[str, Track]:
    """A track and its name; as `load_recipe`, from recipes/tracks/<name>.yaml."""
    return _load(str(name), root / "recipes" / "tracks", "track", Track, sets, declared)


def _load(given: str, folder: Path, what: str, kind: type[T], sets: Sequence[str], declared: bool) -> tuple[str, T]:
    if given.endswith(".yaml"):
        path = Path(given).expanduser() if given.startswith("~") else Path(given)
        if not NAME.fullmatch(path.stem):
            raise ValueError(f"{strict.quote(given)}: a {what}'s file is named {NAME.pattern}.yaml; rename it")
    else:
        known = available(folder)
        if given not in known:
            raise ValueError(f"no {what} {strict.quote(given)} in {folder}{strict.nearest(given, known)}")
        path = folder / f"{given}.yaml"
    if what == "track" and path.stem in TAKEN:
        raise ValueError(f"{strict.quote(given)}: in results/, the name {path.stem} is another's; rename it")
    return path.stem, strict.override(path, kind, sets, declared)


def available(folder: Path) -> list[str]:
    """The names of the files in a folder of recipes or tracks, sorted; a link that leads out of it is none of them."""
    inside = [path for path in folder.glob("*.yaml") if path.resolve().is_relative_to(folder.resolve())]
    return sorted(path.stem for path in inside if NAME.fullmatch(path.stem))


def digest(plain: object) -> str:
    """sha256 (hex) of the canonical JSON of a plain form (`strict.dump`)."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()
