"""Distilling a dense teacher into an APM (paper, section 3): one step, one validation."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.config import TrainConfig
from apm.layers import bilinear, move
from apm.losses import FEATURE_LOSS_FUNCTIONS, rgb_targets
from apm.model import APM
from apm.runtime.device import generator_at, precision
from apm.runtime.distributed import broadcast_weights, shares, sum_over_processes

LOSSES = ("feature_loss", "rgb_loss")


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or not a number; the weights are those before the step."""


class Distiller:
    """A student, its optimiser, and what it learns from.

    Some images of each batch are answered from the trigger column alone, without local patches.
    ``shares`` gives each process, and each of ``accumulate`` parts, its images of the batch. Every
    choice is made for the whole batch, as a function of seed and step: neither number changes what
    is learnt, and a run goes on from weights, optimiser and ``steps_done`` alone.

    Args:
        model: the APM to train, on its device.
        mean, std: ``(F,)``, of the teacher's features.
        steps: length of the run, for the cosine schedule.
        batch_size: images of a whole batch.
        teacher: makes the features of images that come without.

    Attributes:
        gradient_norm: of the last step.
    """

    def __init__(
        self,
        model: APM,
        config: TrainConfig,
        mean: Tensor,
        std: Tensor,
        *,
        steps: int,
        batch_size: int,
        accumulate: int = 1,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.config, self.teacher = model, config, teacher
        self.mean, self.std = mean.to(model.device), std.to(model.device)
        self.steps, self.batch_size, self.accumulate = steps, batch_size, accumulate
        self.steps_done, self.gradient_norm = 0, 0.0
        broadcast_weights(model)
        slow = [*model.fold.parameters(), *model.rgb_first.parameters()]
        rest = [p for p in model.parameters() if not any(p is other for other in slow)]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest, "scale": 1.0}, {"params": slow, "scale": config.fold_rate}],
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimiser.

        Args:
            parts: this process's ``shares`` of the batch: images ``(B, 3, H, W)`` uint8 RGB and
                teacher features ``(B, N, F)`` of the whole grid, or of one a whole number of times
                as fine; empty for the teacher to make.

        Returns:
            Feature loss and RGB loss before the step, of the whole batch, ``(2,)``.

        Raises:
            NonFiniteError: if they, or the gradients, are infinite or not a number.
        """
        config = self.config
        self.model.train()
        self.optimizer.zero_grad()
        generator = generator_at(config.seed, self.steps_done)
        places = torch.randperm(self.model.config.grid_size**2, generator=generator)
        places = places[: config.locations]
        half = self.model.config.patch_size // 2
        moved = [0, 0]
        if config.augment:
            moved = torch.randint(-half, max(half, 1), (2,), generator=generator).tolist()
        # The first images of a batch, which is in random order already.
        sees_local = torch.arange(self.batch_size) >= round(self.batch_size * config.null_share)
        total = torch.zeros(2, device=self.model.device)
        mine = shares(range(self.batch_size), self.accumulate)
        for (pixels, features), images in zip(parts, mine, strict=True):
            features = self.features(pixels, features)
            losses = self.losses(pixels, features, places, sees_local[images], moved)
            losses = losses * (len(images) / self.batch_size)
            (losses[0] + config.rgb_weight * losses[1]).backward()
            total += losses.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        sum_over_processes([*gradients, total])
        self.gradient_norm = torch.stack([g.norm() for g in gradients]).norm().item()
        if not math.isfinite(self.gradient_norm + total.sum().item()):
            raise NonFiniteError(
                f"step {self.steps_done + 1}: feature loss {total[0]:.4g}, RGB loss "
                f"{total[1]:.4g}, gradient {self.gradient_norm:.4g}"
            )
        for group in self.optimizer.param_groups:
            rate = config.rate(self.steps_done, self.steps) * config.learning_rate
            group["lr"] = group["scale"] * rate
        self.optimizer.step()
        self.steps_done += 1
        return total.cpu()

    def features(self, pixels: Tensor, features: Tensor) -> Tensor:
        """The given features, or if they are empty the teacher's."""
        if features.numel() or self.teacher is None:
            return features
        with precision(self.model.device, self.config.dtype):
            return self.teacher(pixels.to(self.model.device) / 255)

    def losses(
        self,
        pixels: Tensor,
        features: Tensor,
        places: Tensor,
        sees_local: Tensor,
        moved: Sequence[int] = (0, 0),
    ) -> Tensor:
        """Feature loss and RGB loss, ``(2,)``.

        Args:
            places: ``(n,)``, indices of the grid's locations that are asked for.
            sees_local: ``(B,)`` bool, as of ``APM.query``.
            moved: (rows, columns) by which all these locations are off the grid, in pixels.
        """
        model, device = self.model, self.model.device
        pixels, places, sees_local = (t.to(device) for t in (pixels, places, sees_local))
        off_grid = torch.tensor(moved, device=device) / model.config.patch_size
        positions = model.grid_positions()[places] + off_grid
        with precision(device, self.config.dtype):
            images = model.preprocessing.normalise(pixels)
            column = model.encode(images)
            answers, rgb = model.query(column, positions, images=images, sees_local=sees_local)
        targets = bilinear(features.to(device), positions, model.config.grid_size)
        colours = self._colours(pixels, moved)[:, places]
        feature_loss = FEATURE_LOSS_FUNCTIONS[self.config.feature_loss]
        return torch.stack(
            [
                feature_loss(answers.float(), targets, self.mean, self.std),
                F.mse_loss(rgb.float(), colours),
            ]
        )

    def _colours(self, pixels: Tensor, moved: Sequence[int] = (0, 0)) -> Tensor:
        """The mean colour of every patch: ``(B, N, 3)``."""
        colours = move(self.model.preprocessing.colours(pixels), *moved)
        return rgb_targets(colours, self.model.config.patch_size)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Losses on the whole grid and the RGB R2, with local patches and (null) without.

        R2 is 1 - squared error / variance of the colours over all images, channels together; 0 if
        the colours are all the same. Batches are this process's share; numbers are over all.
        """
        self.model.eval()
        prefixes = {"": True} | ({"null_": False} if self.model.config.local_width else {})
        names = [prefix + loss for prefix in prefixes for loss in LOSSES]
        # Over images: the losses, 1, the mean colour (3) and the mean square of the colours.
        sums = torch.zeros(len(names) + 5, device=self.model.device)
        places = torch.arange(self.model.config.grid_size**2)
        for pixels, features in batches:
            features = self.features(pixels, features)
            losses = [
                self.losses(pixels, features, places, torch.full((len(pixels),), local))
                for local in prefixes.values()
            ]
            colours = self._colours(pixels.to(sums.device))
            moments = [sums.new_ones(()), *colours.mean(dim=(0, 1)), colours.square().mean()]
            sums += len(pixels) * torch.cat([*losses, torch.stack(moments)])
        sum_over_processes([sums])
        *means, _, red, green, blue, squares = (sums / sums[len(names)]).tolist()
        result = dict(zip(names, means, strict=True))
        variance = squares - (red**2 + green**2 + blue**2) / 3
        for prefix in prefixes:
            error = result[f"{prefix}rgb_loss"]
            result[f"{prefix}rgb_r2"] = 1 - error / variance if variance > 1e-6 else 0.0
        return result
