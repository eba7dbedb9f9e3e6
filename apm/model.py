"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024, section 3 and Figure 1).

Fold:    an image becomes one trigger column ``T``.
Unfold:  ``T`` becomes one query per location, ``[T ; I_xy ; p_xy]``.
Answer:  a shared MLP turns each query into a feature and a colour, each location on its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.positional_encoding import sincos_1d, sincos_2d
from apm.preprocessing import Preprocessing

POOLINGS = (None, "attention", "mean")


@dataclass(frozen=True, kw_only=True)
class APMConfig:
    """Shape of an APM. Lengths are in pixels, widths in channels.

    Attributes:
        image_size: side of the square input image.
        patch_size: side of the patch that one column entry folds.
        trunk_widths: output widths of the shared MLP's layers.
        feature_dim: width of the answered feature, the teacher's.
        rgb_widths: hidden widths of the RGB head.
        position_dim: width of the positional encoding, divisible by 4.
        pooling: how ``pool`` summarises the locations: ``None``, ``"attention"`` or ``"mean"``.
        pool_heads: heads of the attention pooling.
        local_sizes: sides of the square neighbourhoods that make the local patch ``I_xy`` of
            Figure 1, each ``patch_size`` times a divisor of ``image_size`` and shown to the MLP
            at a resolution of ``patch_size x patch_size``. Empty: no local patch, as released.
    """

    image_size: int = 448
    patch_size: int = 14
    trunk_widths: tuple[int, ...]
    feature_dim: int
    rgb_widths: tuple[int, ...] = (256, 256)
    position_dim: int = 1024
    pooling: str | None = None
    pool_heads: int = 8
    local_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Checkpoints come from files, where tuples arrive as lists.
        for name in ("trunk_widths", "rgb_widths", "local_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        widths = (self.image_size, self.patch_size, self.feature_dim, self.position_dim)
        widths += self.trunk_widths + self.rgb_widths + self.local_sizes
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"sizes and widths must be positive whole numbers, got {self}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if not self.trunk_widths or not self.rgb_widths:
            raise ValueError("trunk_widths and rgb_widths must not be empty")
        if self.position_dim % 4:
            raise ValueError(f"position_dim {self.position_dim} must be divisible by 4")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} must be one of {POOLINGS}")
        if self.pooling == "attention" and self.feature_dim % self.pool_heads:
            raise ValueError(
                f"feature_dim {self.feature_dim} must be a multiple of pool_heads {self.pool_heads}"
            )
        for size in self.local_sizes:
            if size % self.patch_size or self.image_size % (size // self.patch_size):
                raise ValueError(
                    f"local size {size} must be patch_size {self.patch_size} times a divisor of "
                    f"image_size {self.image_size}"
                )

    @property
    def grid_size(self) -> int:
        """Locations along one side of the grid."""
        return self.image_size // self.patch_size

    @property
    def column_dim(self) -> int:
        """Width of the trigger column: one entry a patch."""
        return self.grid_size**2

    @property
    def local_dim(self) -> int:
        """Width of the local patch I_xy; 0 without one."""
        return len(self.local_sizes) * 3 * self.patch_size**2

    @classmethod
    def coco(cls) -> "APMConfig":
        """The paper's dense model: DINOv2 ViT-L/14 features on COCO, 54.3 M parameters."""
        return cls(trunk_widths=(4096, 4096, 4096, 2048, 1024), feature_dim=1024)

    @classmethod
    def tta(cls, feature_dim: int = 768, pooling: str = "attention") -> "APMConfig":
        """The paper's test-time training model: one CLIP CLS token, 22.8 M parameters."""
        return cls(trunk_widths=(4096, 2048, 1024), feature_dim=feature_dim, pooling=pooling)

    @classmethod
    def small(cls, feature_dim: int = 192) -> "APMConfig":
        """The bundled checkpoint's model: with the local patch, 5.6 M parameters."""
        return cls(
            trunk_widths=(1024, 768, 768, 512),
            feature_dim=feature_dim,
            rgb_widths=(192, 192),
            position_dim=256,
            local_sizes=(14, 56, 224),
        )


def local_patches(
    images: Tensor, positions: Tensor, sizes: tuple[int, ...], patch_size: int
) -> Tensor:
    """The neighbourhoods of each location, the wider the coarser: ``I_xy`` of Figure 1.

    A neighbourhood of side ``size`` is centred on the location's patch and seen as
    ``patch_size x patch_size`` cells, sampled bilinearly from the image averaged down to cells of
    that size. Beyond the border the outermost cells repeat.

    Args:
        images: ``(B, 3, H, H)`` float.
        positions: ``(N, 2)`` float, (row, column) in grid units.

    Returns:
        ``(B, N, len(sizes) * 3 * patch_size**2)``.
    """
    batch, _, side, _ = images.shape
    centres = patch_size * (positions.float() + 0.5)  # (N, 2) in pixels
    offsets = torch.arange(patch_size, device=images.device) - (patch_size - 1) / 2
    patches = []
    for size in sizes:
        cell = size // patch_size
        y, x = (centres[:, :, None] + cell * offsets).unbind(dim=1)  # (N, P) each, in pixels
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
        grid = (2 * grid / side - 1).view(1, -1, patch_size, 2)  # (1, N*P, P, 2) in [-1, 1]
        cells = F.grid_sample(
            F.avg_pool2d(images, cell),
            grid.expand(batch, -1, -1, -1),
            padding_mode="border",
            align_corners=False,
        )  # (B, 3, N*P, P)
        patches.append(cells.view(batch, 3, -1, patch_size**2).transpose(1, 2).flatten(2))
    return torch.cat(patches, dim=-1)


class QueryLinear(nn.Module):
    """``nn.Linear`` on a query ``[feature ; T ; I_xy ; p_xy]`` without building the query.

    The weight is held as one block for each part, so that ``W q = W_T T + W_p p + ...``:
    ``W_T T`` is one vector an image, and as the encoding is separable, ``W_p p`` is a sum of one
    vector a row and one a column of the grid. Equal to the plain layer to float rounding.
    """

    def __init__(self, config: APMConfig, out_features: int, feature_dim: int = 0) -> None:
        super().__init__()
        fan_in = feature_dim + config.column_dim + config.local_dim + config.position_dim
        self.feature = _bias_free(feature_dim, out_features)
        self.column = nn.Linear(config.column_dim, out_features)
        self.local = _bias_free(config.local_dim, out_features)
        # Stands in for W_l I_xy where no image is at hand.
        self.local_null = nn.Parameter(torch.zeros(out_features)) if config.local_dim else None
        self.position = nn.Linear(config.position_dim, out_features, bias=False)
        bound = 1 / math.sqrt(fan_in)  # nn.Linear's own initialisation, of the whole layer
        for name, parameter in self.named_parameters():
            if name != "local_null":
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, column: Tensor, positions: Tensor, local: Tensor | None, feature: Tensor | None = None
    ) -> Tensor:
        """``(B, D), (N, 2), (B, N, L), (B, N, F)`` -> ``(B, N, out_features)``."""
        column_term = self.column(column)[:, None]  # (B, 1, out)
        if self.local is not None and local is None:
            column_term = column_term + self.local_null
        out = column_term + self.position_term(positions)  # (B, N, out)
        if self.local is not None and local is not None:
            out += self.local(local)
        if self.feature is not None:
            out += self.feature(feature)
        return out

    def position_term(self, positions: Tensor) -> Tensor:
        """``W_p p`` for ``(N, 2)`` positions -> ``(N, out_features)``."""
        half = self.position.in_features // 2
        terms = []
        for axis, weight in (
            (1, self.position.weight[:, :half]),
            (0, self.position.weight[:, half:]),
        ):
            values, index = positions[:, axis].unique(return_inverse=True)
            term = F.linear(sincos_1d(values, half).to(weight.dtype), weight)
            terms.append(F.embedding(index, term))  # rows of term; its backward adds them up fast
        return terms[0] + terms[1]


