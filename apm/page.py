"""A page to explore a run's islands in: index.html, opened from disk, and its data beside it."""

import base64
import hashlib
import json
import math
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from apm.drawing import enlarge, shape_of
from apm.predictor import Percept, crop_report
from apm.runtime.files import atomic_path

TEMPLATE = Path(__file__).with_name("page.html")
DATA = "index_files"  # the folder of the page's pictures and features
DIM, SIDE = 32, 32  # of the page's features: numbers a place, most places along a side
JPEG_QUALITY = 88
THUMBNAIL = 256  # px, longer side: a folder of whole photographs would fill a browser's memory
# What tells how a run's islands were made, by the names of the flags.
FACTS = ("checkpoint", "teacher", "method", "seed", "grid", "fit", "consensus", "iterations")


class Page:
    """What a run shows, picture by picture; ``save`` writes the page.

    Pictures are written as they come. Features wait in a file without a name, as a principal
    component analysis of all of them goes before: a page holds the cosine similarities of any two
    places of the run.

    Args:
        folder: where ``index.html`` goes; the page of a former run there is removed at once,
            with its files.
        arguments: of the run; those of ``FACTS`` become its caption.
        joint: whether colours carry over from picture to picture.
    """

    def __init__(
        self, folder: Path, title: str, arguments: Mapping[str, Any], *, joint: bool = False
    ) -> None:
        self.folder = folder
        (folder / "index.html").unlink(missing_ok=True)
        for path in (folder / DATA).glob("[0-9]" * 5 + "*.*"):
            path.unlink()
        facts = {name: arguments.get(name) for name in FACTS}
        self.run: dict[str, Any] = {
            "title": title,
            "facts": {
                name: Path(str(value)).name if Path(str(value)).is_file() else str(value)
                for name, value in facts.items()
                if value is not None
            },
            "joint": joint,
            "items": [],
        }
        self.moments: dict[str, np.ndarray] = {}  # (F, F) of each model's features
        self.cosine_error: dict[str, dict[str, float]] = {}
        self._written: dict[bytes, str] = {}  # digest of a panel -> its file
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long as the page
        weakref.finalize(self, self._spool.close)

    def add(
        self,
        name: str,
        panels: Mapping[str, np.ndarray],
        features: Mapping[str, np.ndarray],
        caption: str,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Add a picture.

        Args:
            panels: label -> ``(h, w, 3)``, uint8 or float in [0, 1]; the others can be laid over
                the first.
            features: name of a model -> its features ``(h, w, F)``, at the same places for each;
                the same names for each picture of a run. Finer grids than ``SIDE`` are averaged.
            caption: a line about the picture.
            scores: by which pictures can be sorted.
        """
        items, first = self.run["items"], next(iter(panels.values()))
        files = [
            self._save_panel(f"{len(items):05}_{place}", picture)
            for place, picture in enumerate(panels.values())
        ]
        small = shape_of(first, THUMBNAIL)
        thumbnail = first if max(first.shape) <= THUMBNAIL else enlarge(first, small)
        items.append(
            {
                "name": name,
                "caption": caption,
                "aspect": round(first.shape[1] / first.shape[0], 4),
                "thumbnail": self._save_panel(f"{len(items):05}_thumbnail", thumbnail),
                "panels": dict(zip(panels, files, strict=True)),
                "scores": dict(scores or {}),
            }
        )
        for model, grid in features.items():
            directions = unit_directions(grid)
            points = directions.reshape(-1, directions.shape[-1])
            self.moments[model] = self.moments.get(model, 0) + points.T @ points
            try:
                np.save(self._spool, directions.astype(np.float16))
            except OSError as error:
                raise OSError(f"{self.folder}: cannot be written to ({error})") from error

    def add_percept(
        self,
        name: str,
        size: tuple[int, int],
        view: Percept,
        islands: np.ndarray,
        model: str = "student",
    ) -> None:
        """Add a photograph of ``size`` (width, height) with its islands ``(h, w, 3)`` in [0, 1]."""
        panels = percept_panels(view, islands)
        self.add(name, panels, {model: view.features}, size_caption(size, view.left_out))

    def _save_panel(self, stem: str, picture: np.ndarray) -> str:
        """Photographs are uint8 and become JPEG; what has a colour a place stays exact."""
        photograph = picture.dtype == np.uint8
        pixels = picture if photograph else (picture * 255).round().astype(np.uint8)
        kind = repr((photograph, pixels.shape)).encode()
        digest = hashlib.sha256(kind + pixels.tobytes()).digest()
        if digest not in self._written:  # the two ends of an interpolation stand beside each step
            path = self.folder / DATA / f"{stem}.{'jpg' if photograph else 'png'}"
            with atomic_path(path) as temporary:
                Image.fromarray(pixels).save(temporary, quality=JPEG_QUALITY)
            self._written[digest] = path.name
        return self._written[digest]

    def save(
        self,
        steps: Sequence[float] | None = None,
        step_name: str = "step",
        losses: Sequence[float] = (),
    ) -> dict[str, dict[str, float]]:
        """Write the page.

        Args:
            steps: where the pictures of the run lie on a line; they get a slider, not a folder.
            losses: after 0, 1, 2, ... steps, for a curve.

        Returns:
            For each model the error of the cosines in the page, mean and 99th percentile, that of
            the worst picture.
        """
        axes = {
            model: np.linalg.eigh(m)[1][:, : -DIM - 1 : -1] for model, m in self.moments.items()
        }
        errors: dict[str, list[tuple[float, float]]] = {model: [] for model in axes}
        self._spool.seek(0)
        for index in range(len(self.run["items"])):
            content = {}
            for model in axes:
                directions = np.load(self._spool).astype(np.float32)
                content[model], error = compress(directions, axes[model])
                errors[model].append((float(error.mean()), float(np.percentile(error, 99))))
            path = self.folder / DATA / f"{index:05}.js"
            with atomic_path(path) as temporary:
                temporary.write_text(f"received({index},{script_json(content)})\n")
        self._spool.close()
        if steps is not None:
            known = [loss if math.isfinite(loss) else None for loss in losses]
            self.run["steps"] = {"name": step_name, "values": list(steps), "losses": known}
        self.cosine_error = {
            model: {"mean": float(np.mean(means)), "99%": max(most)}
            for model, pairs in errors.items()
            for means, most in [zip(*pairs, strict=True)]
        }
        self.run["facts"]["mean error of cosines here"] = ", ".join(
            f"{error['mean']:.3f} ({model})" for model, error in self.cosine_error.items()
        )
        page = TEMPLATE.read_text(encoding="utf-8").replace("RUN_AS_JSON", script_json(self.run))
        with atomic_path(self.folder / "index.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
        return self.cosine_error

    def __str__(self) -> str:
        """The line that a script prints once the page is saved."""
        models = ", ".join(
            f"{model}'s {error['mean']:.3f} (99 % under {error['99%']:.3f})"
            for model, error in self.cosine_error.items()
        )
        return f"{self.folder / 'index.html'}: mean error of its cosines, {models}"


def percept_panels(view: Percept, islands: np.ndarray) -> dict[str, np.ndarray]:
    """The panels of a photograph that a model has seen."""
    answered = {} if view.rgb is None else {"reconstruction": view.rgb}
    return {"photograph": view.picture, "islands": islands} | answered


def size_caption(size: tuple[int, int], left_out: Mapping[str, float]) -> str:
    """A photograph's (width, height), and what a crop left out of it."""
    original = f"{size[0]} x {size[1]} px"
    return crop_report({original: left_out}) or original


def unit_directions(features: np.ndarray) -> np.ndarray:
    """Features ``(h, w, F)`` -> float32 of length 1 on at most ``SIDE`` places a side, averaged."""
    grid = torch.from_numpy(np.ascontiguousarray(features, np.float32)).permute(2, 0, 1)
    shape = (min(len(features), SIDE), min(features.shape[1], SIDE))
    few = torch.nn.functional.adaptive_avg_pool2d(grid, shape).permute(1, 2, 0)
    return torch.nn.functional.normalize(few, dim=-1).numpy()


def compress(directions: np.ndarray, axes: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Features of length 1 as int8 along principal axes, whose dot products stay their cosines.

    Args:
        directions: ``(h, w, F)``.
        axes: ``(F, D)``.

    Returns:
        Shape, scale and base64 of ``(h * w, D)``, and the errors of the cosines of some places with
        all.
    """
    points = directions.reshape(-1, directions.shape[-1])
    small = points @ axes
    scale = max(float(np.abs(small).max()), 1e-12) / 127
    numbers = (small / scale).round().astype(np.int8)
    some = np.random.default_rng(0).permutation(len(points))[:16]
    known = numbers * np.float32(scale)
    errors = np.abs(points[some] @ points.T - known[some] @ known.T)
    values = base64.b64encode(numbers.tobytes()).decode()
    return {"shape": directions.shape[:2], "scale": scale, "values": values}, errors


def script_json(content: Any) -> str:
    """JSON that no string in it can end a script element with, in ASCII."""
    return json.dumps(content).replace("<", "\\u003c")
