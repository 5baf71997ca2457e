"""What a value of a record can be: a check says so in a line, or is silent.

A check takes a value and where it stands, and raises ResultsError with both. Larger ones are made of smaller ones; what
a figure can be goes by its name, wherever it stands.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from quantbench.markup import visible
from quantbench.store import check_name

Check = Callable[[Any, str], None]


class ResultsError(Exception):
    """A committed record cannot be trusted: malformed, of another schema, or not where its content says."""


LARGEST = sys.float_info.max
LARGEST_INTEGER = 2**63 - 1


def _of(kind: type, name: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ResultsError(f"{where}: {name} is needed, not {short(value)}")

    return check


mapping, sequence = _of(dict, "an object"), _of(list, "a list")


def integer(value: Any, where: str) -> None:
    """An integer of 64 bits; true and false are none."""
    _of(int, "an integer")(value, where)
    if abs(value) > LARGEST_INTEGER:
        raise ResultsError(f"{where}: an integer of 64 bits is needed, not {short(value)}")


def text(value: Any, where: str) -> None:
    """Text in which all is to be seen: no control characters, nothing that turns round the order of display.

    Line ends and tabs may stand in it: whatever renders them makes spaces of them.
    """
    _of(str, "text")(value, where)
    if not value.isprintable() and visible(shown := value.replace("\n", " ").replace("\t", " ")) != shown:
        raise ResultsError(f"{where}: {short(visible(value))} has characters that are not to be seen")


def number(value: Any, where: str) -> None:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise ResultsError(f"{where}: a finite number is needed, not {short(value)}")


def between(least: float, most: float = math.inf, kind: Check = number) -> Check:
    """What `kind` takes, within these bounds."""

    def check(value: Any, where: str) -> None:
        kind(value, where)
        if not least <= value <= most:
            due = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise ResultsError(f"{where}: {short(value)} cannot be: {due} is needed")

    return check


ROUNDING = 1e-5  # what is never negative, or never above 1, in exact numbers may be so by this much
amount, share = between(-ROUNDING), between(-ROUNDING, 1 + ROUNDING)
count, several = between(0, kind=integer), between(1, kind=integer)


def anything(value: Any, where: str) -> None:
    """JSON of any shape, as a resolved recipe is; its numbers are finite all the same."""
    if isinstance(value, dict):
        mapping_of(anything)(value, where)
    elif isinstance(value, list):
        list_of(anything)(value, where)
    elif isinstance(value, str):
        text(value, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number(value, where)
    elif not isinstance(value, bool | None):
        raise ResultsError(f"{where}: {short(value)} is not a JSON value")


def folder_name(value: Any, where: str) -> None:
    """A name that may be a folder's."""
    text(value, where)
    try:
        check_name(value, "name")
    except ValueError as error:
        raise ResultsError(f"{where}: {error}") from error


