"""YAML -> frozen dataclass, or one line that says what is wrong and where: `file:line:column: message`.

The type that is due decides what a scalar means, not YAML's guess: `3e-4` is a number where a number is due, `no`
and `1.0` are text where text is due. Refused rather than interpreted: unknown and repeated keys, anchors,
aliases, tags, merge keys, several documents, `yes` for `true`, `012` (octal or decimal?), NaN and infinities.
Files are small by rule (bytes, values, depth), so that no file, however hostile, costs more than a moment.

Types: str, int, float, bool, `X | None`, Literal, list[X], tuple[X, ...], tuple[X, Y], dict[K, V], dataclasses,
and Annotated with the markers Range, Entry and Entries. A field `weight_decay` is the key `weight-decay`.
A file is read three times: with the names of entries alone, with the entries as their sources declare them, so that a
slip anywhere is told before anything heavy is imported, and with the entries themselves. Hence `__post_init__` sees
None for an entry on the first reading; what needs the entries goes into an optional method `check_entries`, which has
the second reading's.

This is the only file that imports yaml. Source of the format: https://yaml.org/spec/1.1/ (PyYAML).
"""

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

MAX_BYTES = 256 * 1024
MAX_VALUES = 4096  # keys count too
MAX_DEPTH = 16

# Not in a file: controls but tab and line ends, Unicode's own line ends, what reverses the order of display, and
# what is no character. One line of text has no tab or line end either.
_FORBIDDEN = re.compile(
    "[^\t\n\r -~\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_NOT_ONE_LINE = re.compile(_FORBIDDEN.pattern.replace("\t\n\r", ""))
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,9})?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_NULL = ("null", "Null", "NULL", "~")

T = TypeVar("T")


class StrictError(ValueError):
    """What is wrong with a file, in one line: `file:line:column: message` (from 1), or `--set key=value: message`."""


class KeyedError(ValueError):
    """For `__post_init__` and `check_entries`: an error placed at the first of these keys that the file has."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


class Catalog(Protocol):
    """Where entries come from; the module `catalog` is one. Passed in, as entries themselves may import this file."""

    def names(self, axis: str) -> list[str]: ...
    def load(self, axis: str, name: str) -> type: ...
    def declared(self, axis: str, name: str) -> type: ...
    def preset(self, axis: str, name: str) -> dict[str, Any]: ...
    def entry_name(self, axis: str, entry: object) -> str: ...


@dataclass(frozen=True)
class Range:
    """Marks a number: lo <= number <= hi."""

    lo: float
    hi: float


@dataclass(frozen=True)
class Entry:
    """Marks a field that is one entry of an axis, written `name: {parameters}`."""

    axis: str
    catalog: Catalog


@dataclass(frozen=True)
class Entries:
    """Marks a dict of entries by name, `{name: {parameters}, ...}`, or a tuple of names that must be entries'."""

    axis: str
    catalog: Catalog


@dataclass(frozen=True)
class Added:
    """Marks a field that came later: where it is at its default, the plain form leaves it out, so that digests hold."""


@dataclass(frozen=True)
class Place:
    """Marks text that may name a file or a folder: relative to the folder of the YAML file, and kept as it is written.

    So the same file is the same track on every machine; `place` says what is meant on this one.
    """


class Placed(str):
    """Text marked `Place`, and the folder that it is relative to."""

    folder: str

    def __new__(cls, text: str, folder: str) -> "Placed":
        placed = super().__new__(cls, text)
        placed.folder = folder
        return placed

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return Placed, (str(self), self.folder)


def place(text: str, names: Iterable[str] = ()) -> str:
    """The path that a text marked `Place` stands for; the text itself where it is a name, one of these or of a hub."""
    if text in names:
        return str(text)
    path = Path(getattr(text, "folder", "."), Path(text).expanduser() if text.startswith("~") else text)
    return str(path) if text.startswith((".", "~", "/")) or (text and path.exists()) else str(text)


def load(path: str | Path, kind: type[T]) -> T:
    """The instance of a dataclass that a file spells. StrictError for whatever is wrong with the file."""
    return _build(_compose(_read(path), str(path)), kind)


def loads(text: str, name: str, kind: type[T]) -> T:
    """As `load`, from text; `name` stands for the file in errors."""
    return _build(_compose(text, name), kind)


