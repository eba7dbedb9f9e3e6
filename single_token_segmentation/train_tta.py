"""Test-time training on a single CLS token (paper, section 3.2, Figure 3 and tables 1 to 3).

One image (--input): a student that knows nothing learns the teacher's embedding; its islands every
50 iterations, and its loss. A data set (--dataset): the accuracy of teacher and students, side by
side, after chosen numbers of iterations.
"""

import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from apm import APM, APMConfig
from apm.data.cache import cached
from apm.data.images import load_image
from apm.data.prompts import load_templates
from apm.data.test_sets import ALL, CIFAR10_CLASSES, DATASETS, LabelledImages, load_dataset, spread
from apm.drawing import panels, save_gif, save_picture
from apm.evaluation import (
    RowLog,
    TeacherEmbeddings,
    adapt_batches,
    image_row,
    row_columns,
    summarise,
)
from apm.figures import log_loss_figure
from apm.islands import island_series
from apm.runtime.cli import (
    OUTPUTS,
    ROOT,
    Results,
    command,
    make_parser,
    positive_int,
    seed_everything,
    select_device,
)
from apm.runtime.counting import torch_macs
from apm.runtime.files import cache_home, file_sha256, prepare_output
from apm.teachers import (
    OPEN_CLIP,
    ClassifierTeacher,
    TokenTeacher,
    imagenet_names,
    load_token_teacher,
)
from apm.tta import TestTimeTrainer

