"""The map: which quantizers are its cells, what its tables and its picture say."""

import pytest
from synthetic_records import Record, synthetic
from tiny import ROOT, quantizer

from quantbench import catalog, figures, grid, tables
from quantbench.board import Board
from quantbench.board import board as board_of
from quantbench.grid import Cell
from quantbench.recipe import load_track
from quantbench.strict import dump

STATIC, RESIDUAL = "w8a8-static", "w8a8-token"  # the synthetic records' two, which stand for two cells here


def fields(name: str, **changes: object) -> dict[str, object]:
    return dump(quantizer(name, **changes))


def run(recipe: str, seed: int, kl: float) -> Record:
    record = synthetic(recipe, seed, kl=kl, damage=kl / 2)
    cells = {STATIC: fields("w8a8-static"), RESIDUAL: fields("w8a8-static-residual"), "other": fields("w8a16-rtn")}
    record["track"]["resolved"]["quantizers"] = cells
    return record


@pytest.fixture(scope="module")
def board() -> Board:
    """relu's KL is half the baseline's, up to one part in a hundred; gate's is all over the place."""
    spread = (1.0, 1.01, 0.99, 1.005, 0.995)
    records = [run("baseline", seed, 0.1 * x) for seed, x in enumerate(spread)]
    records += [run("relu-attn", seed, 0.05 * x) for seed, x in enumerate(reversed(spread))]
    records += [run("gated", seed, 0.1 / x) for seed, x in enumerate(spread)]
    return board_of(records)


def test_the_catalog_fills_the_map() -> None:
    found = grid.cells({name: fields(name) for name in catalog.names("quantizers") if name.startswith("w")})
    assert list(found) == [
        Cell(bits, scope, residual)
        for bits in (8, 6, 4)
        for scope in ("static", "tensor", "token")
        for residual in (False, True)
    ]
    assert found[Cell(6, "token", True)] == "w6a6-token-residual"
    assert all(name == f"w{cell.bits}a{cell.bits}-{str(cell).replace(', ', '-')}" for cell, name in found.items())


def test_the_track_text_has_every_cell() -> None:
    assert len(grid.cells(dump(load_track("text", ROOT)[1])["quantizers"])) == 18


@pytest.mark.parametrize(
    "changes", [{"weights": 4}, {"symmetric": False}, {"rule": "mse"}, {"sites": ("inputs", "keys")}, {"sites": ()}]
)
def test_what_differs_in_anything_else_is_no_cell(changes: dict[str, object]) -> None:
    assert grid.cells({"one": fields("w8a8-static", **changes)}) == {}


def test_cells_say_damage_and_the_ratio_and_mark_what_separates(board: Board) -> None:
    found = tables.map_tables(board)
    assert list(found) == [8]
    header, rows = found[8]
    assert header == ["recipe", "static", "static, residual"]
    assert {name: cells for name, *cells in rows} == {
        "relu-attn": ["0.0250 (× 0.500 †)", "0.00250 (× 0.500 †)"],
        "baseline": ["0.0500", "0.00500"],
        "gated": ["0.0500 (× 1.00)", "0.00500 (× 1.00)"],
    }
    assert tables.separating(board).endswith("W8A8 static: relu-attn; W8A8 static, residual: relu-attn.")


def test_the_picture_is_drawn_once_for_all(board: Board) -> None:
    columns, rows = tables.heat(board)
    assert columns == ["W8A8 static", "W8A8 static, residual"]
    assert [name for name, _ in rows] == [row.name for row in board.rows]
    drawn = figures.heat(columns, rows)
    assert drawn is not None
    assert drawn == figures.heat(columns, rows)
    assert b"0.500" in drawn
    assert figures.heat([], []) is None
    assert figures.heat(columns, [("baseline", [(-0.1, "", False)] * 2)]) is None


def test_a_track_without_a_map_has_no_section() -> None:
    assert tables.map_tables(board_of([synthetic("baseline", seed) for seed in range(3)])) == {}
