"""Train an APM on a teacher's dense features (paper, section 3): feature loss + RGB loss.

Defaults are the paper's, but for the model (--model coco): Adam, learning rate 1e-4, batches of 64,
mean squared errors. A run that was stopped goes on with --resume, to the same weights as without
the stop. Under torchrun every batch is shared out over the processes, and the result is that of one
process:

    torchrun --nproc-per-node 8 misc_scripts/train.py
"""

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apm import APM, APMConfig, load_model
from apm.data.features import FeatureStore, NpyStore, describe_teacher, file_sizes, open_store
from apm.data.images import DistillationDataset, image_names
from apm.distill import DistillationTrainer, start_at_mean, start_rgb_head
from apm.preprocessing import Preprocessing
from apm.run import CHECKPOINT, Run, refuse_a_second_run
from apm.runtime.cli import (
    OUTPUTS,
    Results,
    command,
    make_parser,
    positive_int,
    seed_everything,
    select_device,
    share,
)
from apm.runtime.distributed import claim_gpu, process_group, rank, wait_for_all, world_size
from apm.runtime.files import file_sha256, listing_sha256, prepare_output
from apm.teachers import DenseTeacher, load_dense_teacher

CONFIGS = {"small": APMConfig.small, "coco": APMConfig.coco}
# Flags that the trainer takes as they are.
OPTIMISATION = ["learning_rate", "weight_decay", "schedule", "warmup", "locations", "null_share"]
OPTIMISATION += ["feature_loss", "rgb_weight", "accumulate", "dtype", "seed"]
# Flags that a resumed run may change: they do not change what is learnt.
FREE = {"resume", "device", "workers", "accumulate", "save_every", "tensorboard"}


def widths(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers separated by commas, or nothing."""
    return tuple(int(number) for number in text.split(",") if number)


SHAPE_FLAGS: dict[str, dict[str, Any]] = {
    "--local-width": {"type": int, "help": "width of the embedded local patch; 0 for none"},
    "--local-blocks": {"type": widths, "help": "reach of the local patch, e.g. 2,8"},
    "--trunk-widths": {"type": widths, "help": "widths of the shared MLP, e.g. 1024,512"},
}


def shape_changes(args: Namespace) -> dict[str, Any]:
    """What the flags change in a model's config."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in SHAPE_FLAGS]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--teacher-block"),
        *("--teacher-margin", "--device", "--dtype", "--seed", "--batch-size", "--workers"),
        "--limit",
        input=OUTPUTS / "resized",
        output=OUTPUTS / "train",
        teacher_block=-1,
        teacher_margin=0,
        batch_size=64,
    )
    add = parser.add_argument
    add(
        "--features",
        type=Path,
        default=OUTPUTS / "features",
        help="store of teacher features;"
        " not used with --teacher, which makes the features of each step's images anew",
    )
    add("--model", choices=sorted(CONFIGS), default="small", help="shape of the model")
    add("--init", type=Path, help="checkpoint to start from, instead of --model's random weights")
    add(
        "--new-rgb-head",
        action="store_true",
        help="with --init: start its RGB head anew,"
        " and its fold where that is what a wide head reads",
    )
    for flag, settings in SHAPE_FLAGS.items():
        add(flag, **settings)
    add_optimisation(parser)
    add("--augment", action="store_true", help="random crops and flips, features alike")
    add("--validation-images", type=positive_int, default=200, help="images kept out of training")
    add("--resume", action="store_true", help="go on from --output's last state, if there is one")
    add("--save-every", type=positive_int, help="steps between states (default: once an epoch)")
    add("--tensorboard", action="store_true", help="also log for TensorBoard")
    args = parser.parse_args(argv)
    check(args)
    return args


