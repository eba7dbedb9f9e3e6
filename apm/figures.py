"""Plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from apm.runtime.files import atomic_path


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure atomically; the same figure gives the same bytes."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def loss_figure(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Feature and RGB losses of training and validation against the epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, loss in zip(figure.subplots(1, 2), ("feature_loss", "rgb_loss"), strict=True):
        for name in (f"train_{loss}", loss, f"null_{loss}"):
            if name in history[0]:
                axes.plot(epochs, [row[name] for row in history], label=name.replace("_", " "))
        axes.set(xlabel="epoch", yscale="log")
        axes.legend()
    save_figure(path, figure)


def log_loss_figure(path: Path, losses: Sequence[float]) -> None:
    """One image's loss against the iteration, on a log axis (paper, Figure 3)."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="iteration", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3)
    save_figure(path, figure)
