"""The verbs about models that are there already: get them and their text, measure them, look into their heads.

As in `cli`: nothing heavy is imported before it is needed.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbench.face import print_json, print_table, progress, root, whole_number

if TYPE_CHECKING:
    from quantbench.pretrained import Given

Verb = Callable[[str, Any], argparse.ArgumentParser]

TEXT = "wikipedia"  # on which a model is measured where nobody says otherwise
LENGTH = 512  # tokens of a window
DTYPES = ("float32", "bfloat16", "float16")


def models(arguments: argparse.Namespace) -> int:
    """List the models that have a short name, or get them: `quantbench models get smollm2`."""
    from quantbench import pretrained

    if arguments.get:
        for name in _known(arguments.get, pretrained.SHORT, "model"):
            print(f"{name}: {pretrained.get(name, _cache(), progress(), arguments.accept_licence)}")
        return 0
    for name, state in pretrained.status(_cache()).items():
        print(f"{name:<12}{state}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """List the sets of text and tasks, or get them: `quantbench data get` (all), `quantbench data get lambada`."""
    from quantbench import corpora

    if arguments.get is not None:
        corpora.get(_known(arguments.get, corpora.NAMES, "set") or list(corpora.NAMES), _cache(), progress())
    for name, state in corpora.status(_cache()).items():
        print(f"{name:<12}{state}")
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Show where a model has its extreme tokens: peaks, sinks and drains per layer, with BOS and without."""
    from quantbench.portrait import portrait

    _check_outputs("measure", arguments)
    given = _open(arguments)
    documents, read = _documents(arguments.text or [TEXT])
    body = portrait(given, documents, arguments.length, arguments.windows, progress())
    return _finish("measure", arguments, given, read, body)


def heads(arguments: argparse.Namespace) -> int:
    """Find heads that are dormant in one domain of text and active in another."""
    from quantbench.dormant import survey

    _check_outputs("heads", arguments)
    given = _open(arguments)
    named = [*dict.fromkeys(arguments.domains)]
    if len(named) < 2:
        raise ValueError("--domains: name two different ones or more, such as `--domains wikipedia code`")
    short = {_label(name) for name in named}
    found = {_label(name) if len(short) == len(named) else name: _documents([name]) for name in named}
    body = survey(given, {name: texts for name, (texts, _) in found.items()}, arguments.length, arguments.texts,
                  arguments.top, progress())  # fmt: skip
    read = {name: about["digest"] for name, (_, about) in found.items()}
    return _finish("heads", arguments, given, {"sets": ", ".join(found), "digest": read}, body)


def ablate(arguments: argparse.Namespace) -> int:
    """Zero the MLP or the attention of a layer, and see what becomes of peak, sink and drain."""
    from quantbench.ablation import ablate as zero

    _check_outputs("ablate", arguments)
    given = _open(arguments)
    documents, read = _documents(arguments.text or [TEXT])
    body = zero(given, documents, arguments.length, arguments.windows, arguments.layers, progress())
    return _finish("ablate", arguments, given, read, body)


def dynamics(arguments: argparse.Namespace) -> int:
    """Follow the three signatures over the published training checkpoints of a model, or over folders."""
    from quantbench.dynamics import follow
    from quantbench.pretrained import libraries, name_of

    _check_outputs("dynamics", arguments)
    base = Path(os.path.expanduser(arguments.model))
    below = all((base / revision).is_dir() for revision in arguments.revisions)  # checkpoints side by side in a folder

    def opened(revision: str) -> "Given":
        if below:
            return _opened(str(base / revision), None, arguments.dtype)
        return _opened(arguments.model, revision, arguments.dtype)

    documents, read = _documents(arguments.text or [TEXT])
    body = follow(opened, arguments.revisions, documents, arguments.length, arguments.windows, progress())
    body, run = _split(body)
    about = {"name": name_of(arguments.model), "revisions": len(arguments.revisions), "dtype": arguments.dtype,
             "libraries": libraries()}  # fmt: skip
    return _show("dynamics", arguments, about, read, body, run)


# --- what they share -------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return root() / ".quantbench"


def _known(names: list[str], known: Any, what: str) -> list[str]:
    from quantbench.strict import nearest, quote

    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {quote(name)}{nearest(name, known)}")
    return names


def _check_outputs(verb: str, arguments: argparse.Namespace) -> None:
    """ValueError where what is asked for could not be written: before the work, not after it."""
    from quantbench import gallery
    from quantbench.pretrained import name_of

    folders = []
    if arguments.figures:
        arguments.figures = os.path.expanduser(arguments.figures)
        folders.append(Path(arguments.figures))
    if arguments.record:
        folders.append(gallery.folder(root() / "results", name_of(arguments.model)))
        if (record := folders[-1] / f"{verb}.json").is_dir():
            raise ValueError(f"{record}: a folder, where the record is to be: remove it")
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ValueError(f"{there}: no folder, and {verb} is to write into it: remove it, or name another place")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{there}: {verb} may not write there: name another place, or leave --record out")


def _open(arguments: argparse.Namespace) -> "Given":
    progress()("open", 0, 1, arguments.model)
    return _opened(arguments.model, arguments.revision, arguments.dtype)


