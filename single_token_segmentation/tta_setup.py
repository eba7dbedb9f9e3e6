"""What the scripts of test-time training share: teacher and student."""

from argparse import Namespace

import torch
from PIL import Image
from torch import Tensor

from apm import APM, APMConfig
from apm.token_teachers import TokenTeacher, load_token_teacher
from apm.tta import TestTimeTrainer


def build_teacher(args: Namespace, device: torch.device) -> TokenTeacher:
    """The teacher that the flags name."""
    return load_token_teacher(args.teacher, args.teacher_weights).to(device)


def build_trainer(
    args: Namespace, teacher: TokenTeacher, device: torch.device, locations: int
) -> TestTimeTrainer:
    """The trainer of students as wide as the teacher's embeddings."""
    width = embed(teacher, Image.new("RGB", (64, 64)), device).shape[0]
    return TestTimeTrainer(
        APM(APMConfig.tta(width, pooling=args.pooling)),
        iterations=args.iterations,
        learning_rate=args.learning_rate,
        locations=locations,
        location_seed=args.seed,
        dtype=args.dtype,
        device=device,
    )


def embed(teacher: TokenTeacher, image: Image.Image, device: torch.device) -> Tensor:
    """The teacher's embedding of one image, ``(F,)`` on the CPU."""
    return teacher(teacher.preprocess(image)[None].to(device))[0].cpu()
