"""Test-time training and what it is compared with, to be timed; random weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import released
import torch
import workloads
from timing import Work
from torch import Tensor
from torch.optim import Adam

from apm.choices import DTYPES
from apm.peers import VIEWS
from apm.runtime.device import multiply_adds
from apm.tta import TestTimeTrainer

MANY_CLASSES = 200
AGAINST = f"TPT step, {VIEWS} views"
ONE_IMAGE = f"CLIP + TTT, {workloads.ITERATIONS} iterations"


def test_time_training(device: torch.device) -> Iterator[Work]:
    """One step of the full student; then whole images, one by one and eight at once."""
    model = TestTimeTrainer(device=device).model
    image = torch.rand(1, 3, 448, 448, device=device)
    target = torch.randn(1, model.config.feature_dim, device=device)
    step = partial(released.tta_step, model, image, target, Adam(model.parameters(), lr=1e-4))
    yield Work("TTT step, released", step, once=True)
    with device:
        macs = multiply_adds(workloads.trainer_step().run)
    for dtype in DTYPES:
        with device:
            run = workloads.trainer_step(dtype).run
        yield Work("TTT step, ours", run, dtype, macs=macs)

    def adapt(trainer: TestTimeTrainer, images: Tensor, targets: Tensor) -> object:
        if len(images) > 1:
            return trainer.adapt_many(images, targets, range(len(images)))
        trainer.reset(0)
        return trainer.adapt(images[0], targets[0])

    for iterations, count in ((20, 1), (2, 1), (2, 8)):
        trainer = TestTimeTrainer(iterations=iterations, device=device)
        images, targets = torch.rand(count, 3, 448, 448), torch.randn(count, target.shape[1])
        name = f"TTT, {iterations} iterations, {count} image{'s at once' * (count > 1)}"
        run = partial(adapt, trainer, images, targets)
        yield Work(name, run, images=count, once=True)


def peers(device: torch.device) -> Iterator[Work]:
    """What the paper compares with, random weights."""
    with device:
        clip, tpt = workloads.clip_forward().run, workloads.tpt_step().run
    yield Work("CLIP ViT-B/16, image + prompt", clip)
    yield Work(f"{AGAINST}, {workloads.CLASSES} classes", tpt, once=True)
    with device:
        tpt = workloads.tpt_step(MANY_CLASSES).run
    yield Work(f"{AGAINST}, {MANY_CLASSES} classes", tpt, once=True)


def one_image(device: torch.device) -> Iterator[Work]:
    """Test-time training of one image from a few locations, the teacher's forward pass included."""
    for locations in workloads.FEW:
        with device:
            teacher, student = workloads.clip_forward().run, workloads.student_iterations(locations)
        run = partial(lambda *works: [work() for work in works], teacher, student)
        yield Work(f"{ONE_IMAGE}, {locations} locations", run)


def times_faster(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times longer than test-time training of an image each of TPT's steps took."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    return {
        f"{own}: times faster than one {step}": seconds[step] / seconds[own]
        for own in seconds
        if own.startswith(ONE_IMAGE)
        for step in seconds
        if step.startswith(AGAINST)
    }
