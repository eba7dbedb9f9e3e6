"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024, section 3 and Figure 1).

Fold:    an image becomes one trigger column ``T``.
Unfold:  ``T`` becomes one query per location, ``[T ; I_xy ; p_xy]``.
Answer:  a shared MLP turns each query into a feature and a colour, each location on its own.
"""

import math
from dataclasses import dataclass
from reprlib import repr  # a bounded one: values may come from a stranger's file
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
        local_width: width of the embedded local patch ``I_xy`` of Figure 1; 0: none, as released.
        local_blocks: how far a location sees around its patch: residual blocks at half a patch
            and at a patch, each of which adds one such step on every side.
    """

    image_size: int = 448
    patch_size: int = 14
    trunk_widths: tuple[int, ...]
    feature_dim: int
    rgb_widths: tuple[int, ...] = (256, 256)
    position_dim: int = 1024
    pooling: str | None = None
    pool_heads: int = 8
    local_width: int = 0
    local_blocks: tuple[int, int] = (2, 8)

    def __post_init__(self) -> None:
        # Checkpoints come from files, where tuples arrive as lists.
        for name in ("trunk_widths", "rgb_widths", "local_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        widths = [self.image_size, self.patch_size, self.feature_dim, self.position_dim]
        widths += [self.pool_heads, *self.trunk_widths, *self.rgb_widths]
        for width in widths:
            if not isinstance(width, int) or width < 1:
                raise ValueError(
                    f"sizes and widths must be positive whole numbers, not {repr(width)}"
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if not self.trunk_widths or not self.rgb_widths:
            raise ValueError("trunk_widths and rgb_widths must not be empty")
        if self.position_dim % 4:
            raise ValueError(f"position_dim {self.position_dim} must be divisible by 4")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {repr(self.pooling)} must be one of {POOLINGS}")
        if self.pooling == "attention" and self.feature_dim % self.pool_heads:
            raise ValueError(
                f"feature_dim {self.feature_dim} must be a multiple of pool_heads {self.pool_heads}"
            )
        counts = (self.local_width, *self.local_blocks)
        if len(counts) != 3 or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError(
                "local_width and two local_blocks must be whole numbers of at least 0, not "
                f"{repr(counts)}"
            )
        if self.local_width % 4 or (self.local_width and self.patch_size % 2):
            raise ValueError(
                f"a local patch needs an even patch_size and a local_width divisible by 4, got "
                f"{self.patch_size} and {self.local_width}"
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
    def local_size(self) -> int:
        """Side in pixels of the neighbourhood that a location sees as its local patch."""
        fine, coarse = self.local_blocks
        return self.patch_size * (1 + fine + 2 * coarse) if self.local_width else 0

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
        """The bundled checkpoint's model: with the local patch, 5.3 M parameters."""
        return cls(
            trunk_widths=(768, 512, 512),
            feature_dim=feature_dim,
            rgb_widths=(1280, 128),
            position_dim=256,
            local_width=192,
        )


class LocalPatch(nn.Module):
    """Embeds the neighbourhood of every location: ``I_xy`` of Figure 1.

    Each location has the pixels around its patch run through one small network, always the same.
    Neighbours share most of the work, which makes the network a convolution: first over half
    patches, then over patches. Nothing further away than ``config.local_size`` says is seen.
    """

    def __init__(self, config: APMConfig) -> None:
        super().__init__()
        width, half = config.local_width, config.patch_size // 2
        fine, coarse = config.local_blocks
        self.half_patches = nn.Conv2d(3, width // 2, half, stride=half)
        self.fine = nn.Sequential(*(ResidualBlock(width // 2) for _ in range(fine)))
        self.patches = nn.Conv2d(width // 2, width, 2, stride=2)
        self.coarse = nn.Sequential(*(ResidualBlock(width) for _ in range(coarse)))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, H)`` -> ``(B, local_width, h, h)``, one embedding a grid point."""
        x = self.fine(self.half_patches(images))  # (B, local_width / 2, 2h, 2h)
        return self.coarse(self.patches(x))


class ResidualBlock(nn.Module):
    """``x + f(x)``, f a bottleneck that mixes 3x3 neighbours; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(width, width // 2, 1)
        self.mix = nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.widen = nn.Conv2d(width // 2, width, 1)
        for parameter in self.widen.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, h, w)`` -> the same."""
        return x + self.widen(F.relu_(self.mix(F.relu_(self.narrow(F.relu(x))))))


def sample(maps: Tensor, positions: Tensor) -> Tensor:
    """Values of ``(B, C, h, w)`` maps at ``(N, 2)`` (row, column) places, bilinear: ``(B, N, C)``.

    Beyond the outermost grid points their values go on.
    """
    sides = torch.tensor(maps.shape[-2:], device=positions.device)
    grid = (2 * positions + 1) / sides - 1  # [-1, 1] from border to border
    grid = grid.flip(-1).expand(len(maps), 1, -1, 2)
    values = F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)
    return values[:, :, 0].transpose(1, 2).to(maps.dtype)


class QueryLinear(nn.Module):
    """``nn.Linear`` on a query ``[feature ; T ; I_xy ; p_xy]`` without building the query.

    The weight is held as one block for each part, so that ``W q = W_T T + W_p p + ...``:
    ``W_T T`` is one vector an image, and as the encoding is separable, ``W_p p`` is a sum of one
    vector a row and one a column of the grid. Equal to the plain layer to float rounding.
    """

    def __init__(self, config: APMConfig, out_features: int, feature_dim: int = 0) -> None:
        super().__init__()
        fan_in = feature_dim + config.column_dim + config.local_width + config.position_dim
        self.feature = _bias_free(feature_dim, out_features)
        self.column = nn.Linear(config.column_dim, out_features)
        self.local = _bias_free(config.local_width, out_features)
        # Stands in for W_l I_xy where no image is at hand.
        self.local_null = nn.Parameter(torch.zeros(out_features)) if config.local_width else None
        self.position = nn.Linear(config.position_dim, out_features, bias=False)
        bound = 1 / math.sqrt(fan_in)  # nn.Linear's own initialisation, of the whole layer
        for name, parameter in self.named_parameters():
            if name != "local_null":
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, column: Tensor, positions: Tensor, local: Tensor | None, feature: Tensor | None = None
    ) -> Tensor:
        """``(B, D), (N, 2), (B, N, L), (B, N, F)`` -> ``(B, N, out_features)``."""
        device = column.device.type
        # The two may nearly cancel out, so their sum has full precision under autocast too.
        with torch.autocast(device, enabled=False):
            column_term = self.column(column.to(self.column.weight.dtype))[:, None]  # (B, 1, out)
            if self.local is not None and local is None:
                column_term = column_term + self.local_null
            out = column_term + self.position_term(positions)  # (B, N, out)
        if torch.is_autocast_enabled(device):
            out = out.to(torch.get_autocast_dtype(device))
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
        self.fold: nn.Module = nn.Conv2d(3, 1, config.patch_size, stride=config.patch_size)
        self.local_patch = LocalPatch(config) if config.local_width else None
        self.trunk_first = QueryLinear(config, widths[0])
        self.trunk = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.feature_head = nn.Linear(widths[-1], config.feature_dim)
        rgb_widths = (*config.rgb_widths, 3)
        self.rgb_first = QueryLinear(config, rgb_widths[0], feature_dim=config.feature_dim)
        self.rgb_head = nn.ModuleList(map(nn.Linear, rgb_widths[:-1], rgb_widths[1:]))
        if config.pooling == "attention":
            self.attention_pool = AttentionPool(config.feature_dim, config.pool_heads, widths[-1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.feature_head.weight.device

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
        self._check_images(images)
        return self.fold(images).flatten(1)

    def _check_images(self, images: Tensor, count: int | None = None) -> None:
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, 3, {side}, {side})"
            )
        if count is not None and len(images) != count:
            raise ValueError(f"{len(images)} images for {count} columns")

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
        if positions.ndim != 2 or positions.shape[1] != 2:
            raise ValueError(f"positions have shape {tuple(positions.shape)}, expected (N, 2)")
        positions = positions.float()
        chunks = positions.split(chunk_size or max(len(positions), 1))
        if images is not None:
            self._check_images(images, len(column))
        local_maps = self.local_maps(images)
        answers = (self._answer(column, chunk, local_maps) for chunk in chunks)
        features, rgb = zip(*answers, strict=True)
        if len(chunks) == 1:
            return features[0], rgb[0]
        return torch.cat(features, dim=1), torch.cat(rgb, dim=1)

    def _answer(
        self, column: Tensor, positions: Tensor, local_maps: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        local = None if local_maps is None else sample(local_maps, positions)  # (B, N, L)
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

    def local_maps(self, images: Tensor | None) -> Tensor | None:
        """``I_xy`` on the grid, ``(B, L, h, h)``; None for models or calls without it."""
        if images is None or self.local_patch is None:
            return None
        return self.local_patch(images)

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
        local_maps = self.local_maps(images)
        local = None if local_maps is None else sample(local_maps, positions)
        hidden = self.hidden(column, positions, local)
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
        side, device = self.config.grid_size, self.device
        rows = torch.arange(side if height is None else height, device=device, dtype=torch.float32)
        columns = torch.arange(side if width is None else width, device=device, dtype=torch.float32)
        return torch.cartesian_prod(rows, columns)
