"""Train the small CLIP that is bundled as a teacher of test-time training.

The image tower starts from the first blocks of a ViT-Ti/16 (--teacher-weights), the text tower from
nothing. CLIP's contrast of images and sentences teaches them the class names of one data set: its
folders train and test with one folder a class, or torchvision's CIFAR-10. A run that was stopped
goes on from its last save with --resume, to the same weights as without the stop.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apm.flags import OUTPUTS, make_parser, positive_int
from apm.runtime.cli import Results, answer_flags, command

STATE = "last.pth"


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--teacher", "--teacher-weights", "--device", "--dtype", "--seed"),
        *("--batch-size", "--limit", "--data-root", "--download", "--templates", "--save-every"),
        "--resume",
        example="misc_scripts/bundled/train_clip.py --download --resume",
        output=OUTPUTS / "train_clip",
        teacher="vit_tiny_patch16_224",
        batch_size=64,
        templates="clip80",
        save_every=50,
    )
    add = partial(parser.add, "training")
    parser.add("model", "--layers", type=positive_int, default=6, help="blocks of the image tower")
    add("--steps", type=positive_int, default=800, help="batches, each of other images in an epoch")
    add("--learning-rate", type=float, default=2e-4, help="peak learning rate of AdamW")
    args = parser.parse_args(argv)
    if (args.output / STATE).exists() and not args.resume:
        raise ValueError(f"--output {args.output}: holds a run; add --resume or choose another")
    return args


answer_flags(__name__, parse)

import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_clip import ClipTrainer, new_clip, save_clip, separate_classes, start_from_vit
from tiny_clip_data import load_splits, read_pixels
from torch import Tensor
from tqdm import tqdm

from apm.checkpoint import load_tensors, save_tensors
from apm.config import TrainConfig
from apm.data.class_names import SINGLE, load_templates
from apm.data.images import Skipped, spread
from apm.data.test_sets import LabelledImages, read_batches
from apm.runtime.device import seed_everything, select_device
from apm.runtime.files import file_sha256, keep_settings, prepare_output
from apm.teachers import load_dense_teacher
from apm.token_teachers import TokenTeacher, load_token_teacher

SIZE, PATCH = 32, 4  # px


def build(
    args: Namespace,
    vit: VisionTransformer,
    class_names: Sequence[str],
    images: Tensor,
    labels: Tensor,
) -> ClipTrainer:
    """A CLIP that starts from the ViT, and what trains it."""
    templates = tuple(dict.fromkeys((*SINGLE, *load_templates(args.templates))))
    model = new_clip(image_size=SIZE, patch=PATCH, layers=args.layers)
    start_from_vit(model, vit)
    model = model.to(select_device(args.device))
    config = TrainConfig(
        batch_size=min(args.batch_size, len(images)),
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        schedule="cosine",
        warmup=50,
        dtype=args.dtype,
        seed=args.seed,
    )
    return ClipTrainer(model, images, labels, class_names, templates, config, steps=args.steps)


def settings_of(args: Namespace, trainer: ClipTrainer) -> dict[str, Any]:
    """What decides the weights: flags, but for paths, and what the trainer learns from."""
    names = ("teacher", "layers", "limit", "batch_size", "steps", "learning_rate", "dtype", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings["weights_sha256"] = args.teacher_weights and file_sha256(args.teacher_weights)
    learnt = {"images": trainer.images, "labels": trainer.labels, "sentences": trainer.tokens}
    return settings | {
        f"training {name}": hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
        for name, tensor in learnt.items()
    }


def load_state(path: Path, trainer: ClipTrainer) -> list[dict[str, float]]:
    """Go on from a run's last state. Returns the run's history until then.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        state = load_tensors(path)
        trainer.load_state_dict(state)
        return state["history"]
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not the state of this run ({error})") from error


def train(
    trainer: ClipTrainer, history: list[dict[str, float]], state: Path, save_every: int
) -> None:
    """Step until the end; add the mean loss and accuracy from save to save to the history."""
    recent, left = [], range(trainer.steps_done, trainer.steps)
    for done in tqdm(left, initial=left.start, total=trainer.steps, unit="step"):
        recent.append(trainer.step())
        if (done + 1) % save_every and done + 1 < trainer.steps:
            continue
        loss, accuracy = (sum(values) / len(recent) for values in zip(*recent, strict=True))
        history.append({"step": done + 1, "loss": loss, "accuracy": accuracy})
        tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()), sys.stdout)
        recent.clear()
        save_tensors(state, trainer.state_dict() | {"history": history})


def zero_shot(
    teacher: TokenTeacher, test: LabelledImages, limit: int | None
) -> tuple[dict[str, float], Skipped]:
    """Top-1 in per cent by choice of prompts, and the test images that cannot be read."""
    choices, skipped = ("single", "clip80"), Skipped()
    classes = [teacher.embed_classes(test.class_names, load_templates(c)) for c in choices]
    chosen = spread(len(test), limit)
    batches = read_batches(test, teacher.preprocess, chosen, 100, skipped, title="test images")
    hits, count = torch.zeros(len(choices)), 0
    for _, images, labels in batches:
        embeddings = teacher(images)
        answers = torch.stack([teacher.logits(embeddings, each).argmax(dim=1) for each in classes])
        hits += (answers == labels).sum(dim=1)
        count += len(labels)
    skipped.refuse_all(len(chosen))
    return dict(zip(choices, (100 * hits / count).tolist(), strict=True)), skipped


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    load_templates(args.templates)  # a bad file is refused before anything is made
    training, test = load_splits(args.data_root, download=args.download)
    teacher = load_dense_teacher(args.teacher, args.teacher_weights, grid_size=SIZE // PATCH)
    output = prepare_output(args.output)
    results, skipped = Results(args, device), Skipped()
    pixels, labels = read_pixels(training, SIZE, args.limit, skipped)
    seed_everything(args.seed)
    trainer = build(args, teacher.vit, training.class_names, pixels, labels)
    settings, state = settings_of(args, trainer), output / STATE
    if not state.exists():  # whatever the settings say, nothing was made with them
        (output / "settings.json").unlink(missing_ok=True)
    keep_settings(output / "settings.json", settings)
    if state.exists():
        history = load_state(state, trainer)
    else:
        history = []
        separate_classes(trainer.model, trainer.tokens, seed=args.seed)
    train(trainer, history, state, args.save_every)
    path = output / "clip_tiny.pt"
    save_clip(path, trainer.model, trainer.images[:256])
    accuracies, lost = zero_shot(load_token_teacher(str(path)), test, args.limit)
    for choice, accuracy in accuracies.items():
        print(f"zero-shot top-1, {choice}: {accuracy:.2f} %")
    results.save(
        output,
        classes=training.class_names,
        training_images=len(trainer.images),
        skipped=skipped | lost,
        teacher_sha256=settings["weights_sha256"],
        clip_sha256=file_sha256(path),
        zero_shot_top1=accuracies,
        history=history,
    )
    size = path.stat().st_size / 1e6
    print(f"{path}: {size:.2f} MB; learn from it with train_tta.py --teacher {path}")


if __name__ == "__main__":
    sys.exit(main())
