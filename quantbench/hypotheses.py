"""Predictions that were written before the runs, held against the records: `results/<track>/hypotheses.yaml`.

A hypothesis is a text and a rule over records, one condition a line, all of which must hold:

    - id: 2
      text: ReLU attention lowers the residual peak and the KL under `w8a8-static-residual`.
      rule:
        - metric('relu-attn', 'residual-peak') < metric('baseline', 'residual-peak')
        - better('relu-attn', 'w8a8-static-residual')

A rule is an expression of Python's: comparisons, `and`, `or`, `not`, arithmetic, lists, `all`, `any` and `count` of a
generator, and the functions of `Facts`. It is read by `ast` and computed here, never evaluated as a program. Where a
figure is missing the verdict is *not decided*. A hypothesis that cannot be written so is judged by hand and says that.

Part of a file is a group of hypotheses that were written together: `written` is the commit that has them first, and
`judges` are the recipes whose runs came later; the tests hold that against the history.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantbench import claims, relation
from quantbench.board import Board, Row, value_of
from quantbench.markup import Table
from quantbench.numerals import hundredths, plain
from quantbench.strict import load

FILE = "hypotheses.yaml"
HOLDS, FAILS, OPEN = "holds", "fails", "not decided"


@dataclass(frozen=True)
class ByHand:
    """The verdict on what no rule says."""

    verdict: Literal["holds", "fails", "not decided"]
    why: str


@dataclass(frozen=True)
class Hypothesis:
    """A prediction, and what counts against it."""

    id: int
    text: str
    rule: tuple[str, ...] = ()
    by_hand: ByHand | None = None

    def __post_init__(self) -> None:
        if bool(self.rule) == (self.by_hand is not None):
            raise ValueError(f"hypothesis {self.id}: give a 'rule', or a verdict 'by-hand', and not both")
        for condition in self.rule:
            _parsed(condition)


@dataclass(frozen=True)
class Part:
    """Hypotheses that were written together."""

    written: str  # the commit that has them first
    judges: tuple[str, ...]  # the recipes that were run afterwards
    about: str
    hypotheses: tuple[Hypothesis, ...]


@dataclass(frozen=True)
class Hypotheses:
    """A file of them."""

    parts: tuple[Part, ...]
    note: str = ""  # what else a reader should know of how they were written


@dataclass(frozen=True)
class Verdict:
    """A hypothesis, what the records say, and the figures by which they do."""

    hypothesis: Hypothesis
    verdict: str
    measured: str


def read(results_root: Path, track: str) -> Hypotheses | None:
    """A track's; None where it has none. ValueError, with the place, for a file that is wrong."""
    path = results_root / track / FILE
    return load(path, Hypotheses) if path.is_file() else None


def judged(found: Hypotheses, facts: Facts) -> list[Verdict]:
    """Every hypothesis with its verdict."""
    return [_judge(one, facts) for part in found.parts for one in part.hypotheses]


def table(verdicts: list[Verdict]) -> Table:
    """One row each."""
    rows = [[str(v.hypothesis.id), v.hypothesis.text, v.verdict, v.measured] for v in verdicts]
    return ["", "hypothesis", "verdict", "measured"], rows


def score(verdicts: list[Verdict]) -> str:
    """How many hold, in words."""
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in (HOLDS, FAILS, OPEN)}
    said = f"{counts[HOLDS]} of {len(verdicts)} hold, {counts[FAILS]} fail"
    return said + (f", {counts[OPEN]} are not decided" if counts[OPEN] else "")


def plain_form(found: Mapping[str, list[Verdict]]) -> dict[str, Any]:
    """Fit for JSON: track -> a list."""
    return {
        track: [
            {"id": v.hypothesis.id, "text": v.hypothesis.text, "rule": list(v.hypothesis.rule), "verdict": v.verdict,
             "measured": v.measured}
            for v in verdicts
        ]
        for track, verdicts in found.items()
    }  # fmt: skip


# --- what the records say ------------------------------------------------------------------------------------------


class Unknown(Exception):
    """The records do not have a figure."""


