"""Islands of agreement for a folder of photographs (COCO val2017), as a gallery, and their score.

For each picture a figure: input, RGB reconstruction, islands; with --teacher also the teacher's
islands in like colours and where student and teacher differ. With --score, instead of figures:
how well k-means islands of student, teacher, colour and position agree with semantic masks.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apm import APM, load_model
from apm.data.images import image_names, load_images
from apm.drawing import heat_map, overlay, panels, save_gallery, save_picture
from apm.island_figures import island_row
from apm.islands import island_colours, island_series
from apm.losses import rgb_targets
from apm.predictor import perceive
from apm.preprocessing import to_pixels
from apm.runtime.cli import (
    OUTPUTS,
    ROOT,
    Results,
    command,
    make_parser,
    seed_everything,
    select_device,
)
from apm.runtime.files import prepare_output
from apm.scores import island_scores, mask_labels, mean_scores, pair_with_masks
from apm.teachers import DenseTeacher, load_dense_teacher


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--teacher", "--teacher-weights"),
        *("--teacher-block", "--teacher-margin", "--device", "--dtype", "--seed", "--chunk-size"),
        *("--limit", "--method"),
        input=ROOT / "data" / "coco" / "val2017",
        output=OUTPUTS / "visualize_coco",
    )
    add = parser.add_argument
    add("--masks", type=Path, help="folder of semantic masks, PNG of class ids named as the images")
    add("--score", action="store_true", help="score islands against --masks, draw nothing")
    args = parser.parse_args(argv)
    if args.score and args.masks is None:
        raise ValueError("--score needs --masks: a folder of semantic masks")
    return args


def build_teacher(args: Namespace, model: APM, device: torch.device) -> DenseTeacher | None:
    """The teacher that the flags name; block and margin default to those of the checkpoint."""
    trained = model.provenance.get("teacher")
    kinds = {"teacher": str, "block": int, "margin": int}
    if not isinstance(trained, dict) or not all(
        isinstance(trained.get(name), kind) for name, kind in kinds.items()
    ):
        trained = {}  # a file may say anything
    name = args.teacher or (args.teacher_weights and trained.get("teacher"))
    if not name:
        return None
    known = trained if trained.get("teacher") == name else {}
    block = known.get("block", -1) if args.teacher_block is None else args.teacher_block
    margin = known.get("margin", 0) if args.teacher_margin is None else args.teacher_margin
    teacher = load_dense_teacher(
        name,
        args.teacher_weights,
        grid_size=model.config.grid_size,
        block=block,
        margin=margin,
    )
    if teacher.feature_dim != model.config.feature_dim:
        raise ValueError(
            f"teacher {name!r} has features of width {teacher.feature_dim}, the checkpoint answers "
            f"{model.config.feature_dim}: name the teacher that it learnt from"
        )
    return teacher.to(device)


def features_of(
    image: Image.Image, model: APM, teacher: DenseTeacher | None, args: Namespace
) -> dict[str, np.ndarray]:
    """One picture's ``(h, w, C)`` arrays: student, teacher, colour, position; and the picture."""
    percept = perceive(model, image, chunk_size=args.chunk_size, dtype=args.dtype)
    pixels = to_pixels(model.preprocessing.picture(image))[None] / 255  # (1, 3, H, W)
    side = model.config.grid_size
    arrays = {
        "picture": percept.picture,
        "rgb": percept.rgb,
        "student": percept.features,
        "colour": rgb_targets(pixels, model.config.patch_size).view(side, side, 3).numpy(),
        "position": model.grid_positions().cpu().numpy().reshape(side, side, 2),
    }
    if args.score and model.config.local_width:
        alone = perceive(model, image, chunk_size=args.chunk_size, dtype=args.dtype, local=False)
        arrays["column alone"] = alone.features
    if teacher is not None:
        answers = teacher(pixels.to(teacher.mean.device))[0]
        arrays["teacher"] = answers.unflatten(0, (side, side)).cpu().numpy()
    return arrays


def directions(features: np.ndarray) -> np.ndarray:
    """``(S, h, w, F)`` -> every grid centred, every location of length 1: students' are shorter."""
    centred = features - features.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)


def draw(arrays: dict[str, np.ndarray], args: Namespace, path: Path) -> None:
    """One picture's figure."""
    names = [name for name in ("student", "teacher") if name in arrays]
    features = np.stack([arrays[name] for name in names])
    if args.method == "tsne":
        colours = island_series(features, seed=args.seed)
    else:
        comparable = directions(features) if "teacher" in arrays else features
        colours = island_colours(comparable, args.method, args.seed)
    rows = [island_row(arrays["picture"], colours[0], arrays["rgb"])]
    if "teacher" in arrays:
        student, teacher = directions(features)
        cosine = (student * teacher).sum(axis=-1)
        rows.append(
            {
                "teacher's islands": colours[1],
                "teacher's islands over input": overlay(arrays["picture"], colours[1]),
                "error: black 0, bright opposite": heat_map((1 - cosine) / 2),
            }
        )
    save_picture(path, panels(rows))


def score(arrays: dict[str, np.ndarray], mask: Path, model: APM, seed: int) -> dict:
    """ARI and NMI of every kind of feature on one picture; empty if its mask has one class."""
    labels = mask_labels(mask, model)
    rows = {}
    for name in ("student", "column alone", "teacher", "colour", "position"):
        if name in arrays:
            points = arrays[name].reshape(len(labels), -1)
            if (values := island_scores(points, labels, seed)) is not None:
                rows[name] = values
    return rows


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    masks: dict[str, Path] = {}
    if args.score:
        pairs = list(pair_with_masks(args.input, args.masks).items())[: args.limit]
        paths = {name: image for name, (image, _) in pairs}
        masks = {name: mask for name, (_, mask) in pairs}
    else:
        paths = image_names(args.input, args.limit)
    model = load_model(args.checkpoint, device)
    teacher = build_teacher(args, model, device)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    figures, scored = [], []
    skipped: dict[str, str] = {}
    for name, image in load_images(paths, skipped):
        arrays = features_of(image, model, teacher, args)
        if args.score:
            scored.append(score(arrays, masks[name], model, args.seed))
        else:
            figures.append(Path(f"{name}.png"))
            draw(arrays, args, output / figures[-1])
    scores = mean_scores(scored)
    if args.score and not scores:
        raise ValueError(f"{args.masks}: no mask has two classes with 10 locations each")
    results.save(output, images=len(paths) - len(skipped), skipped=skipped, scores=scores)
    if figures:
        save_gallery(output / "index.html", "Islands of agreement", figures)
        print(output / "index.html")
    if skipped:
        print(f"{len(paths) - len(skipped)} images, {len(skipped)} skipped")
    for name, row in scores.items():
        print(f"{name:13} ARI {row['ari']:.3f}  NMI {row['nmi']:.3f}  ({row['images']} images)")


if __name__ == "__main__":
    sys.exit(main())
