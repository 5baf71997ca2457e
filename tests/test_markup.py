"""Text that others chose, where it is shown: in Markdown, in CSV, on a terminal."""

from typing import Any

import pytest

from quantbench.face import print_table
from quantbench.gallery import compose
from quantbench.markup import escape, harmless, markdown, spelled, visible

UNSEEN = {
    "\x1b[2Jgone": "\\x1b[2Jgone",  # a terminal would clear its screen
    "\x00\x07": "\\x00\\x07",
    "\x9b31m": "\\x9b31m",  # the same in one byte
    "abc\u202edcba": "abc\\u202edcba",  # shows abcd backwards
    "\u2066\u2069\u200f\u061c": "\\u2066\\u2069\\u200f\\u061c",
    "a\u200bb\ufeff": "a\\u200bb\\ufeff",
    "\U000e0041": "\\U000e0041",
    "\ud800": "\\ud800",
    "a\nb": "a\\nb",
}


@pytest.mark.parametrize(("text", "shown"), UNSEEN.items(), ids=ascii)
def test_what_is_not_to_be_seen_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    for rendered in (escape(text), harmless(text), markdown((["a"], [[text]]))):
        assert all(character.isprintable() or character == "\n" for character in rendered)


def test_what_is_to_be_seen_stays() -> None:
    for text in ("plain", "Ångström ≤ 日本語 “ρ”", "no\u00a0break, thin\u2009space"):
        assert visible(text) == text


def test_a_table_on_the_terminal_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    print_table((["\x1b[1mname"], [["\x1b]0;title\x07"], ["\u202eevil"]]), "about \x1b[2J")
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\u202e"}
    assert "\\u202eevil" in out


def test_what_was_measured_is_not_lost_for_a_name() -> None:
    """Of a folder or a token: it is in the record as it can be seen."""
    body: dict[str, Any] = {"sinks": [{"text": "\x1b[2J", "attention": 0.5}], "notes": ["\u202e"]}
    record = compose("measure", {"name": "a\u202eb"}, {"sets": "x"}, {}, body)
    assert record["model"]["name"] == "a\\u202eb"
    assert record["sinks"] == [{"text": "\\x1b[2J", "attention": 0.5}]
    assert record["notes"] == ["\\u202e"]
    assert spelled({"a\x00": [1, None, True, 0.5]}) == {"a\\x00": [1, None, True, 0.5]}
