"""A training run: its epochs, its files, and how it goes on after a stop."""

import csv
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from apm.checkpoint import load_tensors, save_model, save_tensors
from apm.data.images import DistillationDataset
from apm.distill import DistillationTrainer, NonFiniteError, split_batch
from apm.figures import loss_figure
from apm.resumable import generator_at
from apm.runtime.distributed import rank, world_size
from apm.runtime.files import atomic_path
from apm.runtime.interrupts import delayed_signals
from apm.runtime.logs import StepLog

STATE = "last.pth"
CHECKPOINT = "apm.pth"


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The whole batches of an epoch, in an order that seed and epoch decide."""
    generator = generator_at(seed, epoch)
    order = torch.randperm(images, generator=generator).tolist()
    return [order[i : i + batch_size] for i in range(0, images - batch_size + 1, batch_size)]


def refuse_a_second_run(output: Path, resume: bool) -> None:
    """Do not write over a run.

    Raises:
        ValueError: if there is one in the folder that is not to be resumed.
    """
    if (output / STATE).exists() and not resume:
        raise ValueError(f"{output}: holds a run; add --resume or choose another --output")


def load_state(
    path: Path, settings: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> list[dict[str, float]]:
    """Give the trainer the state in a run's file, if there is one.

    Args:
        settings: plain values that must be those in the file.
        load: a trainer's ``load_state_dict``.

    Returns:
        The run's history until then.

    Raises:
        ValueError: if the file belongs to a run with other settings, or is damaged.
    """
    if not path.exists():
        return []
    state = load_tensors(path)
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise ValueError(f"{path}: not the state of a run; choose another --output")
    for name, value in settings.items():
        if (former := state["settings"].get(name)) != value:
            raise ValueError(
                f"{path}: made with {name} {former!r}, not {value!r}; go on with the same, or "
                "choose another --output"
            )
    try:
        load(state)
        return state["history"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


class Waiting:
    """Iterates over batches and adds up the ``seconds`` that it waits for them."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        iterator = iter(self.batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator, None)
            except (ValueError, OSError) as error:  # a worker's comes with its whole traceback
                kind, reason = type(error), str(error).strip().split("\n")[-1]
                raise kind(reason.removeprefix(f"{kind.__name__}: ")) from error
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


