import json
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from conftest import load_script, photograph
from PIL import Image
from torchvision.models.video import MViT_V2_S_Weights, mvit_v2_s
from torchvision.models.video.mvit import MSBlockConfig, MViT
from video_teacher import VideoTeacher, load_video_teacher

from apm import drawing

hinton_islands = load_script("misc_scripts/hinton_islands.py")
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"
URL = MViT_V2_S_Weights.KINETICS400_V1.url


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mvit_v2_s.pth"
    torch.save(mvit_v2_s().state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(DOWNLOAD, refuse)


# The teacher


@pytest.mark.parametrize(
    ("block", "shape"),
    [(0, (56, 56, 96)), (2, (28, 28, 192)), (15, (7, 7, 768))],
)
def test_shape_of_the_tokens_by_block(block, shape):
    with torch.device("meta"):  # shapes without numbers
        mvit = mvit_v2_s()
    mvit.register_forward_pre_hook(lambda _, inputs: (inputs[0].to("meta"),))
    assert VideoTeacher(mvit, block)(torch.rand(1, 3, 256, 256))[0].shape == shape


def test_tokens_are_those_of_the_first_frame_of_a_still_clip_with_random_weights(random_weights):
    image = torch.randint(0, 256, (3, 256, 300), dtype=torch.uint8)
    tokens = load_video_teacher(random_weights, block=1)(image[None])[0]

    with torch.device("meta"):
        mvit = mvit_v2_s().eval()
    mvit.load_state_dict(torch.load(random_weights, weights_only=True), assign=True)
    video = torch.stack([image] * 16)  # frames first, as torchvision reads videos
    clip = MViT_V2_S_Weights.KINETICS400_V1.transforms()(video)[None]
    with torch.inference_mode():
        patches = mvit.conv_proj(clip).flatten(2).transpose(1, 2)
        column, grid = mvit.pos_encoding(patches), (8, 56, 56)
        for block in mvit.blocks[:2]:
            column, grid = block(column, grid)
    frames = column[0, 1:].reshape(8, 28, 28, 192)
    torch.testing.assert_close(tokens, frames[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(frames[0], frames[1], atol=1e-3)


def test_tokens_land_at_their_places_with_random_weights(random_weights):
    teacher = load_video_teacher(random_weights)
    block = teacher.mvit.blocks[0]  # silenced: what is left is the embedding of patches
    for parameter in (*block.attn.project.parameters(), *block.mlp[-2].parameters()):
        parameter.zero_()
    image = torch.rand(1, 3, 256, 256)
    plain = teacher(image)
    for row, column in ((0, 0), (10, 40), (55, 55), (0, 55)):
        marked = image.clone()
        # 256 pixels are cut to 224; patches overlap, but the first pixel of four belongs to one.
        marked[..., 16 + 4 * row, 16 + 4 * column] += 10
        moved = (teacher(marked) - plain)[0].abs().amax(dim=-1) > 1e-4
        assert moved.nonzero().tolist() == [[row, column]]


class Malicious:
    def __reduce__(self):
        return print, ("code from the file was run",)


def test_bad_weights_are_refused_in_one_line(random_weights, tmp_path, no_network, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    weights = torch.load(random_weights, weights_only=True)
    # One number for all of a weight makes small files.
    state = {name: torch.zeros(1).expand(weight.shape) for name, weight in weights.items()}
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(state | {"norm.bias": torch.zeros(5)}, tmp_path / "narrow.pth")
    torch.save(state | {"norm.bias": torch.full((768,), torch.nan)}, tmp_path / "nan.pth")
    del state["head.1.bias"]
    torch.save(state, tmp_path / "less.pth")
    for file, block, message in (
        (None, 0, "could not be downloaded.*see --random-weights.*no network"),
        (None, 16, r"block 16 must be in -16\.\.15"),
        (None, -17, r"block -17 must be in -16\.\.15"),
        ("absent.pth", 0, "absent.pth: no such"),
        ("text.pth", 0, "text.pth: not"),
        ("code.pth", 0, "code.pth: not"),
        ("list.pth", 0, "list.pth: not weights of torchvision's"),
        ("more.pth", 0, r'"more" is \(1,\), expected no such weight'),
        ("narrow.pth", 0, r'"norm.bias" is \(5,\), expected \(768,\)'),
        ("nan.pth", 0, '"norm.bias" holds numbers that are not finite'),
        ("less.pth", 0, r'"head.1.bias" is missing, expected \(400,\)'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_video_teacher(file and tmp_path / file, block=block)
        assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


# The script


@pytest.fixture
def run(tmp_path):
    photograph(300, 200).save(tmp_path / "photo.png")

    def run(*arguments):
        output = tmp_path / "out"
        standard = ["--input", str(tmp_path / "photo.png"), "--output", str(output)]
        try:
            status = hinton_islands.main([*standard, "--method", "pca", *map(str, arguments)])
        except SystemExit as exit:  # argparse's own refusals
            status = exit.code
        return status, output

    return run


@pytest.fixture
def small_mvit(monkeypatch):
    """Two narrow blocks instead of torchvision's sixteen."""
    block = MSBlockConfig(
        num_heads=1,
        input_channels=16,
        output_channels=16,
        kernel_q=(3, 3, 3),
        kernel_kv=(3, 3, 3),
        stride_q=(1, 1, 1),
        stride_kv=(1, 8, 8),
    )

    def small() -> MViT:
        return MViT(
            spatial_size=(224, 224),
            temporal_size=16,
            block_setting=[block, block],
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=True,
            proj_after_attn=True,
        )

    monkeypatch.setattr("video_teacher.mvit_v2_s", small)


def test_weights_from_a_file_and_from_the_download_with_random_weights(
    run, random_weights, monkeypatch, capsys
):
    labels = []
    panels = drawing.panels
    monkeypatch.setattr(
        drawing, "panels", lambda rows, shape: labels.append(list(rows[0])) or panels(rows, shape)
    )
    status, output = run("--teacher-weights", random_weights, "--save-features")
    assert status == 0
    arrays = np.load(output / "photo_islands.npz")
    assert arrays["features"].shape == (56, 56, 96) and arrays["islands"].shape == (56, 56, 3)
    assert labels == [["input (centre crop)", "islands after block 0", "islands over input"]]
    assert Image.open(output / "photo_islands.png").width > 1000

    state = torch.load(random_weights, weights_only=True)
    monkeypatch.setattr(DOWNLOAD, lambda url, **_: {URL: state}[url])
    assert run("--save-features")[0] == 0
    downloaded = np.load(output / "photo_islands.npz")
    np.testing.assert_array_equal(downloaded["features"], arrays["features"])

    assert run("--random-weights")[0] == 0
    assert labels[-1][1] == "islands after block 0 (random weights)"
    written = json.loads((output / "results.json").read_text())
    assert written["arguments"]["random_weights"] is True
    assert written["images"][0]["query_seconds"] > 0
    # A square of 256 pixels is cut out of the photograph, and of that the middle 224 are seen.
    lost = {"width": 1 - 200 / 300 * 224 / 256, "height": 1 - 224 / 256}
    assert written["images"][0]["left_out"] == pytest.approx(lost)
    lost = "41.7 % of the width and 12.5 % of the height left out"
    assert f"photo.png: centre crop, {lost}" in capsys.readouterr().out

    page = (output / "index.html").read_text()
    assert '"title": "Islands after block 0 (random weights)"' in page
    assert f'"caption": "300 x 200 px: centre crop, {lost}"' in page

    assert run("--random-weights", "--block", "-15")[0] == 0
    assert labels[-1][1] == "islands after block 1 (random weights)"
    assert json.loads((output / "results.json").read_text())["block"] == 1


def test_the_seed_draws_the_random_weights(run, small_mvit):
    features = []
    for seed in (1, 1, 2):
        _, output = run("--random-weights", "--save-features", "--seed", seed)
        features.append(np.load(output / "photo_islands.npz")["features"])
    np.testing.assert_array_equal(features[0], features[1])
    assert not np.allclose(features[0], features[2])


def test_bfloat16_changes_little_with_random_weights(run, small_mvit):
    features = []
    for dtype in ("float32", "bfloat16"):
        _, output = run("--random-weights", "--dtype", dtype, "--save-features")
        features.append(np.load(output / "photo_islands.npz")["features"])
    assert features[1].dtype == np.float32
    error = np.abs(features[0] - features[1]).mean() / np.abs(features[0]).mean()
    assert 0 < error < 0.03


def test_refusals_are_one_line_and_status_2(run, no_network, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for arguments, message in (
        ([], "see --random-weights"),
        (["--block", 16], "block 16 must be in -16..15"),
        (["--block", "early"], "early"),
        (["--teacher-weights", tmp_path / "absent.pth"], "absent.pth: no such"),
        (["--teacher-weights", tmp_path / "text.pth"], "text.pth: not"),
        (["--teacher-weights", tmp_path / "code.pth"], "code.pth: not"),
        (["--teacher-weights", "x", "--random-weights"], "not allowed with"),
        (["--random-weights", "--input", tmp_path / "text.pth"], "cannot be read as an image"),
    ):
        status, output = run(*arguments)
        printed = capsys.readouterr()
        assert status == 2, arguments
        assert message in printed.err and printed.err.count("\n") == 1, printed.err
        assert not printed.out and not output.exists(), arguments