def _bias_free(in_features: int, out_features: int) -> nn.Linear | None:
    return nn.Linear(in_features, out_features, bias=False) if in_features else None


class AttentionPool(nn.Module):
    """One learned query attends to all locations, ``nn.MultiheadAttention`` with a short cut.

    With a single query, ``q . (W_k f) = (W_k^T q) . f`` and ``sum a W_v f = W_v sum a f``: neither
    keys nor values are computed for each location.
    """

    def __init__(self, dim: int, heads: int, trunk_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        # Part of the released state dict and parameter count; the forward pass never uses it.
        self.unused_norm = nn.LayerNorm(trunk_dim)

    def forward(self, inputs: Tensor, encoding: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Attend to ``features + encoding``.

        Args:
            inputs: ``(B, N, F)`` features, or with ``head`` the ``(B, N, H)`` hidden states whose
                image under ``head`` the features are. As the head is linear and the weights add up
                to one, it is applied after the attention, to one vector a head.
            encoding: ``(N, F)`` of the positions.

        Returns:
            ``(B, F)``.
        """
        attention, heads = self.attention, self.attention.num_heads
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, _, b_v = attention.in_proj_bias.chunk(3)  # the key's bias cancels in the softmax
        dim = w_q.shape[0]
        query = F.linear(self.query, w_q, b_q).view(heads, 1, -1) / math.sqrt(dim // heads)
        probe = (query @ w_k.view(heads, -1, dim)).squeeze(1)  # (heads, F) = W_k^T q
        scores = inputs @ (probe if head is None else probe @ head.weight).T + encoding @ probe.T
        weights = scores.softmax(dim=1).transpose(1, 2)  # (B, heads, N)
        mixed = weights @ inputs  # (B, heads, F or H)
        mixed = (mixed if head is None else head(mixed)) + weights @ encoding  # (B, heads, F)
        values = torch.einsum("bhf,hdf->bhd", mixed, w_v.view(heads, -1, dim))
        return attention.out_proj(values.flatten(1) + b_v)


class APM(nn.Module):
    """Folds images into columns and answers any location from a column (section 3).

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
        widths = config.trunk_widths
        self.fold = nn.Conv2d(3, 1, config.patch_size, stride=config.patch_size)
        self.trunk_first = QueryLinear(config, widths[0])
        self.trunk = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.feature_head = nn.Linear(widths[-1], config.feature_dim)
        rgb_widths = (*config.rgb_widths, 3)
        self.rgb_first = QueryLinear(config, rgb_widths[0], feature_dim=config.feature_dim)
        self.rgb_head = nn.ModuleList(map(nn.Linear, rgb_widths[:-1], rgb_widths[1:]))
        if config.pooling == "attention":
            self.attention_pool = AttentionPool(config.feature_dim, config.pool_heads, widths[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Fold and answer the whole grid.

        Args:
            images: ``(B, 3, image_size, image_size)`` float, preprocessed as the checkpoint says.

        Returns:
            Features ``(B, N, F)`` and colours ``(B, N, 3)``, row by row.
        """
        return self.query(self.encode(images), images=images)

    def encode(self, images: Tensor) -> Tensor:
        """Fold: ``(B, 3, image_size, image_size)`` -> trigger column ``(B, D)``.

        Raises:
            ValueError: if the images have another shape.
        """
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, 3, {side}, {side})"
            )
        return self.fold(images).flatten(1)

    def query(
        self,
        column: Tensor,
        positions: Tensor | None = None,
        chunk_size: int | None = None,
        *,
        images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Unfold and answer: every location on its own, in any order.

        Args:
            column: ``(B, D)`` trigger columns.
            positions: ``(N, 2)`` float, (row, column) in grid units; default the whole grid.
            chunk_size: how many locations are answered at a time; default all. Bounds memory and
                changes results by float rounding only.
            images: ``(B, 3, image_size, image_size)``, where the local patches come from in models
                that have them. Without images a learned null stands in: the percept is made from
                the column alone.

        Returns:
            Features ``(B, N, F)`` and colours ``(B, N, 3)`` at least 0.

        Raises:
            ValueError: if ``chunk_size`` is below 1 or a shape is wrong.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk size {chunk_size} must be at least 1")
        if column.ndim != 2 or column.shape[1] != self.config.column_dim:
            raise ValueError(
                f"column has shape {tuple(column.shape)}, expected (B, {self.config.column_dim})"
            )
        if positions is None:
            positions = self.grid_positions()
        chunks = positions.split(chunk_size or max(len(positions), 1))
        features, rgb = zip(*(self._answer(column, chunk, images) for chunk in chunks), strict=True)
        if len(chunks) == 1:
            return features[0], rgb[0]
        return torch.cat(features, dim=1), torch.cat(rgb, dim=1)

    def _answer(
        self, column: Tensor, positions: Tensor, images: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        local = self.local_patches(images, positions)  # (B, N, L) or None
        features = self.feature_head(self.hidden(column, positions, local))  # (B, N, F)
        x = F.relu_(self.rgb_first(column, positions, local, features))  # (B, N, rgb_widths[0])
        for layer in self.rgb_head:
            x = F.relu_(layer(x))
        return features, x

    def hidden(self, column: Tensor, positions: Tensor, local: Tensor | None = None) -> Tensor:
        """The shared MLP's last layer, before the heads: ``(B, N, trunk_widths[-1])``."""
        x = F.relu_(self.trunk_first(column, positions, local))  # (B, N, trunk_widths[0])
        for layer in self.trunk:
            x = F.relu_(layer(x))
        return x

    def local_patches(self, images: Tensor | None, positions: Tensor) -> Tensor | None:
        """``I_xy`` at each position, ``(B, N, L)``; None for models or calls without it."""
        if images is None or not self.config.local_sizes:
            return None
        return local_patches(images, positions, self.config.local_sizes, self.config.patch_size)

    def pool(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Summarise the locations: ``(B, N, F)`` -> ``(B, F)``.

        Args:
            features: answers at ``positions``.
            positions: ``(N, 2)``, default the whole grid. Only attention pooling looks at them.

        Raises:
            ValueError: if the model has no pooled head.
        """
        return self._pool(features, self.grid_positions() if positions is None else positions)

    def pooled(self, column: Tensor, images: Tensor | None = None) -> Tensor:
        """``pool(query(column)[0])`` without a feature for each location: ``(B, D)`` -> ``(B, F)``.

        Raises:
            ValueError: if the model has no pooled head.
        """
        positions = self.grid_positions()
        hidden = self.hidden(column, positions, self.local_patches(images, positions))
        return self._pool(hidden, positions, self.feature_head)

    def _pool(self, inputs: Tensor, positions: Tensor, head: nn.Linear | None = None) -> Tensor:
        if self.config.pooling is None:
            raise ValueError("this APM has no pooled head: its config.pooling is None")
        if self.config.pooling == "mean":
            mean = inputs.mean(dim=1)
            return mean if head is None else head(mean)
        encoding = sincos_2d(positions, self.config.feature_dim).to(inputs.dtype)
        return self.attention_pool(inputs, encoding, head)

    def grid_positions(self, height: int | None = None, width: int | None = None) -> Tensor:
        """``(height * width, 2)`` grid points row by row; default the model's own grid."""
        side, device = self.config.grid_size, self.fold.weight.device
        rows = torch.arange(side if height is None else height, device=device, dtype=torch.float32)
        columns = torch.arange(side if width is None else width, device=device, dtype=torch.float32)
        return torch.cartesian_prod(rows, columns)
