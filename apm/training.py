"""Distilling a dense teacher into an APM (paper, section 3): one step, one validation."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.cli import precision
from apm.losses import feature_loss, rgb_targets, standardised_feature_loss
from apm.model import APM


class DistillationTrainer:
    """Trains an APM on batches of images and teacher features.

    A part of each batch goes without its local patches, so that one model answers from image and
    column and from the column alone. Every random choice is a function of seed and step, so a run
    that goes on from ``state_dict`` is the run that was never stopped.

    Args:
        model: the APM to train, on its device.
        mean, std: ``(F,)``, of the teacher's features.
        steps: length of the run, for the cosine schedule.
        locations: random locations a step.
        null_share: share of each batch without local patches, 0..1.
    """

    def __init__(
        self,
        model: APM,
        mean: Tensor,
        std: Tensor,
        *,
        steps: int,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup: int = 0,
        locations: int = 1024,
        null_share: float = 0.3,
        feature_loss: str = "mse",
        rgb_weight: float = 1.0,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self.model, self.steps, self.schedule, self.warmup = model, steps, schedule, warmup
        self.locations, self.rgb_weight = locations, rgb_weight
        self.null_share = null_share if model.config.local_sizes else 0.0
        self.standardised = feature_loss == "standardised"
        self.dtype, self.seed, self.step_index = dtype, seed, 0
        self.device = model.fold.weight.device
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        rate = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        return rate

    def step(self, pixels: Tensor, targets: Tensor) -> tuple[float, float]:
        """One step of the optimiser.

        Args:
            pixels: ``(B, 3, H, W)`` uint8 RGB.
            targets: ``(B, N, F)`` teacher features of the whole grid.

        Returns:
            Feature loss and RGB loss before the step.
        """
        self.model.train()
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.step_index)
        chosen = torch.randperm(targets.shape[1], generator=generator)[: self.locations]
        null = round(len(pixels) * self.null_share)
        features = rgb = torch.zeros((), device=self.device)
        for part, local in ((slice(null), False), (slice(null, None), True)):
            weight = len(pixels[part]) / len(pixels)
            if weight:
                losses = self.losses(pixels[part], targets[part], local=local, chosen=chosen)
                features, rgb = features + weight * losses[0], rgb + weight * losses[1]
        self.optimizer.zero_grad(set_to_none=True)
        (features + self.rgb_weight * rgb).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step_index += 1
        return features.item(), rgb.item()

    def losses(
        self, pixels: Tensor, targets: Tensor, *, local: bool, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Feature and RGB loss at the ``chosen`` places ``(n,)`` of the grid."""
        pixels, targets = pixels.to(self.device), targets.to(self.device)
        chosen = chosen.to(self.device)
        images = self.model.preprocessing.normalise(pixels)
        with precision(self.device, self.dtype):
            features, rgb = self.model.query(
                self.model.encode(images),
                self.model.grid_positions()[chosen],
                images=images if local else None,
            )
        features, targets = features.float(), targets[:, chosen]
        colours = self._colours(pixels)[:, chosen]
        if self.standardised:
            loss = standardised_feature_loss(features, targets, self.mean, self.std)
        else:
            loss = feature_loss(features, targets)
        return loss, F.mse_loss(rgb.float(), colours)

    def _colours(self, pixels: Tensor) -> Tensor:
        colours = self.model.preprocessing.colours(pixels)
        return rgb_targets(colours, self.model.config.patch_size)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Losses on the whole grid, and the RGB R2, with local patches and from the column alone.

        R2 is 1 - squared error / variance of the colours over all images, channels together.
        """
        self.model.eval()
        names = [("", True), ("null_", False)] if self.null_share else [("", True)]
        sums: dict[str, float] = {}
        count, colour_sum, colour_squares = 0, torch.zeros(3), 0.0
        for pixels, targets in batches:
            chosen = torch.arange(targets.shape[1])
            for prefix, local in names:
                losses = self.losses(pixels, targets, local=local, chosen=chosen)
                for name, loss in zip(("feature_loss", "rgb_loss"), losses, strict=True):
                    key = prefix + name
                    sums[key] = sums.get(key, 0.0) + loss.item() * len(pixels)
            colours = self._colours(pixels)
            colour_sum += colours.mean(dim=1).sum(dim=0)
            colour_squares += colours.square().mean(dim=(1, 2)).sum().item()
            count += len(pixels)
        result = {name: value / count for name, value in sums.items()}
        variance = colour_squares / count - (colour_sum / count).square().mean().item()
        for prefix, _ in names:
            result[f"{prefix}rgb_r2"] = 1 - result[f"{prefix}rgb_loss"] / variance
        return result

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


@torch.no_grad()
def start_at_mean(model: APM, mean: Tensor) -> None:
    """Let a new model answer the teacher's mean feature ``(F,)`` and grey.

    The last ReLU of the RGB head would never learn if it started dead.
    """
    model.feature_head.bias.copy_(mean)
    model.rgb_head[-1].bias.fill_(0.5)
