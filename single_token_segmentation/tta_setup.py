"""What test-time training of one image and of a data set share: teacher and student."""

from argparse import Namespace

import torch
from PIL import Image
from torch import Tensor

from apm import APM, APMConfig
from apm.token_teachers import TokenTeacher, load_token_teacher
from apm.tta import TestTimeTrainer


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
