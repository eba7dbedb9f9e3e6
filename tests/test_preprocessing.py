import numpy as np
import pytest
import torch
from PIL import Image

from apm.preprocessing import Preprocessing


def test_a_wide_image_fills_the_square_without_a_strip():
    # Left half red, right half blue; rows run dark to bright.
    pixels = np.zeros((427, 640, 3), np.uint8)
    pixels[:, :320, 0] = 200
    pixels[:, 320:, 2] = 200
    pixels[:, :, 1] = np.linspace(0, 255, 427)[:, None]
    out = np.asarray(Preprocessing().picture(Image.fromarray(pixels)), int)
    assert out.shape == (448, 448, 3)
    assert out[0, :, 1].max() < 3 and out[-1, :, 1].min() > 252  # all rows are there
    assert (out[:, 218, 0] > 190).all() and (out[:, 230, 2] > 190).all()  # the middle stays put
    assert out[100, 0, 0] == 200  # and the sides are cut, not squeezed:
    assert np.flatnonzero(out[224, :, 2] > 100)[0] == pytest.approx(224, abs=1)


def test_stretching_keeps_the_sides():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, :30] = 255
    for fit, share in (("stretch", 0.1), ("crop", 0.0)):
        out = Preprocessing(image_size=200, fit=fit)(Image.fromarray(pixels))
        assert (out[0, 100] > 0.5).float().mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_tiny_and_thin_images(size, fit):
    out = Preprocessing(fit=fit)(Image.new("RGB", size, (255, 0, 51)))
    assert out.shape == (3, 448, 448)
    torch.testing.assert_close(out[:, 200, 200], torch.tensor([1, 0, 0.2]))


def test_released_colours():
    pixels = np.full((448, 448, 3), 100, np.uint8)
    pixels[0, 0] = (50, 100, 250)
    out = Preprocessing(channels="BGR", scaling="min-max")(Image.fromarray(pixels))
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1, 0.25, 0]))
    torch.testing.assert_close(out[:, 9, 9], torch.full((3,), 0.25))
    shown = Preprocessing(channels="BGR").to_rgb(torch.tensor([[0.1, 0.2, 1.7]]))
    torch.testing.assert_close(shown, torch.tensor([[1, 0.2, 0.1]]))


def test_a_constant_image_does_not_divide_by_zero():
    out = Preprocessing(scaling="min-max")(Image.new("RGB", (9, 9), (77, 77, 77)))
    assert (out == 0).all()


def test_imagenet_scaling():
    out = Preprocessing(scaling="imagenet")(Image.new("RGB", (9, 9), (255, 255, 0)))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0 - 0.406) / 0.225])
    torch.testing.assert_close(out[:, 5, 5], expected)


def test_labels_are_cut_as_the_photograph_and_never_mixed():
    labels = np.zeros((100, 200), np.uint8)
    labels[:, 100:] = 90
    labels[:, :50] = 7
    out = Preprocessing(image_size=50).labels(Image.fromarray(labels), 50)
    assert set(np.unique(out)) == {0, 90}
    assert (out[:, :25] == 0).all() and (out[:, 25:] == 90).all()
    whole = Preprocessing(fit="stretch").labels(Image.fromarray(labels), 4)
    assert whole.tolist() == [[7, 0, 90, 90]] * 4


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="wild"):
        Preprocessing(scaling="wild")
