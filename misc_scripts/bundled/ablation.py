"""What matters in a small APM: one change a row, each trained and scored alike.

A row is a short run of train.py from random weights, then the mean ARI of its k-means islands
against semantic masks. --stores holds one feature store for each of the teacher's blocks that rows
ask for, made by 1_extract_coco_features.py and named after it: 4, 8 and 11 for all rows. Give the
command again after an interruption: a row that was trained is only scored again. results.json keeps
the rows of former calls.
"""

import re
import sys
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from apm.config import APMConfig, TrainConfig
from apm.flags import OUTPUTS, make_parser, take_fields
from apm.runtime.cli import Results, answer_flags, command

VALIDATION_IMAGES = 64
BASE = (
    "--epochs 3 --batch-size 16 --locations 256 --null-share 0.25 --learning-rate 1.2e-3 "
    "--warmup 50 --weight-decay 0.05 --schedule cosine --rgb-weight 10 --fold-rate 0.1 --augment "
    f"--dtype bfloat16 --feature-loss relational --validation-images {VALIDATION_IMAGES}"
)
SHAPE = APMConfig.small()


@dataclass(frozen=True)
class Row:
    """One change.

    Attributes:
        flags: of train.py, that differ from ``BASE``.
        shape: what differs from ``SHAPE``.
        block: the teacher's block that is learnt.
    """

    flags: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    block: str = "4"


CLS_ROW = "column from the teacher's CLS token"
ROWS = {
    "base": Row(),
    "no local patch": Row(shape={"local_width": 0}),
    "local patch of 14 px": Row(shape={"local_blocks": (0, 0)}),
    "local patch of 98 px": Row(shape={"local_blocks": (2, 2)}),
    CLS_ROW: Row("--fold-rate 1"),
    "loss: mse": Row("--feature-loss mse"),
    "loss: standardised": Row("--feature-loss standardised"),
    "a quarter of the images, as many steps": Row("--limit {quarter} --epochs 12"),
    "teacher block 8": Row(block="8"),
    "teacher block 11, the last": Row(block="11"),
    "trunk 384-256-256": Row(shape={"trunk_widths": (384, 256, 256)}),
    "trunk 1536-1024-1024": Row(shape={"trunk_widths": (1536, 1024, 1024)}),
}


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--device", "--workers"),
        required=["--masks"],
        example="misc_scripts/bundled/ablation.py --scored photographs --masks masks --rows base",
        input=OUTPUTS / "resized",
        output=OUTPUTS / "ablation",
        teacher="vit_tiny_patch16_224",
    )
    add = partial(parser.add, "input and output")
    stores = "folder of feature stores, each named by its teacher's block"
    add("--stores", type=Path, default=OUTPUTS / "stores", help=stores)
    add("--scored", type=Path, required=True, help="folder of the images to score on, with --masks")
    rows = {"nargs": "+", "choices": ROWS, "default": list(ROWS), "metavar": "ROW"}
    parser.add("training", "--rows", help="what to change, each in quotes", **rows)
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import torch
from thumbnail import start_as_thumbnail
from token_fold import TokenFold
from torch import nn

from apm import APM
from apm.data.features import open_store
from apm.data.images import Skipped, file_sizes, image_names, load_images
from apm.predictor import perceive
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import (
    file_sha256,
    keep_settings,
    listing_sha256,
    prepare_output,
    read_json,
)
from apm.scores import island_scores, mask_labels, mean_scores, pair_with_masks
from apm.teachers import load_dense_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where train.py is
import train
from training_run import load_inputs


def train_row(name: str, args: Namespace, device: torch.device) -> APM:
    """The model of one row."""
    row = ROWS[name]
    store = args.stores / row.block
    images = len(image_names(args.input).keys() & open_store(store).sizes.keys())
    quarter = (images - VALIDATION_IMAGES) // 4 + VALIDATION_IMAGES
    flags = [*BASE.split(), *row.flags.format(quarter=quarter).split(), "--resume"]
    flags += ["--workers", str(args.workers), "--input", str(args.input), "--features", str(store)]
    flags += ["--output", str(args.output / re.sub(r"\W", "_", name))]

    def new_model(_: Namespace, source: dict[str, Any]) -> APM:
        model = APM(replace(SHAPE, feature_dim=source["feature_dim"], **row.shape))
        if name != CLS_ROW:
            start_as_thumbnail(model)
            return model
        teacher = load_dense_teacher(args.teacher, args.teacher_weights, grid_size=14).to(device)
        model.fold = TokenFold(teacher, model)
        last: Any = model.rgb_head[-1]
        nn.init.constant_(last.bias, 0.5)  # grey: its ReLU would never learn from zero
        return model

    run = train.parse(flags)
    config = take_fields(TrainConfig, run)
    seed_everything(config.seed)
    inputs = load_inputs(run, config, device, new_model)
    train.train(inputs, run, config)
    return inputs.model.eval()


def score(model: APM, pairs: dict[str, tuple[Path, Path]]) -> dict[str, float]:
    """Mean ARI and NMI over the images whose masks have at least two classes.

    Raises:
        ValueError: if there is none.
    """
    scored = []
    for name, image in load_images({name: path for name, (path, _) in pairs.items()}, Skipped()):
        features = perceive(model, image).features
        mask = mask_labels(pairs[name][1], image.size, model.preprocessing, len(features))
        if (values := island_scores(features, mask)) is not None:
            scored.append({"student": values})
    if not scored:
        raise ValueError("--masks: no mask has two classes of a hundredth of the picture")
    return mean_scores(scored)["student"]


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    pairs = pair_with_masks(args.scored, args.masks)
    for block in sorted({ROWS[name].block for name in args.rows}):
        open_store(args.stores / block)  # all of them, before hours of training
    output = prepare_output(args.output)
    scored = file_sizes({str(path): path for pair in pairs.values() for path in pair})
    settings = {
        "scored images and masks": listing_sha256(scored),
        "teacher": args.teacher,
        "weights_sha256": args.teacher_weights and file_sha256(args.teacher_weights),
    }
    keep_settings(output / "settings.json", settings)
    path, results = output / "results.json", Results(args, device)
    rows = read_json(path).get("rows", {}) if path.exists() else {}
    for name in args.rows:
        rows[name] = score(train_row(name, args, device), pairs)
        results.save(output, rows=rows)
        print(f"{name:40} ARI {rows[name]['ari']:.3f}  NMI {rows[name]['nmi']:.3f}", flush=True)
    print(f"{path}; a row's checkpoint is in its folder beside it")


if __name__ == "__main__":
    sys.exit(main())
