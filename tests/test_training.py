import copy
import multiprocessing
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import make_model

from apm.distill import DistillationTrainer, NonFiniteError, split_batch, start_at_mean
from apm.losses import (
    feature_loss,
    relational_feature_loss,
    rgb_targets,
    standardised_feature_loss,
)
from apm.preprocessing import Preprocessing
from apm.runtime.distributed import claim_gpu, world_size
from apm.runtime.interrupts import delayed_signals

posix = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return pixels, torch.randn(size, 16, 16, generator=generator)


def step(trainer, whole):
    """A step on a whole batch, in this process's parts of it."""
    pixels, targets = whole
    parts = split_batch(range(len(pixels)), trainer.accumulate)
    return trainer.step(((pixels[list(p)], targets[list(p)]) for p in parts), len(pixels))


def make_trainer(model=None, **settings):
    model = model or make_model(local_width=8)
    settings = {"steps": 40, "learning_rate": 1e-3, "null_share": 0.5} | settings
    return DistillationTrainer(model, torch.zeros(16), torch.ones(16), **settings)


@pytest.mark.parametrize("loss", ["mse", "standardised", "relational"])
def test_losses_fall(loss):
    trainer = make_trainer(feature_loss=loss, schedule="cosine", warmup=3, learning_rate=5e-3)
    losses = [step(trainer, batch()) for _ in range(40)]
    assert losses[-1][0] < 0.95 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_a_resumed_run_is_the_undisturbed_run():
    whole, first = make_trainer(locations=7), make_trainer(locations=7)
    for index in range(6):
        step(whole, batch(seed=index))
    for index in range(3):
        step(first, batch(seed=index))
    state = copy.deepcopy(first.state_dict())
    second = make_trainer(locations=7)
    second.load_state_dict(state)
    for index in range(3, 6):
        step(second, batch(seed=index))
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
    assert step(trainer, (pixels, targets))[0] == pytest.approx(expected.item(), rel=1e-4)


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    trainers = [make_trainer(accumulate=parts, locations=9) for parts in (1, 4)]
    for index in range(3):
        losses = [step(trainer, batch(seed=index)) for trainer in trainers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_weights(*(trainer.model for trainer in trainers), atol=1e-5)


def test_every_image_is_in_one_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts = split_batch(range(17), accumulate=2)
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
    dist.destroy_process_group()


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
    trainer = make_trainer(model, locations=9, accumulate=world_size(), feature_loss="standardised")
    for index in range(5):
        losses = step(trainer, batch(size=7, seed=index))
    mine = slice(rank, None, world_size())
    validation = trainer.validate([tuple(part[mine] for part in batch(seed=9))])
    return trainer.model.state_dict(), losses, validation


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
    trainer = make_trainer()
    before = copy.deepcopy(trainer.state_dict())
    pixels, targets = batch()
    targets[2] = torch.inf
    with pytest.raises(NonFiniteError, match="step 1: feature loss inf"):
        step(trainer, (pixels, targets))
    assert_same_weights(trainer.model, make_trainer().model, atol=0)
    assert trainer.state_dict()["step"] == before["step"] == 0


def test_a_teacher_makes_the_features_that_are_missing():
    def teacher(images):
        return images.unfold(2, 14, 14).unfold(3, 14, 14).mean((1, 4, 5)).flatten(1)[..., None] * w

    w = torch.linspace(-1, 1, 16)
    pixels, _ = batch()
    given, asked = make_trainer(), make_trainer(teacher=teacher)
    for _ in range(2):
        step(given, (pixels, teacher(pixels / 255)))
        step(asked, (pixels, torch.empty(len(pixels), 0)))
    assert_same_weights(given.model, asked.model, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_the_block(number):
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), delayed_signals():
            signal.raise_signal(number)
            done.append("the rest of the block")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert done


def test_a_handler_that_python_did_not_set_is_survived(monkeypatch):
    set_handler = signal.signal

    def nameless(number, handler):
        former = set_handler(number, handler)  # raises for None, as the real one
        return None if number == signal.SIGTERM else former

    former = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", nameless)
            with delayed_signals():
                pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_process_claims_a_gpu_only_to_work_on_one(monkeypatch):
    claimed = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", claimed.append)
    claim_gpu(torch.device("cpu"))
    with pytest.raises(ValueError, match="--nproc-per-node 1, or --device cpu"):
        claim_gpu(torch.device("cuda"))
    assert not claimed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    claim_gpu(torch.device("cuda"))
    assert claimed == [1]


def test_images_of_one_colour_have_no_r2():
    pixels = torch.full((2, 3, 56, 56), 77, dtype=torch.uint8)
    assert make_trainer().validate([(pixels, batch(size=2)[1])])["rgb_r2"] == 0


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


def test_relational_loss_compares_all_pairs_of_places():
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
    expected = standardised_feature_loss(answers, targets, mean, std) + 7 * sum(errors) / 50
    value = relational_feature_loss(answers, targets, mean, std, weight=7)
    torch.testing.assert_close(value, expected)
    assert relational_feature_loss(targets, targets, mean, std).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scaling", ["unit", "imagenet"])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_new_model_answers_a_grey_thumbnail_looked_up_in_its_column(scaling, channels):
    model = make_model(rgb_widths=(20, 8, 8), position_dim=128, local_width=8)
    model.preprocessing = Preprocessing(image_size=56, scaling=scaling, channels=channels)
    start_at_mean(model, torch.randn(16))
    for layer in (model.feature_head, model.rgb_head[0]):  # what does not come from the column
        torch.nn.init.zeros_(layer.weight if layer is model.feature_head else layer.weight[1:])
    pixels = torch.randint(256, (1, 3, 56, 56), dtype=torch.uint8)
    pixels[..., 30:] //= 100  # a dark half
    column = model.encode(model.preprocessing.normalise(pixels))
    grey = (pixels[:, 0] * 0.299 + pixels[:, 1] * 0.587 + pixels[:, 2] * 0.114) / 255
    brightness = torch.nn.functional.avg_pool2d(grey[:, None], 14).flatten(1)
    torch.testing.assert_close(column, brightness, atol=1e-5, rtol=1e-5)
    answers = model.query(column)[1][0]
    torch.testing.assert_close(answers, brightness[0, :, None].expand(-1, 3), atol=0.1, rtol=0)


def test_cancelling_terms_keep_their_precision_under_autocast():
    model = make_model(rgb_widths=(20, 8), position_dim=128, local_width=8)
    start_at_mean(model, torch.randn(16))
    images = torch.rand(1, 3, 56, 56)
    exact = model(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)[1].float()
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0)
