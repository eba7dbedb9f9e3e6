"""Teacher and students on a test set: embeddings, a row of predictions an image, accuracies."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from apm.data.images import Skipped
from apm.data.test_sets import LabelledImages, read_batches
from apm.runtime.files import atomic_path
from apm.runtime.logs import Row, RowLog
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
        Index -> ``(F,)`` on the CPU, of the asked images that can be read, in their order.

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
    return {index: kept[index] for index in indices if index in kept}


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


def common_rows(
    logs: Mapping[str, RowLog], chosen: Iterable[int]
) -> tuple[list[int], dict[str, list[Row]]]:
    """The chosen images that every method has a row of, and these rows."""
    rows = {method: {int(row["index"]): row for row in log.rows} for method, log in logs.items()}
    # A former run may have had another --limit.
    images = sorted(set(chosen).intersection(*rows.values()))
    return images, {method: [found[index] for index in images] for method, found in rows.items()}


def mean_and_error(values: np.ndarray, photographs: Sequence[int]) -> tuple[float, float]:
    """The mean of ``(n,)`` and its standard error.

    Versions of one photograph say little more than one of them: their deviations are added before
    they are squared. Of shares ``p`` of images that are all of different photographs the error is
    ``sqrt(p (1 - p) / n)``.
    """
    mean = values.mean()
    _, photograph = np.unique(photographs, return_inverse=True)
    deviations = np.bincount(photograph, weights=values - mean)
    return float(mean), float(np.sqrt(np.square(deviations).sum()) / len(values))


def score(
    name: str,
    predictions: Sequence[float],
    labels: Sequence[float],
    teacher: Sequence[float],
    photographs: Sequence[int],
) -> dict[str, Any]:
    """A row of the table of methods, in per cent, each number with its standard error.

    ``top1``; ``gain``, by which it is above the teacher's on the same images; ``agreement`` with
    the teacher's predictions.
    """
    right = np.equal(predictions, labels)
    of_images = {
        "top1": right,
        "gain": right.astype(float) - np.equal(teacher, labels),
        "agreement": np.equal(predictions, teacher),
    }
    row: dict[str, Any] = {"name": name}
    for what, values in of_images.items():
        row[what], row[f"{what}_error"] = mean_and_error(100.0 * values, photographs)
    return row


def print_methods(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a method; ``-`` where a number has no meaning or was not measured."""
    head = f"{'':26}  {'top-1 %':>13}  {'gain %':>13}  {'agreement %':>13}"
    print(f"{head}  {'loss':>8}  {'s/image':>8}  {'GMACs/image':>11}  {'peak GB':>7}")
    for row in rows:
        cells = [
            f"{row[name]:{sign}6.2f} ± {row[f'{name}_error']:4.2f}".rjust(13)
            for name, sign in (("top1", ""), ("gain", "+"), ("agreement", ""))
        ]
        for name, form in (
            ("loss", "8.2e"),
            ("seconds", "8.3f"),
            ("GMACs", "11.2f"),
            ("peak_GB", "7.3f"),
        ):
            width = form.split(".")[0]
            cells.append(f"{row[name]:{form}}" if name in row else f"{'-':>{width}}")
        print("  ".join([f"{row['name']:26}", *cells]))


def summarise(
    tables: Mapping[str, Sequence[Mapping[str, float]]],
    teachers: Mapping[str, Sequence[int]],
    report_at: Sequence[int],
    costs: Mapping[str, Mapping[str, float]],
    photographs: Sequence[int],
) -> dict[str, Any]:
    """The table of methods, and the students' part of it by iteration.

    Args:
        tables: method -> its rows, all of the same images in the same order.
        teachers: name -> the teacher's predictions on them with some prompts; the first are the
            run's, with which methods are compared.
        costs: of one image, for ``teacher`` and each method.
        photographs: which one each image shows.
    """
    rows = next(iter(tables.values()))
    labels, (teacher, *_) = [row["label"] for row in rows], teachers.values()
    cost = costs["teacher"]
    methods = [
        score(name, predictions, labels, teacher, photographs) | {**cost}
        for name, predictions in teachers.items()
    ]
    summary: dict[str, Any] = {"images": len(rows), "photographs": len(set(photographs))}
    summary["teacher_top1"] = methods[0]["top1"]
    for method, of_images in tables.items():
        seconds = sum(row["seconds"] for row in of_images) / len(rows)
        if method != "apm":
            predictions = [row["prediction"] for row in of_images]
            row = score(method.upper(), predictions, labels, teacher, photographs)
            methods.append(row | {**costs[method]} | {"seconds": seconds})
            continue
        own, iterations = costs[method], []
        for step in report_at:
            predictions = [one[f"student_{step}"] for one in of_images]
            row = score(f"APM, {step} iterations", predictions, labels, teacher, photographs)
            row["loss"] = sum(one[f"loss_{step}"] for one in of_images) / len(rows)
            row["GMACs"] = cost["GMACs"] + step * own["step_GMACs"] + own["pooled_GMACs"]
            # The teacher's memory is free when the student's is taken.
            row["peak_GB"] = max(cost["peak_GB"], own["peak_GB"])
            iterations.append({"iteration": step} | row)
        # One time for all reports, and the teacher's.
        iterations[-1]["seconds"] = cost["seconds"] + seconds
        methods += [{name: row[name] for name in row if name != "iteration"} for row in iterations]
        summary |= {"seconds_per_image": seconds, "gmacs_per_iteration": own["step_GMACs"]}
        summary["iterations"] = [
            {
                "iteration": row["iteration"],
                "student_top1": row["top1"],
                "agreement": row["agreement"],
                "loss": row["loss"],
            }
            for row in iterations
        ]
    return summary | {"methods": methods, "costs": costs}
