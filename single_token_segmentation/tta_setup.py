"""What test-time training of one image and of a data set share: flags, teacher and student."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apm import APM, APMConfig
from apm.runtime.cli import ROOT, make_parser, positive_int
from apm.token_teachers import TokenTeacher, load_token_teacher
from apm.tta import TestTimeTrainer

BUNDLED_TEACHER = ROOT / "checkpoints" / "clip_tiny.pt"
GRID = APMConfig.tta().column_dim  # locations of the paper's student


def location_count(text: str) -> int:
    """An argparse type: how many of a student's locations, or ``all``."""
    count = GRID if text == "all" else int(text)
    if not 1 <= count <= GRID:
        raise ArgumentTypeError(f"{text} must be in 1..{GRID}, or all")
    return count


def make_tta_parser(description: str, *flags: str, **defaults: Any) -> ArgumentParser:
    """As ``make_parser``, with the flags of teacher and student besides."""
    parser = make_parser(
        description, "--output", "--teacher-weights", "--device", "--dtype", "--seed", *flags
    )
    add = parser.add_argument
    add(
        "--teacher",
        default=str(BUNDLED_TEACHER),
        help="a CLIP by its name (the paper's: ViT-L/14, open_clip:ViT-H-14-quickgelu/dfn5b) or "
        "file, or a classifier of timm",
    )
    add("--templates", default="single", help="prompts: single, clip80, or a file of them")
    add("--pooling", choices=("attention", "mean"), default="attention", help="of the student")
    add("--iterations", type=positive_int, help="steps for each image")
    add("--locations", type=location_count, default="all", help="random places a step, or all")
    add("--learning-rate", type=float, default=1e-4, help="learning rate of Adam")
    parser.set_defaults(**defaults)
    return parser


def build(args: Namespace, device: torch.device) -> tuple[TokenTeacher, TestTimeTrainer]:
    """The teacher, and the trainer of students as wide as its embeddings."""
    teacher = load_token_teacher(args.teacher, args.teacher_weights).to(device)
    width = embed(teacher, Image.new("RGB", (64, 64)), device).shape[0]
    trainer = TestTimeTrainer(
        APM(APMConfig.tta(width, pooling=args.pooling)),
        iterations=args.iterations,
        learning_rate=args.learning_rate,
        locations=args.locations,
        location_seed=args.seed,
        dtype=args.dtype,
        device=device,
    )
    return teacher, trainer


def embed(teacher: TokenTeacher, image: Image.Image, device: torch.device) -> Tensor:
    """The teacher's embedding of one image, ``(F,)`` on the CPU."""
    return teacher(teacher.preprocess(image)[None].to(device))[0].cpu()
