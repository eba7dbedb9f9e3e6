import numpy as np
from conftest import photograph
from PIL import Image

import apm.comparison
from apm.comparison import Look, score
from apm.predictor import perceive


def test_what_is_scored_is_what_is_shown(model, monkeypatch, tmp_path):
    scored = []

    def note(points, labels, seed):
        scored.append(points)
        return 0.0, 0.0

    monkeypatch.setattr(apm.comparison, "island_scores", note)
    Image.new("L", (120, 40), 1).save(tmp_path / "mask.png")
    image = photograph(120, 40)  # neighbours are nearer along a column than along a row
    score(Look(model, None, "stretch"), image, tmp_path / "mask.png", 16, 1, 0)
    for consensus in (0, 1):
        shown = perceive(model, image, grid=16, fit="stretch", consensus=consensus).features
        assert any(np.array_equal(shown, points) for points in scored)
