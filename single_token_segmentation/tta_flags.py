"""The flags that test-time training of one image and of a data set share."""

from argparse import ArgumentTypeError
from functools import partial
from typing import Any

from apm.choices import POOLINGS
from apm.config import APMConfig
from apm.flags import ROOT, Parser, make_parser, positive_int

BUNDLED_TEACHER = ROOT / "checkpoints" / "clip_tiny.pt"
GRID = APMConfig.tta().column_dim  # locations of the paper's student


def location_count(text: str) -> int:
    """An argparse type: how many of a student's locations, or ``all``."""
    count = GRID if text == "all" else int(text)
    if not 1 <= count <= GRID:
        raise ArgumentTypeError(f"{text} must be in 1..{GRID}, or all")
    return count


def location_counts(text: str) -> tuple[int, ...]:
    """An argparse type: such numbers, with commas between."""
    return tuple(map(location_count, text.split(",")))


def make_tta_parser(
    description: str, *flags: str, example: str, several: bool = False, **defaults: Any
) -> Parser:
    """As ``make_parser``, with the flags of teacher and student; ``several`` ``--locations``."""
    shared = ("--output", "--teacher-weights", "--templates", "--device", "--dtype", "--seed")
    parser = make_parser(
        description, *shared, *flags, example=example, **{"templates": "single"} | defaults
    )
    teacher = (
        "a CLIP by its name (the paper's: ViT-L/14, open_clip:ViT-H-14-quickgelu/dfn5b), or with a "
        "file in the place of name or tag; or a classifier of timm by its name, whose file is "
        "--teacher-weights. The bundled CLIP knows CIFAR-10's ten classes"
    )
    parser.add("model", "--teacher", default=str(BUNDLED_TEACHER), help=teacher)
    add = partial(parser.add, "test-time training")
    pooling = (
        "how the student's locations become the one vector that is compared with the teacher's. "
        "attention: weighted by a learnt query, the paper's. mean: all alike"
    )
    add("--pooling", choices=POOLINGS[1:], default="attention", help=pooling)
    add("--iterations", type=positive_int, help="steps for each image")
    locations = (
        f"random places that each step asks, 1 to {GRID}, or all, as released. Fewer are faster "
        "by their share and end at a higher loss; the answer that counts is that of all places"
    )
    locations += "; with commas between, a row of the table each" * several
    kind = location_counts if several else location_count
    add("--locations", type=kind, default="all", help=locations)
    add("--learning-rate", type=float, default=1e-4, help="learning rate of Adam")
    parser.set_defaults(**defaults)
    return parser
