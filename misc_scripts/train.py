"""Train an APM on a teacher's dense features (paper, section 3): feature loss + RGB loss.

Defaults are the paper's: Adam, learning rate 1e-4, batches of 64, mean squared errors. Only the
model is a small one; the paper's is --model coco. A run that was stopped goes on with --resume, to
the same weights as without the stop. Under torchrun every batch is shared out over the processes,
and the result is that of one process:

    torchrun --nproc-per-node 8 misc_scripts/train.py
"""

import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from training_run import Inputs, Progress, load_inputs, summary_writer

from apm.checkpoint import save_model
from apm.config import TrainConfig
from apm.data.images import load_batches
from apm.data.training_set import TrainingSet, epoch_batches
from apm.distill import Distiller, NonFiniteError
from apm.drawing import loss_figure
from apm.runtime import cli
from apm.runtime.device import seed_everything, select_device
from apm.runtime.distributed import claim_gpu, process_group, rank, shares, wait_for_all, world_size
from apm.runtime.files import keep_settings, prepare_output
from apm.runtime.logs import RowLog, write_table

STATE, CHECKPOINT = "last.pth", "apm.safetensors"
LOGGED = ("step", "feature_loss", "rgb_loss", "learning_rate", "gradient_norm")


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = cli.make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--teacher-block"),
        *("--teacher-margin", "--device", "--workers", "--limit"),
        input=cli.OUTPUTS / "resized",
        output=cli.OUTPUTS / "train",
        teacher_block=-1,
        teacher_margin=0,
    )
    add, store = parser.add_argument, cli.OUTPUTS / "features"
    add("--features", type=Path, default=store, help="feature store; unused with --teacher")
    add("--model", choices=("small", "coco"), default="small", help="shape of a new model")
    add("--init", type=Path, help="checkpoint to go on from, instead of a new model")
    cli.add_fields(parser, TrainConfig)
    add("--accumulate", type=cli.positive_int, default=1, help="parts of a batch, one by one")
    add("--validation-images", type=cli.positive_int, default=200, help="images held out")
    add("--resume", action="store_true", help="go on from --output's last state, if there is one")
    add("--save-every", type=cli.positive_int, help="steps between states, besides each epoch's")
    add("--tensorboard", action="store_true", help="also log for TensorBoard")
    args = parser.parse_args(argv)
    if not args.teacher and (args.teacher_weights or args.teacher_block + 1 or args.teacher_margin):
        raise ValueError(
            "--teacher-weights, --teacher-block and --teacher-margin go with --teacher: a store's "
            "features are made already"
        )
    if (args.output / STATE).exists() and not args.resume:
        raise ValueError(f"{args.output}: holds a run; add --resume or choose another --output")
    return args


def blame(distiller: Distiller, images: TrainingSet, batch: list[int]) -> str:
    """Which of this process's images of a batch have losses that are not finite."""
    mine = sorted(index for part in shares(batch, distiller.accumulate) for index in part)
    places = torch.arange(distiller.model.config.grid_size**2)
    bad = []
    with torch.no_grad():
        for index in mine:
            pixels, features = (part[None] for part in images[index])
            features = distiller.features(pixels, features)
            losses = distiller.losses(pixels, features, places, torch.tensor([True]))
            bad += [] if losses.isfinite().all() else [images.names[index]]
    if not bad:
        return "none of this process's images alone is the cause"
    if len(bad) < len(mine):
        return f"images {', '.join(bad)}"
    return f"all images of this process's batch, {', '.join(bad)}: try a lower --learning-rate"


