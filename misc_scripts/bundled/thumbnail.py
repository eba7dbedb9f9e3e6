"""A start of the RGB head: its colours are a grey thumbnail of the image, read from the column."""

from typing import Any

import torch

from apm import APM
from apm.positional_encoding import sincos_2d

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
LEAST, GAIN = 0.3, 0.7  # an open unit holds LEAST + GAIN * brightness


@torch.no_grad()
def start_as_thumbnail(model: APM) -> None:
    """Give a model a new fold and a new RGB head, which together answer a grey thumbnail.

    The fold makes each entry of the column the brightness of its patch. The answer at location k
    is entry k of the column: a product of column and position, which an MLP learns slowly from
    random weights. So hidden unit k starts with entry k as its input, and its bias and position
    weights keep it at zero at every other location. The later layers pass the one open unit on.
    All other weights are random.

    Raises:
        ValueError: if the RGB head has fewer hidden units than there are locations, or one layer
            of them only.
    """
    config, widths = model.config, model.config.rgb_widths
    if widths[0] < config.column_dim or len(widths) < 2:
        raise ValueError(
            f"RGB head of hidden widths {widths}: a thumbnail needs at least {config.column_dim}, "
            "one unit a location, and a second layer"
        )
    fresh = APM(config).to(model.device)
    model.fold, model.rgb_first, model.rgb_head = fresh.fold, fresh.rgb_first, fresh.rgb_head

    fold: Any = model.fold
    brightness = torch.tensor(BRIGHTNESS, device=model.device)
    if model.preprocessing.channels == "BGR":
        brightness = brightness.flip(0)
    mean, std = model.preprocessing.statistics().to(model.device)
    fold.weight.copy_((brightness * std / config.patch_size**2).view(1, 3, 1, 1))
    fold.bias.fill_(brightness @ mean)

    first, units = model.rgb_first, slice(config.column_dim)
    encoding = sincos_2d(model.grid_positions(), config.position_dim)  # (N, P)
    square_norm = config.position_dim / 2  # of every encoding
    cosines = encoding @ encoding.T / square_norm  # (N, N)
    slope = (LEAST + GAIN) / (1 - cosines.fill_diagonal_(-1).max())  # zero at the nearest location
    first.position.weight[units] = slope / square_norm * encoding
    first.column.weight[units] = GAIN * torch.eye(config.column_dim, device=model.device)
    first.column.bias[units] = LEAST - slope
    for other in (first.feature, first.local):
        if other is not None:
            other.weight[units] = 0

    layers: list[Any] = list(model.rgb_head)
    for layer in layers:
        layer.weight.mul_(0.1)  # random units must add little to the thumbnail
        layer.bias.zero_()
    layers[0].weight[0, units] = 1
    for layer in layers[1:-1]:
        layer.weight[0, 0] = 1
    layers[-1].weight[:, 0] = 1 / GAIN
    layers[-1].bias.fill_(-LEAST / GAIN)
