import pytest
import torch
from conftest import TINY, make_model
from reference import grid_encoding
from torch import nn

from apm import APM, APMConfig
from apm.tta import TestTimeTrainer

STUDENT = APMConfig(**TINY | {"pooling": "attention", "pool_heads": 2})


class ReleasedStep(nn.Module):
    """The released step, plainly: eight copies, concatenated queries, nn.MultiheadAttention."""

    def __init__(self, model):
        super().__init__()
        config = model.config
        self.fold = nn.Conv2d(3, 1, config.patch_size, stride=config.patch_size)
        self.fold.load_state_dict(model.fold.state_dict())
        first = nn.Linear(config.column_dim + config.position_dim, config.trunk_widths[0])
        with torch.no_grad():
            parts = (model.trunk_first.column.weight, model.trunk_first.position.weight)
            first.weight.copy_(torch.cat(parts, dim=1))
            first.bias.copy_(model.trunk_first.column.bias)
        layers = [first]
        for layer in (*model.trunk, model.feature_head):
            layers.append(nn.Linear(layer.in_features, layer.out_features))
            layers[-1].load_state_dict(layer.state_dict())
        self.layers = nn.ModuleList(layers)
        pool = model.pooling
        self.query = nn.Parameter(pool.query.detach().clone())
        self.attention = nn.MultiheadAttention(config.feature_dim, 2, batch_first=True)
        self.attention.load_state_dict(pool.attention.state_dict())
        self.position = grid_encoding(4, config.position_dim)
        self.pool_position = grid_encoding(4, config.feature_dim)

    def forward(self, images):
        column = self.fold(images).flatten(1)
        x = torch.cat(
            [
                column[:, None].expand(-1, 16, -1),
                self.position.to(images.dtype).expand(len(images), -1, -1),
            ],
            dim=-1,
        )
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        tokens = self.layers[-1](x) + self.pool_position.to(x.dtype)
        query = self.query.expand(len(images), 1, -1)
        return self.attention(query, tokens, tokens)[0][:, 0]


@pytest.fixture
def image_and_target():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 56, 56, generator=generator), torch.randn(16, generator=generator)


