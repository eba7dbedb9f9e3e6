import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, photograph
from PIL import Image

from apm import load_model
from apm.choices import ORDERS
from apm.consensus import agree
from apm.predictor import (
    answer_grid,
    answer_in_turn,
    crop_report,
    left_out,
    mean_colours,
    perceive,
    undo_token_offset,
    view_of,
    visiting_order,
)
from apm.preprocessing import Preprocessing


def test_a_percept_is_the_models_answers_on_its_grid(model):
    percept = perceive(model, photograph(56, 56))
    images = model.preprocessing(photograph(56, 56))[None]
    with torch.inference_mode():
        features, rgb = model(images)
    np.testing.assert_allclose(percept.features, features.view(4, 4, 16), atol=1e-6)
    np.testing.assert_allclose(percept.rgb, rgb.view(4, 4, 3).clamp(0, 1), atol=1e-6)
    np.testing.assert_array_equal(percept.picture, photograph(56, 56))
    chunked = perceive(model, photograph(56, 56), chunk_size=3)
    np.testing.assert_allclose(chunked.features, percept.features, atol=1e-5)


def test_the_bundled_checkpoint_in_bfloat16():
    """On its grid of 32x32 places: bfloat16 cannot count so far."""
    model = load_model(ROOT / "checkpoints" / "apm_small.safetensors")
    exact, rounded = (
        perceive(model, photograph(448, 448), dtype=dtype).features.reshape(1024, -1)
        for dtype in ("float32", "bfloat16")
    )
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    assert ((exact * rounded).sum(axis=1) / lengths).min() > 0.999


def test_without_local_patches_the_column_alone_answers(model):
    alone = perceive(model, photograph(56, 56), local=False)
    with torch.inference_mode():
        column = model.encode(model.preprocessing(photograph(56, 56))[None])
        features, _ = model.query(column)
    np.testing.assert_allclose(alone.features, features.view(4, 4, 16), atol=1e-6)
    for array, of_both in zip((alone.features, alone.rgb), answer_grid(model, column), strict=True):
        np.testing.assert_array_equal(array, of_both[0])
    assert np.abs(alone.features - perceive(model, photograph(56, 56)).features).max() > 1e-3


def test_percepts_are_rgb_and_in_place_whatever_the_checkpoint_learnt():
    model = make_model()
    plain = perceive(model, photograph(56, 56))
    model.preprocessing = Preprocessing(image_size=56, token_offset=2)
    moved = perceive(model, photograph(56, 56))
    np.testing.assert_allclose(
        moved.features.reshape(16, -1)[:14], plain.features.reshape(16, -1)[2:], atol=1e-6
    )
    np.testing.assert_array_equal(moved.rgb, plain.rgb)
    model.preprocessing = Preprocessing(image_size=56, channels="BGR")
    swapped = Image.fromarray(np.asarray(photograph(56, 56))[..., ::-1].copy())
    np.testing.assert_array_equal(perceive(model, swapped).rgb, plain.rgb[..., ::-1])


def test_token_offset_is_undone():
    # Place n of a released model answers token n of (5 leading tokens, then the patches).
    patches = torch.arange(64.0)
    learnt = torch.cat([torch.full((5,), -1.0), patches])[:64]
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    asked = undo_token_offset(grid, 5, 8)
    shown = learnt[(asked @ torch.tensor([8.0, 1.0])).long()]
    np.testing.assert_array_equal(shown[:59], patches[:59])
    np.testing.assert_array_equal(shown[59:], patches[51:56])
    assert torch.equal(undo_token_offset(grid, 0, 8), grid)
    between = undo_token_offset(torch.tensor([[2.25, 1.75], [2.25, 2.75], [7.0, 4.0]]), 5, 8)
    assert between.tolist() == [[2.25, 6.75], [3.25, -0.25], [7.0, 1.0]]


def test_a_fine_grid_is_asked_exactly_where_its_places_are(model):
    percept = perceive(model, photograph(56, 56), grid=10, chunk_size=7)
    images = model.preprocessing(photograph(56, 56))[None]
    place = torch.tensor([[6.5 / 10 * 4 - 0.5, 2.5 / 10 * 4 - 0.5]])
    with torch.inference_mode():
        features, rgb = model.query(model.encode(images), place, images=images)
    np.testing.assert_allclose(percept.features[6, 2], features[0, 0], atol=1e-5)
    np.testing.assert_allclose(percept.rgb[6, 2], rgb[0, 0].clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_in_any_order_the_percept_is_the_one_made_at_once(model, order):
    view = view_of(model, photograph(80, 60), "stretch")
    assert view.picture.shape == (42, 56, 3)  # all of it, in its own shape
    order = visiting_order(6, order, seed=1)
    assert sorted(order) == list(range(36))
    parts = torch.from_numpy(order).split(5)
    features, rgb = map(np.concatenate, zip(*answer_in_turn(model, view, 6, parts), strict=True))
    percept = perceive(model, photograph(80, 60), grid=6, fit="stretch")
    np.testing.assert_allclose(features, percept.features.reshape(36, -1)[order], atol=1e-5)
    np.testing.assert_allclose(rgb, percept.rgb.reshape(36, 3)[order], atol=1e-5)


def test_a_spiral_begins_in_the_middle():
    order = visiting_order(5, "spiral")
    assert order[0] == 12 and set(order[1:9]) == {6, 7, 8, 11, 13, 16, 17, 18}


def test_consensus_of_a_percept_is_of_its_features_and_the_pictures_colours(model):
    plain = perceive(model, photograph(80, 60), grid=32, fit="stretch")
    agreed = perceive(model, photograph(80, 60), grid=32, fit="stretch", consensus=2)
    features = torch.from_numpy(plain.features)
    expected = agree(features, mean_colours(plain.picture, 32), 2, aspect=0.75)
    np.testing.assert_array_equal(agreed.features, expected)
    assert np.abs(agreed.features - plain.features).max() > 1e-4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2882, 720), {"width": 0.75}),
        ((300, 400), {"height": 0.25}),
        ((500, 500), {}),
        ((501, 500), {}),
    ],
)
def test_what_a_centre_crop_leaves_out(size, expected):
    image = Image.new("RGB", size)
    assert left_out(image, Preprocessing()) == pytest.approx(expected, abs=1e-3)
    assert left_out(image, Preprocessing(fit="stretch")) == {}
    model = make_model()
    assert perceive(model, image).left_out == left_out(image, model.preprocessing)


def test_crops_are_reported_on_one_line():
    whole, wide, both = {}, {"width": 0.75017}, {"width": 0.5, "height": 0.125}
    assert crop_report({"a.jpg": whole}) == crop_report({"a": whole, "b": whole}) == ""
    assert crop_report({"a.jpg": wide}) == "a.jpg: centre crop, 75 % of the width left out"
    assert crop_report({"a": both}).endswith("50 % of the width and 12.5 % of the height left out")
    many = crop_report({"a": whole, "b": wide, "c": both})
    assert many == "centre crop of 2 of 3 images, up to 75 % of a side left out"
