"""Tables that grow by a row a step or an image, and survive whatever ends the process."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apm.runtime.files import atomic_path


class RowLog:
    """A CSV table of numbers that only grows: a row is on the disk before other work begins.

    A process that goes on finds the rows of a killed one; a half-written last row is dropped.

    Args:
        path: the CSV file.
        columns: their names. The first is a whole number, different in each row.
        until: rows whose first number is greater are dropped: they came after the state that the
            process goes on from. Default: none.

    Attributes:
        rows: what is in the table.

    Raises:
        ValueError: if the file is no such table.
    """

    def __init__(self, path: Path, columns: Sequence[str], until: float = float("inf")) -> None:
        self.path, self.columns = path, list(columns)
        self.rows = [row for row in self._read() if row[self.columns[0]] <= until]
        with atomic_path(path) as temporary:
            temporary.write_text(
                ",".join(self.columns) + "\n" + "".join(map(self._line, self.rows))
            )

    def _read(self) -> list[dict[str, float]]:
        if not self.path.exists():
            return []
        header, *lines = self.path.read_bytes().decode(errors="replace").split("\n")
        if header.split(",") != self.columns:
            raise ValueError(f"{self.path}: not a table of this run; choose another --output")
        rows: dict[float, dict[str, float]] = {}
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

    def _line(self, row: Mapping[str, float]) -> str:
        return ",".join(f"{row[column]:.9g}" for column in self.columns) + "\n"

    @property
    def done(self) -> set[int]:
        """The first numbers of all rows."""
        return {int(row[self.columns[0]]) for row in self.rows}

    def append(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Add rows and see them onto the disk."""
        added = [dict(row) for row in rows]
        with self.path.open("a", newline="") as file:
            file.writelines(map(self._line, added))
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(added)


def write_table(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write rows with like columns as CSV, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def summary_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer for a run that goes on after ``step``.

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