def _opened(name: str, revision: str | None, dtype: str) -> "Given":
    import quantbench.model  # noqa: F401 - a folder may be a checkpoint of ours
    from quantbench.pretrained import open_model

    return open_model(name, _cache(), revision, dtype)


def _documents(names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The documents of sets of `quantbench data` and of text files, one each, and what a record says of them."""
    from quantbench import corpora
    from quantbench.store import digest

    documents: list[str] = []
    for name in names:
        if name in ("wikipedia", "code"):
            documents += corpora.documents(name, _cache())
            continue
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            raise ValueError(f"{name}: no such text file, and no set of text (wikipedia, code)")
        try:
            documents.append(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: byte {error.start} is not UTF-8: convert the file") from None
    return documents, {"sets": ", ".join(map(_label, names)), "documents": len(documents), "digest": digest(documents)}


def _label(name: str) -> str:
    return Path(name).name


def _split(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a verb found, and the facts of its run."""
    run = body.pop("run", {})
    return body, run


def _finish(
    verb: str, arguments: argparse.Namespace, given: "Given", read: dict[str, Any], body: dict[str, Any]
) -> int:
    body, run = _split(body)
    return _show(verb, arguments, given.about, read, body, run)


def _show(
    verb: str,
    arguments: argparse.Namespace,
    model: Any,
    read: dict[str, Any],
    body: dict[str, Any],
    run: dict[str, Any],
) -> int:
    """Prints a record as tables, or as one JSON object; writes its pictures and the record where that is asked for."""
    from datetime import UTC, datetime

    from quantbench import gallery
    from quantbench.bench import environment, installed, source
    from quantbench.store import atomic_write

    here = environment() | installed("transformers", "tokenizers")  # whose code the model runs through
    record = gallery.compose(verb, model, read, here, body)
    if arguments.figures:
        for name, picture in gallery.pictures(record).items():
            atomic_write(Path(arguments.figures) / name, picture)
    if arguments.record:
        run |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), **source()}
        path = gallery.write(root() / "results", record, run)
        print(f"recorded in {path}; `quantbench leaderboard` renders its page", file=sys.stderr)
    if arguments.json:
        print_json(record)
        return 0
    for title, table in gallery.tables(record):
        print_table(table, title)
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def add(verb: Verb) -> None:
    """Their parsers."""
    for name, function in (("models", models), ("data", data)):
        gets = verb(name, function)
        gets.add_argument("action", nargs="?", choices=["get"], help="get those named (data: all, where none is)")
        gets.add_argument("names", nargs="*", metavar="NAME")
        if name == "models":
            gets.add_argument("--accept-licence", action="store_true", help="of a model that has one of its own")
        gets.set_defaults(verb=_got(function))

    measures = _about_a_model(verb("measure", measure))
    measures.add_argument("--windows", type=whole_number(1), default=32, metavar="N", help="of text (default: 32)")
    finds = _about_a_model(verb("heads", heads), text=False, length=256)
    finds.add_argument("--domains", nargs="+", default=["wikipedia", "code"], metavar="SET",
                       help="sets of text, or text files (default: wikipedia code)")  # fmt: skip
    finds.add_argument(
        "--texts", type=whole_number(1), default=8, metavar="N", help="windows of each domain (default: 8)"
    )
    finds.add_argument(
        "--top", type=whole_number(1), default=16, metavar="N", help="heads that are intervened on (default: 16)"
    )
    zeroes = _about_a_model(verb("ablate", ablate))
    zeroes.add_argument("--windows", type=whole_number(1), default=8, metavar="N", help="of text (default: 8)")
    zeroes.add_argument("--layers", type=whole_number(0), nargs="+", metavar="L", help="from 0 (default: all)")
    follows = _about_a_model(verb("dynamics", dynamics), revision=False)
    follows.add_argument("--revisions", nargs="+", required=True, metavar="R", help="of the model, or folders in it")
    follows.add_argument("--windows", type=whole_number(1), default=8, metavar="N", help="of text (default: 8)")


def _got(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def verb(arguments: argparse.Namespace) -> int:
        arguments.get = arguments.names if arguments.action == "get" else None
        if function is models and arguments.action == "get" and not arguments.names:
            raise ValueError("models get: name one, such as `quantbench models get smollm2`")
        return function(arguments)

    return verb


def _about_a_model(
    parser: argparse.ArgumentParser, revision: bool = True, text: bool = True, length: int = LENGTH
) -> argparse.ArgumentParser:
    parser.add_argument("model", metavar="MODEL", help="a short name (`quantbench models`), a folder, a .gguf file, or "
                        "a name of the hub")  # fmt: skip
    if revision:
        parser.add_argument("--revision", metavar="R", help="of a name of the hub")
    if text:
        parser.add_argument("--text", nargs="+", metavar="PATH", help="text files, or sets of `quantbench data` "
                            f"(default: {TEXT})")  # fmt: skip
    parser.add_argument(
        "--length", type=whole_number(4), default=length, metavar="N", help=f"tokens a window ({length})"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"the model computes in ({DTYPES[0]})")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")
    parser.add_argument("--figures", metavar="DIR", help="put the pictures there (SVG)")
    parser.add_argument("--record", action="store_true", help="keep it in results/models/")
    return parser
