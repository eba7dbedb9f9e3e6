"""Accuracy by locations and by what a query holds, with a CLIP with random weights."""

import json

import pytest
import torch
from conftest import TINY, load_script, make_model, photograph, save_tiny_clip

from apm import APMConfig

script = load_script("single_token_segmentation/location_table.py")


@pytest.mark.parametrize("arm", script.ARMS)
def test_an_arm_is_the_query_with_zeros_in_its_place(arm):
    """The plain first layer on the joined query, one part of which is zero."""
    plain, model = make_model(pooling="mean"), make_model(pooling="mean")
    script.zero_arm(model, arm)
    column, positions = torch.randn(2, 16), torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    first = plain.trunk_first
    with torch.no_grad():
        encoded = first.position_term(positions) if arm != "no-position" else torch.zeros(2, 32)
        folded = first.column(column if arm != "no-column" else torch.zeros(2, 16))
        expected = folded[:, None] + encoded
        found = model.trunk_first(model.unfold(column, positions))
    torch.testing.assert_close(found, expected)


def test_the_table(tmp_path, monkeypatch, capsys):
    def tta(feature_dim, pooling):
        return APMConfig(**TINY | {"feature_dim": feature_dim, "pooling": pooling})

    monkeypatch.setattr(APMConfig, "tta", tta)
    for index, name in enumerate(("cat", "cat", "dog")):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        photograph(seed=index).save(tmp_path / "set" / name / f"{index}.png")
    arguments = [
        *("--teacher", str(save_tiny_clip(tmp_path / "clip.pt")), "--iterations", "20"),
        *("--data-root", str(tmp_path / "set"), "--output", str(tmp_path / "out")),
        *("--locations", "1,16", "--arms", "whole", "no-column", "--learning-rate", "3e-2"),
    ]
    assert script.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["whole-1", "whole-16", "no-column-1", "no-column-16"]
    assert all(name in printed for name in names) and found["images"] == 3
    assert len({row["loss"] for row in found["rows"]}) == 4
    before = (tmp_path / "out" / "whole-1.csv").read_bytes()
    assert script.main(arguments) == 0  # all is there: nothing is trained again
    assert (tmp_path / "out" / "whole-1.csv").read_bytes() == before
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == found["rows"]
    assert script.main([*arguments, "--limit", "2"]) == 0  # some of those that are there
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["images"] == 2 and found["rows"][0]["top1"] in (0, 50, 100)
    assert script.main([*arguments, "--seed", "1"]) == 2
    assert "made with seed" in capsys.readouterr().err