BUNDLED_TEACHER = ROOT / "checkpoints" / "clip_tiny.pt"
TILE = 224  # px, of a picture in the figures


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    return tuple(positive_int(number) for number in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """An argparse type: class names, separated by commas."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise ArgumentTypeError(f"{text!r} names no class")
    return found


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--teacher-weights", "--device", "--dtype", "--seed", "--limit"),
        output=OUTPUTS / "train_tta",
    )
    add = parser.add_argument
    add("--input", type=Path, default=ROOT / "assets" / "cat.jpg", help="image file")
    add(
        "--teacher",
        default=str(BUNDLED_TEACHER),
        help="a CLIP by its name (the paper's: ViT-L/14, open_clip:ViT-H-14-quickgelu/dfn5b) or "
        "file, or a classifier of timm",
    )
    add(
        "--classes",
        type=names,
        help="class names for --input, by commas (default: CIFAR-10's, of a classifier ImageNet's)",
    )
    add("--templates", default="single", help="prompts: single, clip80, or a file of them")
    add("--pooling", choices=("attention", "mean"), default="attention", help="of the student")
    add("--iterations", type=positive_int, help="steps (default: 250, with --dataset 50)")
    add("--learning-rate", type=float, default=1e-4, help="learning rate of Adam")
    add("--every", type=positive_int, default=50, help="iterations from islands to islands")
    add("--dataset", choices=DATASETS, help="a test set instead of one image")
    add("--data-root", type=Path, default=ROOT / "data", help="where data sets lie")
    add("--download", action="store_true", help="let torchvision fetch the data set")
    add("--corruption", default=ALL, help="of cifar10c: all, or the name of one")
    add("--severity", type=int, default=5, help="of cifar10c, 1 to 5")
    add("--report-at", type=numbers, default=(1, 5, 10, 20, 50), help="iterations in the table")
    add("--parallel", type=positive_int, default=1, help="students trained at once")
    args = parser.parse_args(argv)
    args.iterations = args.iterations or (50 if args.dataset else 250)
    args.report_at = tuple(step for step in args.report_at if step <= args.iterations)
    if not args.report_at:
        raise ValueError(f"--report-at: none is within the {args.iterations} iterations")
    return args


def embed(teacher: TokenTeacher, image: Image.Image, device: torch.device) -> Tensor:
    """The teacher's embedding of one image, ``(F,)`` on the CPU."""
    return teacher(teacher.preprocess(image)[None].to(device))[0].cpu()


def teacher_key(args: Namespace) -> dict[str, str | None]:
    """What identifies the teacher: its name, and the hash of its weights where they are a file.

    The file is read whole for that, about a second a gigabyte: a changed file is always noticed.
    """
    # OpenCLIP's second part may be a file.
    is_open_clip = args.teacher.startswith(OPEN_CLIP)
    path = Path(args.teacher.partition("/")[2] if is_open_clip else args.teacher)
    name, weights = (path.name, path) if path.is_file() else (args.teacher, args.teacher_weights)
    return {"teacher": name, "weights_sha256": file_sha256(weights) if weights else None}


def draw_islands(
    output: Path, picture: np.ndarray, grids: Mapping[int, np.ndarray], seed: int
) -> Path:
    """Islands after each number of steps, as a picture and as an animation.

    Args:
        picture: ``(H, W, 3)`` uint8, the image as the student sees it.
        grids: number of steps -> features ``(h, w, F)``.

    Returns:
        The picture.
    """
    series = np.stack(list(grids.values()))
    greys, colours = (island_series(series, channels, seed) for channels in (1, 3))
    upper, lower = {"input": picture}, {"": np.full_like(picture, 255)}
    frames = []
    for step, grey, colour in zip(grids, greys, colours, strict=True):
        upper[f"{step} iterations"], lower[f"{step}, in colour"] = grey, colour
        frame = {"input": picture, f"{step} iterations": grey, "in colour": colour}
        frames.append(panels([frame], TILE))
    save_picture(output / "islands.png", panels([upper, lower], TILE))
    save_gif(output / "islands.gif", frames, milliseconds=600)
    return output / "islands.png"


def print_predictions(shares: Mapping[str, Mapping[str, float]]) -> None:
    """The best class of teacher and student."""
    for name, probabilities in shares.items():
        best = max(probabilities, key=probabilities.__getitem__)
        print(f"{name}: {best} ({probabilities[best]:.3f})")


def run_image(
    args: Namespace,
    trainer: TestTimeTrainer,
    teacher: TokenTeacher,
    image: Image.Image,
    output: Path,
) -> dict:
    """One image: islands, loss curve, predictions."""
    target = embed(teacher, image, trainer.device)
    class_names = args.classes or (
        imagenet_names() if isinstance(teacher, ClassifierTeacher) else CIFAR10_CLASSES
    )
    classes = teacher.embed_classes(class_names, load_templates(args.templates)).cpu()
    trainer.reset(args.seed)
    preprocessing, side = trainer.model.preprocessing, trainer.model.config.grid_size
    kept = [*range(args.every, args.iterations, args.every), args.iterations]
    started = time.perf_counter()
    with tqdm(total=args.iterations, unit="step") as progress:
        adapted = trainer.adapt(preprocessing(image), target, kept, progress.update)
    seconds = time.perf_counter() - started
    grids = {step: adapted.features_at[step].view(side, side, -1).numpy() for step in kept}
    picture = np.asarray(preprocessing.picture(image))
    figure = draw_islands(output, picture, grids, args.seed)
    log_loss_figure(output / "loss.png", adapted.losses)
    logits = teacher.logits(torch.stack([target, adapted.pooled]), classes)
    shares = {
        name: dict(zip(class_names, row, strict=True))
        for name, row in zip(("teacher", "student"), logits.softmax(dim=1).tolist(), strict=True)
    }
    losses = adapted.losses
    print(f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps, {seconds:.1f} s")
    print_predictions(shares)
    print(figure)
    return {"losses": losses, "adapt_seconds": seconds, "probabilities": shares}


def run_dataset(
    args: Namespace,
    trainer: TestTimeTrainer,
    teacher: TokenTeacher,
    data: LabelledImages,
    output: Path,
) -> dict:
    """A data set: a row an image, resumed where a killed run stopped, and the table."""
    chosen = spread(len(data.images), args.limit)
    key = teacher_key(args) | {"dataset": data.name, "files_sha256": data.files_sha256}
    templates = load_templates(args.templates)
    run = key | {
        **{"templates": templates, "iterations": args.iterations, "pooling": args.pooling},
        **{"learning_rate": args.learning_rate, "seed": args.seed, "dtype": args.dtype},
    }
    log = RowLog(output / "rows.csv", row_columns(args.report_at), run)
    folder = cache_home() / "apm"
    classes = cached(
        folder,
        key | {"what": "classes", "classes": data.class_names, "templates": templates},
        lambda: teacher.embed_classes(data.class_names, templates),
    )
    embeddings = TeacherEmbeddings(teacher, data, chosen, folder, key | {"what": "images"})
    known: dict[int, tuple[int, Tensor]] = {}  # label and embedding
    skipped: set[int] = set()
    done = log.done
    todo = [index for index in chosen if index not in done]
    progress = tqdm(total=len(chosen), initial=len(chosen) - len(todo), unit="image")

    def load(index: int) -> tuple[Tensor, Tensor] | None:
        try:
            image, label = data.images[index]
            known[index] = label, embeddings[index]
            return trainer.model.preprocessing(image.convert("RGB")), known[index][1]
        except (ValueError, OSError) as error:
            progress.write(f"skipped {error}", file=sys.stderr)
            progress.update()
            skipped.add(index)
            return None

    row = partial(image_row, teacher=teacher, classes=classes, report_at=args.report_at)
    with progress:
        for indices, many, seconds in adapt_batches(trainer, todo, args.parallel, load, args.seed):
            log.append(
                row(index, *known.pop(index), adapted, seconds)
                for index, adapted in zip(indices, many, strict=True)
            )
            progress.update(len(indices))
    if len(skipped) == len(chosen):
        raise ValueError(f"{args.data_root}: none of {len(chosen)} images could be read")
    asked = set(chosen)  # a former run may have had a larger --limit
    rows = [row for row in log.rows if row["index"] in asked]
    return summarise(rows, args.report_at) | {"skipped": len(skipped)}


def step_gmacs(trainer: TestTimeTrainer) -> float:
    """Giga multiply-adds of one step, forward and backward."""
    config = trainer.model.config
    image = torch.zeros(1, 3, config.image_size, config.image_size, device=trainer.device)
    target = torch.zeros(1, config.feature_dim, device=trainer.device)
    return torch_macs(lambda: trainer.step(image, target)) / 1e9


def print_table(summary: dict, gmacs: float) -> None:
    """Teacher and student by iteration."""
    print(
        f"{summary['images']} images, {summary['skipped']} skipped; "
        f"teacher top-1 {summary['teacher_top1']:.2f} %"
    )
    print("iteration  student top-1 %  agreement %       loss  GMACs an image")
    for row in summary["iterations"]:
        print(
            f"{row['iteration']:9}  {row['student_top1']:15.2f}  {row['agreement']:11.2f}  "
            f"{row['loss']:9.2e}  {gmacs * row['iteration']:14.1f}"
        )
    print(f"{summary['seconds_per_image']:.2f} s an image")


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    load_templates(args.templates)
    if args.dataset:
        work = partial(
            run_dataset,
            data=load_dataset(
                args.dataset,
                args.data_root,
                download=args.download,
                corruption=args.corruption,
                severity=args.severity,
            ),
        )
    else:
        work = partial(run_image, image=load_image(args.input))
    teacher = load_token_teacher(args.teacher, args.teacher_weights).to(device)
    width = embed(teacher, Image.new("RGB", (64, 64)), device).shape[0]
    trainer = TestTimeTrainer(
        APM(APMConfig.tta(width, pooling=args.pooling)),
        iterations=args.iterations,
        learning_rate=args.learning_rate,
        dtype=args.dtype,
        device=device,
    )
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)
    numbers = work(args=args, trainer=trainer, teacher=teacher, output=output)
    if args.dataset:
        numbers["gmacs_per_iteration"] = step_gmacs(trainer)
    results.save(output, **numbers)
    if args.dataset:
        print_table(numbers, numbers["gmacs_per_iteration"])


if __name__ == "__main__":
    sys.exit(main())