@dataclass
class Facts:
    """What a rule may ask. Recipes, quantizers, metrics and predictors by their names; losses and damage in nats."""

    board: Board
    related: dict[str, Any]  # the track's part of `relation.relate`
    claimed: dict[str, list[claims.Row]] = field(default_factory=dict)  # by track, of `claims.examine`

    def __post_init__(self) -> None:
        self._rows = {row.name: row for row in self.board.rows}
        self.pretraining = [r.name for r in self.board.rows if r.records and not relation.post_hoc(r.records[0])]

    def _row(self, recipe: str) -> Row:
        if recipe not in self._rows:
            raise Unknown(f"no runs of {recipe}")
        return self._rows[recipe]

    def damage(self, recipe: str, quantizer: str) -> float:
        return _known(value_of(self._row(recipe).quantized(quantizer, "damage")), f"damage of {recipe}")

    def across(self, recipe: str, quantizers: list[str]) -> float:
        """Largest minus smallest damage over some quantizers."""
        found = [self.damage(recipe, quantizer) for quantizer in quantizers]
        return max(found) - min(found)

    def deviation(self, recipe: str, quantizer: str) -> float:
        """Standard deviation of the damage over seeds."""
        found = list(self._row(recipe).damages(quantizer).values())
        if len(found) < 2:
            raise Unknown(f"one seed of {recipe}")
        mean = math.fsum(found) / len(found)
        return math.sqrt(math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1))

    def ratio(self, recipe: str, quantizer: str) -> float:
        """KL relative to the baseline's."""
        compared = self._row(recipe).comparisons.get(quantizer)
        if compared is None:
            raise Unknown(f"{recipe} is not compared under {quantizer}")
        return compared.ratio.mean

    def better(self, recipe: str, quantizer: str) -> bool:
        """Whether it is told from the baseline, and loses less."""
        return self.ratio(recipe, quantizer) < 1 and not self.alike(recipe, quantizer)

    def worse(self, recipe: str, quantizer: str) -> bool:
        return self.ratio(recipe, quantizer) > 1 and not self.alike(recipe, quantizer)

    def alike(self, recipe: str, quantizer: str) -> bool:
        """Whether it cannot be told from the baseline."""
        self.ratio(recipe, quantizer)
        return not self._row(recipe).comparisons[quantizer].separates

    def least(self, quantizer: str, recipes: list[str]) -> str:
        """The recipe with the smallest KL."""
        return min(recipes, key=lambda name: _known(value_of(self._row(name).quantized(quantizer, "kl")), name))

    def metric(self, recipe: str, name: str) -> float:
        """Of the full-precision model, mean over seeds."""
        return _known(value_of(self._row(recipe).full("metrics", name, "value")), f"{name} of {recipe}")

    def share(self, recipe: str, quantizer: str) -> float:
        """Of the damage, carried by extreme tokens."""
        return self._share(recipe, quantizer, "extreme")

    def control(self, recipe: str, quantizer: str) -> float:
        """Of the damage, carried by as many random tokens."""
        return self._share(recipe, quantizer, "random")

    def share_low(self, recipe: str, quantizer: str) -> float:
        """The lower limit of the share, over documents."""
        interval = self._row(recipe).share_interval(quantizer, "extreme")
        if interval is None:
            raise Unknown(f"no interval of the share of {recipe}")
        return interval.low

    def share_undefined(self, recipe: str, quantizer: str) -> bool:
        """Whether the damage may be nothing, so that it has no shares."""
        return self._row(recipe).share(quantizer, "extreme") == "undefined"

    def _share(self, recipe: str, quantizer: str, exempt: str) -> float:
        found = self._row(recipe).share(quantizer, exempt)
        if not isinstance(found, float):
            raise Unknown(f"share of {recipe} under {quantizer}")
        return found

    def rho(self, quantizer: str, predictor: str) -> float:
        """Spearman's correlation of KL with a predictor, over runs."""
        return self._rho(quantizer, predictor, "estimate")

    def rho_low(self, quantizer: str, predictor: str) -> float:
        return self._rho(quantizer, predictor, "low")

    def rho_high(self, quantizer: str, predictor: str) -> float:
        return self._rho(quantizer, predictor, "high")

    def _rho(self, quantizer: str, predictor: str, key: str) -> float:
        found = self.related.get(quantizer, {}).get(predictor, {}).get("rho")
        return _known(found and found[key], f"rho of {predictor} under {quantizer}")

    def accuracy(self, recipe: str, quantizer: str, task: str) -> float:
        """What a quantizer changes in the accuracy on a task of lm-eval, paired over items."""
        return self._accuracy(recipe, quantizer, task)[0]

    def accuracy_low(self, recipe: str, quantizer: str, task: str) -> float:
        return self._accuracy(recipe, quantizer, task)[1]

    def accuracy_high(self, recipe: str, quantizer: str, task: str) -> float:
        return self._accuracy(recipe, quantizer, task)[2]

    def _accuracy(self, recipe: str, quantizer: str, task: str) -> tuple[float, float, float]:
        from quantbench.tables import changed

        mean = changed(self._row(recipe).records[0], task, quantizer)
        if mean is None or mean.interval is None:
            raise Unknown(f"{task} of {recipe} under {quantizer}")
        return mean.value, mean.interval.low, mean.interval.high

    def claim(self, track: str, name: str) -> float:
        """The figure of a row of the claims, mean over seeds."""
        return math.fsum(self._claim(track, name).values.values()) / len(self._claim(track, name).values)

    def claim_holds(self, track: str, name: str) -> bool:
        return self._claim(track, name).verdict == claims.HOLDS

    def claim_seeds(self, track: str, name: str) -> int:
        """How many seeds obey the row's rule."""
        return int(_known(self._claim(track, name).obeyed, f"{name} on {track}"))

    def claim_low(self, track: str, name: str) -> float:
        return self._interval(track, name)[0]

    def claim_high(self, track: str, name: str) -> float:
        return self._interval(track, name)[1]

    def _interval(self, track: str, name: str) -> tuple[float, float]:
        from quantbench.stats import t_interval

        found = t_interval(list(self._claim(track, name).values.values()))
        if found is None:
            raise Unknown(f"one seed of {name}")
        return found.low, found.high

    def _claim(self, track: str, name: str) -> claims.Row:
        found = next((row for row in self.claimed.get(track, ()) if row.name == name), None)
        if found is None or not found.values:
            raise Unknown(f"no row {name} on {track}")
        return found


