"""Rows of a table as plain dictionaries: printed on stdout, kept in results.json."""

from collections.abc import Sequence
from typing import Any


def compare(name: str, ours: float, paper: float | None = None, **more: Any) -> dict[str, Any]:
    """A row: the paper's number if it has one, ours, ours less the paper's, further columns."""
    difference = None if paper is None else ours - paper
    return {"name": name, "paper": paper, "ours": ours, "difference": difference} | more


def print_table(title: str, rows: Sequence[dict[str, Any]], digits: int = 2) -> None:
    """Names to the left, numbers to the right, ``-`` where there is none; units in the title."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.{digits}f}"
        return "-" if value is None else str(value)

    columns = ["" if column == "name" else column for column in rows[0]]
    cells = [columns, *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for name, *numbers in cells:
        aligned = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        print("  ".join([f"{name:{widths[0]}}", *aligned]))


def print_notes(notes: Sequence[str]) -> None:
    """The explanations under the tables."""
    print("\n" + "\n".join(f"* {note}" for note in notes))
