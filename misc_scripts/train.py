"""Train an APM on a teacher's dense features (paper, section 3): feature loss + RGB loss.

Defaults are the paper's: Adam, learning rate 1e-4, batches of 64, mean squared errors. A run that
was stopped goes on from its last epoch with --resume, to the same weights as without the stop.
"""

import csv
import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from apm import APM, APMConfig, load_model, save_model
from apm.checkpoint import load_tensors
from apm.cli import (
    OUTPUTS,
    Results,
    command,
    make_parser,
    positive_int,
    seed_everything,
    select_device,
    share,
)
from apm.data import DistillationDataset, FeatureStore, image_names
from apm.figures import loss_figure
from apm.files import atomic_path, prepare_output
from apm.training import DistillationTrainer, start_at_mean

CONFIGS = {"small": APMConfig.small, "coco": APMConfig.coco}


def widths(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers separated by commas, or nothing."""
    return tuple(int(number) for number in text.split(",") if number)


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--device", "--dtype", "--seed", "--batch-size", "--workers"),
        "--limit",
        input=OUTPUTS / "resized",
        output=OUTPUTS / "train",
        batch_size=64,
    )
    add = parser.add_argument
    add("--features", type=Path, default=OUTPUTS / "features", help="folder of teacher features")
    add("--model", choices=sorted(CONFIGS), default="small", help="shape of the model")
    add("--init", type=Path, help="checkpoint to start from, instead of --model's random weights")
    add("--local-sizes", type=widths, help="sides of the local patches in px, e.g. 14,56 or ''")
    add("--trunk-widths", type=widths, help="widths of the shared MLP, e.g. 1024,512")
    add("--epochs", type=positive_int, default=12, help="passes over the images")
    add("--learning-rate", type=float, default=1e-4, help="peak learning rate")
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="learning rate")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--locations", type=positive_int, default=1024, help="random locations a step")
    add("--null-share", type=share, default=0.3, help="share of a batch without local patch")
    add(
        "--feature-loss",
        choices=("mse", "standardised"),
        default="mse",
        help="the paper's, or of standardised channels with a cosine term",
    )
    add("--rgb-weight", type=float, default=1.0, help="weight of the RGB loss")
    add("--augment", action="store_true", help="random crops and flips, features alike")
    add("--validation-images", type=positive_int, default=200, help="images kept out of training")
    add("--resume", action="store_true", help="go on from the last epoch in --output")
    args = parser.parse_args(argv)
    if args.init and (args.local_sizes is not None or args.trunk_widths is not None):
        raise ValueError("--init brings its own shape: leave out --local-sizes and --trunk-widths")
    return args


def split(args: Namespace, store: FeatureStore) -> tuple[DistillationDataset, DistillationDataset]:
    """Training and validation images, drawn by the seed."""
    images = image_names(args.input, args.limit)
    names = [name for name in images if store.path(name).exists()]
    if len(names) <= args.validation_images:
        raise ValueError(
            f"{args.features}: has features of {len(names)} images of {args.input}, expected more "
            f"than the {args.validation_images} of --validation-images"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed)).tolist()
    names = [names[index] for index in order]
    training, validation = names[args.validation_images :], names[: args.validation_images]
    return (
        DistillationDataset(
            [images[name] for name in training], training, store, args.augment, args.seed
        ),
        DistillationDataset([images[name] for name in validation], validation, store),
    )


def new_model(args: Namespace, feature_dim: int, mean: Tensor) -> APM:
    """A model with fresh weights, of the shape that the flags ask for."""
    changes = {"feature_dim": feature_dim}
    for name in ("local_sizes", "trunk_widths"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    model = APM(dataclasses.replace(CONFIGS[args.model](), **changes))
    start_at_mean(model, mean)
    return model


def continued_model(path: Path, feature_dim: int) -> APM:
    """A checkpoint to train further."""
    model = load_model(path)
    if model.config.feature_dim != feature_dim:
        raise ValueError(
            f"{path}: answers features of width {model.config.feature_dim}, "
            f"--features has width {feature_dim}"
        )
    # The released model's shifted tokens are what training on right ones undoes.
    model.preprocessing = dataclasses.replace(model.preprocessing, token_offset=0)
    return model


def build(
    args: Namespace, store: FeatureStore, validation: DistillationDataset, steps: int
) -> DistillationTrainer:
    """The model and its trainer."""
    device = select_device(args.device)
    seed_everything(args.seed)
    # Statistics of the teacher, for which any of its features will do.
    sample = torch.cat([validation[i][1] for i in range(min(64, len(validation)))])
    mean, std = sample.mean(dim=0), sample.std(dim=0)
    feature_dim = store.meta["feature_dim"]
    model = (
        continued_model(args.init, feature_dim) if args.init else new_model(args, feature_dim, mean)
    )
    settings = ("learning_rate", "weight_decay", "schedule", "warmup", "locations", "null_share")
    settings += ("feature_loss", "rgb_weight", "dtype", "seed")
    return DistillationTrainer(
        model.to(device),
        mean,
        std,
        steps=steps,
        **{name: getattr(args, name) for name in settings},
    )


def train_epoch(
    trainer: DistillationTrainer, training: DistillationDataset, batch_size: int, args: Namespace
) -> dict[str, float]:
    """One pass over the training images, in an order that seed and epoch decide; mean losses."""
    loader = DataLoader(
        training,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        generator=torch.Generator().manual_seed(args.seed + 1_000_003 * training.epoch),
    )
    sums = torch.zeros(2)
    progress = tqdm(loader, desc=f"epoch {training.epoch + 1}/{args.epochs}", unit="step")
    for pixels, targets in progress:
        losses = trainer.step(pixels, targets)
        sums += torch.tensor(losses)
        progress.set_postfix(feature=f"{losses[0]:.4f}", rgb=f"{losses[1]:.4f}")
    feature, rgb = (sums / len(loader)).tolist()
    return {"train_feature_loss": feature, "train_rgb_loss": rgb}


def write_history(output: Path, history: list[dict[str, float]]) -> None:
    """The losses of each epoch as a table and as a plot."""
    with atomic_path(output / "history.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    loss_figure(output / "loss.png", history)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    store = FeatureStore(args.features)
    training, validation = split(args, store)
    output = prepare_output(args.output)
    batch_size = min(args.batch_size, len(training))
    trainer = build(args, store, validation, args.epochs * (len(training) // batch_size))
    results = Results(args, trainer.device)
    state_path, history = output / "last.pth", []
    if args.resume:
        state = load_tensors(state_path)
        history = state.pop("history")
        trainer.load_state_dict(state)
    validation_loader = DataLoader(validation, 8, num_workers=args.workers)
    for training.epoch in range(len(history), args.epochs):
        row = {"epoch": training.epoch + 1}
        row |= train_epoch(trainer, training, batch_size, args)
        row |= trainer.validate(validation_loader)
        history.append(row)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        with atomic_path(state_path) as temporary:
            torch.save(trainer.state_dict() | {"history": history}, temporary)
    arguments = results.content["arguments"]
    trainer.model.provenance = {
        "init": trainer.model.provenance,
        "teacher": store.meta,
        "training_images": len(training),
        # Where files lay says nothing about the model.
        "arguments": {k: v for k, v in arguments.items() if not isinstance(vars(args)[k], Path)},
        "validation": history[-1],
    }
    save_model(output / "apm.pth", trainer.model, dtype=torch.float16)
    write_history(output, history)
    results.save(output, history=history)
    print(f"checkpoint: {output / 'apm.pth'}")


if __name__ == "__main__":
    sys.exit(main())
