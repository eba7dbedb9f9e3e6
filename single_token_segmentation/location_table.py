"""What a location knows: students' accuracy by the number of locations a step and by their query.

Each row trains a student for each image as evaluate_tta.py does, on ``M`` random locations a step,
with the whole query ``[T ; p_xy]``, without its position, or without its trigger column. A run that
was stopped goes on when it is given again.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable

from tta_flags import make_tta_parser

from apm.flags import OUTPUTS
from apm.runtime.cli import Results, answer_flags, command

ARMS = ("whole", "no-position", "no-column")


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_tta_parser(
        __doc__,
        *("--data-root", "--limit", "--workers"),
        example="single_token_segmentation/location_table.py --data-root set --limit 30",
        output=OUTPUTS / "location_table",
        iterations=20,
        parallel=1,
        locations="1,4,16,64,256,1024",
        several=True,
    )
    arms = "what a query holds"
    parser.add("test-time training", "--arms", nargs="+", choices=ARMS, default=ARMS, help=arms)
    args = parser.parse_args(argv)
    args.report_at = [args.iterations]
    return args


answer_flags(__name__, parse)

import torch
from evaluation import embed_set, print_methods, row_columns, score
from methods import run_students
from tta_setup import build_teacher, build_trainer

from apm import APM
from apm.data.class_names import load_templates
from apm.data.images import Skipped, spread
from apm.data.test_sets import load_dataset
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import keep_settings, prepare_output
from apm.runtime.logs import RowLog


def zero_arm(model: APM, arm: str) -> None:
    """Let the first layer see zeros in the place of the positions or of the trigger column."""
    first = model.trunk_first
    if arm == "no-position":
        nothing = torch.zeros(first.column.out_features, device=model.device)
        model.trunk_first.position_term = lambda positions: nothing.expand(len(positions), -1)  # type: ignore[method-assign]
    elif arm == "no-column":
        first.column.register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0]),))


def name_of(count: int, arm: str) -> str:
    """A row's name in the table and of its file."""
    return f"{arm}-{count}"


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    templates = load_templates(args.templates)
    data = load_dataset("imagefolder", args.data_root)
    results = Results(args, device)
    seed_everything(args.seed)
    teacher = build_teacher(args, device)
    classes = teacher.embed_classes(data.class_names, templates).cpu()
    output = prepare_output(args.output)
    same = ("iterations", "pooling", "learning_rate", "seed", "dtype")
    settings = {name: getattr(args, name) for name in same} | teacher.identity
    settings |= {"files_sha256": data.files_sha256, "templates": templates}
    keep_settings(output / "settings.json", settings)
    chosen, skipped = spread(len(data), args.limit), Skipped()
    path = output / "embeddings.safetensors"
    targets = embed_set(teacher, data, chosen, path, skipped, args.workers)

    def adapt(arm: str, count: int, indices: Iterable[int]) -> RowLog:
        log = RowLog(output / f"{name_of(count, arm)}.csv", row_columns(args.report_at))
        student = build_trainer(args, teacher, device, count)
        zero_arm(student.model, arm)
        todo = [index for index in indices if index not in log.done]
        for found in run_students(
            *(args, teacher, student, classes, data, targets, todo, skipped, name_of(count, arm))
        ):
            log.append(found)
        return log

    rows = []
    for arm in args.arms:
        for count in args.locations:
            log = adapt(arm, count, targets)
            rows.append(table_row(name_of(count, arm), log, set(targets), args.iterations))
            print_methods(rows[-1:])
    results.save(output, images=len(targets), skipped=len(skipped), rows=rows)
    print_methods(rows)
    print(f"{output / 'results.json'}; the same command goes on where it was stopped")


def table_row(name: str, log: RowLog, asked: set[int], step: int) -> dict:
    """Accuracy, agreement with the teacher, loss and seconds of the asked images."""
    rows = [row for row in log.rows if row["index"] in asked]
    index, label, student, teacher, loss, seconds = (
        [row[column] for row in rows]
        for column in ("index", "label", f"student_{step}", "teacher", f"loss_{step}", "seconds")
    )
    means = {"loss": sum(loss) / len(rows), "seconds": sum(seconds) / len(rows)}
    return score(name, student, label, teacher, [*map(int, index)]) | means


if __name__ == "__main__":
    sys.exit(main())