def train(inputs: Inputs, args: Namespace, config: TrainConfig) -> list[dict[str, float]]:
    """All epochs that are left. Returns a row of numbers for each epoch of the run."""
    training, validation, model = inputs.training, inputs.validation, inputs.model
    batch_size = min(config.batch_size, len(training))
    if batch_size < (parts := world_size() * args.accumulate):
        raise ValueError(
            f"--batch-size {config.batch_size}: {batch_size} images are the whole batch, expected "
            f"at least {parts}, one for each process and each part of --accumulate"
        )
    steps = len(training) // batch_size  # of an epoch
    distiller = Distiller(
        model,
        config,
        inputs.mean,
        inputs.std,
        steps=config.epochs * steps,
        batch_size=batch_size,
        accumulate=args.accumulate,
        teacher=inputs.teacher,
    )
    progress = Progress(args.output / STATE, distiller)
    log, board = None, None
    if rank() == 0:
        prepare_output(args.output)
        if not progress.path.exists():  # nothing was made with the settings
            (args.output / "settings.json").unlink(missing_ok=True)
        keep_settings(args.output / "settings.json", inputs.settings)
    progress.load()
    if rank() == 0:
        log = RowLog(args.output / "steps.csv", LOGGED, until=distiller.steps_done)
        if args.tensorboard:
            board = summary_writer(args.output / "tensorboard", distiller.steps_done)
    # Of several processes each may stop at another step: they go on from the last whole state.
    save_alone = progress.save if world_size() == 1 else lambda: None
    with cli.Stop() as stop:
        while (epoch := len(progress.history)) < config.epochs:
            training.epoch = epoch
            batches = epoch_batches(len(training), batch_size, config.seed, epoch)
            batches = batches[distiller.steps_done - epoch * steps :]
            mine = [part for batch in batches for part in shares(batch, args.accumulate)]
            loaded = (items for _, items in load_batches(training, mine, args.workers))
            images = stop.between(loaded, save_alone)
            title = f"epoch {epoch + 1}/{config.epochs}"
            started, waited = time.perf_counter(), 0.0
            for batch in tqdm(batches, desc=title, unit="step", disable=rank() > 0):
                asked = time.perf_counter()
                read = list(islice(images, args.accumulate))
                waited += time.perf_counter() - asked
                try:
                    losses = distiller.step(read)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{error}; {blame(distiller, training, batch)}") from None
                progress.loss_sums += losses
                if log:
                    log_step(distiller, losses, log, board)
                if args.save_every and distiller.steps_done % args.save_every == 0:
                    progress.save()
            seconds = time.perf_counter() - started
            feature_loss, rgb_loss = (progress.loss_sums / steps).tolist()
            held_out = range(rank(), len(validation), world_size())
            eights = [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
            loaded = (items for _, items in load_batches(validation, eights, args.workers))
            row = {
                "epoch": epoch + 1,
                "train_feature_loss": feature_loss,
                "train_rgb_loss": rgb_loss,
                "images_per_second": len(batches) * batch_size / seconds,
                "data_wait": waited / seconds,
                **distiller.validate(stop.between(loaded, save_alone)),
            }
            progress.end_epoch(row)
            if rank() == 0:
                provenance = inputs.provenance | {"validation": row}
                save_model(args.output / CHECKPOINT, model, provenance, torch.float16)
                write_table(args.output / "history.csv", list(row), progress.history)
                loss_figure(args.output / "loss.png", progress.history)
                print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            progress.save()  # last: it says that the epoch is over
    if board:
        board.close()
    return progress.history


def log_step(distiller: Distiller, losses: torch.Tensor, log: RowLog, board: Any) -> None:
    """A row in the table of steps, and for TensorBoard."""
    rate = distiller.optimizer.param_groups[0]["lr"]
    values = (distiller.steps_done, *losses.tolist(), rate, distiller.gradient_norm)
    row = dict(zip(LOGGED, values, strict=True))
    log.append([row])
    if board:
        for name, value in list(row.items())[1:]:
            board.add_scalar(name, value, distiller.steps_done)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = cli.take_fields(TrainConfig, args)
    device = select_device(args.device)
    claim_gpu(device)
    seed_everything(config.seed)
    with process_group(device):
        inputs = load_inputs(args, config, device)
        results = cli.Results(args, device)
        history = train(inputs, args, config)
        if rank() == 0:
            results.save(args.output, history=history)
            print(f"checkpoint: {args.output / CHECKPOINT}")
        wait_for_all()


if __name__ == "__main__":
    sys.exit(main())
