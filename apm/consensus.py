"""Consensus: neighbours that look alike agree (GLOM, Hinton 2021, section 2; bilateral filtering).

In GLOM the embedding of a place is pulled towards those of its neighbours, the more the more alike
they are, and islands of agreement are what this leaves. Here a step makes each feature the mean of
its neighbours' features, and what is alike is their colour.
"""

import torch
from torch import Tensor

LENGTH = 3 / 64  # standard deviation of the distance, as a share of the picture's longer side
COLOUR = 0.07  # standard deviation of the difference in colour, RGB in [0, 1]
TAPS = 7  # neighbours looked at along a side of the neighbourhood, which ends at LENGTH


def agree(features: Tensor, colours: Tensor, steps: int, aspect: float = 1.0) -> Tensor:
    """Features after some steps of consensus: ``(h, w, F)`` float -> the same.

    One step at place i is ``sum_j w_ij f_j / sum_j w_ij`` over its neighbours j, itself included,
    ``w_ij = exp(-|i - j|^2 / 2 LENGTH^2 - |c_i - c_j|^2 / 2 COLOUR^2)``. LENGTH and the neighbours'
    distances are lengths in the picture: the same on every grid.

    Args:
        colours: ``(h, w, 3)`` float in [0, 1], the mean colour of each place.
        aspect: height / width of the picture that the places share out.
    """
    # In places, down and to the right.
    sides = [side / max(aspect, 1) for side in (aspect, 1)]  # of the picture, the longer one 1
    lengths = [LENGTH * places / side for places, side in zip(features.shape, sides, strict=False)]
    reach = [
        torch.linspace(-length, length, TAPS).round().int().unique().tolist() for length in lengths
    ]
    neighbours = []
    for rows in reach[0]:
        for columns in reach[1]:
            here, there = _overlap(features, rows, columns)
            colour = (colours[here] - colours[there]).square().sum(dim=-1, keepdim=True)
            distance = (rows / lengths[0]) ** 2 + (columns / lengths[1]) ** 2
            weight = torch.exp(-distance / 2 - colour / (2 * COLOUR**2))
            neighbours.append((here, there, weight))
    total = torch.zeros_like(features[..., :1])
    for here, _, weight in neighbours:
        total[here] += weight
    for _ in range(steps):
        agreed = torch.zeros_like(features)
        for here, there, weight in neighbours:
            agreed[here].addcmul_(weight, features[there])
        features = agreed.div_(total)
    return features


def _overlap(places: Tensor, rows: int, columns: int) -> tuple[tuple[slice, ...], ...]:
    """Where a place and its neighbour so far away are both in the picture."""
    ends = [
        range(max(0, -step), side - max(0, step))
        for step, side in zip((rows, columns), places.shape[:2], strict=True)
    ]
    here = tuple(slice(end.start, end.stop) for end in ends)
    there = tuple(
        slice(end.start + step, end.stop + step)
        for end, step in zip(ends, (rows, columns), strict=True)
    )
    return here, there
