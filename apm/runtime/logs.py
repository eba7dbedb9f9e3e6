"""A row of numbers a step: as CSV, and for TensorBoard where that is asked for."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apm.runtime.files import atomic_path


class StepLog:
    """Writes ``steps.csv``, and on request ``tensorboard/``, into a folder.

    A run that goes on from an earlier step first drops the rows that came after it.

    Args:
        folder: of the run.
        step: the step that the run goes on from.
        tensorboard: whether TensorBoard gets the rows too.

    Raises:
        ValueError: if TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "steps.csv"
        rows = self.path.read_text().splitlines() if step and self.path.is_file() else []
        with atomic_path(self.path) as temporary:
            kept = [row for row in rows[1:] if _step_of(row) <= step]
            temporary.write_text("".join(f"{row}\n" for row in [*rows[:1], *kept]))
        self.has_header = bool(rows)
        self.board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers of one step; the names must be those of the first."""
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self.has_header:
                writer.writerow(["step", *numbers])
                self.has_header = True
            writer.writerow([step, *(f"{number:.7g}" for number in numbers.values())])
        if self.board:
            for name, number in numbers.items():
                self.board.add_scalar(name, number, step)

    def close(self) -> None:
        """Finish the files."""
        if self.board:
            self.board.close()


def _step_of(row: str) -> float:
    """The step of a line; of a line that was cut off, infinity."""
    step, comma, _ = row.partition(",")
    return int(step) if comma and step.isdigit() else float("inf")


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
