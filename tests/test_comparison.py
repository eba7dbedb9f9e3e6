from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import make_model, photograph
from PIL import Image

import apm.comparison
from apm.comparison import Look, score, teacher_of
from apm.predictor import agreeing, perceive
from apm.teachers import identify


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


class Tokens(torch.nn.Module):
    """A teacher of random tokens."""

    density = 1

    def forward(self, images):
        return torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_student_and_teacher_agree_with_their_neighbours_alike(model):
    look, image = Look(model, Tokens(), "stretch"), photograph(120, 40)
    percept, (student, teacher) = look.both(image, 8, 2)
    for features, before in ((student, look.student(image, 8).features), (teacher, None)):
        raw = look.tokens(image, 8) if before is None else before
        np.testing.assert_array_equal(features, agreeing(raw, percept.picture, 2))
        assert not np.allclose(features, raw)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_a_teacher_has_the_block_of_the_checkpoint_by_whatever_name(weights, caplog):
    model = make_model(feature_dim=192)
    known = identify("vit_tiny_patch16_224", weights)
    model.provenance = {"teacher": known | {"block": 8, "margin": 2}}
    tagged = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    for name in (None, "vit_tiny_patch16_224", tagged):
        teacher = teacher_of(model, name, weights, None, None)
        assert (teacher.block, teacher.margin) == (8, 2)
    assert teacher_of(model, tagged, weights, 3, 0).block == 3
    assert not caplog.records
    model.provenance["teacher"]["weights_sha256"] = "0"
    teacher_of(model, None, weights, None, None)
    assert "other weights than the checkpoint learnt from" in caplog.text


def test_without_a_teacher_its_flags_are_refused(model):
    assert teacher_of(model, None, None, None, None) is None
    for flags in ((Path("w.pth"), None, None), (None, 8, None), (None, None, 0)):
        with pytest.raises(ValueError, match="name the teacher with --teacher"):
            teacher_of(model, None, *flags)
