"""Train the small CLIP that is bundled as a teacher of test-time training.

The image tower starts from the first blocks of a ViT-Ti/16 (--teacher-weights), the text tower from
nothing. CLIP's contrast of images and sentences teaches them the class names of one data set: its
folders train and test with one folder a class, or torchvision's CIFAR-10. A run that was stopped
goes on from its last save with --resume, to the same weights as without the stop.
"""

import hashlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from apm.data.prompts import SINGLE, load_templates
from apm.run import STATE, load_state, refuse_a_second_run
from timm.models.vision_transformer import VisionTransformer
from tiny_clip import ClipTrainer, new_clip, normalise, separate_classes, start_from_vit
from torch import Tensor
from tqdm import tqdm

from apm.checkpoint import save_tensors
from apm.data.test_sets import LabelledImages, load_splits, spread
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
from apm.runtime.files import file_sha256, prepare_output
from apm.teachers import load_dense_teacher
from apm.token_teachers import TokenTeacher, load_token_teacher

SIZE, PATCH = 32, 4  # px


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--teacher", "--teacher-weights", "--device", "--dtype", "--seed"),
        *("--batch-size", "--limit"),
        output=OUTPUTS / "train_clip",
        teacher="vit_tiny_patch16_224",
        batch_size=64,
    )
    add = parser.add_argument
    add("--data-root", type=Path, default=ROOT / "data", help="folder of the data set")
    add("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    add("--templates", default="clip80", help="prompts besides a photo of a {}: clip80 or a file")
    add("--layers", type=positive_int, default=6, help="blocks of the image tower")
    add("--steps", type=positive_int, default=800, help="batches, each of other images in an epoch")
    add("--learning-rate", type=float, default=2e-4, help="peak learning rate")
    add("--save-every", type=positive_int, default=50, help="steps from save to save")
    add("--resume", action="store_true", help="go on from --output's last state, if there is one")
    args = parser.parse_args(argv)
    refuse_a_second_run(args.output, args.resume)
    return args


def pixels(data: LabelledImages, limit: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, SIZE, SIZE)`` uint8 RGB and labels ``(N,)``; with a limit, spread evenly."""
    images, labels = [], []
    for index in tqdm(spread(len(data.images), limit), desc=name, unit="image"):
        image, label = data.images[index]
        image = image.convert("RGB").resize((SIZE, SIZE))
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
        labels.append(label)
    stacked = torch.stack(images).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2)
    return stacked.contiguous(), torch.tensor(labels)


def build(args: Namespace, training: LabelledImages, vit: VisionTransformer) -> ClipTrainer:
    """A CLIP that starts from the ViT, and what trains it."""
    templates = tuple(dict.fromkeys((*SINGLE, *load_templates(args.templates))))
    model = new_clip(image_size=SIZE, patch=PATCH, layers=args.layers)
    start_from_vit(model, vit)
    images, labels = pixels(training, args.limit, "training images")
    return ClipTrainer(
        model.to(select_device(args.device)),
        images,
        labels,
        training.class_names,
        templates,
        steps=args.steps,
        batch_size=min(args.batch_size, len(images)),
        learning_rate=args.learning_rate,
        dtype=args.dtype,
        seed=args.seed,
    )


def run_settings(args: Namespace, trainer: ClipTrainer) -> dict[str, Any]:
    """What decides the weights: flags, but for paths, and what the trainer learns from."""
    names = ("teacher", "layers", "limit", "batch_size", "steps", "learning_rate", "dtype", "seed")
    learnt = {"images": trainer.images, "labels": trainer.labels, "sentences": trainer.tokens}
    settings = {name: getattr(args, name) for name in names}
    settings["weights_sha256"] = args.teacher_weights and file_sha256(args.teacher_weights)
    return settings | {
        f"training {name}": hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
        for name, tensor in learnt.items()
    }


def train(
    trainer: ClipTrainer,
    history: list[dict[str, float]],
    output: Path,
    settings: dict[str, Any],
    save_every: int,
) -> None:
    """Step until the end; add the mean loss and accuracy from save to save to the history."""
    recent = []
    with tqdm(total=trainer.steps, initial=trainer.step_index, unit="step") as progress:
        while trainer.step_index < trainer.steps:
            recent.append(trainer.step())
            progress.update()
            if trainer.step_index % save_every and trainer.step_index < trainer.steps:
                continue
            loss, accuracy = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            history.append({"step": trainer.step_index, "loss": loss, "accuracy": accuracy})
            progress.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()), sys.stdout)
            recent.clear()
            state = {"history": history, "settings": settings}
            save_tensors(output / STATE, trainer.state_dict() | state)


def zero_shot(teacher: TokenTeacher, test: LabelledImages, limit: int | None, choice: str) -> float:
    """Top-1 in per cent on the test images, by the path that every CLIP teacher takes."""
    classes = teacher.embed_classes(test.class_names, load_templates(choice))
    chosen, hits = torch.tensor(spread(len(test.images), limit)), 0
    for part in tqdm(chosen.split(100), desc=f"test, {choice}", unit="batch"):
        images, labels = zip(*(test.images[index] for index in part.tolist()), strict=True)
        batch = torch.stack([teacher.preprocess(image.convert("RGB")) for image in images])
        predictions = teacher.logits(teacher(batch), classes).argmax(dim=1)
        hits += int((predictions == torch.tensor(labels)).sum())
    return 100 * hits / len(chosen)


@torch.no_grad()
def save_clip(path: Path, trainer: ClipTrainer) -> None:
    """A state dict in half precision, which ``clip.load`` reads.

    Embeddings of images are brought to about unit length, where a mean squared error compares with
    the paper's; cosines, which are all that CLIP is about, do not notice.
    """
    state = trainer.model.state_dict()
    sample = normalise(trainer.images[:256].to(trainer.device))
    length = trainer.model.encode_image(sample).norm(dim=-1).mean()
    state["visual.proj"] = state["visual.proj"] / length
    save_tensors(path, {name: value.half().cpu() for name, value in state.items()})


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    load_templates(args.templates)  # a bad file is refused before anything is made
    training, test = load_splits(args.data_root, download=args.download)
    teacher = load_dense_teacher(args.teacher, args.teacher_weights, grid_size=SIZE // PATCH)
    output = prepare_output(args.output)
    results = Results(args, device)
    seed_everything(args.seed)
    trainer = build(args, training, teacher.vit)
    settings = run_settings(args, trainer)
    history = load_state(output / STATE, settings, trainer.load_state_dict)
    if not history:
        separate_classes(trainer.model, trainer.tokens, seed=args.seed)
    train(trainer, history, output, settings, args.save_every)
    path = output / "clip_tiny.pt"
    save_clip(path, trainer)
    made = load_token_teacher(str(path))
    accuracies = {c: zero_shot(made, test, args.limit, c) for c in ("single", "clip80")}
    for choice, accuracy in accuracies.items():
        print(f"zero-shot top-1, {choice}: {accuracy:.2f} %")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    results.save(
        output,
        classes=training.class_names,
        training_images=len(trainer.images),
        teacher_sha256=settings["weights_sha256"],
        clip_sha256=file_sha256(path),
        zero_shot_top1=accuracies,
        history=history,
    )


if __name__ == "__main__":
    sys.exit(main())
