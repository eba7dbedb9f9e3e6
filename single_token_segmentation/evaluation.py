"""Teacher and students on a test set: embeddings, a row of predictions an image, accuracies."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from apm.data.images import Skipped
from apm.data.test_sets import LabelledImages, read_batches
from apm.runtime.files import atomic_path
from apm.token_teachers import TokenTeacher
from apm.tta import Adaptation

BATCH = 32  # images that a teacher embeds at once
SAVE_SECONDS = 60  # of work that a kill may cost


def embed_set(
    teacher: TokenTeacher,
    data: LabelledImages,
    indices: Sequence[int],
    path: Path,
    skipped: Skipped,
    workers: int = 0,
) -> dict[int, Tensor]:
    """A teacher's embeddings of a test set's images, kept in a file; what it lacks is added.

    Args:
        teacher: on its device.
        indices: of the images.
        path: a safetensors file of this teacher and set: ``indices`` ``(n,)`` and
            ``embeddings`` ``(n, F)`` float32.
        skipped: takes the images that cannot be read.

    Returns:
        Index -> ``(F,)`` on the CPU.

    Raises:
        ValueError: if the file is damaged, or no image can be read.
    """
    kept: dict[int, Tensor] = {}
    try:
        if path.exists():
            content = load_file(path)
            kept = dict(zip(content["indices"].tolist(), content["embeddings"], strict=True))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it") from error

    def write() -> None:
        content = {"indices": torch.tensor([*kept]), "embeddings": torch.stack([*kept.values()])}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(content))

    missing = [index for index in indices if index not in kept]
    device, written = next(teacher.parameters()).device, time.monotonic()
    for found, images, _ in read_batches(
        data, teacher.preprocess, missing, BATCH, skipped, workers, title="teacher"
    ):
        embeddings = teacher(images.to(device)).cpu()
        if not embeddings.isfinite().all():
            raise ValueError(f"{data.name}: the teacher's embeddings are not finite")
        kept |= dict(zip(found, embeddings, strict=True))
        if time.monotonic() - written > SAVE_SECONDS:
            write()
            written = time.monotonic()
    skipped.refuse_all(len(indices))
    if missing and kept:
        write()
    return kept


def row_columns(report_at: Sequence[int]) -> list[str]:
    """The columns of a table with a row an image."""
    columns = ["index", "label", "teacher"]
    columns += [f"student_{step}" for step in report_at]
    return [*columns, *(f"loss_{step}" for step in report_at), "seconds"]


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
    """One image's predictions: the teacher's, and the student's after each number of steps.

    Args:
        label: of the image, as predictions an index into the set's class names.
        target: ``(F,)``, the teacher's embedding of the image.
        classes: the teacher's embeddings of the class names.
    """
    pooled = torch.stack([adapted.pooled_at[step] for step in report_at])  # (R, F)
    predictions = teacher.logits(torch.cat([target[None], pooled]), classes).argmax(dim=1).tolist()
    losses = (pooled - target).square().mean(dim=1).tolist()
    row = {"index": index, "label": label, "teacher": predictions[0]}
    row |= {f"student_{s}": p for s, p in zip(report_at, predictions[1:], strict=True)}
    # Rounded, so that a run that goes on reads back what it had.
    row |= {f"loss_{s}": float(f"{loss:.6g}") for s, loss in zip(report_at, losses, strict=True)}
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