def add_optimisation(parser: ArgumentParser) -> None:
    """Flags of optimiser and losses."""
    add = parser.add_argument
    add("--epochs", type=positive_int, default=12, help="passes over the images")
    add(
        "--accumulate",
        type=positive_int,
        default=1,
        help="parts in which a process works through"
        " its share of a batch, one after the other: less memory, same result",
    )
    add(
        "--learning-rate",
        type=float,
        default=1e-4,
        help="peak learning rate; a tenth for the fold and the RGB head's first layer where that"
        " looks the column up, as in --model small",
    )
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="learning rate")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--locations", type=positive_int, default=1024, help="random locations a step")
    add("--null-share", type=share, default=0.3, help="share of a batch without local patch")
    add(
        "--feature-loss",
        choices=("mse", "standardised", "relational"),
        default="mse",
        help="the paper's; of standardised channels with a cosine term; that one and how alike"
        " the places of an image are to one another",
    )
    add("--rgb-weight", type=float, default=1.0, help="weight of the RGB loss")


def check(args: Namespace) -> None:
    """Refuse flags that contradict each other, and to write over a run.

    Raises:
        ValueError: naming the flags.
    """
    if args.init and shape_changes(args):
        raise ValueError(f"--init brings its own shape: leave out {' and '.join(SHAPE_FLAGS)}")
    if args.new_rgb_head and not args.init:
        raise ValueError("--new-rgb-head: a model without --init has a new one anyway")
    if not args.teacher and (args.teacher_weights or args.teacher_block + 1 or args.teacher_margin):
        raise ValueError(
            "--teacher-weights, --teacher-block and --teacher-margin go with --teacher; a store's "
            "features have theirs"
        )
    refuse_a_second_run(args.output, args.resume)


def whole_batch(args: Namespace, images: int) -> int:
    """Images of a batch: those of --batch-size, if there are so many.

    Raises:
        ValueError: if they cannot be shared out.
    """
    size, parts = min(args.batch_size, images), world_size() * args.accumulate
    if size < parts:
        raise ValueError(
            f"--batch-size {args.batch_size}: {size} images are the whole batch, expected at least "
            f"{parts}, one for each process and each part of --accumulate"
        )
    return size


def open_source(
    args: Namespace, grid_size: int, device: torch.device
) -> tuple[FeatureStore | NpyStore | None, DenseTeacher | None, dict[str, Any]]:
    """Where features come from, a store or a teacher, and how they are made.

    Raises:
        ValueError: if a store has another grid than the model.
    """
    if args.teacher:
        teacher = load_dense_teacher(
            args.teacher,
            args.teacher_weights,
            grid_size=grid_size,
            block=args.teacher_block,
            margin=args.teacher_margin,
        )
        meta = describe_teacher(args.teacher, args.teacher_weights, teacher, args.dtype)
        return None, teacher.to(device), meta
    store = open_store(args.features)
    if store.meta["grid_size"] != grid_size:
        raise ValueError(
            f"{args.features}: features on a grid of side {store.meta['grid_size']}, the model's "
            f"has {grid_size}"
        )
    return store, None, store.meta


def split(
    args: Namespace, preprocessing: Preprocessing, store: FeatureStore | NpyStore | None
) -> tuple[DistillationDataset, DistillationDataset]:
    """Training and validation images, drawn by the seed: with --limit some, else all."""
    images = image_names(args.input)
    if store:
        images = {name: path for name, path in images.items() if name in store.sizes}
        for name, size in file_sizes(images).items():
            if store.sizes[name] not in (None, size):
                raise ValueError(
                    f"{images[name]}: {size} bytes, but --features were made of an image of "
                    f"{store.sizes[name]}; extract again, or name the same --input"
                )
    names = sorted(images)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed)).tolist()
    names = [names[index] for index in order[: args.limit]]
    if len(names) <= args.validation_images:
        raise ValueError(
            f"{args.features if store else args.input}: {len(names)} images to learn from, "
            f"expected more than the {args.validation_images} of --validation-images"
        )
    training, validation = names[args.validation_images :], names[: args.validation_images]
    return (
        DistillationDataset(
            {name: images[name] for name in training}, preprocessing, store, args.augment, args.seed
        ),
        DistillationDataset({name: images[name] for name in validation}, preprocessing, store),
    )