def or_null(check: Check) -> Check:
    """What the check takes, or null."""

    def optional(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return optional


def list_of(check: Check) -> Check:
    """A list of what the check takes."""

    def every(value: Any, where: str) -> None:
        sequence(value, where)
        for index, member in enumerate(value):
            check(member, f"{where}[{index}]")

    return every


def mapping_of(check: Check, names: Check = text) -> Check:
    """An object with names of its own choice."""

    def every(value: Any, where: str) -> None:
        mapping(value, where)
        for name, member in value.items():
            names(name, where)
            check(member, f"{where}.{name}")

    return every


def object_of(since: tuple[str, ...] = (), **members: Check) -> Check:
    """An object with just these members; `a_b` stands for the key `a-b`. Older records lack those of `since`."""
    checks = {name.replace("_", "-"): check for name, check in members.items()}

    def every(value: Any, where: str) -> None:
        mapping(value, where)
        for name in sorted((checks.keys() ^ value.keys()) - set(since) | (value.keys() - checks.keys())):
            raise ResultsError(f"{where}: {'missing' if name in checks else 'unknown'} key {name!r}")
        for name in value:
            checks[name](value[name], f"{where}.{name}")

    return every


def point(value: Any, where: str) -> None:
    """[step, loss]."""
    sequence(value, where)
    if len(value) != 2:
        raise ResultsError(f"{where}: [step, loss] is needed, not {short(value)}")
    count(value[0], where)
    amount(value[1], where)


def interval(mean: Check = number) -> Check:
    """[mean, low, high], the limits null where there are none."""

    def check(value: Any, where: str) -> None:
        sequence(value, where)
        if len(value) != 3:
            raise ResultsError(f"{where}: [mean, low, high] is needed, not {short(value)}")
        mean(value[0], where)
        limits(value[0], value[1], value[2], where)

    return check


def limits(mean: Any, low: Any, high: Any, where: str) -> None:
    """Both or neither; of figures in lists, of each."""
    if isinstance(mean, list):
        for members in (low, high):
            if not isinstance(members, list) or len(members) != len(mean):
                raise ResultsError(f"{where}: as many limits are needed as means")
        for index, triple in enumerate(zip(mean, low, high)):
            limits(*triple, f"{where}[{index}]")
        return
    if low is None and high is None:
        return
    for value in (mean, low, high):
        number(value, where)
    if not low <= mean <= high:
        raise ResultsError(f"{where}: the mean {mean} is not within its limits {low} and {high}")


# --- figures by their names ------------------------------------------------------------------------------------------

# What a figure can be, wherever it stands; of `name.layer` by its name. Any finite number, where it is not here.
_AMOUNTS = (
    "loss", "bits-per-byte", "held-out-bits-per-byte", "own-bits-per-byte", "perplexity", "residual-peak", "act-max",
    "inf-norm", "kurtosis-he", "kurtosis-qualcomm", "massive-count", "mmr", "value-drain", "value-drain-plain",
    "sink-value-drain", "value-bos", "value-others", "residual-bos", "residual-others", "residual-median",
    "residual-largest", "norm", "bos-norm", "median", "ratio", "largest", "sink-norm", "sink-norms",
    "largest-sink-norm", "first-norm", "first-norms", "kl", "bits-per-weight", "bytes",
)  # fmt: skip
_MASSES = ("bos-attention", "sink-attention", "trigger-attention", "attention")  # of attention, see `check_masses`
_SHARES = (
    "sink-rate", "share", "position-share", "token-share", "feature-share", "heads-above-half", "top1-agreement",
    "last-word", "last-word-chance", "share-of-weights", "columns-kept", "elements-kept", "weights-kept",
    "tokens-with-outliers", "rounded-instead", "clipped", "alpha", "above-fp16",
)  # fmt: skip
_COUNTS = ("step", "layer", "layers", "k", "argmax-k", "front", "windows", "documents", "texts", "length", "position",
           "feature", "tokens", "sequences")  # fmt: skip
DOMAINS: dict[str, Check] = {
    **dict.fromkeys([*_AMOUNTS, *_MASSES], amount),
    **dict.fromkeys(_SHARES, share),
    **dict.fromkeys(_COUNTS, count),
    "kurtosis-osp": between(-2 - ROUNDING),  # of two values, equally often, the least that there is
    "delta-logit": number,
    "damage": number,
    "parameters": several,
}


def domain(name: str) -> Check:
    """What a figure of that name can be."""
    return DOMAINS.get(name.partition(".")[0], number)


def by_name(value: Any, where: str, name: str = "") -> None:
    """JSON of any shape, as what `measure` and its like find; each figure is one that its name can have."""
    if isinstance(value, dict) and value.keys() == {"mean", "low", "high"}:
        by_name(value["mean"], f"{where}.mean", name)
        limits(value["mean"], value["low"], value["high"], where)
    elif isinstance(value, dict):
        for key, member in value.items():
            text(key, where)
            by_name(member, f"{where}.{key}", key)
        if value.get("perplexity") is not None:
            check_perplexity(value, where)
    elif isinstance(value, list):
        for index, member in enumerate(value):
            by_name(member, f"{where}[{index}]", name)
    elif name in DOMAINS and value is not None:
        DOMAINS[name](value, where)
    else:
        anything(value, where)


def check_masses(value: Any, where: str, name: str = "") -> None:
    """ResultsError where a position draws more than all of the attention: of forms whose weights are 1 at most."""
    if isinstance(value, dict):
        for key, member in value.items():
            base = key.partition(".")[0]
            inherited = name if key in ("value", "per-layer", "mean") else ""
            check_masses(member, f"{where}.{key}", base if base in _MASSES else inherited)
    elif isinstance(value, list):
        for index, member in enumerate(value):
            check_masses(member, f"{where}[{index}]", name)
    elif name and isinstance(value, float) and value > 1 + ROUNDING:
        raise ResultsError(f"{where}: {value} cannot be: weights of this attention are 1 at most")


def by_domain(value: Any, where: str) -> None:
    """figure -> number or null."""
    mapping(value, where)
    for name, member in value.items():
        text(name, where)
        or_null(domain(name))(member, f"{where}.{name}")


def layered(value: Any, where: str) -> None:
    """figure -> a value a layer, as many of each."""
    mapping(value, where)
    for name, members in value.items():
        list_of(or_null(domain(name)))(members, f"{where}.{name}")
    _alike(value.values(), where)


def metrics(value: Any, where: str) -> None:
    """metric -> its value, a value a layer, and named companions, which are of its kind."""
    mapping(value, where)
    for name, found in value.items():
        of_kind = or_null(domain(name))
        object_of(value=of_kind, per_layer=list_of(of_kind), extra=mapping_of(anything))(found, f"{where}.{name}")
        for companion, member in found["extra"].items():
            base = companion.partition(".")[0]
            check = (
                or_null(domain(base)) if base in (*_COUNTS, *_SHARES) else any_figure if base == "excess" else of_kind
            )
            check(member, f"{where}.{name}.extra.{companion}")
    _alike((found["per-layer"] for found in value.values()), where)


def _alike(lists: Iterable[list[Any]], where: str) -> None:
    """Of as many layers each; of none, where the model does not show them."""
    if len({len(members) for members in lists if members}) > 1:
        raise ResultsError(f"{where}: its figures are not of equally many layers")


def scores(value: Any, where: str) -> None:
    """Of lm-eval: accuracies, and what their names say stands beside them."""
    mapping(value, where)
    for name, member in value.items():
        text(name, where)
        kind = amount if name.endswith(("-stderr", "-items", "-bits-per-byte")) else share
        or_null(kind)(member, f"{where}.{name}")


def answers(value: Any, where: str) -> None:
    """Of standard tasks: which items were right, a 1 or a 0 each."""
    text(value, where)
    if not value or set(value) - {"0", "1"}:
        raise ResultsError(f"{where}: a 1 or a 0 for each item is needed, not {short(value)}")


def check_perplexity(found: dict[str, Any], where: str) -> None:
    """The perplexity is that of the loss."""
    loss, perplexity = found.get("loss"), found["perplexity"]
    amount(perplexity, f"{where}.perplexity")
    if loss is not None and not math.isclose(math.log(max(perplexity, 1e-300)), loss, rel_tol=1e-9, abs_tol=1e-9):
        raise ResultsError(f"{where}.perplexity: {perplexity} is not exp(loss), exp({loss})")


any_figure, any_amount = or_null(number), or_null(amount)


def short(value: Any) -> str:
    """The value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
