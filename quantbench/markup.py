"""Tables and text as Markdown and CSV have them, so that nothing a record says is taken for markup or a formula."""

import re
import unicodedata
from typing import Any

Table = tuple[list[str], list[list[str]]]  # a header, and rows of as many cells


def visible(text: str) -> str:
    """Text with what is not seen, or changes the order in which the rest is seen, spelled out: \\x1b, \\u202e."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # spaces of any width are harmless
        return character
    return character.encode("unicode_escape").decode()


def spelled(value: Any) -> Any:
    """JSON, every text in it `visible`."""
    if isinstance(value, dict):
        return {visible(key): spelled(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(member) for member in value]
    return visible(value) if isinstance(value, str) else value


def escape(text: str) -> str:
    """Text as Markdown shows it: no cell, tag, link or emphasis can be opened by a title or a reason."""
    one_line = visible(" ".join(text.split()))
    html = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", html).replace("://", ":&#47;&#47;")


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula (OWASP: CSV injection)."""
    one_line = visible(" ".join(text.split()))
    return "'" + one_line if one_line.startswith(("=", "+", "-", "@")) else one_line


def markdown(shown: Table) -> str:
    """A table, its cells escaped; columns of numbers stand at the right."""
    header, rows = shown
    numeric = [
        all(not row[i] or row[i][0] in "0123456789−–<×" or row[i] == "undefined" for row in rows)
        and header[i] not in ("recipe", "notes")
        for i in range(len(header))
    ]
    lines = [header, ["--:" if right else "---" for right in numeric]]
    body = [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *body])
