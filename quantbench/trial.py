"""A foreign tokenizer.json, tried in a process of its own with little memory and time, before ours reads it.

The library that reads it ends the whole process where memory runs out, cannot be interrupted, and takes from the file
how far a text grows: a few replacements make gigabytes of a line. `try_tokenizer` runs this very file as a program,
which imports that library and nothing of ours, and prints one word where all went well, else a reason.
"""

import json
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space: the largest published ones take less than one
SECONDS = 20  # of one core: the largest ones take two
PATIENCE = 120  # seconds of waiting, on a machine that does something else, too
GROWTH = 10_000  # times, of a text by the replacements of a normalizer, in the worst case
IDS = 64  # for a byte
FINE = "fine"

LETTERS = "".join(map(chr, range(32, 127)))
TEXTS = (
    "The cat sat on the mat.\n\n\tIt was 12:30, and (so they say) it rained; l'été, Straße, 北京, мир, नमस्ते, 🙂!",
    LETTERS,
    " ".join(LETTERS),
    *(letter * 64 + "!" for letter in "aA0 .\n_-"),
    " ".join(["word"] * 200),
)


def try_tokenizer(path: Path) -> None:
    """ValueError, one line, where a tokenizer.json is broken, or would take this process with it."""
    about = path.stat()
    if (told := _tried(path.resolve(), about.st_size, about.st_mtime_ns, about.st_ctime_ns)) != FINE:
        raise ValueError(f"{path}: {told}")


@cache
def _tried(path: Path, *_: int) -> str:
    """What the program says of a state of the file."""
    environment = {"PATH": os.defpath, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    command = [sys.executable, "-I", __file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"a tokenizer that does not read a page within {PATIENCE} s"
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode == 0 and len(lines) == 1:
        return "".join(c if c.isprintable() else "?" for c in lines[0])[:300]
    return "a tokenizer that takes more memory or time than any needs, or breaks the library that reads it"


def _main(path: str) -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (ValueError, RecursionError):
        return "no JSON object"
    if fault := _fault(told):
        return fault
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) > IDS * (1 + len(text.encode())):
                return f"a tokenizer that makes {len(ids):,} tokens of {len(text.encode()):,} bytes"
            tokenizer.decode(ids)
    except Exception as error:  # noqa: BLE001 - the library raises plain ones
        return f"a broken tokenizer: {' '.join(str(error).split())}"
    return FINE


def _fault(told: Any) -> str | None:
    """What is wrong with a tokenizer, by what it says."""
    if not isinstance(told, dict):
        return "no JSON object"
    model = told.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        return f"a tokenizer that reads a text another way every time (dropout {model['dropout']!r}): set it to null"
    if (growth := _growth(told.get("normalizer")) * _growth(told.get("pre_tokenizer"))) > GROWTH:
        return f"a tokenizer that may make a text {growth:.3g} times as long"
    return None


def _growth(part: Any) -> float:
    """How many times as long a text may become, at most, by the replacements of a part."""
    if isinstance(part, list):
        found = 1.0
        for member in part:
            found = min(found * _growth(member), 1e18)
        return found
    if not isinstance(part, dict):
        return 1.0
    own = 1.0
    text = part.get("content", part.get("prepend", ""))
    if isinstance(text, str):
        pattern = part.get("pattern")
        whole = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(whole, str) and whole:
            own = max(1.0, len(text.encode()) / len(whole.encode()))
        elif text:  # of a regular expression, which may match nothing at all, everywhere
            own = 1.0 + len(text.encode())
    return min(own * _growth([value for value in part.values() if isinstance(value, dict | list)]), 1e18)


if __name__ == "__main__":
    print(_main(sys.argv[1]))
