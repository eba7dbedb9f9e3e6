import hashlib

import pytest
import timm
import torch

from apm.consensus import agree
from apm.teachers import DenseTeacher, load_dense_teacher

REGISTERS = "vit_small_patch14_reg4_dinov2"


def random_weights_teacher(name, grid_size, margin=0, block=-1, **settings):
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    vit = timm.create_model(name, img_size=(grid_size + 2 * margin) * patch, **settings)
    return DenseTeacher(vit, grid_size=grid_size, margin=margin, block=block)


def silence_blocks(teacher):
    """Let every token pass its blocks unchanged, so that it tells its own place only."""
    for block in teacher.vit.blocks:
        for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
            parameter.zero_()


@pytest.mark.parametrize("name", [REGISTERS, "vit_tiny_patch16_224"])
@pytest.mark.parametrize("margin", [0, 2])
def test_tokens_land_at_their_patches_with_random_weights(name, margin):
    teacher = random_weights_teacher(name, grid_size=6, margin=margin, depth=2)
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


@pytest.mark.parametrize(
    ("name", "density", "moves"),
    [(REGISTERS, 2, (-4, 3)), ("vit_tiny_patch16_224", 3, (-6, 0, 5))],
)
def test_a_dense_teachers_tokens_are_stitched_of_moved_images(name, density, moves):
    """The middle of cell i of d in a patch of P pixels is P ((i + 1/2) / d - 1/2) off its own."""
    teacher = random_weights_teacher(name, grid_size=4, margin=1, depth=2)
    patch = teacher.vit.patch_embed.patch_size[0]
    images = torch.rand(2, 3, 4 * patch, 4 * patch)
    reach = 2 * patch
    padded = torch.nn.functional.pad(images, (reach,) * 4, mode="reflect")
    dense = DenseTeacher(teacher.vit, grid_size=4, margin=1, density=density)
    tokens = dense(images).view(2, 4, density, 4, density, -1)
    for i, rows in enumerate(moves):
        for j, columns in enumerate(moves):
            top, left = patch + rows, patch + columns
            window = padded[..., top : top + 6 * patch, left : left + 6 * patch]
            window = (window - teacher.mean) / teacher.std
            plain = DenseTeacher(teacher.vit, grid_size=6)._tokens(window)
            expected = plain[:, :, 1:-1, 1:-1].permute(0, 2, 3, 1)
            torch.testing.assert_close(tokens[:, :, i, :, j], expected, atol=1e-4, rtol=1e-4)
    assert dense.description()["grid_size"] == 4 * density
    dense.consensus = 2
    colours = torch.nn.functional.adaptive_avg_pool2d(images, 4 * density).permute(0, 2, 3, 1)
    agreed = agree(tokens[1].reshape(4 * density, 4 * density, -1), colours[1], 2)
    torch.testing.assert_close(dense(images)[1], agreed.flatten(0, 1))


def test_normalisation_is_timms_with_random_weights():
    teacher = random_weights_teacher(REGISTERS, grid_size=4, depth=2)
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
        random_weights_teacher("vit_tiny_patch16_224", 4, block=b, depth=4)(images)
        for b in (1, 3, -1)
    ]
    assert not torch.allclose(by_block[0], by_block[1])
    torch.testing.assert_close(by_block[1], by_block[2])


def test_weights_load_from_a_file_and_fit_another_grid(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit")  # positions for 10 x 10 patches
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    teacher = load_dense_teacher("test_vit", tmp_path / "vit.pth", grid_size=10)
    torch.testing.assert_close(teacher.vit.pos_embed, vit.pos_embed)
    images = torch.rand(1, 3, 160, 160)
    expected = vit.eval().forward_features((images - teacher.mean) / teacher.std)[:, 1:]
    torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)
    assert load_dense_teacher("test_vit", tmp_path / "vit.pth", grid_size=5)(
        torch.rand(2, 3, 80, 80)
    ).shape == (2, 25, 64)


