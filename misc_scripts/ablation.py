"""What matters in a small APM: one change a row, each trained and scored alike.

A row is a short run of train.py from random weights, then the mean ARI of its k-means islands
against semantic masks. --stores holds one feature store for each of the teacher's blocks that rows
ask for, made by 1_extract_coco_features.py and named after it: 4, 8 and 11 for all rows. Give the
command again after an interruption: a row that was trained is only scored again.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import train
from torch import Tensor, nn

from apm import APM, APMConfig
from apm.cli import OUTPUTS, Results, command, make_parser, seed_everything, select_device
from apm.data import image_names, load_images, load_labels
from apm.files import prepare_output
from apm.percept import perceive
from apm.scores import island_scores, location_labels
from apm.teachers import DenseTeacher, load_dense_teacher

BASE = (
    "--epochs 3 --batch-size 16 --locations 256 --null-share 0.25 --learning-rate 1.2e-3 "
    "--warmup 50 --weight-decay 0.05 --schedule cosine --rgb-weight 10 --augment "
    "--dtype bfloat16 --feature-loss relational --validation-images 64"
)
VALIDATION_IMAGES = 64  # of BASE
BLOCK = "4"
CLS_ROW = "column from the teacher's CLS token"
# Row: the teacher's block, and flags that differ from BASE.
ROWS: dict[str, tuple[str, str]] = {
    "base": (BLOCK, ""),
    "no local patch": (BLOCK, "--local-width 0"),
    "local patch of 14 px": (BLOCK, "--local-blocks 0,0"),
    "local patch of 98 px": (BLOCK, "--local-blocks 2,2"),
    CLS_ROW: (BLOCK, ""),
    "loss: mse": (BLOCK, "--feature-loss mse"),
    "loss: standardised": (BLOCK, "--feature-loss standardised"),
    "a quarter of the images, as many steps": (BLOCK, "--limit {quarter} --epochs 12"),
    "teacher block 8": ("8", ""),
    "teacher block 11, the last": ("11", ""),
    "trunk 384-256-256": (BLOCK, "--trunk-widths 384,256,256"),
    "trunk 1536-1024-1024": (BLOCK, "--trunk-widths 1536,1024,1024"),
}


class TokenFold(nn.Module):
    """The paper's T_vit: the column is a linear map of a frozen ViT's CLS token."""

    def __init__(self, teacher: DenseTeacher, column_dim: int) -> None:
        super().__init__()
        self.teacher = [teacher]  # in a list: no part of what is trained or saved
        self.linear = nn.Linear(teacher.feature_dim, column_dim)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, H)`` RGB in [0, 1] -> ``(B, column_dim)``."""
        teacher = self.teacher[0]
        side = teacher.grid_size * teacher.vit.patch_embed.patch_size[0]
        with torch.no_grad():
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            tokens = teacher.vit.forward_features((images - teacher.mean) / teacher.std)
        return self.linear(tokens[:, 0])


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--input", "--output", "--teacher", "--teacher-weights", "--device", "--workers"),
        input=OUTPUTS / "resized",
        output=OUTPUTS / "ablation",
        teacher="vit_tiny_patch16_224",
    )
    add = parser.add_argument
    add("--stores", type=Path, default=OUTPUTS / "stores", help="folder of feature stores")
    add("--scored", type=Path, required=True, help="images to score on")
    add("--masks", type=Path, required=True, help="their semantic masks, PNG of class ids")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to change", metavar="ROW")
    return parser.parse_args(argv)


def train_row(name: str, args: Namespace, device: torch.device) -> APM:
    """The model of one row."""
    block, changes = ROWS[name]
    folder = "".join(letter if letter.isalnum() else "_" for letter in name)
    images = len(image_names(args.input)) - VALIDATION_IMAGES
    changes = changes.format(quarter=images // 4 + VALIDATION_IMAGES)
    flags = [*BASE.split(), *changes.split(), "--resume", "--device", str(device)]
    flags += ["--workers", str(args.workers), "--input", str(args.input)]
    flags += ["--features", str(args.stores / block), "--output", str(args.output / folder)]
    fold = None
    seed_everything(0)
    if name == CLS_ROW:
        teacher = load_dense_teacher(args.teacher, args.teacher_weights, grid_size=14)
        fold = TokenFold(teacher.to(device), APMConfig.small().column_dim).to(device)
    run = train.build(train.parse(flags), device, fold)
    run.train()
    return run.trainer.model.eval()


def score(model: APM, args: Namespace) -> dict[str, float]:
    """Mean ARI and NMI over the images that have a mask of at least two classes."""
    masks = image_names(args.masks)
    paths = {name: path for name, path in image_names(args.scored).items() if name in masks}
    if not paths:
        raise ValueError(f"{args.masks}: no mask is named as an image of {args.scored}")
    scored = []
    for name, image in load_images(paths, {}):
        labels = model.preprocessing.labels(load_labels(masks[name]))
        labels = location_labels(labels, model.config.patch_size)
        features = perceive(model, image).features.reshape(len(labels), -1)
        if (values := island_scores(features, labels)) is not None:
            scored.append(values)
    ari, nmi = np.mean(scored, axis=0).tolist()
    return {"ari": ari, "nmi": nmi, "images": len(scored)}


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    output = prepare_output(args.output)
    results = Results(args, device)
    rows: dict[str, dict[str, Any]] = {}
    for name in args.rows:
        rows[name] = score(train_row(name, args, device), args)
        results.save(output, rows=rows)
        print(f"{name:40} ARI {rows[name]['ari']:.3f}  NMI {rows[name]['nmi']:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