def override(path: str | Path, kind: type[T], assignments: Iterable[str], declared: bool = False) -> T:
    """As `load`, after assignments `dotted.key=value` that win over the file's; a value is a YAML scalar or flow.

    With `declared`, entries are what `Catalog.declared` gives: the file is checked, and nothing heavy imported.
    """
    root = _compose(_read(path), str(path))
    for assignment in assignments:
        _assign(root, assignment)
    return _build(root, kind, declared)


def dump(instance: object) -> dict[str, Any]:
    """The canonical plain form, fit for JSON: keys hyphenated and sorted, entries as `{name: {all parameters}}`."""
    assert is_dataclass(instance)
    assert not isinstance(instance, type)
    values = {key: (getattr(instance, f.name), f, due) for key, (f, due) in keys(type(instance)).items()}
    return {key: _plain(value, due) for key, (value, f, due) in sorted(values.items()) if not _left_out(value, f, due)}


def _left_out(value: Any, field: Field[Any], due: Any) -> bool:
    if Added() not in _unwrap(due)[1]:
        return False
    return bool(value == (field.default if field.default_factory is MISSING else field.default_factory()))


def keys(kind: type) -> dict[str, tuple[Field[Any], Any]]:
    """The keys of a dataclass in YAML, each with its field and its type."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name.replace("_", "-"): (f, hints[f.name]) for f in fields(kind) if f.init}


def _unwrap(due: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and the markers it is annotated with."""
    return (due.__origin__, due.__metadata__) if get_origin(due) is Annotated else (due, ())


