"""Tables of numbers that grow row by row, and survive whatever ends the process."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from apm.runtime.files import atomic_path

Row = Mapping[str, float]


class RowLog:
    """A CSV table that only grows: a row is on the disk before other work begins.

    A process that goes on finds the rows of a killed one, without a half-written last one. The
    first column holds whole numbers, no two alike. Rows for which it is greater than ``until`` are
    dropped: they came after the state that the process goes on from. A file that is no such table
    is refused with a ``ValueError``.
    """

    def __init__(self, path: Path, columns: Sequence[str], until: float = float("inf")) -> None:
        self.path, self.columns = path, list(columns)
        self.rows = [row for row in self._read() if row[self.columns[0]] <= until]
        write_table(path, self.columns, self.rows)

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        header, *lines = self.path.read_bytes().decode(errors="replace").split("\n")
        if header.split(",") != self.columns:
            raise ValueError(f"{self.path}: not a table of this run; choose another --output")
        rows: dict[float, Row] = {}
        for number, line in enumerate(lines[:-1], start=2):  # the last one has no end: cut off
            try:
                row = dict(zip(self.columns, map(float, line.split(",")), strict=True))
                index = row[self.columns[0]]
                if not index.is_integer() or index in rows:
                    raise ValueError(f"{index:g} is no whole number, or there already")
                rows[index] = row
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: damaged ({error})") from error
        return list(rows.values())

    @property
    def done(self) -> set[int]:
        """The first numbers of all rows."""
        return {int(row[self.columns[0]]) for row in self.rows}

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows and see them onto the disk."""
        added = list(rows)
        with self.path.open("a") as file:
            file.writelines(_line(self.columns, row) for row in added)
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(added)


def _line(columns: Sequence[str], row: Row) -> str:
    return ",".join(f"{row[column]:.9g}" for column in columns) + "\n"


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows of numbers as CSV, atomically."""
    lines = [",".join(columns) + "\n", *(_line(columns, row) for row in rows)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines))
