"""Test-time training over a data set: a row an image, kept safely; a table at the end."""

import csv
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apm.data.cache import cached
from apm.data.test_sets import LabelledImages
from apm.runtime.cli import is_out_of_memory
from apm.runtime.files import atomic_path, read_json
from apm.teachers import TokenTeacher
from apm.tta import Adaptation, TestTimeTrainer

logger = logging.getLogger(__name__)

PART = 32  # images that a teacher embeds at once


class RowLog:
    """A CSV file that only grows: a row is on the disk before the next image is begun.

    A run that was killed finds its rows again; a half-written last row is dropped.

    Args:
        path: the CSV file; beside it a ``.json`` says which run its rows belong to.
        columns: names of the columns; the first is the image's index.
        run: what the rows depend on, as plain values.

    Raises:
        ValueError: if the file holds the rows of another run, or is no such file.
    """

    def __init__(self, path: Path, columns: Sequence[str], run: Mapping[str, Any]) -> None:
        self.path, self.columns = path, list(columns)
        self.rows: list[dict[str, float]] = []
        record = path.with_suffix(".json")
        text = json.dumps(run, indent=2, sort_keys=True) + "\n"
        if path.exists():
            present = read_json(record) if record.is_file() else {}
            wanted = json.loads(text)
            keys = sorted(present.keys() | wanted.keys())
            if differing := [key for key in keys if present.get(key) != wanted.get(key)]:
                raise ValueError(
                    f"{path}: rows of another run, whose {', '.join(differing)} differed; choose "
                    "another --output"
                )
            self._recover()
        else:
            with atomic_path(record) as temporary:
                temporary.write_text(text)
            with atomic_path(path) as temporary:
                temporary.write_text(",".join(self.columns) + "\n")

    def _recover(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if not lines or lines[0].split(",") != self.columns:
            raise ValueError(f"{self.path}: not a table of this run; choose another --output")
        indices: set[int] = set()
        for number, line in enumerate(lines[1:], start=2):
            try:
                values = [float(value) for value in line.split(",")]
                self.rows.append(dict(zip(self.columns, values, strict=True)))
                if not values[0].is_integer() or values[0] in indices:
                    raise ValueError(f"index {values[0]:g} is no whole number, or there already")
                indices.add(int(values[0]))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: damaged ({error})") from error
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    @property
    def done(self) -> set[int]:
        """Indices of the images that have their rows."""
        return {int(row[self.columns[0]]) for row in self.rows}

    def append(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Add rows and see them onto the disk."""
        added = [dict(row) for row in rows]
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(added)
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(added)


def row_columns(report_at: Sequence[int]) -> list[str]:
    """The columns of a data set run."""
    columns = ["index", "label", "teacher"]
    columns += [f"student_{step}" for step in report_at]
    return [*columns, *(f"loss_{step}" for step in report_at), "seconds"]


class TeacherEmbeddings:
    """A teacher's embeddings of a data set's images, computed part by part and kept in a cache.

    Args:
        teacher: on its device.
        data: the images.
        indices: those that will be asked for.
        folder: of the cache.
        key: what the embeddings depend on besides the indices, as plain values.
    """

    def __init__(
        self,
        teacher: TokenTeacher,
        data: LabelledImages,
        indices: Sequence[int],
        folder: Path,
        key: Mapping[str, Any],
    ) -> None:
        self.teacher, self.data, self.folder, self.key = teacher, data, folder, dict(key)
        parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
        self._part = {index: list(part) for part in parts for index in part}
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        """``(F,)`` on the CPU.

        Raises:
            OSError: if the image could not be read.
        """
        if index not in self._kept:
            part = self._part[index]
            embeddings = cached(
                self.folder, self.key | {"indices": part}, lambda: self._embed(part)
            )
            self._kept = dict(zip(part, embeddings, strict=True))
        if self._kept[index].isnan().any():
            raise OSError(f"image {index} of {self.data.name}: could not be read")
        return self._kept[index]

    def _embed(self, part: Sequence[int]) -> Tensor:
        """``(n, F)``, NaN for an image that cannot be read."""
        pictures = {}
        for index in part:
            with suppress(ValueError, OSError):
                pictures[index] = self.teacher.preprocess(self.data.images[index][0].convert("RGB"))
        if not pictures:
            raise OSError(f"{self.data.name}: none of images {part} could be read")
        device = next(self.teacher.parameters()).device
        found = self.teacher(torch.stack(list(pictures.values())).to(device)).cpu()
        embeddings = torch.full((len(part), found.shape[1]), torch.nan)
        embeddings[[row for row, index in enumerate(part) if index in pictures]] = found
        return embeddings


def adapt_each(
    trainer: TestTimeTrainer, images: Tensor, targets: Tensor, seeds: Sequence[int]
) -> list[Adaptation]:
    """A new student for each image: ``adapt_many``, or for one image the faster ``adapt``."""
    if len(seeds) > 1:
        return trainer.adapt_many(images, targets, seeds)
    trainer.reset(seeds[0])
    return [trainer.adapt(images[0], targets[0])]


def adapt_batches(
    trainer: TestTimeTrainer, indices: Sequence[int], parallel: int, load: Any, seed: int
) -> Iterator[tuple[list[int], list[Adaptation], float]]:
    """Train a student for each image, ``parallel`` at a time; halve that when memory runs out.

    Args:
        load: index -> preprocessed image ``(3, H, W)`` and target ``(F,)``; None to leave it out.

    Yields:
        Indices, what came of them, seconds for each.
    """
    start = 0
    while start < len(indices):
        batch = indices[start : start + parallel]
        loaded = {index: item for index in batch if (item := load(index)) is not None}
        if loaded:
            images, targets = map(torch.stack, zip(*loaded.values(), strict=True))
            started, adapted = time.perf_counter(), None
            try:
                adapted = adapt_each(trainer, images, targets, [seed + index for index in loaded])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if parallel == 1:
                    raise ValueError("out of memory with one student: nothing smaller") from None
            if adapted is None:  # outside the handler: what the exception refers to is free again
                parallel //= 2
                torch.cuda.empty_cache()
                logger.warning("out of memory: going on with %d students at a time", parallel)
                continue
            yield list(loaded), adapted, (time.perf_counter() - started) / len(loaded)
        start += len(batch)


def image_row(
    index: int,
    label: int,
    target: Tensor,
    adapted: Adaptation,
    seconds: float,
    teacher: TokenTeacher,
    classes: Tensor,
    report_at: Sequence[int],
) -> dict[str, float]:
    """One image's predictions: the teacher's, and the student's after each number of steps."""
    pooled = adapted.pooled_at[list(report_at)]  # (R, F)
    predictions = teacher.logits(torch.cat([target[None], pooled]), classes).argmax(dim=1).tolist()
    losses = (pooled - target).square().mean(dim=1).tolist()
    row = {"index": index, "label": label, "teacher": predictions[0]}
    row |= {f"student_{s}": p for s, p in zip(report_at, predictions[1:], strict=True)}
    row |= {f"loss_{s}": loss for s, loss in zip(report_at, losses, strict=True)}
    return row | {"seconds": round(seconds, 4)}


def summarise(rows: Sequence[Mapping[str, float]], report_at: Sequence[int]) -> dict[str, Any]:
    """Top-1 of teacher and student in per cent, their agreement, and the loss, by iteration."""

    def percent(hits: Iterable[bool]) -> float:
        return 100 * sum(hits) / len(rows)

    return {
        "images": len(rows),
        "teacher_top1": percent(row["teacher"] == row["label"] for row in rows),
        "seconds_per_image": sum(row["seconds"] for row in rows) / len(rows),
        "iterations": [
            {
                "iteration": step,
                "student_top1": percent(row[f"student_{step}"] == row["label"] for row in rows),
                "agreement": percent(row[f"student_{step}"] == row["teacher"] for row in rows),
                "loss": sum(row[f"loss_{step}"] for row in rows) / len(rows),
            }
            for step in report_at
        ],
    }
