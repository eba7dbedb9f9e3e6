"""The released models written plainly: concatenated queries, one nn.Linear a layer, all of it."""

import math

import torch
from torch import nn

COCO_TRUNK = (2048, 4096, 4096, 4096, 2048, 1024)
TTA_TRUNK = (2048, 4096, 2048, 1024)


def encoding(i: float, j: float, dim: int) -> list[float]:
    """Position (row i, column j), channel by channel."""

    def half(x: float, width: int) -> list[float]:
        values = []
        for channel in range(width):
            angle = x * math.exp(-2 * (channel // 2) * math.log(10000.0) / width)
            values.append(math.cos(angle) if channel % 2 else math.sin(angle))
        return values

    return half(j, dim // 2) + half(i, dim // 2)


def grid_encoding(side: int, dim: int) -> torch.Tensor:
    return torch.tensor([encoding(i, j, dim) for i in range(side) for j in range(side)])


class Reference(nn.Module):
    """A released model; its state dict has the released keys."""

    def __init__(self, trunk: tuple[int, ...], feature_dim: int, pooled: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 1, 14, stride=14)
        numbers = (1, 4, 5) if pooled else (1, 2, 3, 4, 5)
        self.trunk = [f"fc{number}" for number in numbers]
        for name, fan_in, fan_out in zip(self.trunk, trunk[:-1], trunk[1:], strict=True):
            setattr(self, name, nn.Linear(fan_in, fan_out))
        self.feat_proj_head = nn.Linear(trunk[-1], feature_dim)
        self.rgb_head_1 = nn.Linear(feature_dim + 2048, 256)
        self.rgb_head_2 = nn.Linear(256, 256)
        self.rgb_head_3 = nn.Linear(256, 3)
        self.feature_dim = feature_dim
        if pooled:
            self.norm = nn.LayerNorm(1024)
            self.little_query = nn.Parameter(torch.randn(feature_dim))
            self.little_self_attention = nn.MultiheadAttention(feature_dim, 8, batch_first=True)

    def forward(self, images):
        batch = len(images)
        column = self.conv1(images).flatten(1)  # (B, 1024)
        positions = grid_encoding(32, 1024)
        queries = torch.cat(
            [column[:, None].expand(-1, 1024, -1), positions[None].expand(batch, -1, -1)], dim=-1
        )
        x = queries
        for name in self.trunk:
            x = getattr(self, name)(x).relu()
        features = self.feat_proj_head(x)
        rgb = torch.cat([features, queries], dim=-1)
        for layer in (self.rgb_head_1, self.rgb_head_2, self.rgb_head_3):
            rgb = layer(rgb).relu()
        return features, rgb

    def pool(self, features):
        tokens = features + grid_encoding(32, self.feature_dim)
        query = self.little_query.view(1, 1, -1).expand(len(features), -1, -1)
        return self.little_self_attention(query, tokens, tokens)[0][:, 0]


def coco() -> Reference:
    return Reference(COCO_TRUNK, 1024, pooled=False)


def tta() -> Reference:
    return Reference(TTA_TRUNK, 768, pooled=True)
