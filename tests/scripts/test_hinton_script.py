import json
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from conftest import load_script, photograph
from PIL import Image
from torchvision.models.video import MViT_V2_S_Weights, mvit_v2_s

from apm import drawing

hinton_islands = load_script("misc_scripts/hinton_islands.py")
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mvit_v2_s.pth"
    torch.save(mvit_v2_s().state_dict(), path)
    return path


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


def test_weights_from_a_file_and_from_the_download_with_random_weights(
    run, random_weights, monkeypatch, capsys
):
    labels = []
    panels = drawing.panels
    monkeypatch.setattr(
        drawing, "panels", lambda rows: labels.append(list(rows[0])) or panels(rows)
    )
    status, output = run("--teacher-weights", random_weights, "--save-features")
    assert status == 0
    arrays = np.load(output / "photo_islands.npz")
    assert arrays["features"].shape == (56, 56, 96) and arrays["islands"].shape == (56, 56, 3)
    assert labels == [["input (centre crop)", "islands after block 0", "islands over input"]]
    assert Image.open(output / "photo_islands.png").width > 1000

    expected = MViT_V2_S_Weights.KINETICS400_V1.url
    state = torch.load(random_weights, weights_only=True)
    monkeypatch.setattr(DOWNLOAD, lambda url, **_: {expected: state}[url])
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

    assert run("--teacher-weights", random_weights, "--block", "-15")[0] == 0
    assert labels[-1][1] == "islands after block 1"


def test_the_seed_draws_the_random_weights(run):
    features = []
    for seed in (1, 1, 2):
        _, output = run("--random-weights", "--save-features", "--seed", seed)
        features.append(np.load(output / "photo_islands.npz")["features"])
    np.testing.assert_array_equal(features[0], features[1])
    assert not np.allclose(features[0], features[2])


def test_bfloat16_changes_little_with_random_weights(run, random_weights):
    features = []
    for dtype in ("float32", "bfloat16"):
        arguments = ["--teacher-weights", random_weights, "--dtype", dtype]
        _, output = run(*arguments, "--save-features")
        features.append(np.load(output / "photo_islands.npz")["features"])
    assert features[1].dtype == np.float32
    error = np.abs(features[0] - features[1]).mean() / np.abs(features[0]).mean()
    assert 0 < error < 0.03


class Malicious:
    def __reduce__(self):
        return print, ("code from the file was run",)


def test_refusals_are_one_line_and_status_2(run, random_weights, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(DOWNLOAD, no_network)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    state = torch.load(random_weights, weights_only=True)
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(state | {"norm.bias": torch.full((768,), torch.nan)}, tmp_path / "nan.pth")
    del state["head.1.bias"]
    torch.save(state, tmp_path / "less.pth")
    for arguments, message in (
        ([], "see --random-weights"),
        (["--block", 16], "block 16 must be in -16..15"),
        (["--block", -17], "block -17 must be in -16..15"),
        (["--block", "early"], "early"),
        (["--teacher-weights", tmp_path / "absent.pth"], "absent.pth: no such"),
        (["--teacher-weights", tmp_path / "text.pth"], "text.pth: not"),
        (["--teacher-weights", tmp_path / "code.pth"], "code.pth: not"),
        (["--teacher-weights", tmp_path / "list.pth"], "list.pth: not weights of torchvision's"),
        (["--teacher-weights", tmp_path / "more.pth"], '"more"'),
        (["--teacher-weights", tmp_path / "nan.pth"], "not finite"),
        (["--teacher-weights", tmp_path / "less.pth"], '"head.1.bias"'),
        (["--teacher-weights", random_weights, "--random-weights"], "not allowed with"),
        (["--random-weights", "--input", tmp_path / "text.pth"], "cannot be read as an image"),
    ):
        status, output = run(*arguments)
        printed = capsys.readouterr()
        assert status == 2, arguments
        assert message in printed.err and printed.err.count("\n") == 1, printed.err
        assert not printed.out and not output.exists(), arguments
