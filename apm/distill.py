"""Distilling a dense teacher into an APM (paper, section 3): one step, one validation."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.losses import (
    feature_loss,
    relational_feature_loss,
    rgb_targets,
    standardised_feature_loss,
)
from apm.model import APM
from apm.positional_encoding import sincos_2d
from apm.resumable import ResumableTrainer, generator_at
from apm.runtime.cli import precision
from apm.runtime.distributed import broadcast_weights, rank, sum_over_processes, world_size
from apm.runtime.interrupts import delayed_signals
from apm.teachers import DenseTeacher

LOSSES = ("feature_loss", "rgb_loss")


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or not a number; the weights are those before the step."""


class DistillationTrainer(ResumableTrainer):
    """Trains an APM on batches of images and teacher features.

    A part of each batch goes without its local patches, so that one model answers from image and
    column and from the column alone. Every random choice is a function of seed and step: there is
    no generator whose state could be lost, and a run that goes on from ``state_dict`` is the run
    that was never stopped.

    A batch may be shared out over processes, and by each process over ``accumulate`` parts
    (``split_batch``). The choices above are made for the whole batch, and gradients are added up
    over all parts before the one update, so that neither number changes what is learnt.

    Args:
        model: the APM to train, on its device.
        mean, std: ``(F,)``, of the teacher's features.
        steps: length of the run, for the cosine schedule.
        locations: random locations a step.
        null_share: share of each batch without local patches, 0..1.
        accumulate: parts in which a process works through its share of a batch.
        teacher: makes the features of images that come without.

    Attributes:
        step_index: steps done.
        loss_sums: feature and RGB loss, added up over the steps of this epoch, ``(2,)`` float64.
        gradient_norm: of the last step.
    """

    model: APM

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
        accumulate: int = 1,
        teacher: DenseTeacher | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self.model, self.steps, self.schedule, self.warmup = model, steps, schedule, warmup
        self.locations, self.rgb_weight = locations, rgb_weight
        self.null_share = null_share if model.config.local_width else 0.0
        self.feature_loss = feature_loss
        self.accumulate, self.teacher = accumulate, teacher
        self.dtype, self.seed, self.step_index = dtype, seed, 0
        self.device = model.device
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        broadcast_weights(model)
        self.optimizer = torch.optim.AdamW(
            _groups(model, learning_rate), weight_decay=weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.loss_sums, self.gradient_norm = torch.zeros(2, dtype=torch.float64), 0.0
        # All gradients in one piece, which processes add up in one message, and the two losses.
        parameters = list(model.parameters())
        self.totals = torch.zeros(sum(p.numel() for p in parameters) + 2, device=self.device)
        gradients = self.totals[:-2].split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)

    def step(
        self,
        parts: Iterable[tuple[Tensor, Tensor]],
        batch_size: int,
        report: Callable[[float, float], None] | None = None,
    ) -> tuple[float, float]:
        """One step of the optimiser.

        Args:
            parts: what ``split_batch`` makes of the batch: images ``(B, 3, H, W)`` uint8 RGB and
                teacher features of the whole grid, ``(B, N, F)``, or empty for the teacher to make.
            batch_size: images of the whole batch.
            report: called with the losses when the step is done, before a signal ends the run.

        Returns:
            Feature loss and RGB loss before the step, of the whole batch.

        Raises:
            NonFiniteError: if they, or the gradients, are infinite or not a number.
        """
        self.model.train()
        self.totals.zero_()
        generator = generator_at(self.seed, self.step_index)
        places = self.model.config.grid_size**2
        chosen = torch.randperm(places, generator=generator)[: self.locations]
        null = round(batch_size * self.null_share)  # the first images of the whole batch
        for (pixels, targets), offset in zip(parts, _offsets(self.accumulate), strict=True):
            first_local = len(range(offset, null, world_size() * self.accumulate))
            self._backward(pixels, targets, first_local, chosen, batch_size)
        sum_over_processes(self.totals)
        self.gradient_norm = self.totals[:-2].norm().item()
        losses = self.totals[-2:].cpu().double()
        if not math.isfinite(self.gradient_norm + losses.sum()):
            raise NonFiniteError(
                f"step {self.step_index + 1}: feature loss {losses[0]:.4g}, RGB loss "
                f"{losses[1]:.4g}, gradient {self.gradient_norm:.4g}"
            )
        with delayed_signals():
            self.optimizer.step()
            self.scheduler.step()
            self.step_index += 1
            self.loss_sums += losses
            feature, rgb = losses.tolist()
            if report:
                report(feature, rgb)
        return feature, rgb

    def _backward(
        self, pixels: Tensor, targets: Tensor, first_local: int, chosen: Tensor, batch_size: int
    ) -> None:
        """Add one part's gradients and losses to the totals."""
        targets = self.targets(pixels, targets)[:, chosen]
        for part, local in ((slice(first_local), False), (slice(first_local, None), True)):
            if not len(pixels[part]):
                continue
            losses = torch.stack(
                self.losses(pixels[part], targets[part], local=local, chosen=chosen)
            ) * (len(pixels[part]) / batch_size)
            (losses[0] + self.rgb_weight * losses[1]).backward()
            self.totals[-2:] += losses.detach()

    def targets(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """``(B, N, F)``: the given features, or if they are empty the teacher's."""
        if targets.numel() or self.teacher is None:
            return targets
        with precision(self.device, self.dtype):
            return self.teacher(pixels.to(self.device) / 255)

    def losses(
        self, pixels: Tensor, targets: Tensor, *, local: bool, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Feature and RGB loss at the ``chosen`` places ``(n,)`` of the grid.

        Args:
            pixels: ``(B, 3, H, W)`` uint8 RGB.
            targets: ``(B, n, F)``, teacher features at those places.
            local: whether with local patches.
            chosen: indices of the places.
        """
        pixels, chosen = pixels.to(self.device), chosen.to(self.device)
        targets = targets.to(self.device).float()
        images = self.model.preprocessing.normalise(pixels)
        with precision(self.device, self.dtype):
            features, rgb = self.model.query(
                self.model.encode(images),
                self.model.grid_positions()[chosen],
                images=images if local else None,
            )
        features, colours = features.float(), self._colours(pixels)[:, chosen]
        if self.feature_loss == "relational":
            loss = relational_feature_loss(features, targets, self.mean, self.std)
        elif self.feature_loss == "standardised":
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

        R2 is 1 - squared error / variance of the colours over all images, channels together; 0 if
        the colours are all the same.

        Args:
            batches: this process's share of the images, as for ``step``.

        Returns:
            The numbers over the images of all processes.
        """
        self.model.eval()
        prefixes = {"": True, "null_": False} if self.null_share else {"": True}
        names = [prefix + loss for prefix in prefixes for loss in LOSSES]
        # Over images: the losses, 1, the mean colour (3) and the mean square of the colours.
        sums = torch.zeros(len(names) + 5, dtype=torch.float64)
        chosen = torch.arange(self.model.config.grid_size**2)
        for pixels, targets in batches:
            targets = self.targets(pixels, targets)
            values: list[Tensor] = []
            for local in prefixes.values():
                values += self.losses(pixels, targets, local=local, chosen=chosen)
            colours = self._colours(pixels.to(self.device))
            values += [colours.new_ones(()), *colours.mean(dim=(0, 1)), colours.square().mean()]
            sums += len(pixels) * torch.stack(values).cpu()
        sums = sum_over_processes(sums.float().to(self.device))
        count = sums[len(names)]
        *means, _, red, green, blue, squares = (sums / count).tolist()
        result = dict(zip(names, means, strict=True))
        variance = squares - (red**2 + green**2 + blue**2) / 3
        for prefix in prefixes:
            error = result[f"{prefix}rgb_loss"]
            result[f"{prefix}rgb_r2"] = 1 - error / variance if variance > 1e-6 else 0.0
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on."""
        return super().state_dict() | {"loss_sums": self.loss_sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        super().load_state_dict(state)
        self.loss_sums = state["loss_sums"].clone()


def _groups(model: APM, learning_rate: float) -> list[dict[str, Any]]:
    """Parameters and their learning rates, for the optimiser."""
    if not looks_up(model):
        return [{"params": model.parameters(), "lr": learning_rate}]
    slow = [*model.fold.parameters(), *model.rgb_first.parameters()]
    rest = [p for p in model.parameters() if not any(p is other for other in slow)]
    # Adam's first steps, all of one sign, would throw a thumbnail about.
    return [{"params": rest, "lr": learning_rate}, {"params": slow, "lr": learning_rate / 10}]


def split_batch(batch: list[int], accumulate: int = 1) -> list[list[int]]:
    """This process's parts of a batch: of n parts in all, part p takes every n-th from p on."""
    return [batch[offset :: world_size() * accumulate] for offset in _offsets(accumulate)]


def _offsets(accumulate: int) -> range:
    return range(rank() * accumulate, (rank() + 1) * accumulate)


@torch.no_grad()
def start_at_mean(model: APM, mean: Tensor) -> None:
    """Let a new model answer the teacher's mean feature ``(F,)`` and start its RGB head."""
    model.feature_head.bias.copy_(mean)
    start_rgb_head(model)


@torch.no_grad()
def start_rgb_head(model: APM) -> None:
    """Draw the RGB head anew: it answers grey, or where it is wide enough a grey thumbnail.

    For the thumbnail the fold is made anew as well.
    """
    fresh = APM(model.config).to(model.device)
    model.rgb_first, model.rgb_head = fresh.rgb_first, fresh.rgb_head
    # The last ReLU would never learn if it started dead.
    last: Any = model.rgb_head[-1]
    last.bias.fill_(0.5)
    if looks_up(model):
        _start_as_thumbnail(model)


def looks_up(model: APM) -> bool:
    """Whether the RGB head has a hidden unit for every patch that the fold reads, and one after."""
    widths = model.config.rgb_widths
    wide = widths[0] >= model.config.column_dim and len(widths) > 1
    return wide and isinstance(model.fold, nn.Conv2d)


def _start_as_thumbnail(model: APM) -> None:
    """Fold each patch to its brightness, and let one hidden unit a place look its entry up.

    To answer entry k of the column at place k, a product of column and position, is what an MLP
    learns last from random weights. Here unit k reads entry k, and its bias keeps it shut
    wherever the position is not that of place k. The next layers hand the open unit on.
    """
    gain, least = 0.7, 0.3  # an open unit holds ``least + gain * brightness``
    first, places = model.rgb_first, slice(model.config.column_dim)
    fold: Any = model.fold
    layers: list[Any] = list(model.rgb_head)
    brightness = torch.tensor([0.299, 0.587, 0.114])
    if model.preprocessing.channels == "BGR":
        brightness = brightness.flip(0)
    mean, std = model.preprocessing.statistics()
    fold.weight.copy_((brightness * std / model.config.patch_size**2).view(1, 3, 1, 1))
    fold.bias.fill_(brightness @ mean)
    encoding = sincos_2d(model.grid_positions(), model.config.position_dim)
    encoding /= model.config.position_dim / 2  # which is its square norm
    likeness = encoding @ encoding.T * (model.config.position_dim / 2)  # 1 on the diagonal
    slope = (least + gain) / (1 - likeness.fill_diagonal_(-1).max())  # shuts the nearest place
    first.position.weight[places] = slope * encoding
    first.column.weight[places] = gain * torch.eye(model.config.column_dim)
    first.column.bias[places] = least - slope
    for other in (first.feature, first.local):
        if other is not None:
            other.weight[places] = 0
    for layer in layers:
        layer.weight.mul_(0.1)  # what else there is shall not drown it
    layers[0].weight[0, places] = 1
    for layer in layers[1:-1]:
        layer.weight[0, 0] = 1
    layers[-1].weight[:, 0] = 1 / gain
    layers[-1].bias.fill_(-least / gain)
