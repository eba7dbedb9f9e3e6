"""Count the multiply-adds of the paper's Table 4 and draw its Figure 2.

A forward pass is counted twice, by fvcore and by torch; the script stops if the two disagree or if
fvcore meets an operator that nobody has classified. A backward pass is counted by torch.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--device", "--repeats"),
        example="flop_analysis/count_flops.py --repeats 1",
        output=OUTPUTS / "count_flops",
        repeats=5,
    )
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import released
import torch
from baselines import TABLE_4, clip_inputs, clip_model, swin_model, tpt_model
from counting import HARMLESS, Call, count_forward, count_step
from deviations import PAPER_LOCATIONS, explain
from figure_2 import draw, features, figure_rows
from released import LOCATIONS
from table import compare, print_notes, print_table
from torch import Tensor, nn
from tqdm import tqdm
from workloads import FEW, ITERATIONS, student_iterations

from apm import APM, APMConfig
from apm.peers import VIEWS
from apm.runtime.device import multiply_adds, select_device
from apm.runtime.files import prepare_output

META = torch.device("meta")  # shapes without memory, enough to count what has no data-made shapes
CHUNKS = (4, 16, 64, 256, 512)
CLIP = "CLIP ViT-B/16, image + prompt"

Row = dict[str, Any]  # numbers in GMACs
Output = Callable[[APM, Tensor], Tensor]  # of images (B, 3, H, H)

# What a student may be asked for: in the released arithmetic, in ours.
STUDENT_OUTPUTS: dict[str, tuple[Output, Output]] = {
    "conv, feature grid": (
        lambda model, images: released.features(model, model.encode(images)),
        features,
    ),
    "conv, feature grid, RGB head": (
        lambda model, images: torch.cat(released.dense(model, images), dim=-1),
        lambda model, images: torch.cat(model(images), dim=-1),
    ),
    "conv, pooled vector": (
        lambda model, images: released.pool(model, released.features(model, model.encode(images))),
        lambda model, images: model.query_pooled(model.encode(images)),
    ),
}


def forward_rows(clip: nn.Module) -> list[Row]:
    """One forward pass of each model, and how the counters come to it.

    The student's is the paper's: 512 locations in chunks, trunk and feature head.
    """
    swin, teacher, student = (TABLE_4[name].gmacs_ideal for name in ("Swin", "teacher", "student"))
    image, prompt = clip_inputs()
    swin_row = compare(
        "Swin-B, image", paper=swin / ITERATIONS, **count_forward(swin_model(), image)
    )
    rows = [swin_row, compare(CLIP, paper=teacher, **count_forward(clip, image, prompt))]
    with META:
        model, column = APM(APMConfig.tta()), torch.rand(1, LOCATIONS)
    for size in CHUNKS:
        work = partial(released.features, chunk_size=size, locations=PAPER_LOCATIONS)
        name = f"APM, {PAPER_LOCATIONS} locations in chunks of {size}"
        rows.append(compare(name, paper=student, **count_forward(Call(model, work), column)))
    return rows


def student_rows(model: APM) -> list[Row]:
    """The same outputs at all 1024 locations, in both arithmetics."""
    images = torch.rand(1, 3, 448, 448)
    with META:
        plain, blank = APM(model.config), torch.rand(images.shape)
    rows = []
    for output, (theirs, ours) in STUDENT_OUTPUTS.items():
        forward = [count_forward(Call(model, work), images)["torch"] for work in (theirs, ours)]
        step = [count_step(plain, theirs, blank), count_step(model, ours, images)]
        for work, (old, new) in {"forward": forward, "forward + backward": step}.items():
            row = {"name": f"{output}: {work}", "released": old, "ours": new}
            rows.append(row | {"saved (%)": 100 * (1 - new / old)})
    return rows


def few_rows() -> list[Row]:
    """A student's 20 iterations at a few random locations a step, with its answer."""
    name = f"{ITERATIONS} steps, features and pooled vector of all"
    return [
        {
            "name": f"{few} locations: {name}",
            "ours": multiply_adds(student_iterations(few)) / 1e9,
        }
        for few in FEW
    ]


def count_tpt(views: int, prompts: int) -> float:
    """A TPT step, the backward pass through the text tower included."""
    with META:  # a thousand prompts would take 40 GB
        model, images = tpt_model(prompts), clip_inputs(views)[0]
    return count_step(model, lambda tpt, images: tpt.loss(tpt.encode_views(images)), images)


def total_rows(forward: list[Row], student: list[Row], few: list[Row]) -> list[Row]:
    """Totals over t = 1..20; for APM the teacher at t = 1 and the student at the other 19."""
    swin, clip, *_, half = (row["ours"] for row in forward)
    grid, pooled = student[0], student[-1]
    ideal = {name: line.gmacs_ideal for name, line in TABLE_4.items()}

    def tpt(views: int, prompts: int, paper: float | None = None) -> Row:
        name = f"TPT, 20 x step: views {views}, prompts {prompts}"
        return compare(name, ITERATIONS * count_tpt(views, prompts), paper)

    def apm(work: str, gmacs: float, paper: float | None = None) -> Row:
        return compare(f"APM, CLIP + 19 x {work}", clip + (ITERATIONS - 1) * gmacs, paper)

    return [
        compare("Swin-B, 20 x forward", ITERATIONS * swin, ideal["Swin"]),
        compare("CLIP ViT-B/16, 20 x forward", ITERATIONS * clip, ideal["CLIP"]),
        # The paper does not say what it counted; one view and one prompt come nearest.
        tpt(1, 1, ideal["TPT"]),
        tpt(VIEWS, 1),
        tpt(VIEWS, 1000),
        apm(f"forward at {PAPER_LOCATIONS} locations, released", half, ideal["APM"]),
        apm("forward, released", grid["released"]),
        apm("forward, ours", grid["ours"]),
        apm("forward + backward, released arithmetic on one copy", pooled["released"]),
        apm("forward + backward, ours", pooled["ours"]),
        *(compare(f"APM, CLIP + {row['name']}, ours", clip + row["ours"]) for row in few),
    ]


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results = Results(args, device)
    progress = tqdm(total=5, unit="table")

    def counted(rows: list[Row]) -> list[Row]:
        progress.update()
        return rows

    clip, model = clip_model("ViT-B/16"), APM(APMConfig.tta())
    forward, student = counted(forward_rows(clip)), counted(student_rows(model))
    few = counted(few_rows())
    total = counted(total_rows(forward, student, few))
    models = model.to(device), clip.to(device)
    figure = counted(figure_rows(*models, forward[1]["ours"], args.repeats))
    progress.close()
    notes = explain(forward[1], student[0])

    print_table("One forward pass (GMACs)", forward)
    print(f"All that fvcore left out has no products: {', '.join(sorted(HARMLESS))}")
    print_table("APM, TTT model, all 1024 locations (GMACs)", student)
    print_table("APM, TTT model, a few locations, forward + backward (GMACs)", few)
    print_table("Totals over t = 1..20 (GMACs), Table 4", total)
    print_table("APM, a forward pass for some patches (GMACs), Figure 2", figure)
    print_notes(notes)
    draw(output / "figure_2.png", figure)
    results.save(
        output,
        forward=forward,
        student=student,
        few=few,
        totals=total,
        figure_2=figure,
        notes=notes,
    )
    print(f"\n{output / 'figure_2.png'}; the numbers are in results.json beside it")


if __name__ == "__main__":
    sys.exit(main())
