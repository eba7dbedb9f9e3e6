import copy

import pytest
import torch
from conftest import make_model

from apm.losses import feature_loss, rgb_targets, standardised_feature_loss
from apm.training import DistillationTrainer


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return pixels, torch.randn(size, 16, 16, generator=generator)


def make_trainer(**settings):
    model = make_model(local_sizes=(14,))
    settings = {"steps": 40, "learning_rate": 1e-3, "null_share": 0.5} | settings
    return DistillationTrainer(model, torch.zeros(16), torch.ones(16), **settings)


@pytest.mark.parametrize("loss", ["mse", "standardised"])
def test_losses_fall(loss):
    trainer = make_trainer(feature_loss=loss, schedule="cosine", warmup=3, learning_rate=5e-3)
    losses = [trainer.step(*batch()) for _ in range(40)]
    assert losses[-1][0] < 0.95 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_a_resumed_run_is_the_undisturbed_run():
    whole, first = make_trainer(locations=7), make_trainer(locations=7)
    for step in range(6):
        whole.step(*batch(seed=step))
    for step in range(3):
        first.step(*batch(seed=step))
    state = copy.deepcopy(first.state_dict())
    second = make_trainer(locations=7)
    second.load_state_dict(state)
    for step in range(3, 6):
        second.step(*batch(seed=step))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_step_is_the_plain_step():
    """Part of the batch with local patches, part without, the mean over all of it."""
    trainer = make_trainer(rgb_weight=2.0)
    model = copy.deepcopy(trainer.model)
    pixels, targets = batch()
    images = pixels / 255
    null, _ = model.query(model.encode(images[:3]))
    local, _ = model.query(model.encode(images[3:]), images=images[3:])
    expected = ((torch.cat([null, local]) - targets) ** 2).mean()
    assert trainer.step(pixels, targets)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_both_ways_of_answering_are_validated():
    trainer = make_trainer()
    result = trainer.validate([batch(), batch(seed=1)])
    assert result["feature_loss"] != result["null_feature_loss"]
    colours = rgb_targets(torch.cat([batch()[0], batch(seed=1)[0]]) / 255, 14).flatten(0, 1)
    variance = (colours - colours.mean(0)).square().mean().item()
    assert result["rgb_r2"] == pytest.approx(1 - result["rgb_loss"] / variance, rel=1e-3)


def test_losses_by_hand():
    answers, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    assert feature_loss(answers, targets) == 2
    mean, std = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])
    # standardised: (0, 1) and (1, 1): squared error 1/2, cosine 1/sqrt 2
    value = standardised_feature_loss(answers, targets, mean, std)
    assert value.item() == pytest.approx(0.5 + 1 - 0.5**0.5)


def test_rgb_targets_are_patch_means_row_by_row():
    images = torch.zeros(1, 3, 28, 42)
    images[0, 1, 14:, 14:28] = 1
    images[0, 1, 14:21, 28:] = 1
    assert rgb_targets(images, 14)[0, :, 1].tolist() == [0, 0, 0, 0, 1, 0.5]