def describe(kind: Any) -> str:
    """A type in words, as errors and the reference of keys say it: `a whole number from 1 to 1024`."""
    kind, markers = _unwrap(kind)
    origin, args = get_origin(kind), get_args(kind)
    for marker in markers:
        match marker:
            case Range(lo, hi):
                return f"{describe(kind)} from {lo} to {hi}"
            case Entry(axis):
                return f"one entry of {axis}"
            case Entries(axis):
                return f"entries of {axis}" if origin is dict else f"a list of names of {axis}"
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is NoneType else describe(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(map(describe, args))}"
    if origin in (tuple, list):
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return f"a mapping of {describe(args[0])} to {describe(args[1])}"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a mapping")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?`, or what is known where nothing is near."""
    known = list(known)
    # At 0.5 one slip in a name of two letters still finds it. Cut, as the comparison is quadratic.
    close = get_close_matches(name[:64].lower().replace("_", "-"), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


def quote(text: object, limit: int = 60) -> str:
    """Foreign text, fit for one line of a terminal: escaped, and cut."""
    escaped = repr(text if not isinstance(text, str) else text[:limit])
    cut = len(escaped) > limit or (isinstance(text, str) and len(text) > limit)
    return f"{escaped[: limit - 4]}...{escaped[-1]}" if cut else escaped


# Reading ------------------------------------------------------------------------------------------------------


def _mark(name: str, text: str = "") -> yaml.Mark:
    """The place right after a text, where a file begins with it."""
    return yaml.Mark(name, len(text), text.count("\n"), len(text) - text.rfind("\n") - 1, None, 0)


def _fail(mark: yaml.Mark, message: str) -> NoReturn:
    name = mark.name if mark.name.isprintable() else repr(mark.name)[1:-1]
    place = name if name.startswith("--set ") else f"{name}:{mark.line + 1}:{mark.column + 1}"
    raise StrictError(f"{place}: {message}")


def _read(path: str | Path) -> str:
    start = _mark(str(path))
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe or a device might never end
            _fail(start, "a directory, not a file" if stat.S_ISDIR(mode) else "not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        _fail(start, f"cannot be read: {error.strerror}")
    except ValueError as error:
        if isinstance(error, StrictError):
            raise
        _fail(start, f"cannot be read: {error}")  # a path with a NUL
    if len(data) > MAX_BYTES:
        _fail(start, f"larger than {MAX_BYTES // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _fail(_mark(str(path), data[: error.start].decode("utf-8-sig")), f"byte 0x{data[error.start]:02x} is not UTF-8")


class _Loader(yaml.BaseLoader):
    """Composes nodes, and refuses what a recipe has no need of."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.values += 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            _fail(
                event.start_mark, f"anchors and aliases ({quote(sign + event.anchor)}) are refused; write the value out"
            )
        if event.tag is not None:
            _fail(
                event.start_mark,
                f"tags ({quote(event.tag)}) are refused; leave it out, or quote text that begins with !",
            )
        if self.values > MAX_VALUES:
            _fail(event.start_mark, f"more than {MAX_VALUES} keys and values")
        if self.depth == MAX_DEPTH:
            _fail(event.start_mark, f"nested deeper than {MAX_DEPTH}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, name: str) -> yaml.Node:
    """The one document of a text, as nodes that know their places."""
    if len(text) > MAX_BYTES:
        _fail(_mark(name), f"larger than {MAX_BYTES // 1024} KiB")
    if wrong := _FORBIDDEN.search(text):
        _fail(_mark(name, text[: wrong.start()]), f"character U+{ord(wrong[0]):04X} is not allowed")
    loader = _Loader(text)
    loader.name = name
    try:
        if not loader.check_node():
            _fail(_mark(name), "empty: a mapping or a value is due")
        root = loader.get_node()
        assert root is not None
        if loader.check_node():
            _fail(loader.peek_event().start_mark, "a second document; a file holds one")
        return root
    except yaml.MarkedYAMLError as error:
        message = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        # A line that lacks its colon is noticed on the next one.
        early = error.context_mark if error.context == "while scanning a simple key" else None
        _fail(early or error.problem_mark or error.context_mark or _mark(name), message[:200])
    except (ValueError, OverflowError) as error:
        if isinstance(error, StrictError):
            raise
        _fail(loader.get_mark(), "an escape or a number beyond Unicode or YAML")  # PyYAML lets chr() and int() raise


def _assign(root: yaml.Node, assignment: str) -> None:
    """Writes `dotted.key=value` into the nodes."""
    mark = _mark(f"--set {quote(assignment)[1:-1]}")
    dotted, equals, text = assignment.partition("=")
    *parents, last = dotted.split(".")
    if not equals or not all([*parents, last]):
        _fail(mark, "write key=value or key.key=value")
    value = _compose(text, mark.name)
    node = root
    for part in parents:
        node = _child(node, part, yaml.MappingNode("", [], mark, mark), mark, replace=False)
    _child(node, last, value, mark, replace=True)


def _child(node: yaml.Node, key: str, new: yaml.Node, mark: yaml.Mark, replace: bool) -> yaml.Node:
    """The value under a key; `new`, put there, where it is missing or to be replaced."""
    if not isinstance(node, yaml.MappingNode):
        _fail(mark, f"{quote(key)} is set inside what is not a mapping")
    at = next((i for i, (k, _) in enumerate(node.value) if k.value == key), len(node.value))
    if at == len(node.value) or replace:
        node.value[at : at + 1] = [(yaml.ScalarNode("", key, mark, mark), new)]
    return node.value[at][1]


# Building -----------------------------------------------------------------------------------------------------


def _build(root: yaml.Node, kind: type[T], declared: bool = False) -> T:
    _Builder("names").mapping(root, kind, "")
    built = _Builder("declared").mapping(root, kind, "")
    return built if declared else _Builder("load").mapping(root, kind, "")


def _form(node: yaml.Node) -> str:
    """A node as an error tells it."""
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
        case yaml.ScalarNode(value="", style=None):
            return "nothing"
        case _:
            return quote(node.value) if getattr(node, "style", None) is None else f"the text {quote(node.value)}"


def _find(node: yaml.Node, dotted: str) -> yaml.Mark | None:
    """The place of a key, where it is there."""
    first, _, rest = dotted.partition(".")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == first:
            return _find(value, rest) if rest else key.start_mark
    return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULL


@dataclass(frozen=True)
class _Builder:
    """Nodes -> values. `where` is the dotted key of the value at hand."""

    reading: Literal["names", "declared", "load"]  # names: an entry's name is checked, and None stands for it

    def value(self, node: yaml.Node, due: Any, where: str) -> Any:
        kind, markers = _unwrap(due)
        origin, args = get_origin(kind), get_args(kind)
        for marker in markers:
            if isinstance(marker, Entry):
                return self.entry(node, marker, where)
            if isinstance(marker, Entries):
                return self.entries(node, marker, where) if origin is dict else self.entry_names(node, marker, where)
        if origin in (Union, UnionType):
            kinds = [arg for arg in args if arg is not NoneType]
            assert len(args) == len(kinds) + 1 == 2, f"{kind}: only X | None is read"
            value = None if _is_null(node) else self.value(node, kinds[0], where)
        elif isinstance(kind, type) and is_dataclass(kind):
            value = self.mapping(node, kind, where)
        elif origin in (tuple, list):
            value = self.sequence(node, kind, where)
        elif origin is dict:
            pairs = self.pairs(node, where)
            value = {self.key(k, args[0], where): self.value(v, args[1], f"{where}.{k.value}") for k, v in pairs}
        else:
            value = self.scalar(node, kind, where, due)
        if Place() in markers and isinstance(value, str):
            name = node.start_mark.name  # a folder of --set is as one typed it: relative to the current one
            value = Placed(value, "." if name.startswith("--set ") else str(Path(name).absolute().parent))
        for marker in markers:
            if isinstance(marker, Range) and value is not None and not marker.lo <= value <= marker.hi:
                _fail(node.start_mark, f"{quote(where)} must be {describe(due)}, not {_form(node)}")
        return value

    def key(self, node: yaml.ScalarNode, kind: Any, where: str) -> Any:
        """A key of a dict; JSON quotes every key, so a number may be."""
        bare = yaml.ScalarNode("", node.value, node.start_mark, node.end_mark)
        return self.scalar(node if kind is str else bare, kind, where, kind)

    def scalar(self, node: yaml.Node, kind: Any, where: str, due: Any) -> Any:
        """`due` is what an error asks for: the kind with its range."""
        if isinstance(node, yaml.ScalarNode):
            text, plain = node.value, node.style is None
            if kind is str and not (plain and text in ("", *_NULL)):
                if wrong := _NOT_ONE_LINE.search(text):
                    remedy = "; a block of lines is folded into one by >-" if wrong[0] == "\n" else ""
                    _fail(node.start_mark, f"{quote(where)} holds the character U+{ord(wrong[0]):04X}{remedy}")
                return text
            if get_origin(kind) is Literal:
                for choice in get_args(kind):
                    if str(choice) == text and (plain or isinstance(choice, str)):
                        return choice
            if kind is bool and plain and text in ("true", "false"):
                return text == "true"
            if kind in (int, float) and plain and _LEADING_ZERO.fullmatch(text):
                _fail(node.start_mark, f"{quote(where)} is {quote(text)}: octal or decimal? write no leading zero")
            if kind is int and plain and _INT.fullmatch(text):
                return int(text)
            if kind is float and plain and _FLOAT.fullmatch(text) and isfinite(float(text)):
                return float(text)
            if kind is float and plain and (_FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text)):
                _fail(node.start_mark, f"{quote(where)} must be finite, not {quote(text)}")
        hint = "; quote it" if kind is str and _is_null(node) else ""
        if get_origin(kind) is Literal and isinstance(node, yaml.ScalarNode) and node.value:
            near = nearest(node.value, [str(choice) for choice in get_args(kind)])
            hint = near if "did you mean" in near and near.find(repr(node.value)) < 0 else ""
        _fail(node.start_mark, f"{quote(where)} must be {describe(due)}, not {_form(node)}{hint}")

    def sequence(self, node: yaml.Node, kind: Any, where: str) -> Any:
        args = get_args(kind)
        if not isinstance(node, yaml.SequenceNode):
            _fail(node.start_mark, f"{quote(where)} must be {describe(kind)}, not {_form(node)}")
        if get_origin(kind) is list or args[-1] is Ellipsis:
            args = (args[0],) * len(node.value)
        if len(node.value) != len(args):
            _fail(node.start_mark, f"{quote(where)} must be {describe(kind)}, not of {len(node.value)}")
        items = [self.value(v, arg, f"{where}[{i}]") for i, (v, arg) in enumerate(zip(node.value, args, strict=True))]
        return items if get_origin(kind) is list else tuple(items)

    def pairs(self, node: yaml.Node, where: str, hint: str = "") -> Sequence[tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys and values of a mapping, where the keys are text, each there once."""
        if not isinstance(node, yaml.MappingNode):
            what = quote(where) if where else "the file"
            _fail(node.start_mark, f"{what} must be a mapping, not {_form(node)}{hint}")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                _fail(key.start_mark, f"a key must be text, not {_form(key)}")
            if key.value == "<<":
                _fail(key.start_mark, "merge keys ('<<') are refused; write the keys out")
            if key.value in lines:
                _fail(key.start_mark, f"repeated key {quote(key.value)}, first on line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
        return node.value

    def mapping(
        self, node: yaml.Node, kind: type[T], where: str, hint: str = "", preset: Mapping[str, Any] | None = None
    ) -> T:
        known = keys(kind)
        values: dict[str, Any] = dict(preset or {})
        for key, value in self.pairs(node, where, hint):
            if key.value not in known:
                _fail(key.start_mark, f"unknown key {quote(key.value)}{nearest(key.value, known)}")
            field, due = known[key.value]
            values[field.name] = self.value(value, due, f"{where}.{key.value}" if where else key.value)
        for name, (field, _) in known.items():
            if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
                _fail(node.start_mark, f"missing key {name!r}{f' in {quote(where)}' if where else ''}")
        try:
            instance = kind(**values)
            if self.reading == "declared" and hasattr(instance, "check_entries"):
                instance.check_entries()
        except ValueError as error:
            message = " ".join(str(error).split())
            keyed = error.keys if isinstance(error, KeyedError) else ()
            places = [place for place in (_find(node, key) for key in keyed) if place]
            _fail(places[0] if places else node.start_mark, message if message.isprintable() else repr(message))
        return instance

    def entry(self, node: yaml.Node, marker: Entry, where: str) -> object:
        pairs = self.pairs(node, where)
        if len(pairs) != 1:
            _fail(node.start_mark, f"{quote(where)} must be one `name: {{parameters}}`, not {len(pairs)}")
        return next(iter(self.entries(node, Entries(marker.axis, marker.catalog), where).values()))

    def entries(self, node: yaml.Node, marker: Entries, where: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, parameters in self.pairs(node, where):
            name = self.entry_of(key, marker, where)
            inside, hint = f"{where}.{name}", "; write {} where it has no parameters"
            if self.reading != "names":
                kind = getattr(marker.catalog, self.reading)(marker.axis, name)
                preset = marker.catalog.preset(marker.axis, name)
                found[name] = self.mapping(parameters, kind, inside, hint, preset)
            else:
                found[name] = None
                self.pairs(parameters, inside, hint)
        return found

    def entry_names(self, node: yaml.Node, marker: Entries, where: str) -> tuple[str, ...]:
        found: list[str] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else self.sequence(node, tuple[str, ...], where):
            name = self.entry_of(item, marker, where)
            if name in found:
                _fail(item.start_mark, f"{quote(where)} repeats {quote(name)}")
            found.append(name)
        return tuple(found)

    def entry_of(self, node: yaml.Node, marker: Entries, where: str) -> str:
        """A scalar that names an entry."""
        name = self.scalar(node, str, where, str)
        known = marker.catalog.names(marker.axis)
        if name not in known:
            _fail(node.start_mark, f"{marker.axis} has no {quote(name)}{nearest(name, known)}")
        return name


# Writing ------------------------------------------------------------------------------------------------------


def _plain(value: Any, due: Any) -> Any:
    kind, markers = _unwrap(due)
    origin, args = get_origin(kind), get_args(kind)
    for marker in markers:
        if isinstance(marker, Entry):
            return {marker.catalog.entry_name(marker.axis, value): dump(value)}
        if isinstance(marker, Entries) and origin is dict:
            return {name: dump(value[name]) for name in sorted(value)}
    if value is None:
        return None
    if origin in (Union, UnionType):
        return _plain(value, next(arg for arg in args if arg is not NoneType))
    if is_dataclass(kind):
        return dump(value)
    if origin in (tuple, list):
        ends = args[:1] * len(value) if origin is list or args[-1] is Ellipsis else args
        return [_plain(v, arg) for v, arg in zip(value, ends, strict=True)]
    if origin is dict:
        return {str(k): _plain(value[k], args[1]) for k in sorted(value)}
    return float(value) if kind is float else value  # 1 and 1.0 are one number, and one digest
