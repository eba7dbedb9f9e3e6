"""What trainers share that go on after a stop as if there had been none."""

import math
from typing import Any

import torch
from torch import nn


def generator_at(seed: int, index: int) -> torch.Generator:
    """Randomness that is a function of the seed and of a step's or an epoch's index."""
    return torch.Generator().manual_seed(seed + 1_000_003 * index)


class ResumableTrainer:
    """A trainer whose state is its weights, its optimiser and the number of steps.

    Subclasses draw every random choice from ``generator_at``, set the attributes and take steps.

    Attributes:
        model, optimizer, scheduler: as trained; ``scheduler`` calls ``rate``.
        steps: length of the run, for the cosine schedule.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup: steps in which the learning rate rises.
        step_index: steps done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    steps: int
    schedule: str
    warmup: int
    step_index: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of its peak."""
        rate = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        return rate

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step_index,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step_index = state["step"]
