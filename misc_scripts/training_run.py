"""What a training run starts from, and how far it is."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from apm import APM, APMConfig, load_model
from apm.checkpoint import load_tensors, save_tensors
from apm.config import TrainConfig
from apm.data.features import FeatureStore, NpyStore, open_store
from apm.data.images import file_sizes, image_names
from apm.data.training_set import TrainingSet
from apm.distill import Distiller
from apm.preprocessing import Preprocessing
from apm.runtime.distributed import rank, shares
from apm.runtime.files import file_sha256, listing_sha256
from apm.teachers import DenseTeacher, load_dense_teacher


@dataclass
class Inputs:
    """What a run starts from.

    Attributes:
        model: to be trained.
        teacher: on the device, or None where the features come from a store.
        training, validation: images and features.
        mean, std: ``(F,)``, of the features.
        provenance: plain values for the checkpoint.
        settings: what a run that goes on must share with the one that was stopped.
    """

    model: APM
    teacher: DenseTeacher | None
    training: TrainingSet
    validation: TrainingSet
    mean: Tensor
    std: Tensor
    provenance: dict[str, Any]
    settings: dict[str, Any]


def new_model(args: Namespace, source: dict[str, Any]) -> APM:
    """A model with random weights for features that ``source`` describes."""
    shape = APMConfig.small() if args.model == "small" else APMConfig.coco()
    model = APM(replace(shape, feature_dim=source["feature_dim"]))
    last: Any = model.rgb_head[-1]
    torch.nn.init.constant_(last.bias, 0.5)  # grey: its ReLU would never learn from zero
    return model


def training_sets(
    args: Namespace,
    config: TrainConfig,
    preprocessing: Preprocessing,
    store: FeatureStore | NpyStore | None,
) -> tuple[TrainingSet, TrainingSet]:
    """Images for training and images held out, drawn by the seed from those that have features."""
    images, held_out = image_names(args.input), args.validation_images
    if store:
        images = {name: path for name, path in images.items() if name in store.sizes}
        for name, size in file_sizes(images).items():
            if store.sizes[name] not in (None, size):
                raise ValueError(
                    f"{images[name]}: {size} bytes, but --features were made of an image of "
                    f"{store.sizes[name]}; extract again, or name the same --input"
                )
    names = sorted(images)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    names = [names[index] for index in order[: args.limit]]
    if len(names) <= held_out:
        raise ValueError(
            f"{len(names)} images to learn from, expected more than the {held_out} of "
            "--validation-images"
        )
    training = {name: images[name] for name in names[held_out:]}
    validation = {name: images[name] for name in names[:held_out]}
    return (
        TrainingSet(training, preprocessing, store, config.augment, config.seed),
        TrainingSet(validation, preprocessing, store),
    )


def feature_statistics(
    dataset: TrainingSet, teacher: DenseTeacher | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(F,)`` of the features of 64 images; 1 where all are equal."""
    sample = []
    first = range(min(64, len(dataset)))
    for index in tqdm(first, "feature statistics", leave=False, disable=rank() > 0):
        pixels, features = dataset[index]
        sample.append(teacher(pixels[None].to(device) / 255)[0].cpu() if teacher else features)
    features = torch.cat(sample).float()
    std = features.std(dim=0)
    return features.mean(dim=0), torch.where(std > 0, std, 1.0)


def settings_of(
    args: Namespace,
    config: TrainConfig,
    model: APM,
    source: dict[str, Any],
    images: dict[str, TrainingSet],
) -> dict[str, Any]:
    """What a run that goes on must share with the one that was stopped."""
    settings = asdict(config)
    if config.schedule == "constant":
        del settings["epochs"]
    settings |= {name: getattr(args, name) for name in ("model", "limit", "validation_images")}
    settings |= {f"features: {name}": value for name, value in source.items()}
    for which, part in images.items():  # statistics of features are of those held out
        sizes = file_sizes(dict(zip(part.names, part.paths, strict=True)))
        settings |= {f"{which} images": listing_sha256(sizes)}
    settings |= {"--init": args.init and file_sha256(args.init)}
    return settings | {"preprocessing": asdict(model.preprocessing)}


