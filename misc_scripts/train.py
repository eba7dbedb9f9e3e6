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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from apm.config import TrainConfig
from apm.flags import OUTPUTS, add_fields, make_parser, positive_int, take_fields
from apm.runtime.cli import Results, Stop, answer_flags, command

STATE, CHECKPOINT = "last.pth", "apm.safetensors"


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--teacher-block"),
        *("--teacher-margin", "--device", "--workers", "--limit", "--resume", "--save-every"),
        *("--dtype", "--seed"),
        example="misc_scripts/train.py --augment --feature-loss relational --dtype bfloat16",
        input=OUTPUTS / "resized",
        output=OUTPUTS / "train",
        teacher_block=-1,
        teacher_margin=0,
    )
    add, more = partial(parser.add, "training"), partial(parser.add, "input and output")
    store = "feature store of these images, of 1_extract_coco_features.py; unused with --teacher"
    more("--features", type=Path, default=OUTPUTS / "features", help=store)
    more("--tensorboard", action="store_true", help="also log for TensorBoard")
    shapes = "a new model's shape: 5.6 million parameters, or the paper's 54.3"
    parser.add("model", "--model", choices=("small", "coco"), default="small", help=shapes)
    init = "checkpoint to go on from, instead of a new model"
    parser.add("model", "--init", type=Path, help=init)
    add_fields(parser, TrainConfig)
    parts = "parts of a batch, one by one, which takes less memory"
    add("--accumulate", type=positive_int, default=1, help=parts)
    add("--validation-images", type=positive_int, default=200, help="images held out")
    args = parser.parse_args(argv)
    take_fields(TrainConfig, args)  # numbers out of range are refused at once
    if not args.teacher and (args.teacher_weights or args.teacher_block + 1 or args.teacher_margin):
        raise ValueError(
            "--teacher-weights, --teacher-block and --teacher-margin go with --teacher: a store's "
            "features are made already"
        )
    if (args.output / STATE).exists() and not args.resume:
        raise ValueError(f"--output {args.output}: holds a run; add --resume or choose another")
    return args


answer_flags(__name__, parse)

import torch
from tqdm import tqdm
from training_run import Inputs, Progress, blame, load_inputs, summary_writer

from apm.checkpoint import save_model
from apm.data.images import load_batches
from apm.data.training_set import epoch_batches
from apm.distill import Distiller, NonFiniteError
from apm.drawing import loss_figure
from apm.runtime.device import seed_everything, select_device
from apm.runtime.distributed import claim_gpu, process_group, rank, shares, wait_for_all, world_size
from apm.runtime.files import keep_settings, prepare_output
from apm.runtime.logs import RowLog, write_table

LOGGED = ("step", "feature_loss", "rgb_loss", "learning_rate", "gradient_norm")


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
    with Stop() as stop:
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
            held = load_batches(validation, eights, args.workers)
            bar = tqdm(held, "validation", len(eights), leave=False, disable=rank() > 0)
            loaded = (items for _, items in bar)
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


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = take_fields(TrainConfig, args)
    device = select_device(args.device)
    claim_gpu(device)
    seed_everything(config.seed)
    with process_group(device):
        inputs = load_inputs(args, config, device)
        results = Results(args, device)
        history = train(inputs, args, config)
        if rank() == 0:
            results.save(args.output, history=history)
            path = args.output / CHECKPOINT
            print(f"checkpoint: {path}; see it with predict_test_image.py --checkpoint {path}")
        wait_for_all()


if __name__ == "__main__":
    sys.exit(main())
