"""A step and a validation: the plain ones, resumed, shared out over parts and processes."""

import copy
import math
import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import make_model

from apm.config import TrainConfig
from apm.distill import Distiller, NonFiniteError
from apm.layers import bilinear
from apm.losses import rgb_targets
from apm.runtime.distributed import shares, wait_for_all, world_size

posix = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return pixels, torch.randn(size, 16, 16, generator=generator)


def step(distiller, whole):
    """A step on a whole batch, in this process's parts of it."""
    pixels, targets = whole
    distiller.batch_size = len(pixels)
    parts = shares(range(len(pixels)), distiller.accumulate)
    return distiller.step((pixels[part], targets[part]) for part in parts).tolist()


def make_distiller(model=None, accumulate=1, teacher=None, **settings):
    config = TrainConfig(**{"learning_rate": 1e-3, "null_share": 0.5} | settings)
    return Distiller(
        model or make_model(local_width=8),
        config,
        torch.zeros(16),
        torch.ones(16),
        steps=40,
        batch_size=6,
        accumulate=accumulate,
        teacher=teacher,
    )


@pytest.mark.parametrize("loss", ["mse", "standardised", "relational"])
def test_losses_fall(loss):
    distiller = make_distiller(feature_loss=loss, schedule="cosine", warmup=3, learning_rate=5e-3)
    losses = [step(distiller, batch()) for _ in range(40)]
    assert losses[-1][0] < 0.95 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_the_step_is_the_plain_step():
    """Part of the batch with local patches, part without, the mean over all of it."""
    distiller = make_distiller(rgb_weight=2.0)
    model = copy.deepcopy(distiller.model)
    pixels, targets = batch()
    images = pixels / 255
    null, _ = model.query(model.encode(images[:3]))
    local, _ = model.query(model.encode(images[3:]), images=images[3:])
    expected = ((torch.cat([null, local]) - targets) ** 2).mean()
    assert step(distiller, (pixels, targets))[0] == pytest.approx(expected.item(), rel=1e-4)


def test_weights_change_as_by_the_plain_optimiser():
    """Weight decay, the slow layers, the RGB loss' weight, warm-up and cosine."""
    distiller = make_distiller(
        **{"weight_decay": 0.1, "fold_rate": 0.5, "rgb_weight": 2.0, "warmup": 2, "locations": 7},
        **{"schedule": "cosine", "augment": True},
    )
    model, asked, losses = copy.deepcopy(distiller.model), [], distiller.losses

    def noted(*arguments):
        asked.append(arguments[2:])
        return losses(*arguments)

    distiller.losses = noted
    slow = [p for n, p in model.named_parameters() if n.startswith(("fold.", "rgb_first."))]
    rest = [p for n, p in model.named_parameters() if not n.startswith(("fold.", "rgb_first."))]
    plain = torch.optim.AdamW([{"params": rest}, {"params": slow}], weight_decay=0.1)
    # The rate before each of the first steps of 40.
    for k, rate in enumerate(
        (0.5, 0.5 * (1 + math.cos(math.pi / 40)), 0.5 * (1 + math.cos(math.pi / 20)))
    ):
        pixels, targets = batch(seed=k)
        step(distiller, (pixels, targets))
        places, sees_local, moved = asked[-1]
        images = model.preprocessing.normalise(pixels)
        positions = model.grid_positions()[places] + torch.tensor(moved) / 14
        answers, rgb = model.query(
            model.encode(images), positions, images=images, sees_local=sees_local
        )
        loss = (answers - bilinear(targets, positions, 4)).square().mean()
        loss += 2 * (rgb - distiller._colours(pixels, moved)[:, places]).square().mean()
        plain.zero_grad()
        loss.backward()
        for group, scale in zip(plain.param_groups, (1, 0.5), strict=True):
            group["lr"] = 1e-3 * scale * rate
        plain.step()
        assert_same_weights(distiller.model, model, atol=1e-5)
    assert len({tuple(places.tolist()) for places, *_ in asked}) == 3