FUNCTIONS = {name for name in vars(Facts) if not name.startswith("_")}
NAMES = {"pretraining": "every recipe that changes pretraining, and the baseline"}


def _known(value: float | None, what: str) -> float:
    if value is None or math.isnan(value):
        raise Unknown(what)
    return value


# --- rules -----------------------------------------------------------------------------------------------------------

_COMPARE: dict[type[ast.cmpop], tuple[Callable[[Any, Any], bool], str]] = {
    ast.Lt: (operator.lt, "<"), ast.LtE: (operator.le, "≤"), ast.Gt: (operator.gt, ">"), ast.GtE: (operator.ge, "≥"),
    ast.Eq: (operator.eq, "="), ast.NotEq: (operator.ne, "≠"),
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_GATHER = {"all": all, "any": any, "count": sum}


def _parsed(condition: str) -> ast.expr:
    """The expression; ValueError where it has anything that no rule has."""
    try:
        tree = ast.parse(condition, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"'rule' {condition!r}: {error.msg}") from None
    bound = {n.target.id for n in ast.walk(tree) if isinstance(n, ast.comprehension) and isinstance(n.target, ast.Name)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS | _GATHER.keys():
                continue
            case ast.Name(id=name) if name in FUNCTIONS | _GATHER.keys() | NAMES.keys() | bound:
                continue
            case ast.Constant(value=str() | int() | float()) | ast.List() | ast.Compare() | ast.GeneratorExp():
                continue
            case ast.BoolOp() | ast.BinOp() | ast.UnaryOp() | ast.comprehension(ifs=[], target=ast.Name()):
                continue
            case ast.expr_context() | ast.boolop() | ast.Not() | ast.USub():
                continue
            case _ if type(node) in _COMPARE or type(node) in _ARITHMETIC:
                continue
        raise ValueError(
            f"'rule' {condition!r}: {ast.unparse(node) if isinstance(node, ast.expr) else 'it'} is no rule"
        )
    return tree


def _judge(one: Hypothesis, facts: Facts) -> Verdict:
    if one.by_hand is not None:
        return Verdict(one, one.by_hand.verdict, f"by hand: {one.by_hand.why}")
    verdicts: list[bool | None] = []
    measured = []
    for condition in one.rule:
        tree = _parsed(condition)
        try:
            verdicts.append(bool(_value(tree, facts, {})))
            measured.append(_shown(tree, facts, {}))
        except Unknown as missing:
            verdicts.append(None)
            measured.append(f"unknown: {missing}")
    whole = FAILS if False in verdicts else OPEN if None in verdicts else HOLDS
    return Verdict(one, whole, "; ".join(measured))


def _value(node: ast.AST, facts: Facts, bound: dict[str, str]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return bound[name] if name in bound else getattr(facts, name)
        case ast.List(elts=elements):
            return [_value(element, facts, bound) for element in elements]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, facts, bound)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, facts, bound)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, facts, bound), _value(right, facts, bound))
        case ast.BoolOp(op=op, values=values):
            found = [_value(value, facts, bound) for value in values]
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_value(side, facts, bound) for side in (left, *others)]
            return all(_COMPARE[type(op)][0](a, b) for op, a, b in zip(ops, sides, sides[1:]))
        case ast.Call(func=ast.Name(id=name), args=[ast.GeneratorExp() as each]) if name in _GATHER:
            return _GATHER[name](_value(each.elt, facts, inner) for inner in _inner(each, facts, bound))
        case ast.Call(func=ast.Name(id=name), args=given):
            return getattr(facts, name)(*(_value(value, facts, bound) for value in given))
    raise AssertionError(ast.dump(node))