def load_inputs(
    args: Namespace,
    config: TrainConfig,
    device: torch.device,
    new_model: Callable[[Namespace, dict[str, Any]], APM] = new_model,
) -> Inputs:
    """Load everything that the flags name.

    Raises:
        ValueError: if features and model do not fit, or there are too few images.
    """
    model = load_model(args.init) if args.init else None
    teacher, store = None, None
    if args.teacher:
        teacher = load_dense_teacher(
            args.teacher,
            args.teacher_weights,
            grid_size=(model.config if model else APMConfig.small()).grid_size,
            block=args.teacher_block,
            margin=args.teacher_margin,
        ).to(device)
        source = teacher.description() | {"dtype": config.dtype}
    else:
        store = open_store(args.features)
        source = store.meta
    if model is None:
        model = new_model(args, source)
    else:
        # Training on right tokens undoes the released model's shift, and it is on cropped images.
        model.preprocessing = replace(model.preprocessing, token_offset=0, fit="crop")
    named, grid_size = args.teacher or args.features, model.config.grid_size
    if source["grid_size"] % grid_size:
        raise ValueError(
            f"{named}: features of grid_size {source['grid_size']}, expected the model's "
            f"{grid_size} or a multiple"
        )
    if source["feature_dim"] != model.config.feature_dim:
        raise ValueError(
            f"{named}: features of width {source['feature_dim']}, the model's have "
            f"{model.config.feature_dim}"
        )
    preprocessing = Preprocessing(image_size=model.config.image_size)
    training, validation = training_sets(args, config, preprocessing, store)
    mean, std = feature_statistics(validation, teacher, device)
    if args.init is None:  # what a student answers that knows nothing
        model.feature_head.bias.data = mean.clone()
    provenance = {
        "init": model.provenance,
        "teacher": source,
        "training_images": len(training),
        # Where files lay says nothing about the model.
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
    }
    images = {"training": training, "held-out": validation}
    settings = settings_of(args, config, model, source, images)
    model = model.to(device)
    return Inputs(model, teacher, training, validation, mean, std, provenance, settings)


def blame(distiller: Distiller, images: TrainingSet, batch: list[int]) -> str:
    """Which of this process's images of a batch have losses that are not finite."""
    mine = sorted(index for part in shares(batch, distiller.accumulate) for index in part)
    places = torch.arange(distiller.model.config.grid_size**2)
    bad = []
    with torch.no_grad():
        for index in mine:
            pixels, features = (part[None] for part in images[index])
            features = distiller.features(pixels, features)
            losses = distiller.losses(pixels, features, places, torch.tensor([True]))
            bad += [] if losses.isfinite().all() else [images.names[index]]
    if not bad:
        return "none of this process's images alone is the cause"
    if len(bad) < len(mine):
        return f"images {', '.join(bad)}"
    return f"all images of this process's batch, {', '.join(bad)}: try a lower --learning-rate"


class Progress:
    """How far a run is. Of several processes the first writes it down.

    Attributes:
        history: a row of numbers for each epoch that is over.
        loss_sums: feature and RGB loss, added up over the steps of the present epoch.
    """

    def __init__(self, path: Path, distiller: Distiller) -> None:
        self.path, self.distiller = path, distiller
        self.history: list[dict[str, float]] = []
        self.loss_sums = torch.zeros(2, dtype=torch.float64)

    def save(self) -> None:
        """Write the whole state of the run."""
        if rank() == 0:
            state: dict[str, Any] = {name: getattr(self, name) for name in ("history", "loss_sums")}
            state["config"] = asdict(self.distiller.config)
            state["steps_done"] = self.distiller.steps_done
            state["model"] = self.distiller.model.state_dict()
            save_tensors(self.path, state | {"optimizer": self.distiller.optimizer.state_dict()})

    def end_epoch(self, row: dict[str, float]) -> None:
        """Keep an epoch's row, and begin the next."""
        self.history.append(row)
        self.loss_sums = torch.zeros(2, dtype=torch.float64)

    def load(self) -> None:
        """Go on from the last state, if there is one."""
        if not self.path.exists():
            return
        try:
            state = load_tensors(self.path)
            self.history, self.loss_sums = state["history"], state["loss_sums"]
            self.distiller.steps_done = state["steps_done"]
            self.distiller.model.load_state_dict(state["model"])
            self.distiller.optimizer.load_state_dict(state["optimizer"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path}: not the state of this run ({error})") from error


def summary_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer for a run that goes on after ``step``."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs: pip install -e '.[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