def test_the_rate_rises_and_falls():
    constant = TrainConfig(warmup=4)
    assert [constant.rate(k, 10) for k in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [TrainConfig(schedule="cosine").rate(k, 4) for k in range(5)]
    assert cosine == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_batches_of_a_validation_count_by_their_images():
    distiller, (pixels, targets) = make_distiller(feature_loss="standardised"), batch(size=11)
    whole = distiller.validate([(pixels, targets)])
    parts = [(pixels[:8], targets[:8]), (pixels[8:], targets[8:])]
    assert distiller.validate(parts) == pytest.approx(whole, rel=1e-3)


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    distillers = [make_distiller(accumulate=parts, locations=9) for parts in (1, 4)]
    for index in range(3):
        losses = [step(distiller, batch(seed=index)) for distiller in distillers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_weights(*(distiller.model for distiller in distillers), atol=1e-5)


def test_every_image_is_in_one_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts = shares(range(17), accumulate=2)
        assert len(parts) == 2 and all(len(part) in (2, 3) for part in parts)
        seen += [index for part in parts for index in part]
    assert sorted(seen) == list(range(17))


def assert_same_weights(one, other, atol):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=atol, rtol=0, msg=name)


def work_together(rank, folder, task):
    """One of two processes: runs ``task`` and saves what it returns."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(task(rank), folder / f"{rank}.pth")
    wait_for_all()  # and no destroy_process_group: see apm.runtime.distributed.process_group


def in_two_processes(folder, task):
    """What each of two processes returns."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work_together, args=(r, folder, task)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def train_a_little(rank=0):
    model = make_model(local_width=8)
    if rank == 1:  # the first process's weights count
        torch.nn.init.zeros_(model.feature_head.weight)
    distiller = make_distiller(
        model, locations=9, accumulate=world_size(), feature_loss="standardised"
    )
    for index in range(5):
        losses = step(distiller, batch(size=7, seed=index))
    mine = slice(rank, None, world_size())
    validation = distiller.validate([tuple(part[mine] for part in batch(seed=9))])
    return distiller.model.state_dict(), losses, validation


@posix
def test_two_processes_train_as_one(tmp_path):
    weights, losses, validation = train_a_little()
    for other in in_two_processes(tmp_path, train_a_little):
        for name, tensor in weights.items():
            torch.testing.assert_close(other[0][name], tensor, atol=1e-5, rtol=0, msg=name)
        assert other[1] == pytest.approx(losses, rel=1e-4)
        assert other[2] == pytest.approx(validation, rel=1e-4)


@posix
def test_two_processes_share_out_the_locations_of_one_image(tmp_path):
    model = make_model(local_width=8)
    images = torch.rand(1, 3, 56, 56)

    @torch.no_grad()
    def answer_half(rank):
        positions = model.grid_positions()[rank::2]
        features, _ = model.query(model.encode(images), positions, images=images)
        halves = [torch.empty_like(features) for _ in range(2)]
        dist.all_gather(halves, features)
        return torch.stack(halves, dim=2).flatten(1, 2)

    expected, _ = model(images)
    for features in in_two_processes(tmp_path, answer_half):
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_a_loss_that_is_not_finite_changes_no_weights():
    distiller = make_distiller()
    pixels, targets = batch()
    targets[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"step 1: feature loss (inf|nan)"):
        step(distiller, (pixels, targets))
    assert_same_weights(distiller.model, make_distiller().model, atol=0)
    assert distiller.steps_done == 0
    assert not distiller.optimizer.state


def test_a_teacher_makes_the_features_that_are_missing():
    def teacher(images):
        return images.unfold(2, 14, 14).unfold(3, 14, 14).mean((1, 4, 5)).flatten(1)[..., None] * w

    w = torch.linspace(-1, 1, 16)
    pixels, _ = batch()
    given, asked = make_distiller(), make_distiller(teacher=teacher)
    for _ in range(2):
        step(given, (pixels, teacher(pixels / 255)))
        step(asked, (pixels, torch.empty(len(pixels), 0)))
    assert_same_weights(given.model, asked.model, atol=0)


def test_off_the_grid_targets_and_colours_are_those_of_the_place():
    """A teacher twice as fine, whose features are a linear ramp; 7 pixels are half a place."""
    distiller = make_distiller()
    pixels, _ = batch(size=1)
    ramp = torch.arange(8).repeat(8, 1).T.flatten()[None, :, None] * torch.ones(16)
    model, everything = distiller.model, torch.tensor([True])
    places, row = torch.tensor([5, 9]), torch.tensor([1.5, 2.5])  # 7 px below rows 1 and 2
    features, rgb = model.query(
        model.encode(model.preprocessing.normalise(pixels)),
        torch.stack([row, torch.tensor([1 - 3 / 14] * 2)], dim=1),
        images=model.preprocessing.normalise(pixels),
    )
    losses = distiller.losses(pixels, ramp, places, everything, moved=(7, -3))
    targets = (2 * row + 0.5)[None, :, None].expand(1, 2, 16)
    cells = [pixels[0, :, 14 * r + 7 : 14 * r + 21, 11:25] / 255 for r in (1, 2)]
    colours = torch.stack([cell.mean(dim=(1, 2)) for cell in cells])[None]
    expected = torch.stack([(features - targets).square().mean(), (rgb - colours).square().mean()])
    torch.testing.assert_close(losses, expected)


def test_images_of_one_colour_have_no_r2():
    pixels = torch.full((2, 3, 56, 56), 77, dtype=torch.uint8)
    assert make_distiller().validate([(pixels, batch(size=2)[1])])["rgb_r2"] == 0


def test_both_ways_of_answering_are_validated():
    distiller = make_distiller()
    result = distiller.validate([batch(), batch(seed=1)])
    assert result["feature_loss"] != result["null_feature_loss"]
    colours = rgb_targets(torch.cat([batch()[0], batch(seed=1)[0]]) / 255, 14).flatten(0, 1)
    variance = (colours - colours.mean(0)).square().mean().item()
    assert result["rgb_r2"] == pytest.approx(1 - result["rgb_loss"] / variance, rel=1e-3)