def teacher_statistics(
    validation: DistillationDataset, teacher: DenseTeacher | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(F,)`` of the teacher's channels over some of its images."""
    sample = []
    for index in range(min(64, len(validation))):
        pixels, features = validation[index]
        sample.append(teacher(pixels[None].to(device) / 255)[0].cpu() if teacher else features)
    features = torch.cat(sample).float()
    return features.mean(dim=0), features.std(dim=0)


def continued_model(path: Path, new_rgb_head: bool) -> APM:
    """A checkpoint to train further."""
    model = load_model(path)
    if new_rgb_head:
        start_rgb_head(model)
    # Training on right tokens undoes the released model's shift, and it is on cropped images.
    model.preprocessing = dataclasses.replace(model.preprocessing, token_offset=0, fit="crop")
    return model


def build(
    args: Namespace, device: torch.device, make_fold: Callable[[APM], nn.Module] | None = None
) -> Run:
    """The run that the flags ask for, in an output folder claimed for it.

    Args:
        args: the flags.
        device: where to train.
        make_fold: given a new model, returns what makes its columns instead of its own fold.
    """
    model = continued_model(args.init, args.new_rgb_head) if args.init else None
    config = (
        model.config if model else dataclasses.replace(CONFIGS[args.model](), **shape_changes(args))
    )
    store, teacher, source = open_source(args, config.grid_size, device)
    if model and config.feature_dim != source["feature_dim"]:
        raise ValueError(
            f"{args.init}: answers features of width {config.feature_dim}, the teacher's have "
            f"width {source['feature_dim']}"
        )
    training, validation = split(args, Preprocessing(image_size=config.image_size), store)
    batch_size = whole_batch(args, len(training))
    if rank() == 0:
        prepare_output(args.output)  # before the long work, and before a state is read there
    mean, std = teacher_statistics(validation, teacher, device)
    if model is None:
        model = APM(dataclasses.replace(config, feature_dim=len(mean)))
        if make_fold:
            model.fold = make_fold(model)
        start_at_mean(model, mean)
    run = Run(
        trainer=DistillationTrainer(
            model.to(device),
            mean,
            std,
            steps=args.epochs * (len(training) // batch_size),
            teacher=teacher,
            **{name: getattr(args, name) for name in OPTIMISATION},
        ),
        training=training,
        validation=validation,
        output=args.output,
        settings=run_settings(args, training, source, model.preprocessing),
        provenance={
            "init": model.provenance,
            "teacher": source,
            "training_images": len(training),
            # Where files lay says nothing about the model.
            "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        },
        epochs=args.epochs,
        batch_size=batch_size,
        workers=args.workers,
        save_every=args.save_every,
    )
    run.resume()
    return run


def run_settings(
    args: Namespace,
    training: DistillationDataset,
    source: dict[str, Any],
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """What decides the weights: flags, but for paths, the training images, how features are made.

    Args:
        args: the flags.
        training: the training images, which names and sizes tell from others.
        source: as of ``open_source``.
        preprocessing: of the model.
    """
    flags = {k: v for k, v in vars(args).items() if k not in FREE and not isinstance(v, Path)}
    images = dict(zip(training.names, training.paths, strict=True))
    if args.schedule == "constant":
        del flags["epochs"]
    return flags | {
        "training images": listing_sha256(file_sizes(images)),
        "features": source,
        "--init": args.init and file_sha256(args.init),
        "preprocessing": dataclasses.asdict(preprocessing),
    }


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    claim_gpu(device)
    seed_everything(args.seed)
    with process_group(device):
        run = build(args, device)
        results = Results(args, device)
        run.train(args.tensorboard)
        if rank() == 0:
            results.save(args.output, history=run.history)
            print(f"checkpoint: {args.output / CHECKPOINT}")
        wait_for_all()


if __name__ == "__main__":
    sys.exit(main())
