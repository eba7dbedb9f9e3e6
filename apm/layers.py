"""The layers that make an APM fast. Each docstring names the plain layer that it equals."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.positional_encoding import sincos_1d, sincos_2d

FEW = 128  # locations, up to which a step is no slower by one product with their encodings


class Query(NamedTuple):
    """The parts of the queries ``[T ; I_xy ; p_xy]`` of B images at N locations, never joined.

    Attributes:
        column: ``T``, ``(B, D)``.
        local: ``I_xy``, ``(B, N, L)``; None where there is no image to take it from.
        sees_local: ``(B,)`` bool, the images that do see their local patches; None: all of them.
        positions: ``(N, 2)`` float, (row, column) in grid units, of which ``p_xy`` is the encoding.
    """

    column: Tensor
    local: Tensor | None
    sees_local: Tensor | None
    positions: Tensor

    def split(self, size: int) -> Iterator["Query"]:
        """The queries of ``size`` locations at a time."""
        for start in range(0, max(len(self.positions), 1), size):
            here = slice(start, start + size)
            local = None if self.local is None else self.local[:, here]
            yield self._replace(local=local, positions=self.positions[here])


class QueryLinear(nn.Module):
    """``nn.Linear`` on ``[feature ; T ; I_xy ; p_xy]``, without joining them.

    With the weight in one block a part, ``W q = W_T T + W_l I_xy + W_p p_xy + W_f feature + b``:
    ``W_T T`` is one vector an image. The encoding is separable, ``p_xy = [c ; r]``, so ``W_p p_xy``
    is the sum of one vector a column and one a row of the grid. A learned vector stands in for
    ``W_l I_xy`` where an image's local patches are not seen.
    """

    def __init__(
        self, out_features: int, column: int, local: int, position: int, feature: int = 0
    ) -> None:
        super().__init__()
        self.feature = _bias_free(feature, out_features)
        self.column = nn.Linear(column, out_features)
        self.local = _bias_free(local, out_features)
        self.local_null = nn.Parameter(torch.zeros(out_features)) if local else None
        self.position = nn.Linear(position, out_features, bias=False)
        # nn.Linear's own initialisation, of the whole layer.
        bound = 1 / math.sqrt(feature + column + local + position)
        for name, parameter in self.named_parameters():
            if name != "local_null":
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, query: Query, feature: Tensor | None = None) -> Tensor:
        """Queries, and features ``(B, N, F)`` -> ``(B, N, out_features)``."""
        device = query.column.device.type
        # The two may nearly cancel out, so their sum has full precision under autocast too.
        with torch.autocast(device, enabled=False):
            column = query.column.to(self.column.weight.dtype)
            out = self.column(column)[:, None] + self.position_term(query.positions)  # (B, N, out)
        if torch.is_autocast_enabled(device):
            out = out.to(torch.get_autocast_dtype(device))
        if self.local is not None:
            out += self.local_term(query)
        if self.feature is not None:
            out += self.feature(feature)
        return out

    def local_term(self, query: Query) -> Tensor:
        """``W_l I_xy`` or its stand-in, to be broadcast to ``(B, N, out_features)``."""
        assert self.local is not None and self.local_null is not None
        if query.local is None:
            return self.local_null[None, None]
        term = self.local(query.local)
        if query.sees_local is None:
            return term
        return torch.where(query.sees_local[:, None, None], term, self.local_null.to(term.dtype))

    def position_term(self, positions: Tensor) -> Tensor:
        """``W_p sincos_2d(positions)``: ``(N, 2)`` -> ``(N, out_features)``."""
        width, dtype = self.position.in_features, self.position.weight.dtype
        # The backward pass of two thin products, and of the split, takes longer than one product.
        if len(positions) <= FEW:
            return self.position(sincos_2d(positions, width).to(dtype))
        columns, rows = self.position.weight.split(width // 2, dim=1)
        terms = []
        for axis, weight in ((1, columns), (0, rows)):
            values, index = positions[:, axis].unique(return_inverse=True)
            term = F.linear(sincos_1d(values, width // 2).to(dtype), weight)
            terms.append(F.embedding(index, term))  # rows of term; its backward adds them up fast
        return terms[0] + terms[1]


def _bias_free(in_features: int, out_features: int) -> nn.Linear | None:
    return nn.Linear(in_features, out_features, bias=False) if in_features else None


class LocalPatch(nn.Module):
    """``I_xy`` of Figure 1: one small network on the neighbourhood of every location.

    Equal to the network on each neighbourhood cut out, where that lies within the image. Neighbours
    share most of the work, which makes the network a convolution, first over half patches, then
    over patches. Each residual block adds one half patch, or one patch, on every side.
    """

    def __init__(self, width: int, patch_size: int, blocks: tuple[int, int]) -> None:
        super().__init__()
        half = patch_size // 2
        self.half_patches = nn.Conv2d(3, width // 2, half, stride=half)
        self.fine = nn.Sequential(*(ResidualBlock(width // 2) for _ in range(blocks[0])))
        self.patches = nn.Conv2d(width // 2, width, 2, stride=2)
        self.coarse = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks[1])))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, H)`` -> ``(B, width, h, h)``, one embedding a grid point."""
        x = self.fine(self.half_patches(images))  # (B, width / 2, 2h, 2h)
        return self.coarse(self.patches(x))

    def at(self, images: Tensor, positions: Tensor) -> Tensor:
        """Embeddings at ``(N, 2)`` real-valued positions in grid units: ``(B, N, width)``.

        Equal to ``forward`` of the image moved so that the position is a grid point, by whole
        pixels, mirrored at the border. Positions that are as far from a grid point share a pass.
        """
        patch = 2 * self.half_patches.kernel_size[0]
        side = images.shape[-1] // patch
        points = (positions + 0.5).floor().clamp(0, side - 1)
        moves = ((positions - points) * patch).round().long()
        moves, group, counts = moves.unique(dim=0, return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        # No matrix product, which autocast would round to 8 bits.
        points = (points[:, 0] * side + points[:, 1]).long()[order]
        found = [
            self(move(images, *by)).flatten(2)[..., here]
            for by, here in zip(moves.tolist(), points.split(counts.tolist()), strict=True)
        ] or [self(images).flatten(2)[..., :0]]
        return torch.cat(found, dim=-1)[..., order.argsort()].transpose(1, 2)


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


def move(images: Tensor, rows: int, columns: int, margin: int = 0) -> Tensor:
    """Pixel (rows, columns) of ``(B, C, H, W)`` comes first; mirrored where the image ends.

    With a ``margin``, so many pixels more are seen on every side.
    """
    height, width = images.shape[-2:]
    reach = margin + max(abs(rows), abs(columns))
    if reach == 0:
        return images
    top, left = reach - margin + rows, reach - margin + columns
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return padded[..., top : top + height + 2 * margin, left : left + width + 2 * margin]


def bilinear(features: Tensor, positions: Tensor, grid_size: int) -> Tensor:
    """Values between the points of a square grid: ``(B, M * M, F)`` -> ``(B, N, F)`` float32.

    ``(N, 2)`` float positions are in units of a grid of ``grid_size`` cells a side over the same
    square. Beyond the outermost points their values go on.
    """
    side = math.isqrt(features.shape[1])
    positions = ((positions + 0.5) * (side / grid_size) - 0.5).clamp(0, side - 1)
    low = positions.floor()
    above = positions - low
    corners = [(low, 1 - above), ((low + 1).clamp(max=side - 1), above)]
    values = features.new_zeros((), dtype=torch.float32)
    for rows, row_share in corners:
        for columns, column_share in corners:
            places = (rows[:, 0] * side + columns[:, 1]).long()
            share = row_share[:, 0] * column_share[:, 1]
            values = values + share[:, None] * features[:, places].float()
    return values


class MeanPool(nn.Module):
    """The mean over all locations (Figure 1)."""

    def forward(self, inputs: Tensor, positions: Tensor, head: nn.Linear | None = None) -> Tensor:
        """As ``AttentionPool``'s; the positions do not matter."""
        mean = inputs.mean(dim=1)
        return mean if head is None else head(mean)


class AttentionPool(nn.Module):
    """``nn.MultiheadAttention`` of one learned query to ``features + sincos_2d(positions)``.

    With a single query, ``q . (W_k f) = (W_k^T q) . f`` and ``sum a W_v f = W_v sum a f``: neither
    keys nor values are computed for each location.
    """

    def __init__(self, dim: int, heads: int, trunk_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        # Part of the released state dict and parameter count; the forward pass never uses it.
        self.unused_norm = nn.LayerNorm(trunk_dim)

    def forward(self, inputs: Tensor, positions: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Features ``(B, N, F)`` at ``(N, 2)`` positions -> ``(B, F)``.

        With ``head``, inputs are the ``(B, N, H)`` hidden states that it makes features of. It is
        linear and the weights add up to one: it is applied after the attention, once a head.
        """
        attention, heads = self.attention, self.attention.num_heads
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, _, b_v = attention.in_proj_bias.chunk(3)  # the key's bias cancels in the softmax
        dim = w_q.shape[0]
        encoding = sincos_2d(positions, dim).to(inputs.dtype)  # (N, F)
        query = F.linear(self.query, w_q, b_q).view(heads, 1, -1) / math.sqrt(dim // heads)
        probe = (query @ w_k.view(heads, -1, dim)).squeeze(1)  # (heads, F) = W_k^T q
        scores = inputs @ (probe if head is None else probe @ head.weight).T + encoding @ probe.T
        weights = scores.softmax(dim=1).transpose(1, 2)  # (B, heads, N)
        mixed = weights @ inputs  # (B, heads, F or H)
        mixed = (mixed if head is None else head(mixed)) + weights @ encoding  # (B, heads, F)
        values = torch.einsum("bhf,hdf->bhd", mixed, w_v.view(heads, -1, dim))
        return attention.out_proj(values.flatten(1) + b_v)
