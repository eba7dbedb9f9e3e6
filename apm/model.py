"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024, section 3 and Figure 1).

Fold:    an image becomes one trigger column ``T``.
Unfold:  ``T`` becomes one query per location, ``[T ; I_xy ; p_xy]``.
Answer:  a shared MLP turns each query into a feature and a colour, each location on its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.config import APMConfig
from apm.layers import AttentionPool, LocalPatch, MeanPool, Query, QueryLinear
from apm.preprocessing import Preprocessing


class APM(nn.Module):
    """Folds images into columns and answers any location from a column (section 3).

    B images of side H, N locations, column width D, feature width F.

    Attributes:
        config: the model's shape.
        preprocessing: how its images are made from pictures.
        provenance: how it was trained, as plain values; empty for a new model.
    """

    def __init__(self, config: APMConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = Preprocessing(image_size=config.image_size, scaling="imagenet")
        self.provenance: dict[str, Any] = {}
        trunk, rgb = config.trunk_widths, (*config.rgb_widths, 3)
        patch, local = config.patch_size, config.local_width
        parts = (config.column_dim, local, config.position_dim)
        self.fold: nn.Module = nn.Conv2d(3, 1, patch, stride=patch)
        self.local_patch = LocalPatch(local, patch, config.local_blocks) if local else None
        self.trunk_first = QueryLinear(trunk[0], *parts)
        self.trunk = nn.ModuleList(map(nn.Linear, trunk[:-1], trunk[1:]))
        self.feature_head = nn.Linear(trunk[-1], config.feature_dim)
        self.rgb_first = QueryLinear(rgb[0], *parts, config.feature_dim)
        self.rgb_head = nn.ModuleList(map(nn.Linear, rgb[:-1], rgb[1:]))
        self.pooling: nn.Module | None = None
        if config.pooling == "attention":
            self.pooling = AttentionPool(config.feature_dim, config.pool_heads, trunk[-1])
        elif config.pooling == "mean":
            self.pooling = MeanPool()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 3, H, H)`` -> features ``(B, N, F)`` and colours ``(B, N, 3)`` of the grid."""
        return self.query(self.encode(images), images=images)

    def encode(self, images: Tensor) -> Tensor:
        """Fold preprocessed images: ``(B, 3, H, H)`` -> trigger column ``(B, D)``."""
        self._check("images", images, (3, self.config.image_size, self.config.image_size))
        return self.fold(images).flatten(1)  # (B, 1, h, h) -> (B, D)

    def unfold(
        self,
        column: Tensor,
        positions: Tensor,
        images: Tensor | None = None,
        sees_local: Tensor | None = None,
    ) -> Query:
        """The queries ``[T ; I_xy ; p_xy]`` at ``(N, 2)`` positions; arguments as of ``query``."""
        self._check("column", column, (self.config.column_dim,))
        self._check("positions", positions, (2,))
        local = None
        if images is not None and self.local_patch is not None:
            self._check("images", images, (3, self.config.image_size, self.config.image_size))
            if len(images) != len(column):
                raise ValueError(f"{len(images)} images for {len(column)} columns")
            last = self.config.grid_size - 0.5
            if positions.numel() and not (positions.min() >= -0.5 and positions.max() <= last):
                raise ValueError(f"positions must be in -0.5..{last}, where the image is")
            local = self.local_patch.at(images, positions)  # (B, N, L)
        return Query(column, local, sees_local, positions)

    def hidden(self, query: Query) -> Tensor:
        """The shared MLP: ``(B, N, trunk_widths[-1])``."""
        x = F.relu_(self.trunk_first(query))  # (B, N, trunk_widths[0])
        for layer in self.trunk:
            x = F.relu_(layer(x))
        return x

    def answer(self, query: Query) -> tuple[Tensor, Tensor]:
        """Both heads: features ``(B, N, F)`` and, from feature and query, colours ``(B, N, 3)``."""
        features = self.feature_head(self.hidden(query))  # (B, N, F)
        x = F.relu_(self.rgb_first(query, features))  # (B, N, rgb_widths[0])
        for layer in self.rgb_head:
            x = F.relu_(layer(x))
        return features, x

    def query(
        self,
        column: Tensor,
        positions: Tensor | None = None,
        chunk_size: int | None = None,
        *,
        images: Tensor | None = None,
        sees_local: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unfold and answer: every location on its own, in any order.

        Args:
            column: ``(B, D)`` trigger columns.
            positions: ``(N, 2)`` float, (row, column) in grid units, on the grid, between its
                points, or half a unit beyond; default the whole grid.
            chunk_size: how many locations are answered at a time; default all. Bounds memory and
                changes results by float rounding only.
            images: ``(B, 3, H, H)``, where the local patches come from in models that have them.
                Without images the percept is made from the column alone.
            sees_local: ``(B,)`` bool, False for images that are answered from the column alone.

        Returns:
            Features ``(B, N, F)`` and colours ``(B, N, 3)``, at least 0.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk size {chunk_size} must be at least 1")
        positions = self.grid_positions() if positions is None else positions.float()
        query = self.unfold(column, positions, images, sees_local)
        if chunk_size is None or chunk_size >= len(positions):
            return self.answer(query)
        # Filled part by part: to join them at the end would take all of their memory once more.
        answers: list[Tensor] = []
        done = 0
        for part in query.split(chunk_size):
            some = self.answer(part)
            if not answers:  # whose dtype they have
                answers = [one.new_empty(len(one), len(positions), one.shape[-1]) for one in some]
            here = slice(done, done := done + some[0].shape[1])
            for whole, one in zip(answers, some, strict=True):
                whole[:, here] = one
        features, rgb = answers
        return features, rgb

    def query_pooled(
        self, column: Tensor, positions: Tensor | None = None, *, images: Tensor | None = None
    ) -> Tensor:
        """``pool(query(column, positions)[0], positions)``, without a feature for each location.

        ``(B, D)`` -> ``(B, F)``. Arguments as of ``query``.
        """
        positions = self.grid_positions() if positions is None else positions.float()
        hidden = self.hidden(self.unfold(column, positions, images))
        return self._pooling()(hidden, positions, self.feature_head)

    def pool(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Summarise the answers at ``(N, 2)`` positions: ``(B, N, F)`` -> ``(B, F)``.

        Positions default to the whole grid; only attention pooling looks at them.
        """
        return self._pooling()(features, self.grid_positions() if positions is None else positions)

    def _pooling(self) -> nn.Module:
        if self.pooling is None:
            raise ValueError("this APM has no pooled head: its config.pooling is None")
        return self.pooling

    def grid_positions(self, side: int | None = None) -> Tensor:
        """The middles of ``side`` x ``side`` cells of the image in grid units: ``(N, 2)``.

        Default the model's own grid, whose positions are whole numbers.
        """
        side = side or self.config.grid_size
        middles = torch.arange(side, device=self.device) + 0.5
        middles = middles * (self.config.grid_size / side) - 0.5
        return torch.cartesian_prod(middles, middles)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.feature_head.weight.device

    @staticmethod
    def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if value.ndim != len(shape) + 1 or value.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected (B, {expected})")
