"""The released code's arithmetic, on this project's models without local patches, to compare with.

It joins a whole query for each location, answers chunk by chunk, and pools through keys and values
of every location. The numbers are ours to float rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from apm import APM
from apm.layers import QueryLinear
from apm.positional_encoding import sincos_2d

LOCATIONS = 1024  # of the paper's models
COPIES = 8  # of the one image in a step of test-time training
TTA_CHUNK = 16  # queries


def joined(layer: QueryLinear) -> Callable[..., Tensor]:
    """A first layer as one matrix, joined once, on the concatenated query."""
    blocks = (layer.feature, layer.column, layer.position)
    weight = torch.cat([block.weight for block in blocks if block is not None], dim=1)
    return lambda *parts: F.linear(torch.cat(parts, dim=-1), weight, layer.column.bias)


def first_layers(model: APM) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Of the trunk and of the RGB head, joined."""
    return joined(model.trunk_first), joined(model.rgb_first)


def chunks(
    model: APM,
    column: Tensor,
    chunk_size: int,
    first: Callable[..., Tensor],
    locations: int = LOCATIONS,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Queries ``(B, n, D)``, ``(B, n, P)`` and features ``(B, n, F)`` of n locations at a time."""
    encoding = sincos_2d(model.grid_positions()[:locations], model.config.position_dim)
    for positions in encoding.split(chunk_size):
        query = (
            column[:, None].expand(-1, len(positions), -1),
            positions.expand(len(column), -1, -1),
        )
        x = first(*query).relu()
        for layer in model.trunk:
            x = layer(x).relu()
        yield query, model.feature_head(x)


def features(
    model: APM, column: Tensor, chunk_size: int = LOCATIONS, locations: int = LOCATIONS
) -> Tensor:
    """Features of the first locations, ``(B, N, F)``."""
    parts = chunks(model, column, chunk_size, joined(model.trunk_first), locations)
    return torch.cat([answers for _, answers in parts], dim=1)


def dense(
    model: APM,
    images: Tensor,
    chunk_size: int = LOCATIONS,
    layers: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Inference: features ``(B, N, F)`` and colours ``(B, N, 3)`` of the whole grid.

    ``layers`` are ``first_layers(model)``, where its weights do not change.
    """
    trunk_first, rgb_first = layers or first_layers(model)
    answers, colours, paint = [], [], rgb_head(model, rgb_first)
    for query, answer in chunks(model, model.encode(images), chunk_size, trunk_first):
        answers.append(answer)
        colours.append(paint(answer, *query))
    return torch.cat(answers, dim=1), torch.cat(colours, dim=1)


def rgb_head(model: APM, first: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Colours of features ``(..., F)`` and of both parts of their queries."""

    def paint(*parts: Tensor) -> Tensor:
        rgb = first(*parts).relu()
        for layer in model.rgb_head:
            rgb = layer(rgb).relu()
        return rgb

    return paint


def tta_features(model: APM, column: Tensor) -> Tensor:
    """Features of the whole grid as a step of test-time training has them, ``(B, N, F)``.

    Images and locations are one list of queries, answered ``TTA_CHUNK`` at a time. Each chunk's
    colours are computed though nothing asks for them, and all answers so far are copied with each
    chunk that joins them.
    """
    first, rgb_first = first_layers(model)
    paint = rgb_head(model, rgb_first)
    encoding = sincos_2d(model.grid_positions(), model.config.position_dim)  # (N, P)
    images, locations = len(column), len(encoding)
    columns = column[:, None].expand(-1, locations, -1).flatten(0, 1)  # (B N, D)
    positions = encoding.repeat(images, 1)  # (B N, P)
    answers, colours = column.new_empty(0, model.config.feature_dim), column.new_empty(0, 3)
    for query in zip(columns.split(TTA_CHUNK), positions.split(TTA_CHUNK), strict=True):
        x = first(*query).relu()
        for layer in model.trunk:
            x = layer(x).relu()
        answer = model.feature_head(x)
        answers = torch.cat([answers, answer])
        colours = torch.cat([colours, paint(answer, *query)])
    return answers.view(images, locations, -1)


def pool(model: APM, answers: Tensor) -> Tensor:
    """Attention pooling of the whole grid: ``(B, N, F)`` -> ``(B, F)``."""
    pooling: Any = model.pooling
    tokens = answers + sincos_2d(model.grid_positions(), answers.shape[-1])
    query = pooling.query.expand(len(tokens), 1, -1)
    return pooling.attention(query, tokens, tokens)[0][:, 0]


def tta_step(model: APM, image: Tensor, target: Tensor, optimizer: Optimizer) -> None:
    """A step of test-time training on one image ``(1, 3, H, H)`` and its target ``(1, F)``."""
    column = model.encode(image.expand(COPIES, -1, -1, -1))
    pooled = pool(model, tta_features(model, column))
    _step(optimizer, F.mse_loss(pooled, target.expand(COPIES, -1)))


def training_step(
    model: APM, images: Tensor, targets: Tensor, colours: Tensor, optimizer: Optimizer
) -> float:
    """A step of training on COCO; the loss before it."""
    answers, rgb = dense(model, images)
    return _step(optimizer, F.mse_loss(answers, targets) + F.mse_loss(rgb, colours))


def _step(optimizer: Optimizer, loss: Tensor) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
