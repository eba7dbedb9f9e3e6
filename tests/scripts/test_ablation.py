"""The ablation script: its rows are trained, scored, kept."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import load_script, make_model, photograph
from PIL import Image
from token_fold import TokenFold

from apm import APMConfig
from apm.data.features import StoreWriter
from apm.data.images import file_sizes, image_names
from apm.preprocessing import Preprocessing
from apm.teachers import DenseTeacher

ablation = load_script("misc_scripts/bundled/ablation.py")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A few photographs with random features, masks of two classes, rows of one short epoch."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(3):
        photograph(448, 448, seed=index).save(tmp_path / "images" / f"p{index}.png")
        mask = np.ones((448, 448), np.uint8)
        mask[:200] = 2
        Image.fromarray(mask).save(tmp_path / "masks" / f"p{index}.png")
    paths = image_names(tmp_path / "images")
    meta = {"teacher": "none", "grid_size": 32, "feature_dim": 8, "store_dtype": "float16"}
    (tmp_path / "stores" / "4").mkdir(parents=True)
    writer = StoreWriter(tmp_path / "stores" / "4", meta, file_sizes(paths))
    features = torch.randn(3, 1024, 8, generator=torch.Generator().manual_seed(0))
    writer.write(0, dict(zip(writer.shards[0], features, strict=True)), {})
    short = "--epochs 1 --batch-size 2 --validation-images 1 --locations 16 --fold-rate 0.1"
    monkeypatch.setattr(ablation, "VALIDATION_IMAGES", 1)
    monkeypatch.setattr(ablation, "BASE", short)
    changes = {"local_width": 8, "local_blocks": (0, 1), "trunk_widths": (16, 8)}
    monkeypatch.setattr(ablation, "SHAPE", replace(APMConfig.small(), **changes))
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    flags = {"input": "images", "stores": "stores", "scored": "images", "masks": "masks"}
    flags |= {"output": "out", "teacher-weights": "vit.pth"}
    return [word for k, v in flags.items() for word in (f"--{k}", str(tmp_path / v))]


def test_rows_are_trained_scored_and_kept_with_random_weights(arguments, tmp_path, capsys):
    rows = ["base", "no local patch", ablation.CLS_ROW]
    assert ablation.main([*arguments, "--rows", *rows]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert list(results) == rows
    assert all(row["images"] == 3 and -1 <= row["ari"] <= 1 for row in results.values())
    state = tmp_path / "out" / "base" / "last.pth"
    written = state.stat().st_mtime_ns
    assert ablation.main([*arguments, "--rows", "base"]) == 0
    assert state.stat().st_mtime_ns == written  # nothing is trained twice
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results
    assert ablation.main([*arguments, "--rows", "base", "--masks", str(tmp_path / "stores")]) == 2
    assert "no image in this folder" in capsys.readouterr().err
    masks = tmp_path / "other"
    shutil.copytree(tmp_path / "masks", masks)
    assert ablation.main([*arguments, "--rows", "base", "--masks", str(masks)]) == 2
    assert "out: made with scored images and masks" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results
    assert ablation.main([*arguments, "--rows", "base", "teacher block 8"]) == 2
    assert "8" in capsys.readouterr().err


def test_an_unknown_row_is_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        ablation.main([*arguments, "--rows", "nothing"])


def test_the_column_of_a_token_is_linear_in_the_cls_token_with_random_weights():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    model = make_model()
    model.preprocessing = Preprocessing(image_size=56, scaling="imagenet")
    fold = TokenFold(DenseTeacher(vit, grid_size=14), model)
    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    tokens = vit.forward_features((pixels / 255 - 0.5) / 0.5)[:, 0]
    column = fold(model.preprocessing.normalise(pixels))
    torch.testing.assert_close(column, fold.linear(tokens), atol=1e-4, rtol=1e-4)
    assert column.shape == (2, 16)
    assert [name for name, _ in fold.named_parameters()] == ["linear.weight", "linear.bias"]