@pytest.mark.parametrize("classes", [0, 10])
def test_a_head_is_neither_needed_nor_in_the_way(tmp_path, classes):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=classes)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    teacher = load_dense_teacher("test_vit", tmp_path / "vit.pth", grid_size=10)
    images = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(teacher(images), DenseTeacher(vit, grid_size=10)(images))


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3"])  # pooled by mean, by attention
def test_pooling_counts_as_the_head(tmp_path, name):
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=64)
    pooling = ("head", "fc_norm", "attn_pool")
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith(pooling)}
    assert len(vit.state_dict()) > len(state) + 2
    torch.save(state, tmp_path / "vit.pth")
    teacher = load_dense_teacher(name, tmp_path / "vit.pth", grid_size=4)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(teacher(images), DenseTeacher(vit, grid_size=4)(images))


def test_half_precision_files_make_teachers_in_full_precision(tmp_path):
    vit = timm.create_model("test_vit", img_size=64)
    torch.save(vit.half().state_dict(), tmp_path / "vit.pth")
    teacher = load_dense_teacher("test_vit", tmp_path / "vit.pth", grid_size=4)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_the_description_is_of_name_file_and_place(tmp_path):
    vit = timm.create_model("test_vit", img_size=96)
    path = tmp_path / "vit.pth"
    torch.save(vit.state_dict(), path)
    name = "hf-hub:timm/test_vit.r160_in1k"  # the Hub's name of the same model
    teacher = load_dense_teacher(name, path, grid_size=4, block=-2, margin=1)
    assert teacher.description() == {
        "teacher": name,
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "block": 4,
        "margin": 1,
        "grid_size": 4,
        "density": 1,
        "consensus": 0,
        "feature_dim": 64,
    }


def test_bad_teachers_are_refused_in_one_line(tmp_path, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **settings):
        if pretrained:
            raise ConnectionError("no network,\nalas")
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    tiny = "test_vit"
    state = create(tiny).state_dict()
    less = {name: weight for name, weight in state.items() if name != "blocks.3.norm1.bias"}
    (tmp_path / "text.pth").write_text("no weights")
    for file, content in (
        ("good", state),
        ("list", [1, 2]),
        ("other", {"a": torch.zeros(1)}),
        ("less", less),
        ("more", state | {"blocks.6.norm1.bias": torch.zeros(64)}),
        ("narrow", state | {"norm.bias": torch.zeros(5)}),
        ("nan", state | {"norm.bias": torch.full((64,), torch.nan)}),
    ):
        torch.save(content, tmp_path / f"{file}.pth")
    for name, file, message in (
        ("vit_enormous", "good", "'vit_enormous' is not a model of timm"),
        ("hf-hub:somebody/vit", "good", "'hf-hub:somebody/vit' is not a model of timm"),
        (f"{tiny}.typo", "good", f"typo': timm has no such weights, but {tiny}.r160_in1k"),
        (f"{tiny}.typo", None, f"typo': timm has no such weights, but {tiny}.r160_in1k"),
        ("resnet18", None, "plain ViT"),
        (tiny, None, "could not be downloaded; name a local file with --teacher-weights.*network"),
        (f"timm/{tiny}", None, f"'timm/{tiny}': its weights could not be downloaded"),
        (tiny, "absent", "absent.pth: no such teacher weights file"),
        (tiny, "text", "text.pth: not weights of teacher"),
        (tiny, "list", "list.pth: not weights of teacher"),
        (tiny, "other", "not weights of teacher 'test_vit'.*\"a\" is"),
        (tiny, "less", r'"blocks.3.norm1.bias" is missing, expected \(64,\)'),
        (tiny, "more", r'"blocks.6.norm1.bias" is \(64,\), expected no such weight'),
        (tiny, "narrow", r'"norm.bias" is \(5,\), expected \(64,\)'),
        (tiny, "nan", '"norm.bias" holds numbers that are not finite'),
        ("vit_tiny_patch16_224", "good", r"is \(64,\), expected \(192,\)"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_dense_teacher(name, file and tmp_path / f"{file}.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="block 12"):
        random_weights_teacher(tiny, 4, block=12)
    with pytest.raises(ValueError, match="block 12"):  # before a download
        load_dense_teacher(tiny, block=12)
