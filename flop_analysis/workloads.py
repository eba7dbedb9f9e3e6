"""The models of Table 4 at work, for measuring memory and time; built on the default device."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines import clip_inputs, clip_model, swin_model, tpt_model
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from apm import APM, APMConfig
from apm.peers import VIEWS
from apm.tta import TestTimeTrainer

CLASSES = 10  # that TPT tells apart; its text tower's activations grow with them
FEW, ITERATIONS = (16, 64), 20  # locations a step, of test-time training from a few


class Workload(NamedTuple):
    """What holds memory for good, and the work that is measured."""

    model: nn.Module
    run: Callable[[], object]
    optimizer: Optimizer | None = None


def forward(model: nn.Module, *inputs: Tensor) -> Workload:
    """A forward pass alone."""
    return Workload(model, torch.no_grad()(partial(model, *inputs)))


def swin_forward() -> Workload:
    """Swin-B, one image."""
    return forward(swin_model(), clip_inputs()[0])


def clip_forward() -> Workload:
    """CLIP ViT-B/16, one image and one prompt."""
    return forward(clip_model("ViT-B/16"), *clip_inputs())


def tpt_step(classes: int = CLASSES) -> Workload:
    """One step of test-time prompt tuning."""
    model, views = tpt_model(classes), clip_inputs(VIEWS)[0]
    optimizer = model.optimizer()
    return Workload(model, lambda: model.step(optimizer, model.encode_views(views)), optimizer)


def student_forward(chunk_size: int) -> Workload:
    """Features and colours of the whole grid, ``chunk_size`` locations at a time."""
    model, images = APM(APMConfig.tta()), torch.rand(1, 3, 448, 448)
    run = torch.no_grad()(lambda: model.query(model.encode(images), chunk_size=chunk_size))
    return Workload(model, run)


def student_step(chunk_size: int) -> Workload:
    """A step through features of the whole grid, ``chunk_size`` locations at a time."""
    model, images = APM(APMConfig.tta()), torch.rand(1, 3, 448, 448)
    optimizer = Adam(model.parameters(), lr=1e-4, fused=True)
    target = torch.randn(1, model.config.feature_dim)

    def run() -> None:
        features = model.query(model.encode(images), chunk_size=chunk_size)[0]
        optimizer.zero_grad()
        F.mse_loss(model.pool(features), target).backward()
        optimizer.step()

    run()  # Adam's state exists from its first step on
    return Workload(model, run, optimizer)


def trainer_step(dtype: str = "float32", locations: int | None = None) -> Workload:
    """A step of ``TestTimeTrainer``, which needs the pooled vector alone."""
    device = torch.get_default_device()
    trainer = TestTimeTrainer(dtype=dtype, locations=locations, device=device)
    images, target = torch.rand(1, 3, 448, 448), torch.randn(1, trainer.model.config.feature_dim)
    run = partial(trainer.step, images, target)
    run()  # Adam's state exists from its first step on
    return Workload(trainer.model, run, trainer.optimizer)


def teacher_and_trainer_step() -> Workload:
    """Both models in memory: the teacher's forward pass, then a student's step."""
    teacher, student = clip_forward(), trainer_step()
    models = nn.ModuleList([teacher.model, student.model])
    return Workload(models, lambda: (teacher.run(), student.run()), student.optimizer)


def teacher_then_student(locations: int) -> Workload:
    """One image from end to end: the teacher's forward pass, then a new student's 20 iterations.

    Students need the teacher's embedding alone: its memory is free before theirs is taken.
    """
    teacher = clip_forward()

    def run() -> None:
        teacher.run()
        teacher.model.to("meta")
        student_iterations(locations)()

    return Workload(teacher.model, run)


def student_iterations(locations: int) -> Callable[[], object]:
    """Twenty iterations at a few locations from new weights on, and the answer of all of them."""
    device = torch.get_default_device()
    trainer = TestTimeTrainer(iterations=ITERATIONS, locations=locations, device=device)
    image, target = torch.rand(3, 448, 448), torch.randn(trainer.model.config.feature_dim)

    def run() -> None:
        trainer.reset(0)
        trainer.adapt(image, target)

    return run