def _inner(each: ast.GeneratorExp, facts: Facts, bound: dict[str, str]) -> Iterator[dict[str, str]]:
    """What its names stand for, one after the other."""
    found = [bound]
    for loop in each.generators:
        assert isinstance(loop.target, ast.Name)
        found = [inner | {loop.target.id: value} for inner in found for value in _value(loop.iter, facts, inner)]
    yield from found


def _shown(node: ast.AST, facts: Facts, bound: dict[str, str]) -> str:
    """The figures of a condition in the place of what asks for them."""
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_side(side, facts, bound) for side in (left, *others)]
            return sides[0] + "".join(f" {_COMPARE[type(op)][1]} {side}" for op, side in zip(ops, sides[1:]))
        case ast.BoolOp(values=values, op=op):
            return (" and " if isinstance(op, ast.And) else " or ").join(_shown(v, facts, bound) for v in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _shown(operand, facts, bound)
        case ast.Call(func=ast.Name(id="all" | "any" as name), args=[ast.GeneratorExp() as each]):
            cases = list(_inner(each, facts, bound))
            kept = [inner for inner in cases if bool(_value(each.elt, facts, inner)) == (name == "any")]
            listed = ", ".join(" ".join(value for key, value in inner.items() if key not in bound) for inner in kept)
            told = f"{len(cases) - len(kept) if name == 'all' else len(kept)} of {len(cases)}"
            return f"{told}{'; not ' if name == 'all' and listed else ': ' if listed else ''}{listed}"
        case ast.Call(
            func=ast.Name(id=name), args=[ast.Constant(value=str() as recipe), ast.Constant(value=quantizer)]
        ):
            if name in ("better", "worse", "alike"):
                return f"{recipe} × {plain(facts.ratio(recipe, str(quantizer)))}{_told(facts, recipe, str(quantizer))}"
            return _side(node, facts, bound)
    return _side(node, facts, bound)


def _told(facts: Facts, recipe: str, quantizer: str) -> str:
    return " (not told from 1)" if facts.alike(recipe, quantizer) else ""


def _side(node: ast.AST, facts: Facts, bound: dict[str, str]) -> str:
    value = _value(node, facts, bound)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return hundredths(value) if 0.01 <= abs(value) < 1 else plain(value)
    return str(value)
