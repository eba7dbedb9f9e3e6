import pytest
import torch
from reference import encoding

from apm.positional_encoding import sincos_2d


def test_equals_the_formula_channel_by_channel():
    positions = [(0.0, 0.0), (3.0, 31.0), (17.0, 2.0), (2.5, -0.25)]
    expected = torch.tensor([encoding(i, j, 64) for i, j in positions])
    torch.testing.assert_close(sincos_2d(torch.tensor(positions), 64), expected, atol=1e-5, rtol=0)


def test_first_half_encodes_the_column():
    left, right = sincos_2d(torch.tensor([[5.0, 1.0], [5.0, 9.0]]), 32)
    assert not torch.allclose(left[:16], right[:16])
    torch.testing.assert_close(left[16:], right[16:])


@pytest.mark.parametrize("dim", [2, 6, 1023])
def test_refuses_a_width_that_four_does_not_divide(dim):
    with pytest.raises(ValueError, match=str(dim)):
        sincos_2d(torch.zeros(1, 2), dim)


def test_refuses_positions_of_another_shape():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        sincos_2d(torch.zeros(3, 3), 8)
