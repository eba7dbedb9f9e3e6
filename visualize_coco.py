"""Islands of agreement for a folder of photographs (COCO val2017), as a page, and their score.

For each picture a figure: input, RGB reconstruction, islands; with --teacher also the teacher's
islands in like colours and where student and teacher differ. All are in index.html, a page to
explore them in, which opens from disk. With --score, instead of figures: how well k-means islands
of student, teacher, colour and position agree with semantic masks. On a finer --grid than 32 the
student's own answers stand beside other ways to such a grid.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from apm.flags import OUTPUTS, ROOT, make_parser
from apm.runtime.cli import Results, answer_flags, command

COCO = ROOT / "data" / "coco" / "val2017"


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--checkpoint", "--input", "--output", "--teacher", "--teacher-weights"),
        *("--teacher-block", "--teacher-margin", "--grid", "--fit", "--consensus", "--device"),
        *("--dtype", "--seed", "--chunk-size", "--limit", "--method", "--joint", "--masks"),
        example="visualize_coco.py --input photographs --joint --method pca",
        input=COCO,
        output=OUTPUTS / "visualize_coco",
    )
    help = "score islands against --masks, draw nothing"
    parser.add("picture", "--score", action="store_true", help=help)
    args = parser.parse_args(argv)
    if args.score != (args.masks is not None):
        raise ValueError("--score needs --masks, a folder of masks, and --masks needs --score")
    if args.fit is None:  # a score is compared with those of other versions, which saw the crop
        args.fit = "crop" if args.score else "stretch"
    if args.input == COCO and not COCO.exists():
        raise FileNotFoundError(
            f"{COCO}: no such folder; name photographs with --input FOLDER, or fetch COCO's with "
            "./download.sh coco-val"
        )
    return args


answer_flags(__name__, parse)

import numpy as np
from matplotlib import colormaps

from apm import load_model
from apm.comparison import Colours, Look, directions, palettes, score, teacher_of
from apm.data.images import Skipped, UnreadableImage, image_names, load_images
from apm.drawing import island_row, overlay, panels, save_picture, shape_of
from apm.islands import sample_landmarks
from apm.page import Page, percept_panels, size_caption
from apm.predictor import Percept, crop_report
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import prepare_output
from apm.scores import checkerboard, mean_scores, pair_with_masks


def panels_of(
    percept: Percept, features: np.ndarray, colours: Sequence[Colours]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """One picture's panels, and its mean error where there is a teacher: ``(S, h, w, F)``."""
    shown = percept_panels(percept, colours[0](features[0]))
    if len(features) == 1:
        return shown, {}
    student, teacher = features
    error = 1 - (directions(student) * directions(teacher)).sum(axis=-1)
    shown |= {"teacher": colours[1](teacher), "error": colormaps["magma"](error / 2)[..., :3]}
    return shown, {"error": float(error.mean())}


def figure(percept: Percept, shown: Mapping[str, np.ndarray]) -> np.ndarray:
    """One picture's figure, with a second row for the teacher."""
    rows = [island_row(percept, shown["islands"])]
    if "teacher" in shown:
        rows.append(
            {
                "teacher's islands": shown["teacher"],
                "teacher's islands over input": overlay(percept.picture, shown["teacher"]),
                "error: black 0, bright opposite": shown["error"],
            }
        )
    return panels(rows, shape_of(percept.picture))


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    if args.score:
        pairs = pair_with_masks(args.input, args.masks, args.limit)
        paths = {name: image for name, (image, _) in pairs.items()}
    else:
        pairs, paths = {}, image_names(args.input, args.limit)
    model = load_model(args.checkpoint, device)
    which = (args.teacher, args.teacher_weights, args.teacher_block, args.teacher_margin)
    teacher = teacher_of(model, *which)
    look = Look(model, teacher, args.fit, args.chunk_size, args.dtype)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)

    own = model.config.grid_size
    grid = args.grid or own
    few = min(grid, own)  # t-SNE of many places would take minutes
    joint: list[Colours] = []
    if args.joint and not args.score:
        images = (image for _, image in load_images(paths, Skipped()))
        grids = (look.both(image, few, args.consensus)[1] for image in images)
        joint = palettes(sample_landmarks(grids, len(paths), args.seed), args.method, args.seed)
    title, said = "Islands of agreement", vars(args) | {"grid": grid}
    page = None if args.score else Page(output, title, said, joint=args.joint)
    scored: list[dict[str, tuple[float, float]]] = []
    repeats: list[float] = []
    crops, skipped, unscored = {}, Skipped(), list[str]()
    for name, image in load_images(paths, skipped):
        if page is None:
            try:
                found, percept = score(
                    *(look, image, pairs[name][1]), grid, args.consensus, args.seed
                )
            except UnreadableImage as error:
                skipped.add(error)
                continue
            if not found:  # masks of one class
                unscored.append(name)
                continue
            scored.append(found)
            if grid % own == 0 and grid > 2 * own:
                repeats.append(checkerboard(percept.features, grid // own))
        else:
            percept, features = look.both(image, grid, args.consensus)
            if not (colours := joint):
                landmarks = features
                if args.method == "tsne" and grid > few:
                    _, landmarks = look.both(image, few, args.consensus)
                colours = palettes(landmarks, args.method, args.seed)
            shown, errors = panels_of(percept, features, colours)
            save_picture(output / f"{name}.png", figure(percept, shown))
            caption = size_caption(image.size, percept.left_out)
            models = dict(zip(("student", "teacher"), features, strict=False))
            page.add(name, shown, models, caption, errors)
        crops[name] = percept.left_out
    scores = mean_scores(scored)
    if args.score and not scores:
        raise ValueError(f"{args.masks}: no mask has two classes of a hundredth of the picture")
    results.save(
        output,
        images=len(crops),
        skipped=skipped,
        unscored=unscored,
        teacher=teacher and teacher.description(),
        scores=scores,
        checkerboard=float(np.mean(repeats)) if repeats else None,
        left_out={name: shares for name, shares in crops.items() if shares},
        page_cosine_error=page.save() if page else {},
    )
    if line := crop_report(crops):
        print(line)
    for name, row in scores.items():
        ari, gain = f"{row['ari']:.3f}", f"{row['gain']:+.3f}"
        if "ari_error" in row:
            ari, gain = f"{ari} +- {row['ari_error']:.3f}", f"{gain} +- {row['gain_error']:.3f}"
        print(f"{name:24} ARI {ari} ({gain})  NMI {row['nmi']:.3f}")
    if scores:
        alone = f", {len(unscored)} more whose masks have one class" if unscored else ""
        print(f"{row['images']} images{alone}; in brackets the difference to the student's, paired")
    if repeats:
        print(f"checkerboard of the student's own grid: {np.mean(repeats):.2f} (1: none)")
    if page:
        print(page)
    more = f"; to explore, open {output / 'index.html'}" if page else "; scores in results.json"
    print(f"{output}: {len(crops)} images, {len(skipped)} skipped{more}")


if __name__ == "__main__":
    sys.exit(main())