@dataclass(kw_only=True)
class Run:
    """A training run in a folder. Of several processes the first writes.

    Attributes:
        trainer: takes the steps.
        training, validation: images and features.
        output: the run's folder.
        settings: plain values that a run which goes on must share with the one that was stopped.
        provenance: plain values about the run, for its checkpoint.
        epochs: length of the run.
        batch_size: images a step, over all processes.
        workers: processes that read images, for each process.
        save_every: steps between states, besides one at the end of each epoch.
        history: a row of numbers for each epoch that is over.
    """

    trainer: DistillationTrainer
    training: DistillationDataset
    validation: DistillationDataset
    output: Path
    settings: dict[str, Any]
    provenance: dict[str, Any]
    epochs: int
    batch_size: int
    workers: int = 0
    save_every: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def resume(self) -> None:
        """Go on from the last state, if there is one.

        Raises:
            ValueError: if it belongs to a run with other settings, or is damaged.
        """
        path = self.output / STATE
        self.history = load_state(path, self.settings, self.trainer.load_state_dict)

    def save(self) -> None:
        """Write the state."""
        if rank() == 0:
            state = {"history": self.history, "settings": self.settings}
            save_tensors(self.output / STATE, self.trainer.state_dict() | state)

    def save_checkpoint(self) -> None:
        """Write the model as it is after the last epoch."""
        model = self.trainer.model
        provenance = self.provenance | {"validation": self.history[-1]}
        save_model(self.output / CHECKPOINT, model, dtype=torch.float16, provenance=provenance)

    def train(self, tensorboard: bool = False) -> None:
        """All epochs; the state is saved after each, and when a signal ends the run."""
        log = None
        if rank() == 0:
            log = StepLog(self.output, self.trainer.step_index, tensorboard)
        try:
            while len(self.history) < self.epochs:
                row = {"epoch": len(self.history) + 1} | self.train_epoch(log) | self.validate()
                with delayed_signals():
                    self.end_epoch(row)
                if rank() == 0:
                    line = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
                    print(line, flush=True)
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            if log:
                log.close()

    def end_epoch(self, row: dict[str, float]) -> None:
        """Write what an epoch leaves; last the state, which says that it is over."""
        self.history.append(row)
        self.trainer.loss_sums.zero_()
        if rank() == 0:
            self.save_checkpoint()
            write_history(self.output, self.history)
        self.save()

    def train_epoch(self, log: StepLog | None) -> dict[str, float]:
        """What is left of an epoch; its mean losses, and how fast it went."""
        epoch, trainer, accumulate = len(self.history), self.trainer, self.trainer.accumulate
        self.training.epoch = epoch
        batches = epoch_batches(len(self.training), self.batch_size, trainer.seed, epoch)
        steps = len(batches)
        batches = batches[trainer.step_index - epoch * steps :]
        parts = [part for batch in batches for part in split_batch(batch, accumulate)]
        loaded = Waiting(DataLoader(self.training, batch_sampler=parts, num_workers=self.workers))
        items, started = iter(loaded), time.perf_counter()
        report = partial(self.log_step, log) if log else None
        title = f"epoch {epoch + 1}/{self.epochs}"
        for batch in tqdm(batches, desc=title, unit="step", disable=rank() > 0):
            try:
                trainer.step(islice(items, accumulate), self.batch_size, report)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; {self.blame(batch)}") from None
            if self.save_every and trainer.step_index % self.save_every == 0:
                self.save()
        seconds = time.perf_counter() - started
        feature, rgb = (trainer.loss_sums / steps).tolist()
        return {
            "train_feature_loss": feature,
            "train_rgb_loss": rgb,
            "images_per_second": len(batches) * self.batch_size / seconds,
            "data_wait": loaded.seconds / seconds,
        }

    def log_step(self, log: StepLog, feature_loss: float, rgb_loss: float) -> None:
        """Write the row of the step just done."""
        numbers = {
            "feature_loss": feature_loss,
            "rgb_loss": rgb_loss,
            "learning_rate": float(self.trainer.scheduler.get_last_lr()[0]),
            "gradient_norm": self.trainer.gradient_norm,
        }
        log.add(self.trainer.step_index, numbers)

    def validate(self) -> dict[str, float]:
        """Losses on the images kept out of training, shared out over the processes."""
        mine = Subset(self.validation, range(rank(), len(self.validation), world_size()))
        return self.trainer.validate(Waiting(DataLoader(mine, 8, num_workers=self.workers)))

    @torch.no_grad()
    def blame(self, batch: list[int]) -> str:
        """Which of this process's images of a batch have losses that are not finite."""
        trainer, bad = self.trainer, []
        chosen = torch.arange(trainer.model.config.grid_size**2)
        indices = sorted(i for part in split_batch(batch, trainer.accumulate) for i in part)
        for index in indices:
            pixels, features = (part[None] for part in self.training[index])
            targets = trainer.targets(pixels, features)
            losses = trainer.losses(pixels, targets, local=True, chosen=chosen)
            if not torch.stack(losses).isfinite().all():
                bad.append(index)
        if not bad:
            return "none of this process's images alone is the cause"
        names = [self.training.names[index] for index in bad]
        if len(bad) < len(indices):
            return f"images {', '.join(names)}"
        return f"all images of the batch, {', '.join(names)}: try a lower --learning-rate"


def write_history(output: Path, history: list[dict[str, float]]) -> None:
    """The numbers of each epoch as a table, the losses as a plot."""
    with atomic_path(output / "history.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    loss_figure(output / "loss.png", history)
