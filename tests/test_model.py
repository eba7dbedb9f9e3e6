import pytest
import torch
from conftest import make_model
from reference import coco, grid_encoding, tta
from torch import nn

from apm import APM, APMConfig
from apm.checkpoint import from_released
from apm.layers import Query


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        assert count(APM(APMConfig.coco())) == 54_347_600
        assert count(APM(APMConfig.tta())) == 22_822_224


@pytest.mark.parametrize("build, config", [(coco, APMConfig.coco()), (tta, APMConfig.tta())])
def test_equals_the_plain_released_model(build, config):
    torch.manual_seed(0)
    reference = build().eval()
    model = APM(config).eval()
    model.load_state_dict(from_released(reference.state_dict()))
    images = torch.randn(2, 3, 448, 448)
    with torch.inference_mode():
        expected_features, expected_rgb = reference(images)
        features, rgb = model(images)
        torch.testing.assert_close(features, expected_features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rgb, expected_rgb, atol=1e-5, rtol=1e-4)
        if config.pooling:
            torch.testing.assert_close(
                model.pool(features), reference.pool(expected_features), atol=1e-5, rtol=1e-4
            )


@pytest.fixture
def asked(model):
    images = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        column = model.encode(images)
        yield model, images, column, model.query(column, images=images)


def test_order_does_not_matter(asked):
    model, images, column, (features, rgb) = asked
    order = torch.randperm(16)
    shuffled = model.query(column, model.grid_positions()[order], images=images)
    torch.testing.assert_close(shuffled[0], features[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled[1], rgb[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 100])
def test_chunks_do_not_matter(asked, chunk_size):
    model, images, column, expected = asked
    for answer, whole in zip(
        model.query(column, chunk_size=chunk_size, images=images), expected, strict=True
    ):
        torch.testing.assert_close(answer, whole, atol=1e-5, rtol=0)


def test_chunks_have_the_dtype_of_their_answers(asked):
    model, images, column, _ = asked
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for chunk_size in (None, 3):
            answers = model.query(column, chunk_size=chunk_size, images=images)
            assert {answer.dtype for answer in answers} == {torch.bfloat16}


def test_some_locations_are_answered_as_among_all(asked):
    model, images, column, (features, _) = asked
    some = torch.tensor([14, 3, 3, 7])
    answers, _ = model.query(column, model.grid_positions()[some], images=images)
    torch.testing.assert_close(answers, features[:, some], atol=1e-5, rtol=0)


def test_a_fine_grid_is_its_positions_asked_one_by_one(asked):
    model, images, column, _ = asked
    positions = model.grid_positions(10)
    assert positions.min() == pytest.approx(-0.3) and positions.max() == pytest.approx(3.3)
    features, rgb = model.query(column, positions, images=images)
    order = torch.randperm(100)
    shuffled = model.query(column, positions[order], chunk_size=7, images=images)
    torch.testing.assert_close(shuffled[0], features[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled[1], rgb[:, order], atol=1e-5, rtol=0)
    for place in (0, 34, 99):
        alone, colour = model.query(column, positions[place][None], images=images)
        torch.testing.assert_close(alone[:, 0], features[:, place], atol=1e-5, rtol=0)
        torch.testing.assert_close(colour[:, 0], rgb[:, place], atol=1e-5, rtol=0)


def test_between_grid_points_the_answer_is_of_the_image_moved_and_the_position_kept(asked):
    model, images, column, _ = asked
    position = torch.tensor([[1 + 3 / 14, 2 - 5 / 14]])
    features, rgb = model.query(column, position, images=images)
    moved = torch.nn.functional.pad(images, (5, 0, 0, 3), mode="reflect")[..., 3:, :56]
    local = model.local_patch(moved)[:, :, 1, 2][:, None]
    expected = model.answer(Query(column, local, None, position))
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(rgb, expected[1])


@pytest.mark.parametrize("position", [(-0.6, 0.0), (0.0, 3.6), (float("nan"), 0.0)])
def test_positions_beyond_the_image_are_refused_where_a_patch_is_cut(asked, position):
    model, images, column, _ = asked
    with pytest.raises(ValueError, match=r"positions must be in -0.5..3.5"):
        model.query(column, torch.tensor([position]), images=images)


def test_order_and_chunks_do_not_matter_in_the_coco_model():
    torch.manual_seed(0)
    model = APM(APMConfig.coco()).eval()
    with torch.inference_mode():
        column = model.encode(torch.rand(1, 3, 448, 448))
        whole, _ = model.query(column)
        order = torch.randperm(1024)
        chunked, _ = model.query(column, model.grid_positions()[order], chunk_size=300)
    torch.testing.assert_close(chunked, whole[:, order], atol=1e-5, rtol=0)


def test_gradients_add_up_over_chunks():
    model = make_model(local_width=8)
    images = torch.rand(1, 3, 56, 56)

    def gradients(chunks):
        model.zero_grad()
        for positions in chunks:
            features, rgb = model.query(model.encode(images), positions, images=images)
            (features.square().sum() + rgb.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    grid = model.grid_positions()
    pairs = zip(gradients([grid]), gradients(grid.split(5)), strict=True)
    for whole, chunked in pairs:
        torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)


def test_without_images_the_null_stands_in():
    model = make_model(local_width=8)
    images = torch.rand(1, 3, 56, 56)
    with torch.inference_mode():
        column = model.encode(images)
        with_patch, _ = model.query(column, images=images)
        without, _ = model.query(column)
        other_patch, _ = model.query(column, images=images.flip(-1))
    assert not torch.allclose(with_patch, without)
    assert not torch.allclose(with_patch, other_patch)


@pytest.mark.parametrize("blocks", [(0, 0), (2, 0), (0, 1), (1, 1)])
def test_a_location_sees_a_neighbourhood_of_local_size_and_no_more(blocks):
    model = make_model(image_size=112, local_width=64, local_blocks=blocks)
    images = torch.rand(1, 3, 112, 112, requires_grad=True)
    row, column = 4, 3
    model.local_patch(images)[0, :, row, column].sum().backward()
    seen = images.grad[0].abs().amax(dim=0) > 0
    margin = (model.config.local_size - 14) // 2
    expected = torch.zeros(112, 112, dtype=torch.bool)
    top, left = 14 * row - margin, 14 * column - margin
    expected[top : top + 14 + 2 * margin, left : left + 14 + 2 * margin] = True
    assert torch.equal(seen, expected)


def test_images_that_do_not_see_their_local_patches_are_answered_from_the_column_alone(asked):
    model, images, column, (whole, _) = asked
    alone, _ = model.query(column)
    mixed, _ = model.query(column, images=images, sees_local=torch.tensor([False, True]))
    torch.testing.assert_close(mixed, torch.stack([alone[0], whole[1]]), atol=1e-6, rtol=0)


def test_a_far_change_reaches_a_location_through_the_column_only():
    model = make_model(local_width=8, local_blocks=(1, 0))
    images = torch.rand(1, 3, 56, 56)
    changed = images.clone()
    changed[..., :14, :14] = 0
    with torch.inference_mode():
        column = model.encode(images)
        difference = model.query(column, images=images)[0] - model.query(column, images=changed)[0]
    moved = difference.abs().amax(dim=(0, 2)).view(4, 4) > 1e-6
    assert moved[:2, :2].all()
    assert not moved[2:].any() and not moved[:, 2:].any()


@pytest.mark.parametrize("heads", [1, 4])
def test_poolinging_equals_multihead_attention(heads):
    model = make_model(pooling="attention", pool_heads=heads)
    attention = model.pooling.attention
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    features = torch.randn(3, 16, 16)
    tokens = features + grid_encoding(4, 16)
    query = model.pooling.query.expand(3, 1, -1)
    expected = attention(query, tokens, tokens)[0][:, 0]
    torch.testing.assert_close(model.pool(features), expected, atol=1e-5, rtol=1e-4)


def test_pooling_some_locations_encodes_their_positions():
    model = make_model(pooling="attention", pool_heads=2)
    features, order = torch.randn(1, 16, 16), torch.randperm(16)
    shuffled = model.pool(features[:, order], model.grid_positions()[order])
    torch.testing.assert_close(shuffled, model.pool(features), atol=1e-5, rtol=1e-4)


def test_mean_pooling():
    features = torch.randn(2, 16, 16)
    torch.testing.assert_close(make_model(pooling="mean").pool(features), features.mean(dim=1))


def test_a_model_without_pooled_head_says_so(model):
    with pytest.raises(ValueError, match="no pooled head"):
        model.pool(torch.zeros(1, 16, 16))


def test_wrong_shapes_and_chunks_are_named(model):
    with pytest.raises(ValueError, match=r"\(1, 3, 60, 56\)"):
        model.encode(torch.zeros(1, 3, 60, 56))
    with pytest.raises(ValueError, match=r"\(1, 9\)"):
        model.query(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="chunk size 0"):
        model.query(torch.zeros(1, 16), chunk_size=0)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 55},
        {"position_dim": 30},
        {"pooling": "max"},
        {"pooling": "attention", "pool_heads": 5},
        {"local_width": -8},
        {"local_width": 6},
        {"local_width": 8, "patch_size": 7},
        {"local_blocks": (1,)},
        {"trunk_widths": ()},
        {"trunk_widths": (-1,)},
        {"feature_dim": 1.5},
    ],
)
def test_an_impossible_config_is_refused(change):
    with pytest.raises(ValueError, match=r".+"):
        make_model(**change)


def test_wrong_positions_and_images_are_refused_and_doubles_are_welcome():
    model = make_model(local_width=8)
    images = torch.rand(2, 3, 56, 56)
    column, positions = model.encode(images), model.grid_positions()
    expected = model.query(column, positions, images=images)[0]
    torch.testing.assert_close(model.query(column, positions.double(), images=images)[0], expected)
    with pytest.raises(ValueError, match=r"positions: shape \(16, 3\)"):
        model.query(column, torch.zeros(16, 3))
    with pytest.raises(ValueError, match=r"images: shape"):
        model.query(column, images=images[..., :28, :28])
    with pytest.raises(ValueError, match="1 images for 2 columns"):
        model.query(column, images=images[:1])
