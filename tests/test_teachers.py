import pytest
import timm
import torch

from apm.teachers import DenseTeacher, load_dense_teacher

REGISTERS = "vit_small_patch14_reg4_dinov2"


def random_weights_teacher(name, grid_size, margin=0, block=-1):
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    vit = timm.create_model(name, img_size=(grid_size + 2 * margin) * patch)
    return DenseTeacher(vit, grid_size=grid_size, margin=margin, block=block)


def silence_blocks(teacher):
    """Let every token pass its blocks unchanged, so that it tells its own place only."""
    for block in teacher.vit.blocks:
        for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
            parameter.zero_()


@pytest.mark.parametrize("name", [REGISTERS, "vit_tiny_patch16_224"])
@pytest.mark.parametrize("margin", [0, 2])
def test_tokens_land_at_their_patches_with_random_weights(name, margin):
    teacher = random_weights_teacher(name, grid_size=6, margin=margin)
    silence_blocks(teacher)
    images = torch.rand(1, 3, 96, 96)
    plain = teacher(images)
    side = 6 * teacher.vit.patch_embed.patch_size[0]
    images = torch.nn.functional.interpolate(
        images, (side, side), mode="bicubic", antialias=True
    ).clamp(0, 1)
    patch = side // 6
    for row, column in ((0, 0), (2, 3), (5, 5), (0, 5)):
        marked = images.clone()
        cell = (
            ...,
            slice(row * patch + 3, (row + 1) * patch - 3),
            slice(column * patch + 3, (column + 1) * patch - 3),
        )
        marked[cell] = 1 - marked[cell]
        moved = (teacher(marked) - plain).abs().amax(dim=-1).view(6, 6) > 1e-4
        assert moved.nonzero().tolist() == [[row, column]]


def test_normalisation_is_timms_with_random_weights():
    teacher = random_weights_teacher(REGISTERS, grid_size=4)
    seen = []
    teacher.vit.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(torch.ones(1, 3, 56, 56))
    expected = [
        (1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ]
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(expected))


def test_blocks_differ_and_the_last_is_minus_one_with_random_weights():
    images = torch.rand(1, 3, 64, 64)
    by_block = [
        random_weights_teacher("vit_tiny_patch16_224", 4, block=b)(images) for b in (3, 11, -1)
    ]
    assert not torch.allclose(by_block[0], by_block[1])
    torch.testing.assert_close(by_block[1], by_block[2])


def test_weights_load_from_a_file_and_fit_another_grid(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224")  # positions for 14 x 14 patches
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    teacher = load_dense_teacher("vit_tiny_patch16_224", tmp_path / "vit.pth", grid_size=14)
    torch.testing.assert_close(teacher.vit.pos_embed, vit.pos_embed)
    expected = vit.eval().forward_features(torch.ones(1, 3, 224, 224))[:, 1:]
    torch.testing.assert_close(teacher(torch.ones(1, 3, 224, 224)), expected, atol=1e-4, rtol=1e-4)
    assert load_dense_teacher("vit_tiny_patch16_224", tmp_path / "vit.pth", grid_size=5)(
        torch.rand(2, 3, 80, 80)
    ).shape == (2, 25, 192)


def test_bad_teachers_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, weights, message in (
        ("vit_enormous", None, "vit_enormous"),
        ("resnet18", None, "plain ViT"),
        ("vit_tiny_patch16_224", tmp_path / "absent.pth", "absent.pth"),
        ("vit_tiny_patch16_224", tmp_path / "text.pth", "not weights of teacher"),
        ("vit_tiny_patch16_224", tmp_path / "other.pth", "not weights of teacher"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_dense_teacher(name, weights)
    with pytest.raises(ValueError, match="block 12"):
        random_weights_teacher("vit_tiny_patch16_224", 4, block=12)
