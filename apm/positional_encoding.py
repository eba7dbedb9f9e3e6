"""Sine-cosine encoding of 2-D positions (paper, section 3; Vaswani et al. 2017, in 2-D)."""

import math

import torch
from torch import Tensor


def sincos_1d(coordinates: Tensor, dim: int) -> Tensor:
    """Encode ``(N,)`` real-valued coordinates in grid units: ``(N, dim)`` float32 in [-1, 1].

    Even channels are ``sin(x w_k)``, odd ones ``cos(x w_k)``, ``w_k = exp(-2k ln(10000) / dim)``.
    """
    k = torch.arange(dim // 2, device=coordinates.device, dtype=torch.float32)
    angles = coordinates.float()[:, None] * torch.exp(-2 * k * math.log(10000.0) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def sincos_2d(positions: Tensor, dim: int) -> Tensor:
    """Encode ``(N, 2)`` (row, column) positions in grid units, on the grid or between its points.

    Returns ``(N, dim)`` float32 in [-1, 1]: the first half is of the column, the second of the row.
    """
    if dim % 4:
        raise ValueError(f"positional encoding width {dim} must be divisible by 4")
    if positions.ndim != 2 or positions.shape[1] != 2:
        raise ValueError(f"positions have shape {tuple(positions.shape)}, expected (N, 2)")
    rows, columns = positions.unbind(dim=1)
    return torch.cat([sincos_1d(columns, dim // 2), sincos_1d(rows, dim // 2)], dim=1)
