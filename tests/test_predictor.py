import numpy as np
import pytest
import torch
from conftest import make_model, photograph
from PIL import Image

from apm.predictor import answer_grid, crop_report, left_out, perceive, undo_token_offset
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
    np.testing.assert_array_equal(
        moved.features.reshape(16, -1)[:14], plain.features.reshape(16, -1)[2:]
    )
    np.testing.assert_array_equal(moved.rgb, plain.rgb)
    model.preprocessing = Preprocessing(image_size=56, channels="BGR")
    swapped = Image.fromarray(np.asarray(photograph(56, 56))[..., ::-1].copy())
    np.testing.assert_array_equal(perceive(model, swapped).rgb, plain.rgb[..., ::-1])


def test_token_offset_is_undone():
    # Place n of a released model answers token n of (5 leading tokens, then the patches).
    patches = torch.arange(64.0)
    learnt = torch.cat([torch.full((5,), -1.0), patches])[:64].view(8, 8, 1)
    shown = undo_token_offset(learnt, 5).ravel()
    np.testing.assert_array_equal(shown[:59], patches[:59])
    np.testing.assert_array_equal(shown[59:], patches[51:56])
    np.testing.assert_array_equal(undo_token_offset(learnt, 0), learnt)
    batch = torch.stack([learnt, 2 * learnt])
    np.testing.assert_array_equal(undo_token_offset(batch, 5)[1].ravel(), 2 * shown)


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
