"""The methods that a test set is evaluated with, and what one image costs each of them."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from evaluation import image_row
from PIL import Image
from torch import Tensor

from apm import APM
from apm.data.class_names import load_templates
from apm.data.images import Skipped
from apm.data.test_sets import LabelledImages, read_batches
from apm.peers import CONTEXT, TPT, make_views, zero_vote
from apm.runtime.device import multiply_adds, peak_bytes
from apm.token_teachers import ClipTeacher, TokenTeacher
from apm.tta import Adaptation, TestTimeTrainer

PEER_COLUMNS = ("index", "label", "prediction", "seconds")
Answer = Callable[[Tensor], int]  # of views (V, 3, h, h): a class
Cost = dict[str, float]  # of one image: GMACs, peak_GB, seconds
BLANK, REPEATS = Image.new("RGB", (64, 64)), 3  # what costs are measured with


def make_peer(
    method: str, teacher: TokenTeacher, class_names: Sequence[str], classes: Tensor
) -> Answer:
    """How TPT or ZERO answers.

    Args:
        classes: the teacher's embeddings of the class names, which ZERO compares with.

    Raises:
        ValueError: if the method is TPT and the teacher has no text tower.
    """
    device = next(teacher.parameters()).device
    if method == "zero":
        classes = classes.to(device)
        # Which views are confident depends on the temperature: a CLIP's own, as in both papers.
        scale = teacher.clip.logit_scale.exp() / 100 if isinstance(teacher, ClipTeacher) else 1
        return lambda views: zero_vote(scale * teacher.logits(teacher(views.to(device)), classes))
    if not isinstance(teacher, ClipTeacher) or not hasattr(teacher.clip, "token_embedding"):
        raise ValueError(
            f"--method tpt: {teacher.identity['teacher']!r} has no prompts to tune; give a CLIP, "
            "or leave tpt out"
        )
    prompts = teacher.tokenize([f"{CONTEXT} {name}" for name in class_names])
    tpt = TPT(teacher.clip, prompts.to(device))
    return lambda views: int(tpt.adapt(views.to(device)).argmax())


def run_peer(
    answer: Answer,
    teacher: TokenTeacher,
    data: LabelledImages,
    todo: Sequence[int],
    skipped: Skipped,
    seed: int,
    workers: int,
    title: str,
) -> Iterator[dict[str, float]]:
    """A row of ``PEER_COLUMNS`` an image; its seconds leave out reading and cutting views."""
    prepare = partial(make_views, preprocess=teacher.preprocess, seed=seed)
    for [index], [views], [label] in read_batches(
        data, prepare, todo, 1, skipped, workers, title=title
    ):
        started = time.perf_counter()
        prediction = answer(views)
        seconds = round(time.perf_counter() - started, 4)
        yield {"index": index, "label": int(label), "prediction": prediction, "seconds": seconds}


def adapt_each(
    trainer: TestTimeTrainer,
    images: Tensor,
    targets: Tensor,
    seeds: Sequence[int],
    report_at: Sequence[int],
) -> list[Adaptation]:
    """A new student for each image; a single one is faster without stacked weights."""
    if len(seeds) > 1:
        return trainer.adapt_many(images, targets, seeds, report_at)
    trainer.reset(seeds[0])
    return [trainer.adapt(images[0], targets[0], pooled_at=report_at)]


def teacher_classes(
    teacher: TokenTeacher, class_names: Sequence[str], templates: str, beside_peers: bool
) -> dict[str, Tensor]:
    """What the teacher alone compares with: the run's prompts; beside peers CLIP's 1 and 80, too.

    The run's come first.
    """
    prompts = [templates]
    if isinstance(teacher, ClipTeacher) and beside_peers:
        prompts += [choice for choice in ("single", "clip80") if choice != templates]
    return {
        f"teacher, {choice}": teacher.embed_classes(class_names, load_templates(choice)).cpu()
        for choice in prompts
    }


def run_students(
    args: Namespace,
    teacher: TokenTeacher,
    trainer: TestTimeTrainer,
    classes: Tensor,
    data: LabelledImages,
    targets: Mapping[int, Tensor],
    todo: Sequence[int],
    skipped: Skipped,
    title: str = "students",
) -> Iterator[list[dict[str, float]]]:
    """Rows of batches of images, each with a student of its own."""
    prepare = trainer.model.preprocessing
    for indices, images, labels in read_batches(
        data, prepare, todo, args.parallel, skipped, args.workers, title=title
    ):
        goals = torch.stack([targets[index] for index in indices])
        started = time.perf_counter()
        seeds = [args.seed + index for index in indices]
        adapted = adapt_each(trainer, images, goals, seeds, args.report_at)
        seconds = (time.perf_counter() - started) / len(indices)
        yield [
            image_row(*one, seconds, teacher, classes, args.report_at)
            for one in zip(indices, labels.tolist(), goals, adapted, strict=True)
        ]


def predict(teacher: TokenTeacher, embeddings: Tensor, classes: Tensor) -> list[int]:
    """The teacher's answers to ``(n, F)``."""
    return teacher.logits(embeddings, classes).argmax(dim=1).tolist()


def teacher_cost(teacher: TokenTeacher) -> Cost:
    """The teacher's embedding of one image; its classes are embedded once a run."""
    image = teacher.preprocess(BLANK)[None].to(next(teacher.parameters()).device)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        teacher(image).cpu()
        seconds.append(time.perf_counter() - started)
    return _cost(teacher, partial(teacher, image)) | {"seconds": statistics.median(seconds)}


def peer_cost(answer: Answer, teacher: TokenTeacher) -> Cost:
    """TPT or ZERO."""
    return _cost(teacher, partial(answer, make_views(BLANK, teacher.preprocess, 0)))


def _cost(teacher: TokenTeacher, work: Callable[[], object]) -> Cost:
    device, counts = next(teacher.parameters()).device, list[int]()
    _, peak = peak_bytes(lambda: None, lambda _: counts.append(multiply_adds(work)), device)
    peak += sum(tensor.nbytes for tensor in teacher.state_dict().values())
    return {"GMACs": counts[0] / 1e9, "peak_GB": peak / 1e9}


def student_cost(trainer: TestTimeTrainer) -> Cost:
    """A step, forward and backward: ``GMACs``; the pooled answer of all locations; the memory."""
    config, device = trainer.model.config, trainer.device
    image = torch.zeros(3, config.image_size, config.image_size, device=device)
    target = torch.zeros(config.feature_dim, device=device)

    def build() -> TestTimeTrainer:
        # From the second step on Adam's state and all gradients are there.
        few, dtype = trainer.locations, trainer.dtype
        return TestTimeTrainer(APM(config), iterations=2, locations=few, dtype=dtype, device=device)

    _, peak = peak_bytes(build, lambda fresh: fresh.adapt(image, target), device)
    model = trainer.model
    step = multiply_adds(lambda: trainer.step(image[None], target[None]))
    with torch.no_grad():
        pooled = multiply_adds(
            lambda: model.query_pooled(model.encode(image[None]), images=image[None])
        )
    return {"step_GMACs": step / 1e9, "pooled_GMACs": pooled / 1e9, "peak_GB": peak / 1e9}
