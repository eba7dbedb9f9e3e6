"""Each fast layer against the plain layer that its docstring names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import encoding
from torch import nn

from apm.layers import AttentionPool, LocalPatch, Query, QueryLinear, bilinear, move
from apm.positional_encoding import sincos_2d

POSITIONS = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.25, 2.5], [3.0, 2.5]])


@pytest.mark.parametrize("few", [4, 3])
@pytest.mark.parametrize("feature", [0, 6])
@pytest.mark.parametrize("local", [0, 4])
def test_query_linear_is_a_linear_layer_on_the_joined_query(local, feature, few, monkeypatch):
    monkeypatch.setattr("apm.layers.FEW", few)
    torch.manual_seed(0)
    layer = QueryLinear(7, 5, local, 8, feature)
    blocks = [getattr(layer, name) for name in ("feature", "column", "local", "position")]
    plain = nn.Linear(feature + 5 + local + 8, 7)
    plain.weight.data = torch.cat([block.weight for block in blocks if block is not None], dim=1)
    plain.bias.data = layer.column.bias
    column, features = torch.randn(2, 5), torch.randn(2, 4, feature)
    patches = torch.randn(2, 4, local)
    p = torch.tensor([encoding(i, j, 8) for i, j in POSITIONS.tolist()])
    joined = [features, column[:, None].expand(-1, 4, -1), patches, p.expand(2, -1, -1)]
    query = Query(column, patches if local else None, None, POSITIONS)
    answers = layer(query, features if feature else None)
    expected = plain(torch.cat(joined, dim=-1))
    torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-5)
    for output in (answers, expected):
        output.square().sum().backward()
    gradients = torch.cat([block.weight.grad for block in blocks if block is not None], dim=1)
    torch.testing.assert_close(gradients, plain.weight.grad, atol=1e-4, rtol=1e-4)


def test_the_null_stands_in_for_the_local_patch_of_each_image_that_does_not_see_it():
    torch.manual_seed(0)
    layer = QueryLinear(7, 5, 4, 8)
    nn.init.normal_(layer.local_null)
    column, patches = torch.randn(3, 5), torch.randn(3, 4, 4)
    seen = layer(Query(column, patches, None, POSITIONS))
    alone = layer(Query(column, None, None, POSITIONS))
    no_patch = layer(Query(column, torch.zeros_like(patches), None, POSITIONS))
    torch.testing.assert_close(alone, no_patch + layer.local_null)
    mixed = layer(Query(column, patches, torch.tensor([True, False, True]), POSITIONS))
    torch.testing.assert_close(mixed, torch.stack([seen[0], alone[1], seen[2]]))
    mixed[1].sum().backward()
    assert layer.local.weight.grad.abs().max() == 0
    assert layer.local_null.grad.abs().min() > 0


@pytest.mark.parametrize("blocks", [(0, 0), (1, 0), (0, 1), (1, 2)])
def test_the_local_patch_is_one_network_on_every_neighbourhood(blocks):
    """Far from the image's border, beyond which the convolution sees zeros."""
    torch.manual_seed(0)
    network, side = LocalPatch(8, 4, blocks), 11
    for name, parameter in network.named_parameters():
        if "widen" in name:
            nn.init.normal_(parameter)
    reach = blocks[0] * 2 + blocks[1] * 4  # pixels on every side
    border = -(-reach // 4) * 4  # whole patches
    images = torch.randn(1, 3, 4 * side, 4 * side)
    whole = network(images)
    for row, column in ((5, 5), (4, 6)):
        top, left = 4 * row - border, 4 * column - border
        cut = images[:, :, top : top + 4 + 2 * border, left : left + 4 + 2 * border]
        alone = network(F.pad(cut, (8,) * 4))[0, :, border // 4 + 2, border // 4 + 2]
        torch.testing.assert_close(alone, whole[0, :, row, column], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_head", [False, True])
def test_attention_pool_is_multihead_attention_of_one_query(with_head):
    torch.manual_seed(0)
    pool, head = AttentionPool(8, 2, 6), nn.Linear(6, 8)
    nn.init.normal_(pool.attention.in_proj_bias)
    nn.init.normal_(pool.attention.out_proj.bias)
    hidden, features = torch.randn(3, 4, 6), torch.randn(3, 4, 8)
    features = head(hidden) if with_head else features
    tokens = features + sincos_2d(POSITIONS, 8)
    expected, _ = pool.attention(pool.query.expand(3, 1, -1), tokens, tokens)
    pooled = pool(hidden, POSITIONS, head) if with_head else pool(features, POSITIONS)
    torch.testing.assert_close(pooled, expected[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [(0, 0), (2, 0), (1, 1)])
def test_between_grid_points_the_local_patch_is_the_network_on_the_neighbourhood_there(blocks):
    torch.manual_seed(0)
    network = LocalPatch(8, 4, blocks)
    for name, parameter in network.named_parameters():
        if "widen" in name:
            nn.init.normal_(parameter)
    border = -(-(blocks[0] * 2 + blocks[1] * 4) // 4) * 4
    images = torch.randn(1, 3, 44, 44)
    positions = torch.tensor([[5.25, 4.5], [4.0, 5.0], [5.25, 5.5], [4.75, 4.0]])
    found = network.at(images, positions)
    for position, embedding in zip(positions, found[0], strict=True):
        top, left = (4 * position).int().tolist()
        cut = move(images, top - border, left - border)[..., : 4 + 2 * border, : 4 + 2 * border]
        alone = network(F.pad(cut, (8,) * 4))[0, :, border // 4 + 2, border // 4 + 2]
        torch.testing.assert_close(embedding, alone, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_every_place_of_a_real_grid_has_its_own_local_patch():
    torch.manual_seed(0)
    network, images = LocalPatch(8, 4, (0, 0)), torch.randn(2, 3, 128, 128)
    grid = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0))
    whole = network(images).flatten(2).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network.at(images, grid).float(), whole, atol=0.05, rtol=0.05)


def test_at_the_border_the_local_patch_sees_the_image_mirrored():
    torch.manual_seed(0)
    network, images = LocalPatch(8, 4, (1, 1)), torch.randn(2, 3, 16, 16)
    mirrored = torch.cat([images[..., 1:3].flip(-1), images[..., :-2]], dim=-1)
    found = network.at(images, torch.tensor([[0.0, -0.5]]))
    torch.testing.assert_close(found[:, 0], network(mirrored)[:, :, 0, 0])
    assert network.at(images, torch.empty(0, 2)).shape == (2, 0, 8)


@pytest.mark.parametrize(("rows", "columns", "margin"), [(0, 0, 0), (2, -1, 0), (-2, 1, 2)])
def test_moved_images_are_windows_of_the_mirrored_image(rows, columns, margin):
    image = np.random.default_rng(0).random((5, 6), np.float32)
    mirrored = np.pad(image, 4, mode="reflect")
    top, left = 4 + rows - margin, 4 + columns - margin
    expected = mirrored[top : top + 5 + 2 * margin, left : left + 6 + 2 * margin]
    moved = move(torch.from_numpy(image)[None, None], rows, columns, margin)
    np.testing.assert_array_equal(moved[0, 0], expected)


def test_bilinear_values_are_the_grids_at_its_points_and_shared_out_between():
    features = torch.rand(2, 16, 3)
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    assert torch.equal(bilinear(features, grid, 4), features)
    places = 4 * torch.rand(50, 2) - 0.5
    maps = features.transpose(1, 2).view(2, 3, 4, 4)
    sampled = F.grid_sample(  # (x, y) in [-1, 1] from border to border
        maps, ((places + 0.5) / 2 - 1).flip(-1).expand(2, 1, -1, 2),
        padding_mode="border", align_corners=False,
    )  # fmt: skip
    torch.testing.assert_close(bilinear(features, places, 4), sampled[:, :, 0].transpose(1, 2))
    coarse = (places + 0.5) / 2 - 0.5  # of a grid half as fine
    torch.testing.assert_close(bilinear(features, coarse, 2), bilinear(features, places, 4))
