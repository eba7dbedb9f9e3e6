import numpy as np
import pytest
from PIL import Image

from apm.drawing import (
    enlarge,
    input_label,
    island_row,
    loss_figure,
    overlay,
    panels,
    save_gif,
    shape_of,
)
from apm.predictor import Percept

PICTURE = np.full((56, 56, 3), 200, np.uint8)
ISLANDS = np.random.default_rng(0).random((4, 4, 3), np.float32)


def test_panels_show_every_picture_at_its_place():
    rows = [{"a": PICTURE, "b": ISLANDS}, {"c": PICTURE}]
    figure = panels(rows, (56, 56))
    assert figure.shape == (2 * (24 + 56 + 12), 12 + 2 * (56 + 12), 3)
    np.testing.assert_array_equal(figure[24:80, 12:68], PICTURE)
    np.testing.assert_array_equal(figure[24:80, 80:136], enlarge(ISLANDS, (56, 56)))
    assert (figure[116:172, 80:136] == 255).all()
    titled = panels(rows, (56, 56), title="t")
    np.testing.assert_array_equal(titled[24:], figure)
    assert (titled[:24] == 255).mean() > 0.9 and titled[:24].min() < 100


def test_pictures_are_enlarged_without_smoothing():
    large = enlarge(ISLANDS, (40, 40))
    assert large.dtype == np.uint8
    np.testing.assert_array_equal(large[::10, ::10], (ISLANDS * 255).round())
    assert overlay(PICTURE[:20], ISLANDS).shape == (20, 56, 3)
    assert shape_of(PICTURE[:28]) == (224, 448) and shape_of(PICTURE, 100) == (100, 100)


def test_a_row_of_islands_says_what_is_a_centre_crop():
    features = np.zeros((4, 4, 8), np.float32)
    whole = island_row(Percept(PICTURE, features, {}, ISLANDS), ISLANDS)
    assert list(whole) == [
        "input",
        "RGB reconstruction",
        "islands of agreement",
        "islands over input",
    ]
    cut = island_row(Percept(PICTURE, features, {"width": 0.5}), ISLANDS, "islands (block 3)")
    assert list(cut) == ["input (centre crop)", "islands (block 3)", "islands over input"]
    assert input_label("A", {}) == "A"


def test_an_animation_goes_there_and_back(tmp_path):
    save_gif(tmp_path / "a.gif", [np.full((8, 8, 3), grey, np.uint8) for grey in (0, 100, 200)])
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 4


@pytest.mark.parametrize("columns", [("feature_loss",), ("feature_loss", "null_feature_loss")])
def test_the_same_history_is_drawn_to_the_same_bytes(tmp_path, columns):
    history = [{"epoch": n} | dict.fromkeys((*columns, "rgb_loss"), 1 / n) for n in (1, 2, 3)]
    for name in ("a.png", "b.png"):
        loss_figure(tmp_path / name, history)
    loss_figure(tmp_path / "c.png", history, ["rgb_loss"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as two, Image.open(tmp_path / "c.png") as one:
        assert two.height == one.height and two.width > 1.5 * one.width
