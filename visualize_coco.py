"""Islands of agreement for a folder of photographs (COCO val2017), as a gallery, and their score.

For each picture a figure: input, RGB reconstruction, islands; with --teacher also the teacher's
islands in like colours and where student and teacher differ. With --score, instead of figures:
how well k-means islands of student, teacher, colour and position agree with semantic masks.
"""

import sys
from argparse import Namespace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps

from apm import APM, load_model
from apm.data.images import Skipped, UnreadableImage, image_names, load_images
from apm.drawing import island_row, overlay, panels, save_gallery, save_picture
from apm.islands import METHODS, island_colours, island_series
from apm.losses import rgb_targets
from apm.predictor import Percept, crop_report, perceive
from apm.preprocessing import to_pixels
from apm.runtime.cli import OUTPUTS, Results, command, make_parser
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import ROOT, prepare_output
from apm.scores import island_scores, mask_labels, mean_scores, pair_with_masks
from apm.teachers import DenseTeacher, load_dense_teacher

COCO = ROOT / "data" / "coco" / "val2017"


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--teacher", "--teacher-weights"),
        *("--teacher-block", "--teacher-margin", "--device", "--dtype", "--seed", "--chunk-size"),
        "--limit",
        input=COCO,
        output=OUTPUTS / "visualize_coco",
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="tsne", help="how islands are coloured")
    add("--masks", type=Path, help="folder of semantic masks, PNG of class ids named as the images")
    add("--score", action="store_true", help="score islands against --masks, draw nothing")
    args = parser.parse_args(argv)
    if args.score and args.masks is None:
        raise ValueError("--score needs --masks: a folder of semantic masks")
    if args.input == COCO and not COCO.exists():
        raise FileNotFoundError(
            f"{COCO}: no such folder; name photographs with --input FOLDER, or fetch COCO's with "
            "./download.sh coco-val"
        )
    return args


def build_teacher(args: Namespace, model: APM, device: torch.device) -> DenseTeacher | None:
    """The teacher that the flags name; block and margin default to those of the checkpoint."""
    trained = model.provenance.get("teacher")
    trained = trained if isinstance(trained, dict) else {}
    name = args.teacher or (args.teacher_weights and trained.get("teacher"))
    if not name:
        return None
    known = trained if trained.get("teacher") == name else {}
    teacher = load_dense_teacher(
        name,
        args.teacher_weights,
        grid_size=model.config.grid_size,
        block=known.get("block", -1) if args.teacher_block is None else args.teacher_block,
        margin=known.get("margin", 0) if args.teacher_margin is None else args.teacher_margin,
    )
    if teacher.feature_dim != model.config.feature_dim:
        raise ValueError(
            f"teacher {name!r} has features of width {teacher.feature_dim}, the checkpoint answers "
            f"{model.config.feature_dim}: name the teacher that it learnt from"
        )
    return teacher.to(device)


def directions(features: np.ndarray) -> np.ndarray:
    """``(S, h, w, F)`` -> every grid centred, every location of length 1: students' are shorter."""
    centred = features - features.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)


def figure(percept: Percept, teacher: np.ndarray | None, method: str, seed: int) -> np.ndarray:
    """One picture's figure, with a second row for the teacher's features ``(h, w, F)``."""
    features = np.stack([percept.features] if teacher is None else [percept.features, teacher])
    if method == "tsne":
        colours = island_series(features, seed=seed)
    else:
        comparable = features if teacher is None else directions(features)
        colours = island_colours(comparable, method, seed)
    rows = [island_row(percept, colours[0])]
    if teacher is not None:
        one, other = directions(features)
        cosine = (one * other).sum(axis=-1)
        rows.append(
            {
                "teacher's islands": colours[1],
                "teacher's islands over input": overlay(percept.picture, colours[1]),
                "error: black 0, bright opposite": colormaps["magma"]((1 - cosine) / 2)[..., :3],
            }
        )
    return panels(rows)


def score(
    features: dict[str, np.ndarray], labels: np.ndarray, seed: int
) -> dict[str, tuple[float, float]]:
    """ARI and NMI of each kind of features; empty if the labels are of one class only."""
    scores = {name: island_scores(points, labels, seed) for name, points in features.items()}
    return {name: values for name, values in scores.items() if values is not None}


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    if args.score:
        pairs = dict(islice(pair_with_masks(args.input, args.masks).items(), args.limit))
        paths = {name: image for name, (image, _) in pairs.items()}
    else:
        pairs, paths = {}, image_names(args.input, args.limit)
    model = load_model(args.checkpoint, device)
    teacher = build_teacher(args, model, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    look = partial(perceive, model, chunk_size=args.chunk_size, dtype=args.dtype)
    patch_size, positions = model.config.patch_size, model.grid_positions().cpu().numpy()
    scored: list[dict[str, tuple[float, float]]] = []
    crops, skipped = {}, Skipped()
    for name, image in load_images(paths, skipped):
        percept = look(image)
        features = {"student": percept.features}
        if args.score and model.config.local_width:
            features["column alone"] = look(image, local=False).features
        pixels = to_pixels(percept.picture)[None] / 255  # (1, 3, H, H)
        if teacher is not None:
            answers = teacher(pixels.to(device))[0].cpu().numpy()  # (N, F)
            features["teacher"] = answers.reshape(percept.features.shape)
        if args.score:
            try:
                labels = mask_labels(pairs[name][1], model.preprocessing, patch_size)
            except UnreadableImage as error:
                skipped.add(error)
                continue
            features["colour"] = rgb_targets(pixels, patch_size)[0].numpy()
            scored.append(score(features | {"position": positions}, labels, args.seed))
        else:
            picture = figure(percept, features.get("teacher"), args.method, args.seed)
            save_picture(output / f"{name}.png", picture)
        crops[name] = percept.left_out
    scores = mean_scores(scored)
    if args.score and not scores:
        raise ValueError(f"{args.masks}: no mask has two classes with 10 locations each")
    results.save(
        output,
        images=len(crops),
        skipped=skipped,
        scores=scores,
        left_out={name: shares for name, shares in crops.items() if shares},
    )
    if line := crop_report(crops):
        print(line)
    if not args.score:
        figures = [Path(f"{name}.png") for name in crops]
        save_gallery(output / "index.html", "Islands of agreement", figures)
        print(output / "index.html")
    if skipped:
        print(f"{len(crops)} images, {len(skipped)} skipped")
    for name, row in scores.items():
        print(f"{name:13} ARI {row['ari']:.3f}  NMI {row['nmi']:.3f}  ({row['images']} images)")


if __name__ == "__main__":
    sys.exit(main())
