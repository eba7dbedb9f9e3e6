import pytest
import torch

from apm.losses import mse_loss, relational_loss, rgb_targets, standardised_loss


def test_losses_by_hand():
    answers, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    mean, std = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])
    assert mse_loss(answers, targets, mean, std) == 2
    # standardised: (0, 1) and (1, 1): squared error 1/2, cosine 1/sqrt 2
    value = standardised_loss(answers, targets, mean, std)
    assert value.item() == pytest.approx(0.5 + 1 - 0.5**0.5)


def test_rgb_targets_are_patch_means_row_by_row():
    images = torch.zeros(1, 3, 28, 42)
    images[0, 1, 14:, 14:28] = 1
    images[0, 1, 14:21, 28:] = 1
    assert rgb_targets(images, 14)[0, :, 1].tolist() == [0, 0, 0, 0, 1, 0.5]


def test_relational_loss_compares_all_pairs_of_places(monkeypatch):
    monkeypatch.setattr("apm.losses.RELATION_WEIGHT", 7)
    answers, targets = torch.randn(2, 2, 5, 3)
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    errors = []
    for image in range(2):
        pair = [(x[image] - mean) / std for x in (answers, targets)]
        pair = [x - x.mean(dim=0) for x in pair]
        for i in range(5):
            for j in range(5):
                one, other = (torch.cosine_similarity(x[i], x[j], dim=0) for x in pair)
                errors.append((one - other) ** 2)
    expected = standardised_loss(answers, targets, mean, std) + 7 * sum(errors) / 50
    value = relational_loss(answers, targets, mean, std)
    torch.testing.assert_close(value, expected)
    assert relational_loss(targets, targets, mean, std).item() == pytest.approx(0, abs=1e-5)
