"""Student and teacher at the same places of a picture: their features, colours and scores."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apm.islands import Palette, palette_chain
from apm.layers import bilinear
from apm.model import APM
from apm.predictor import Percept, agreeing, mean_colours, perceive
from apm.preprocessing import to_pixels
from apm.scores import island_scores, mask_labels, ways_to
from apm.teachers import DenseTeacher, architecture_of, load_dense_teacher

logger = logging.getLogger(__name__)
Colours = Callable[[np.ndarray], np.ndarray]  # of features, as a Palette


@dataclass
class Look:
    """How student and teacher, where there is one, look at pictures; ``fit`` and more as of
    ``perceive``.
    """

    model: APM
    teacher: DenseTeacher | None
    fit: str
    chunk_size: int | None = None
    dtype: str = "float32"

    def student(self, image: Image.Image, grid: int, **more: Any) -> Percept:
        """As ``perceive``."""
        more |= {"fit": self.fit, "chunk_size": self.chunk_size, "dtype": self.dtype}
        return perceive(self.model, image, grid=grid, **more)

    def tokens(self, image: Image.Image, grid: int, density: int = 1) -> np.ndarray | None:
        """The teacher's features at the places of the student's: ``(h, w, F)``."""
        if self.teacher is None:
            return None
        self.teacher.density = density
        square = replace(self.model.preprocessing, fit=self.fit).picture(image)
        tokens = self.teacher(to_pixels(square)[None].to(self.model.device) / 255)  # (1, N, F)
        positions = self.model.grid_positions(grid)
        tokens = bilinear(tokens, positions, self.model.config.grid_size)
        return tokens.view(grid, grid, -1).cpu().numpy()

    def both(self, image: Image.Image, grid: int, consensus: int) -> tuple[Percept, np.ndarray]:
        """The percept, and features of the student and of a teacher, if any: ``(S, h, w, F)``."""
        percept, tokens = self.student(image, grid, consensus=consensus), self.tokens(image, grid)
        found = [percept.features]
        if tokens is not None:
            found.append(agreeing(tokens, percept.picture, consensus))
        return percept, np.stack(found)


def teacher_of(
    model: APM, name: str | None, weights: Path | None, block: int | None, margin: int | None
) -> DenseTeacher | None:
    """The teacher to set beside a model, if one is named by its name or its weights.

    Block and margin default to those that the model learnt from, where it learnt from such a ViT.
    """
    trained = model.provenance.get("teacher")
    trained = trained if isinstance(trained, dict) else {}
    if name is None and weights:
        name = trained.get("teacher")
    if not name:
        if any(given is not None for given in (weights, block, margin)):
            raise ValueError("--teacher-weights, -block, -margin: name the teacher with --teacher")
        return None
    like = architecture_of(str(trained.get("teacher"))) == architecture_of(name)
    known = trained if like else {}
    teacher = load_dense_teacher(
        name,
        weights,
        grid_size=model.config.grid_size,
        block=known.get("block", -1) if block is None else block,
        margin=known.get("margin", 0) if margin is None else margin,
    )
    if teacher.feature_dim != model.config.feature_dim:
        raise ValueError(
            f"--teacher {name!r} has features of width {teacher.feature_dim}, the checkpoint "
            f"answers {model.config.feature_dim}: name the teacher that it learnt from"
        )
    if trained and known.get("weights_sha256", "") != teacher.identity["weights_sha256"]:
        logger.warning("--teacher %r: other weights than the checkpoint learnt from", name)
    return teacher.to(model.device)


def palettes(landmarks: np.ndarray, method: str, seed: int) -> list[Colours]:
    """Colours for the features of each of S models, in which what is alike has like colours.

    ``landmarks`` ``(S, ..., F)`` are as of ``Palette``, at the same places for each model.
    """
    if len(landmarks) == 1:
        return [Palette(landmarks, method, seed)]
    if method == "tsne":
        return [*palette_chain(landmarks, 3, seed)]
    means = [points.reshape(-1, points.shape[-1]).mean(axis=0) for points in landmarks]
    pairs = zip(landmarks, means, strict=True)
    shared = Palette(np.stack([directions(points, mean) for points, mean in pairs]), method, seed)
    return [partial(_by_direction, shared, mean) for mean in means]


def _by_direction(palette: Palette, mean: np.ndarray, features: np.ndarray) -> np.ndarray:
    return palette(directions(features, mean))


def directions(features: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """``(..., F)`` centred, every location of length 1: students' features are shorter."""
    if mean is None:
        mean = features.reshape(-1, features.shape[-1]).mean(axis=0)
    centred = features - mean
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)


def score(
    look: Look, image: Image.Image, mask: Path, grid: int, consensus: int, seed: int
) -> tuple[dict[str, tuple[float, float]], Percept]:
    """ARI and NMI of each kind of features, and the percept; none if the mask has one class only.

    Raises:
        UnreadableImage: if the mask cannot be read, or is not of the image's shape.
    """
    model, own = look.model, look.model.config.grid_size
    percept = few = look.student(image, grid)
    tokens = few_tokens = look.tokens(image, grid, max(1, grid // own))
    if grid != own:
        few, few_tokens = look.student(image, own), look.tokens(image, own)
    labels = mask_labels(mask, image.size, replace(model.preprocessing, fit=look.fit), grid)
    colours, few_colours = (mean_colours(percept.picture, side) for side in (grid, own))
    aspect = percept.picture.shape[0] / percept.picture.shape[1]
    ways = partial(ways_to, colours=colours, consensus=consensus, aspect=aspect)
    features = ways("student", percept.features, few=few.features, few_colours=few_colours)
    if model.config.local_width:
        features["column alone"] = look.student(image, grid, local=False).features
    if tokens is not None and few_tokens is not None:
        features |= ways("teacher", tokens, few=few_tokens, few_colours=few_colours)
    features["colour"] = colours.numpy()
    features["position"] = np.indices((grid, grid)).transpose(1, 2, 0)
    scores = {name: island_scores(points, labels, seed) for name, points in features.items()}
    return {name: values for name, values in scores.items() if values is not None}, percept
