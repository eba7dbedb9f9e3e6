import numpy as np
import pytest
import torch

from apm.consensus import COLOUR, LENGTH, TAPS, agree


@pytest.mark.parametrize(("grid", "aspect"), [(32, 1.0), (24, 0.5), (24, 2.0)])
def test_a_step_is_the_mean_of_neighbours_weighted_by_distance_and_colour(grid, aspect):
    """Against the formula, place by place, with distances in the picture."""
    torch.manual_seed(0)
    features, colours = torch.randn(grid, grid, 5), 0.2 * torch.rand(grid, grid, 3)
    sides = np.array([aspect, 1]) / max(aspect, 1)  # the longer one is 1
    agreed = agree(features, colours, 1, aspect)
    steps = [
        sorted({int(np.round(x)) for x in np.linspace(-reach, reach, TAPS)})
        for reach in LENGTH * grid / sides
    ]
    for row, column in ((0, 0), (5, 11), (grid - 1, 3)):
        total, weights = torch.zeros(5), 0.0
        for down in steps[0]:
            for right in steps[1]:
                there = row + down, column + right
                if not (0 <= there[0] < grid and 0 <= there[1] < grid):
                    continue
                distance = np.linalg.norm(np.array([down, right]) * sides / grid)
                colour = (colours[row, column] - colours[there]).square().sum().item()
                weight = np.exp(-(distance**2) / (2 * LENGTH**2) - colour / (2 * COLOUR**2))
                total, weights = total + weight * features[there], weights + weight
        torch.testing.assert_close(
            agreed[row, column], (total / weights).float(), atol=1e-5, rtol=0
        )


def test_what_looks_alike_agrees_and_what_does_not_keeps_apart():
    colours = torch.zeros(32, 32, 3)
    colours[:, 16:] = 1
    features = colours[..., :1] + 0.3 * torch.randn(32, 32, 1, generator=torch.manual_seed(0))
    sides = agree(features, colours, 3)[:, :16], agree(features, colours, 3)[:, 16:]
    assert max(side.std().item() for side in sides) < 0.15
    assert (sides[1].mean() - sides[0].mean()).item() == pytest.approx(1, abs=0.05)
    assert torch.equal(agree(features, colours, 0), features)
    twice = agree(agree(features, colours, 1), colours, 1)
    torch.testing.assert_close(agree(features, colours, 2), twice)
