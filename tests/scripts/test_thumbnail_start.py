"""The start of the RGB head as a lookup of a grey thumbnail, and the script that writes it."""

import pytest
import torch
from conftest import load_script, make_model
from thumbnail import start_as_thumbnail

from apm import APMConfig, load_model, save_model
from apm.preprocessing import Preprocessing

main = load_script("misc_scripts/bundled/thumbnail_start.py").main
WIDE = {"rgb_widths": (20, 8), "position_dim": 128}  # a unit for each of 16 locations, and a layer


@pytest.mark.parametrize("scaling", ["unit", "imagenet"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_new_model_answers_a_grey_thumbnail_looked_up_in_its_column(scaling, channels):
    model = make_model(rgb_widths=(20, 8, 8), position_dim=128, local_width=8)
    model.preprocessing = Preprocessing(image_size=56, scaling=scaling, channels=channels)
    start_as_thumbnail(model)
    for weight in (model.feature_head.weight, model.rgb_head[0].weight[1:]):
        torch.nn.init.zeros_(weight)  # what does not come from the column
    pixels = torch.randint(256, (1, 3, 56, 56), dtype=torch.uint8)
    pixels[..., 30:] //= 100  # a dark half
    column = model.encode(model.preprocessing.normalise(pixels))
    grey = (pixels[:, 0] * 0.299 + pixels[:, 1] * 0.587 + pixels[:, 2] * 0.114) / 255
    brightness = torch.nn.functional.avg_pool2d(grey[:, None], 14).flatten(1)
    torch.testing.assert_close(column, brightness, atol=1e-5, rtol=1e-5)
    answers = model.query(column)[1][0]
    torch.testing.assert_close(answers, brightness[0, :, None].expand(-1, 3), atol=0.1, rtol=0)


def test_cancelling_terms_keep_their_precision_under_autocast():
    model = make_model(**WIDE, local_width=8)
    start_as_thumbnail(model)
    images = torch.rand(1, 3, 56, 56)
    exact = model(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)[1].float()
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0)


def test_terms_that_nearly_cancel_are_saved_in_full_precision(tmp_path):
    model = make_model(**WIDE)
    start_as_thumbnail(model)
    save_model(tmp_path / "half.safetensors", model, dtype=torch.float16)
    images = torch.rand(1, 3, 56, 56)
    answers = load_model(tmp_path / "half.safetensors").query(model.encode(images))[1]
    torch.testing.assert_close(answers, model.query(model.encode(images))[1], atol=3e-3, rtol=0)


def test_a_checkpoint_gets_a_new_fold_and_rgb_head_and_keeps_the_rest(tmp_path, capsys):
    before = make_model(**WIDE, local_width=8)
    save_model(tmp_path / "tiny.safetensors", before, {"teacher": "none"})
    arguments = ["--checkpoint", str(tmp_path / "tiny.safetensors")]
    assert main([*arguments, "--output", str(tmp_path / "start.safetensors"), "--seed", "1"]) == 0
    said = f"{tmp_path / 'start.safetensors'}; train it with misc_scripts/train.py"
    assert capsys.readouterr().out.startswith(said)
    after = load_model(tmp_path / "start.safetensors")
    assert after.config == before.config and after.preprocessing == before.preprocessing
    assert after.provenance == {"teacher": "none"}
    for name, tensor in after.state_dict().items():
        kept = torch.equal(tensor, before.state_dict()[name])
        assert kept != name.startswith(("fold", "rgb")), name


def test_a_new_model_has_the_bundled_checkpoints_shape(tmp_path):
    output = tmp_path / "start.safetensors"
    assert main(["--output", str(output), "--feature-dim", "8"]) == 0
    model = load_model(output)
    assert model.config == APMConfig.small(feature_dim=8) and not model.provenance
    pixels = torch.full((1, 3, 448, 448), 200, dtype=torch.uint8)
    column = model.encode(model.preprocessing.normalise(pixels))
    torch.testing.assert_close(column, torch.full((1, 1024), 200 / 255), atol=1e-4, rtol=0)
    answers = model.query(column)[1]
    torch.testing.assert_close(answers, torch.full_like(answers, 200 / 255), atol=0.1, rtol=0)


@pytest.mark.parametrize("widths", [(15, 8), (20,)])
def test_a_head_that_is_too_small_is_refused_in_one_line(tmp_path, capsys, widths):
    save_model(tmp_path / "tiny.safetensors", make_model(rgb_widths=widths))
    arguments = ["--checkpoint", str(tmp_path / "tiny.safetensors")]
    assert main([*arguments, "--output", str(tmp_path / "start.safetensors")]) == 2
    message = capsys.readouterr().err
    assert f"hidden widths {widths}" in message and message.count("\n") == 1
    assert not (tmp_path / "start.safetensors").exists()
