"""The paper's Figure 2: what a forward pass costs against its number of patches."""

from functools import partial
from pathlib import Path
from typing import Any

import released
import torch
from baselines import clip_inputs
from matplotlib.figure import Figure
from released import LOCATIONS
from timing import seconds_of
from torch import Tensor, nn
from workloads import FEW

from apm import APM
from apm.drawing import save_figure
from apm.runtime.device import multiply_adds

PATCHES = sorted((7, 14, 28, 56, 112, 224, *FEW))  # the paper's, and these


def features(model: APM, images: Tensor, locations: int = LOCATIONS) -> Tensor:
    """Our feature grid or its first locations, ``(B, N, F)``."""
    query = model.unfold(model.encode(images), model.grid_positions()[:locations])
    return model.feature_head(model.hidden(query))


@torch.no_grad()
def figure_rows(model: APM, clip: nn.Module, clip_gmacs: float, repeats: int) -> list[dict]:
    """GMACs and milliseconds of a forward pass: for each number of patches, for all, and CLIP's.

    Both models are on one device.
    """
    with model.device:
        images, pair = torch.rand(1, 3, 448, 448), clip_inputs()
    column = model.encode(images)
    rows: list[dict[str, Any]] = []
    for patches in (*PATCHES, LOCATIONS):
        theirs = multiply_adds(partial(released.features, model, column, patches, patches))
        ours = partial(features, model, images, patches)
        row = {"name": f"APM, {patches} patches", "released": theirs / 1e9}
        row |= {"ours": multiply_adds(ours) / 1e9}
        rows.append(row | {"time (ms)": 1e3 * seconds_of(ours, model.device, repeats)})
    seconds = seconds_of(partial(clip, *pair), model.device, repeats)
    row = {"name": "CLIP ViT-B/16, image + prompt", "released": None, "ours": clip_gmacs}
    return [*rows, row | {"time (ms)": 1e3 * seconds}]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Lines over ``PATCHES``, of which ``FEW`` have no tick; what all and CLIP cost is dotted."""
    steps, totals = rows[: len(PATCHES)], rows[len(PATCHES) :]
    figure = Figure(figsize=(10, 4), layout="constrained")
    work, time = figure.subplots(1, 2)
    work.plot(PATCHES, [row["released"] for row in steps], "o-", label="APM, released arithmetic")
    for axes, column, label in (
        (work, "ours", "GMACs per iteration"),
        (time, "time (ms)", "forward time (ms)"),
    ):
        axes.plot(PATCHES, [row[column] for row in steps], "o-C1", label="APM, this project")
        for colour, row in zip(("C1", "C2"), totals, strict=True):
            axes.axhline(row[column], color=colour, linestyle=":", label=f"total: {row['name']}")
        axes.set(xlabel="patches per step", ylabel=label, xscale="log", yscale="log")
        ticks = [patches for patches in PATCHES if patches not in FEW]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    figure.legend(*work.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(path, figure)
