"""Test-time training over a data set (paper, tables 1 to 3).

For each image a student that knows nothing learns the teacher's embedding of it. The table shows
the accuracy of teacher and students, side by side, after chosen numbers of iterations. A run that
was stopped goes on when it is given again.
"""

import logging
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from evaluation import embed_set, image_row, row_columns, summarise
from torch import Tensor
from tta_setup import build, make_tta_parser

from apm.data.class_names import load_templates
from apm.data.images import Skipped
from apm.data.test_sets import (
    ALL,
    DATASETS,
    LabelledImages,
    load_dataset,
    read_batches,
    spread,
)
from apm.runtime.cli import OUTPUTS, ROOT, Results, command, positive_int
from apm.runtime.device import multiply_adds, seed_everything, select_device
from apm.runtime.files import keep_settings, prepare_output, read_json
from apm.runtime.logs import RowLog
from apm.tta import Adaptation, TestTimeTrainer

logger = logging.getLogger(__name__)
NAMES = 5  # of classes, that are shown


def positive_ints(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    return tuple(positive_int(number) for number in text.split(","))


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_tta_parser(
        __doc__,
        "--limit",
        "--workers",
        output=OUTPUTS / "evaluate_tta",
        iterations=50,
        locations="64",
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="the test set")
    add("--data-root", type=Path, default=ROOT / "data", help="where data sets lie")
    add("--download", action="store_true", help="let torchvision fetch the data set")
    add("--corruption", default=ALL, help="of cifar10c: all, or the name of one")
    add("--severity", type=int, default=5, help="of cifar10c, 1 to 5")
    add("--report-at", type=positive_ints, default="1,5,10,20,50", help="iterations in the table")
    add(
        "--parallel",
        type=positive_int,
        default=1,
        help="students trained at once, on an accelerator",
    )
    args = parser.parse_args(argv)
    args.report_at = sorted({step for step in args.report_at if step <= args.iterations})
    made = args.data_root / "settings.json"  # of make_corruptions.py
    if args.dataset == "cifar10c" and made.is_file():
        levels = read_json(made).get("severities")
        if levels != [1, 2, 3, 4, 5]:
            raise ValueError(f"{args.data_root}: made with severities {levels}, expected all five")
    if not args.report_at:
        raise ValueError(f"--report-at: none is within the {args.iterations} iterations")
    return args


def doubtful_names(class_names: Iterable[str]) -> list[str]:
    """Names that say nothing to a teacher: numbers, single letters, unknown WordNet ids."""
    return [name for name in class_names if re.fullmatch(r"\d+|[a-z]|n\d{8}", name)]


def describe(data: LabelledImages) -> dict[str, Any]:
    """What the set holds: said, and for results.json. Warns of names that no prompt can use."""
    names = data.class_names
    first = ", ".join(names[:NAMES]) + ", ..." * (len(names) > NAMES)
    print(f"{data.name}: {len(data)} images of {len(names)} classes ({first})", flush=True)
    if doubtful := doubtful_names(names):
        logger.warning(
            "names that say nothing to a teacher: %s (%d of %d); name each folder as its class",
            ", ".join(doubtful[:NAMES]),
            len(doubtful),
            len(names),
        )
    return {
        "dataset": data.name,
        "dataset_images": len(data),
        "classes": len(names),
        "first_classes": names[:NAMES],
    }


def adapt_each(
    trainer: TestTimeTrainer,
    images: Tensor,
    targets: Tensor,
    seeds: Sequence[int],
    report_at: Sequence[int],
) -> list[Adaptation]:
    """A new student for each image; a single one is faster without stacked weights."""
    if len(seeds) > 1:
        return trainer.adapt_many(images, targets, seeds, report_at)
    trainer.reset(seeds[0])
    return [trainer.adapt(images[0], targets[0], pooled_at=report_at)]


def step_gmacs(trainer: TestTimeTrainer) -> float:
    """Giga multiply-adds of one step, forward and backward."""
    config = trainer.model.config
    image = torch.zeros(1, 3, config.image_size, config.image_size, device=trainer.device)
    target = torch.zeros(1, config.feature_dim, device=trainer.device)
    return multiply_adds(lambda: trainer.step(image, target)) / 1e9


def print_table(summary: Mapping[str, Any], gmacs: float) -> None:
    """Teacher and student by iteration."""
    print(
        f"{summary['images']} images, {summary['skipped']} skipped; "
        f"teacher top-1 {summary['teacher_top1']:.2f} %"
    )
    print("iteration  student top-1 %  agreement %       loss  GMACs an image")
    for row in summary["iterations"]:
        print(
            f"{row['iteration']:9}  {row['student_top1']:15.2f}  {row['agreement']:11.2f}  "
            f"{row['loss']:9.2e}  {gmacs * row['iteration']:14.1f}"
        )
    print(f"{summary['seconds_per_image']:.2f} s an image")


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    if device.type == "cpu" and args.parallel > 1:
        logger.warning("--parallel %d: on a CPU students are faster one by one", args.parallel)
        args.parallel = 1
    templates = load_templates(args.templates)
    data = load_dataset(
        args.dataset,
        args.data_root,
        download=args.download,
        corruption=args.corruption,
        severity=args.severity,
    )
    results = Results(args, device)
    described = describe(data)
    seed_everything(args.seed)
    teacher, trainer = build(args, device)
    classes = teacher.embed_classes(data.class_names, templates).cpu()

    output = prepare_output(args.output)
    same = ("iterations", "report_at", "pooling", "learning_rate", "locations", "seed", "dtype")
    settings = {name: getattr(args, name) for name in same} | teacher.identity
    settings |= {"dataset": data.name, "files_sha256": data.files_sha256}
    settings |= {"classes": data.class_names, "templates": templates}
    keep_settings(output / "settings.json", settings)
    log, skipped = RowLog(output / "rows.csv", row_columns(args.report_at)), Skipped()

    chosen = spread(len(data), args.limit)
    embeddings_file = output / "embeddings.safetensors"
    targets = embed_set(teacher, data, chosen, embeddings_file, skipped, args.workers)
    done = log.done
    todo = [index for index in chosen if index in targets and index not in done]
    prepare = trainer.model.preprocessing
    for indices, images, labels in read_batches(
        data, prepare, todo, args.parallel, skipped, args.workers, title="students"
    ):
        goals = torch.stack([targets[index] for index in indices])
        started = time.perf_counter()
        adapted = adapt_each(
            trainer, images, goals, [args.seed + index for index in indices], args.report_at
        )
        seconds = (time.perf_counter() - started) / len(indices)
        log.append(
            image_row(*one, seconds, teacher, classes, args.report_at)
            for one in zip(indices, labels.tolist(), goals, adapted, strict=True)
        )
    skipped.refuse_all(len(chosen))

    asked = set(chosen)  # a former run may have had another --limit
    rows = [row for row in log.rows if row["index"] in asked]
    summary = summarise(rows, args.report_at) | {"skipped": len(skipped)}
    gmacs = step_gmacs(trainer)
    results.save(output, **described, **summary, gmacs_per_iteration=gmacs)
    print_table(summary, gmacs)


if __name__ == "__main__":
    sys.exit(main())
