"""Test-time training over a data set (paper, tables 1 to 3).

For each image a student that knows nothing learns the teacher's embedding of it. The table shows
the accuracy of teacher and students, side by side, after chosen numbers of iterations, and with
--method that of TPT and ZERO on the same images. A run that was stopped goes on when it is given
again.
"""

import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from typing import Any

from tta_flags import make_tta_parser

from apm.choices import ALL, CORRUPTIONS, DATASETS, SEVERITIES
from apm.flags import OUTPUTS, positive_int
from apm.runtime.cli import Results, answer_flags, command
from apm.runtime.files import keep_settings, prepare_output, read_json


def positive_ints(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    return tuple(positive_int(number) for number in text.split(","))


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_tta_parser(
        __doc__,
        *("--limit", "--workers", "--data-root", "--download"),
        example="single_token_segmentation/evaluate_tta.py --dataset cifar10 --download --limit 30",
        output=OUTPUTS / "evaluate_tta",
        iterations=50,
        locations="16",
    )
    more = partial(parser.add, "input and output")
    sets = "the test set; imagefolder is one's own, a folder a class in --data-root"
    more("--dataset", choices=DATASETS, required=True, help=sets)
    which = "of --dataset cifar10c: all corruptions one after the other, or the name of one"
    more("--corruption", choices=(ALL, *CORRUPTIONS), metavar="NAME", default=ALL, help=which)
    weak = "of --dataset cifar10c, 1 the weakest"
    more("--severity", type=int, choices=SEVERITIES, default=5, help=weak)
    add = partial(parser.add, "test-time training")
    methods = (
        "what is compared, on the same images. apm: a student for each, as of the paper. tpt: "
        "prompts tuned for a step on 64 views of the image. zero: the vote of these views"
    )
    add("--method", nargs="+", choices=("apm", "tpt", "zero"), default=["apm"], help=methods)
    table = "iterations in the table, with commas between"
    add("--report-at", type=positive_ints, default="1,5,10,20,50", help=table)
    batch = "students trained at once, which is faster on a GPU only"
    add("--parallel", type=positive_int, default=1, help=batch)
    args = parser.parse_args(argv)
    args.report_at = sorted({step for step in args.report_at if step <= args.iterations})
    made = args.data_root / "settings.json"  # of make_corruptions.py
    if args.dataset == "cifar10c" and made.is_file():
        levels = read_json(made).get("severities")
        if levels != [*SEVERITIES]:
            raise ValueError(f"{args.data_root}: made with severities {levels}, expected all five")
    if not args.report_at:
        raise ValueError(f"--report-at: none is within the {args.iterations} of --iterations")
    return args


answer_flags(__name__, parse)

import torch
from evaluation import common_rows, embed_set, print_methods, row_columns, summarise
from methods import (
    PEER_COLUMNS,
    make_peer,
    peer_cost,
    predict,
    run_peer,
    run_students,
    student_cost,
    teacher_classes,
    teacher_cost,
)
from tqdm import tqdm
from tta_setup import build_teacher, build_trainer

from apm.data.class_names import load_templates
from apm.data.images import Skipped, spread
from apm.data.test_sets import LabelledImages, load_dataset
from apm.runtime.device import seed_everything, select_device
from apm.runtime.logs import RowLog

logger = logging.getLogger(__name__)
NAMES = 5  # of classes, that are shown


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
    teacher = build_teacher(args, device)
    trainer = build_trainer(args, teacher, device, args.locations)
    alone = teacher_classes(teacher, data.class_names, args.templates, args.method != ["apm"])
    classes = next(iter(alone.values()))
    peers = {
        method: make_peer(method, teacher, data.class_names, classes)
        for method in args.method
        if method != "apm"
    }

    output = prepare_output(args.output)
    same = ("iterations", "report_at", "pooling", "learning_rate", "locations", "seed", "dtype")
    settings = {name: getattr(args, name) for name in same} | teacher.identity
    settings |= {"device": device.type, "dataset": data.name, "files_sha256": data.files_sha256}
    settings |= {"classes": data.class_names, "templates": templates}
    keep_settings(output / "settings.json", settings)
    logs = {method: RowLog(output / f"{method}.csv", PEER_COLUMNS) for method in peers}
    if "apm" in args.method:
        logs["apm"] = RowLog(output / "rows.csv", row_columns(args.report_at))

    chosen, skipped = spread(len(data), args.limit, data.versions), Skipped()
    embeddings_file = output / "embeddings.safetensors"
    targets = embed_set(teacher, data, chosen, embeddings_file, skipped, args.workers)
    costs = {"teacher": teacher_cost(teacher)}
    for method, answer in tqdm(peers.items(), "costs", unit="method", disable=not peers):
        costs[method] = peer_cost(answer, teacher)
    todo = {
        method: [index for index in targets if index not in log.done]
        for method, log in logs.items()
    }
    for method, answer in peers.items():
        for row in run_peer(
            answer, teacher, data, todo[method], skipped, args.seed, args.workers, method
        ):
            logs[method].append([row])
    teacher.to("meta")  # students need its embeddings alone: its memory is free
    if "apm" in logs:
        costs["apm"] = student_cost(trainer)
        for rows in run_students(
            args, teacher, trainer, classes, data, targets, todo["apm"], skipped
        ):
            logs["apm"].append(rows)
    skipped.refuse_all(len(chosen))

    images, tables = common_rows(logs, chosen)
    embeddings = torch.stack([targets[index] for index in images])
    answers = {name: predict(teacher, embeddings, rows) for name, rows in alone.items()}
    photographs = [data.photograph(index) for index in images]
    summary = summarise(tables, answers, args.report_at, costs, photographs)
    summary["skipped"] = len(skipped)
    results.save(output, **described, **summary)
    print(
        f"{summary['images']} images, {summary['skipped']} skipped; "
        f"teacher top-1 {summary['teacher_top1']:.2f} %"
    )
    print_methods(summary["methods"])
    print(f"{output / 'results.json'}; the same command goes on where it was stopped")


if __name__ == "__main__":
    sys.exit(main())