def test_the_step_is_the_released_step(image_and_target, monkeypatch):
    """Losses and pooled output over several steps of Adam, and across a drop of the rate."""
    monkeypatch.setattr("apm.tta.DECAY_EVERY", 5)
    image, target = (tensor.double() for tensor in image_and_target)
    trainer = TestTimeTrainer(APM(STUDENT), iterations=12, learning_rate=1e-2)
    trainer.model.double()  # Adam divides rounding noise by itself where a gradient is near 0
    with torch.no_grad():  # larger weights than the released ones, so that every part matters
        for parameter in trainer.model.parameters():
            parameter.mul_(30)
    reference = ReleasedStep(trainer.model).double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    losses = []
    for _ in range(12):
        pooled = reference(image.expand(8, -1, -1, -1))
        loss = nn.functional.mse_loss(pooled, target.expand(8, -1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    result = trainer.adapt(image, target)
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-4, atol=0)
    expected = reference(image[None])[0].float()
    torch.testing.assert_close(result.pooled, expected, rtol=1e-4, atol=1e-5)
    assert result.losses[-1] < 0.8 * result.losses[0]


def test_reset_forgets_everything(image_and_target, monkeypatch):
    monkeypatch.setattr("apm.tta.DECAY_EVERY", 3)
    trainer = TestTimeTrainer(APM(STUDENT), iterations=5, learning_rate=1e-2)
    first = trainer.adapt(*image_and_target)
    continued = trainer.adapt(*image_and_target)
    assert continued.losses[0] < first.losses[0]
    trainer.reset(0)
    again = trainer.adapt(*image_and_target)
    assert again.losses == first.losses
    assert torch.equal(again.features, first.features)
    trainer.reset(1)
    assert trainer.adapt(*image_and_target).losses != first.losses


def test_reset_draws_what_a_step_trains_and_nothing_else(image_and_target):
    """Parameters without a gradient keep their values, and Adam keeps nothing of them."""
    image, target = (tensor[None] for tensor in image_and_target)
    changes = {"trunk_widths": (256, 64), "pooling": "attention", "pool_heads": 2, "local_width": 8}
    trainer = TestTimeTrainer(APM(APMConfig(**TINY | changes)))
    for seed in (3, 4):
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.reset(seed)
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        changed = {name for name, value in before.items() if not torch.equal(value, weights[name])}
        drawn = torch.cat([weights[name].flatten() for name in changed])
        assert drawn.std().item() == pytest.approx(0.01, rel=0.03)
        assert drawn.mean().item() == pytest.approx(0, abs=3e-4)
        assert (drawn != 0).all()
        trainer.step(image, target)
        parameters = dict(trainer.model.named_parameters())
        assert changed == {name for name, one in parameters.items() if one.grad is not None}
        kept = {id(one) for one in trainer.optimizer.state}
        assert kept == {id(parameters[name]) for name in changed}
        assert {name.split(".")[0] for name in parameters.keys() - changed} == {
            *("rgb_first", "rgb_head"),
            *("pooling", "trunk_first"),  # the unused norm, the stand-in of local patches
        }


def test_outputs_are_those_of_the_trained_student(image_and_target):
    image, target = image_and_target
    trainer = TestTimeTrainer(APM(STUDENT), iterations=4, learning_rate=1e-2)
    result = trainer.adapt(image, target, features_at=(0, 2), pooled_at=range(5))
    with torch.inference_mode():
        features, _ = trainer.model(image[None])
        torch.testing.assert_close(result.features, features[0], atol=1e-6, rtol=1e-5)
        pooled = trainer.model.pool(features)[0]
    torch.testing.assert_close(result.pooled, pooled, atol=1e-6, rtol=1e-5)
    assert list(result.pooled_at) == list(range(5)) and result.pooled_at[0].shape == (16,)
    losses = (torch.stack([*result.pooled_at.values()]) - target).square().mean(dim=1)
    torch.testing.assert_close(losses[:4], torch.tensor(result.losses))
    assert set(result.features_at) == {0, 2, 4}
    trainer.reset(0)
    with torch.inference_mode():
        torch.testing.assert_close(result.features_at[0], trainer.model(image[None])[0][0])


def test_what_cannot_be_is_refused_before_the_work(image_and_target):
    image, target = image_and_target
    trainer = TestTimeTrainer(APM(STUDENT), iterations=2)
    before = trainer.model.feature_head.weight.clone()
    for arguments, message in (
        ((image, target[:1]), "targets have shape"),
        ((image, target, (3,)), r"after \[3\] steps: there are 2 iterations"),
        ((image, target, (), print, (1, 3)), r"after \[1, 3\] steps: there are 2 iterations"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.adapt(*arguments)
    assert torch.equal(before, trainer.model.feature_head.weight)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize(("local_width", "locations"), [(0, None), (8, None), (8, 5)])
def test_many_students_are_as_many_single_runs(pooling, local_width, locations, monkeypatch):
    monkeypatch.setattr("apm.tta.DECAY_EVERY", 8)
    changes = {"pooling": pooling, "pool_heads": 2, "local_width": local_width}
    trainer = TestTimeTrainer(
        APM(APMConfig(**TINY | changes)), iterations=20, learning_rate=1e-3, locations=locations
    )
    images, targets, report_at = torch.rand(8, 3, 56, 56), torch.randn(8, 16), (0, 7, 20)
    together = trainer.adapt_many(images, targets, range(8), report_at)
    for seed, many in enumerate(together):
        trainer.reset(seed)
        single = trainer.adapt(images[seed], targets[seed], pooled_at=report_at)
        assert tuple(many.pooled_at) == report_at
        torch.testing.assert_close(many.pooled_at, single.pooled_at, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            torch.tensor(many.losses), torch.tensor(single.losses), atol=1e-5, rtol=0
        )


def test_many_students_leave_the_trainers_own_alone():
    trainer = TestTimeTrainer(APM(STUDENT), iterations=2)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.adapt_many(torch.rand(2, 3, 56, 56), torch.randn(2, 16), seeds=(1, 2))
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_pooled_is_pool_of_the_features(pooling):
    model = make_model(pooling=pooling, pool_heads=4)
    column = torch.randn(3, 16)
    expected = model.pool(model.query(column)[0])
    torch.testing.assert_close(model.query_pooled(column), expected, atol=1e-5, rtol=1e-4)


def test_a_perfect_student_fits_its_target(image_and_target, monkeypatch):
    monkeypatch.setattr("apm.tta.DECAY_EVERY", 300)
    trainer = TestTimeTrainer(APM(STUDENT), iterations=400, learning_rate=1e-2)
    losses = trainer.adapt(*image_and_target).losses
    assert losses[-1] < 1e-6 * losses[0]


def test_a_step_of_few_locations_is_the_plain_step_on_them(image_and_target, monkeypatch):
    """Gradients through the few alone; what is reported is the answer of all."""
    image, target = image_and_target
    trainer = TestTimeTrainer(APM(STUDENT), iterations=3, learning_rate=1e-2, locations=5)
    plain = APM(STUDENT)
    plain.load_state_dict(trainer.model.state_dict())
    optimizer, losses = torch.optim.Adam(plain.parameters(), lr=1e-2), []
    asked = []
    positions = trainer._positions
    monkeypatch.setattr(
        trainer, "_positions", lambda step: asked.append(positions(step)) or asked[-1]
    )
    result = trainer.adapt(image, target, pooled_at=(1,))
    for step, few in enumerate(asked):
        assert len(few.unique(dim=0)) == 5 and few.min() >= 0 and few.max() <= 3
        features, _ = plain.query(plain.encode(image[None]), few)
        loss = nn.functional.mse_loss(plain.pool(features, few)[0], target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            whole = plain.pool(plain(image[None])[0])[0]
            torch.testing.assert_close(result.pooled_at[1], whole, rtol=1e-4, atol=1e-5)
    assert len(asked) == 3
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-4, atol=0)
    whole = plain.pool(plain(image[None])[0])[0]
    torch.testing.assert_close(result.pooled, whole, rtol=1e-4, atol=1e-5)


def test_locations_are_a_function_of_seed_and_step():
    def chosen(**changes):
        trainer = TestTimeTrainer(APM(STUDENT), **{"locations": 6} | changes)
        return [trainer._positions(step).tolist() for step in range(4)]

    assert chosen() == chosen()
    assert chosen() != chosen(location_seed=1)
    assert len({str(step) for step in chosen()}) == 4


def test_all_locations_are_the_released_step(image_and_target):
    runs = [
        TestTimeTrainer(APM(STUDENT), iterations=3, locations=locations).adapt(*image_and_target)
        for locations in (None, 16, 1000, 15)
    ]
    assert runs[0].losses == runs[1].losses == runs[2].losses != runs[3].losses


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="pooling None"):
        TestTimeTrainer(APM(APMConfig(**TINY)))
    with pytest.raises(ValueError, match="iterations 0"):
        TestTimeTrainer(APM(STUDENT), iterations=0)
    with pytest.raises(ValueError, match="locations 0"):
        TestTimeTrainer(APM(STUDENT), locations=0)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"learning rate {rate} must be above 0"):
            TestTimeTrainer(APM(STUDENT), learning_rate=rate)


@pytest.mark.parametrize("together", [False, True])
def test_an_answer_that_is_not_finite_is_no_answer(image_and_target, together):
    image, target = image_and_target
    trainer = TestTimeTrainer(APM(STUDENT), iterations=3, learning_rate=1e30)
    with pytest.raises(ValueError, match="not finite"):
        if together:
            trainer.adapt_many(image[None], target[None], [0])
        else:
            trainer.adapt(image, target)
