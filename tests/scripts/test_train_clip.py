"""The small CLIP and the script that trains it, all from random weights."""

import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import load_script
from PIL import Image
from tiny_clip import (
    BORDER,
    ClipTrainer,
    augment,
    new_clip,
    normalise,
    separate_classes,
    start_from_vit,
    tokenize,
)
from tiny_clip_data import load_splits, read_pixels
from torch import nn

from apm.config import TrainConfig
from apm.data.images import Skipped
from apm.token_teachers import load_token_teacher

NAMES, TEMPLATES = ("red", "blue"), ("a photo of a {}", "the {} one", "see the bright {} there")
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    vit = timm.create_model(VIT, img_size=32).eval()  # 2 x 2 patches
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vit


@torch.no_grad()
def test_the_tower_starts_as_the_vit_on_enlarged_patches_with_random_weights(vit):
    model = new_clip(image_size=8, patch=4, layers=2)
    start_from_vit(model, vit)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    patches = F.unfold(images / 255, 4, stride=4).transpose(1, 2).reshape(-1, 3, 4, 4)
    large = F.interpolate(patches, (16, 16), mode="bicubic").view(2, 2, 2, 3, 16, 16)
    large = large.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    expected = vit._pos_embed(vit.patch_embed((large - 0.5) / 0.5))

    seen = []
    visual = model.visual
    visual.ln_pre.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode_image(normalise(images))
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)

    for block, source in zip(visual.transformer.resblocks, vit.blocks, strict=False):
        block.mlp.gelu = nn.GELU()  # the two differences there are
        block.ln_1.eps = block.ln_2.eps = source.norm1.eps
        answer = block(expected.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(answer, source(expected), atol=1e-4, rtol=1e-4)


def test_a_vit_that_does_not_fit_is_refused(vit):
    for model in (new_clip(image_size=8, layers=13), new_clip(image_size=8, width=128, layers=1)):
        with pytest.raises(ValueError, match="ViT of width 192 with 12 blocks cannot start"):
            start_from_vit(model, vit)


def test_an_augmented_image_is_itself_moved_and_flipped():
    images = torch.randint(256, (16, 3, 12, 12), dtype=torch.uint8)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    padded = F.pad(images.float(), (BORDER,) * 4, mode="reflect").to(torch.uint8)
    found = set()
    for image, candidate in zip(padded, moved, strict=True):
        windows = {
            (row, column, flipped): window.flip(2) if flipped else window
            for row in range(2 * BORDER + 1)
            for column in range(2 * BORDER + 1)
            for window in [image[:, row : row + 12, column : column + 12]]
            for flipped in (False, True)
        }
        found |= {key for key, window in windows.items() if torch.equal(window, candidate)}
    assert len(found) >= 12 and {flipped for *_, flipped in found} == {False, True}


def test_sentences_find_their_class_with_random_weights():
    torch.manual_seed(0)
    model = new_clip(layers=1, text_layers=1)
    tokens = tokenize(NAMES, TEMPLATES)
    assert tokens.shape == (2, 3, 7)  # start, five words, end
    separate_classes(model, tokens, steps=15)
    with torch.no_grad():
        sentences = F.normalize(model.encode_text(tokens.flatten(0, 1)), dim=-1).view(2, 3, -1)
    cosines = torch.einsum("ctf,dsf->ctds", sentences, sentences)
    assert cosines[0, :, 0].min() > cosines[0, :, 1].max() + 0.2


def test_a_stopped_run_ends_as_the_undisturbed_one_with_random_weights():
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(10) % 2

    def trainer():
        torch.manual_seed(0)
        model = new_clip(image_size=8, patch=4, layers=1, text_layers=1)
        config = TrainConfig(batch_size=4, seed=3, schedule="cosine", warmup=2)
        return ClipTrainer(model, images, labels, NAMES, TEMPLATES, config, steps=6)

    whole, stopped, resumed = trainer(), trainer(), trainer()
    losses = [whole.step() for _ in range(6)]
    for _ in range(3):
        stopped.step()
    resumed.load_state_dict(stopped.state_dict())
    assert [resumed.step() for _ in range(3)] == losses[3:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_epoch_sees_every_image_once():
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    trainer = ClipTrainer(
        new_clip(image_size=8, layers=1),
        images,
        torch.zeros(10, dtype=torch.long),
        NAMES,
        TEMPLATES,
        TrainConfig(batch_size=5),
        steps=4,
    )
    seen = []
    for trainer.steps_done in range(4):
        seen.append(trainer.batch())
    for epoch in (seen[:2], seen[2:]):
        assert sorted(epoch[0] + epoch[1]) == list(range(10))
    assert seen[:2] != seen[2:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two colours, which any training tells apart."""
    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in zip(NAMES, ((220, 40, 30), (20, 50, 230)), strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                shade = tuple(max(value - 3 * index, 0) for value in colour)
                Image.new("RGB", (32, 32), shade).save(folder / f"{index}.png")
    return root


def test_images_that_cannot_be_read_are_left_out(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "blue" / "0.png"
    broken.write_text("no image")
    training, _ = load_splits(tmp_path / "data")
    images, labels = read_pixels(training, 8, None, skipped := Skipped())
    assert images.shape == (23, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 11 + [1] * 12
    assert images[0, 2].min() > 200 and images[-1, 0].min() > 180  # blue, red
    assert list(skipped) == [str(broken)]


def test_the_script_makes_a_teacher_and_resumes_with_random_weights(data, tmp_path, capsys):
    main = load_script("misc_scripts/bundled/train_clip.py").main
    torch.manual_seed(0)
    weights = tmp_path / "vit.pth"
    torch.save(timm.create_model(VIT).state_dict(), weights)
    output = tmp_path / "out"
    command = ["--data-root", str(data), "--teacher-weights", str(weights), "--layers", "1"]
    command += ["--batch-size", "8", "--steps", "24", "--learning-rate", "1e-3"]
    command += ["--output", str(output)]
    assert main([*command, "--resume"]) == 0  # nothing there to go on from: starts anew
    assert "zero-shot top-1, single: 100.00 %" in capsys.readouterr().out
    found = json.loads((output / "results.json").read_text())
    assert found["classes"] == ["blue", "red"] and found["history"][-1]["step"] == 24
    made = (output / "clip_tiny.pt").read_bytes()
    state = torch.load(output / "clip_tiny.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}

    teacher = load_token_teacher(str(output / "clip_tiny.pt"))
    image = teacher.preprocess(Image.new("RGB", (300, 200), (200, 30, 30)))[None]
    assert 0.3 < teacher(image).norm() < 3  # about unit length
    classes = teacher.embed_classes(NAMES, TEMPLATES[:1])
    assert teacher.logits(teacher(image), classes).argmax() == 0

    (tmp_path / "other.txt").write_text("one {}\n")
    for flags, message in (
        ([], "holds a run; add --resume"),
        (["--resume", "--layers", "2"], "out: made with layers 1, not 2"),
        (["--resume", "--learning-rate", "1e-2"], "made with learning_rate 0.001, not 0.01"),
        (["--resume", "--templates", str(tmp_path / "other.txt")], "made with training sentences"),
    ):
        assert main([*command, *flags]) == 2
        printed = capsys.readouterr().err.splitlines()
        assert message in printed[-1] and not any("error" in line for line in printed[:-1])
    assert main([*command, "--resume"]) == 0  # at its end already: nothing changes
    assert (output / "clip_tiny.pt").read_bytes() == made
    for state in ([1], {"step": 3}):
        torch.save(state, output / "last.pth")
        assert main([*command, "--resume"]) == 2
        assert "last.pth: not the state of this run" in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_2(data, tmp_path, capsys):
    main = load_script("misc_scripts/bundled/train_clip.py").main
    (tmp_path / "half" / "train" / "a").mkdir(parents=True)
    for extra, message in (
        (["--data-root", str(tmp_path / "none")], "no cifar10 there"),
        (["--data-root", str(tmp_path / "half")], "half"),
        (["--data-root", str(data), "--teacher-weights", str(tmp_path / "none.pth")], "none.pth"),
        (["--data-root", str(data), "--templates", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert main([*extra, "--output", str(tmp_path / "out")]) == 2, extra
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
