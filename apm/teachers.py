"""Frozen teachers. The only place that normalises for a teacher and slices its tokens."""

import difflib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from apm.runtime.files import cache_home

DEFAULT_TEACHER = "vit_large_patch14_reg4_dinov2.lvd142m"


class DenseTeacher(nn.Module):
    """Patch tokens of a frozen ViT on the student's grid (section 2 of the paper: DINOv2).

    The image is scaled so that one token stands for one location. With a ``margin`` it is first
    continued by that many patches on each side, mirrored, and the tokens of the margin are
    dropped: tokens at a ViT's border, above all in the corners, are often outliers.

    Attributes:
        feature_dim: width of the patch tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, vit: VisionTransformer, *, grid_size: int = 32, block: int = -1, margin: int = 0
    ) -> None:
        super().__init__()
        blocks = len(vit.blocks)
        if not -blocks <= block < blocks:
            raise ValueError(f"teacher block {block} must be in {-blocks}..{blocks - 1}")
        self.vit: Any = vit.eval().requires_grad_(False)
        self.grid_size, self.margin = grid_size, margin
        self.block = block % blocks
        self.feature_dim = vit.num_features
        config = timm.data.resolve_model_data_config(vit)
        self.register_buffer("mean", _as_image(config["mean"]), persistent=False)
        self.register_buffer("std", _as_image(config["std"]), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Dense features of the images.

        Args:
            images: ``(B, 3, H, H)`` float, RGB in [0, 1], any ``H``.

        Returns:
            ``(B, grid_size**2, feature_dim)`` float32, row by row, after the ViT's final norm.
        """
        patch = self.vit.patch_embed.patch_size[0]
        side, border = self.grid_size * patch, self.margin * patch
        if images.shape[-1] != side:
            images = F.interpolate(
                images, (side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        images = F.pad((images - self.mean) / self.std, (border,) * 4, mode="reflect")
        tokens = self.vit.forward_intermediates(
            images,
            indices=[self.block],
            norm=True,
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
        )[0]  # (B, F, grid + 2 margin, grid + 2 margin), without CLS and register tokens
        inner = slice(self.margin, self.margin + self.grid_size)
        return tokens[:, :, inner, inner].flatten(2).transpose(1, 2).float()


def load_dense_teacher(
    name: str,
    weights: str | Path | None = None,
    *,
    grid_size: int = 32,
    block: int = -1,
    margin: int = 0,
) -> DenseTeacher:
    """Any plain ViT of timm as a dense teacher.

    Args:
        name: timm's model name, e.g. ``vit_large_patch14_reg4_dinov2.lvd142m``.
        weights: a state dict in timm's or the original authors' format (``.pth``,
            ``.safetensors``); default timm's own download.
        block: the transformer block whose tokens are taken, negative from the end.
        margin: patches by which the image is continued on each side.

    Raises:
        FileNotFoundError: if ``weights`` does not exist.
        ValueError: if the name is no ViT of timm, the weights do not fit it or cannot be had.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"teacher {name!r} is not a model of timm {timm.__version__}")
    if not 0 <= margin < grid_size:
        raise ValueError(f"teacher margin {margin} must be in 0..{grid_size - 1}")
    image_size = (grid_size + 2 * margin) * _patch_size(name)
    vit = _create_timm(name, pretrained=weights is None, img_size=image_size)
    if weights is not None:
        _load_weights(vit, name, Path(weights))
    return DenseTeacher(vit, grid_size=grid_size, block=block, margin=margin)


def _create_timm(name: str, pretrained: bool, **settings: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:  # timm's hub clients raise a dozen unrelated types
        raise ValueError(
            f"teacher {name!r}: its weights could not be downloaded ({type(error).__name__}); "
            "name a local file with --teacher-weights"
        ) from error


def _patch_size(name: str) -> int:
    with torch.device("meta"):
        vit = timm.create_model(name)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"teacher {name!r} is a {type(vit).__name__}, expected a plain ViT of timm"
        )
    return vit.patch_embed.patch_size[0]


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such teacher weights file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        if isinstance(model, VisionTransformer):  # resizes positions to another grid
            state = checkpoint_filter_fn(state, model)
        model.load_state_dict(state)
    except Exception as error:  # whatever an untrusted file provokes in the readers
        raise ValueError(
            f"{path}: not weights of teacher {name!r} ({_first_line(error)})"
        ) from error


class ClipTeacher(nn.Module):
    """CLIP: one embedding an image, compared with embeddings of sentences (section 3.2).

    Attributes:
        preprocess: PIL image -> ``(3, h, h)``, as this CLIP wants it.
    """

    clip: Any  # the clip package's or OpenCLIP's
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]

    def __init__(
        self,
        clip: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
    ) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.preprocess, self.tokenize = preprocess, tokenize

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, h, h)`` preprocessed -> ``(B, F)`` float32, not normalised."""
        return self.clip.encode_image(images).float()

    @torch.no_grad()
    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """``(C, F)`` of unit length: for each class the mean direction of its sentences."""
        device = next(self.clip.parameters()).device
        classes = []
        for name in class_names:
            tokens = self.tokenize([template.replace("{}", name) for template in templates])
            sentences = F.normalize(self.clip.encode_text(tokens.to(device)).float(), dim=-1)
            classes.append(F.normalize(sentences.mean(dim=0), dim=-1))
        return torch.stack(classes)

    def logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """``(..., F)`` and ``(C, F)`` -> ``(..., C)``: 100 times the cosine."""
        return 100 * F.normalize(embeddings, dim=-1) @ classes.T


class ClassifierTeacher(nn.Module):
    """A classifier of timm: its features are the embedding, its head's rows are the classes.

    Attributes:
        preprocess: PIL image -> ``(3, h, h)``, as this classifier wants it.
    """

    classifier: Any  # of timm
    preprocess: Callable[[Image.Image], Tensor]

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.preprocess = timm.data.create_transform(
            **timm.data.resolve_model_data_config(classifier)
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, h, h)`` preprocessed -> ``(B, F)`` float32: what the head is given."""
        features = self.classifier.forward_features(images)
        return self.classifier.forward_head(features, pre_logits=True).float()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """``(C, F + 1)``: the head's row and bias of each ImageNet-1k class; no sentences.

        Raises:
            ValueError: if a name is no class of ImageNet.
        """
        head = self.classifier.get_classifier()
        index = torch.tensor([imagenet_index(name) for name in class_names])
        index = index.to(head.weight.device)
        return torch.cat([head.weight[index], head.bias[index, None]], dim=1)

    def logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """``(..., F)`` and ``(C, F + 1)`` -> ``(..., C)``: the head's own."""
        return embeddings @ classes[:, :-1].T + classes[:, -1]


TokenTeacher = ClipTeacher | ClassifierTeacher
OPEN_CLIP = "open_clip:"


def load_token_teacher(name: str, weights: str | Path | None = None) -> TokenTeacher:
    """A teacher of one embedding an image.

    Args:
        name: a model of the clip package (``ViT-L/14``), a path that ``clip.load`` reads,
            ``open_clip:MODEL/PRETRAINED`` (``open_clip:ViT-H-14-quickgelu/dfn5b``), or a
            classifier of timm.
        weights: of a classifier of timm; default timm's own download.

    Raises:
        FileNotFoundError: if a weights file does not exist.
        ValueError: if there is no such teacher, its weights cannot be had, or a CLIP is given
            weights besides its name.
    """
    is_clip = name.startswith(OPEN_CLIP) or not timm.is_model(name.split(".")[0])
    if is_clip and weights is not None:
        raise ValueError(
            f"weights {weights}: only of a classifier of timm, not of teacher {name!r}"
        )
    if name.startswith(OPEN_CLIP):
        return _load_open_clip(name.removeprefix(OPEN_CLIP))
    return _load_clip(name) if is_clip else _load_classifier(name, weights)


def _load_clip(name: str) -> ClipTeacher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pkg_resources
        import clip  # with its tokenizer a second; dense teachers do without

    if name not in clip.available_models() and not Path(name).is_file():
        raise ValueError(
            f"teacher {name!r}: no file, no model of timm and none of the clip package "
            f"({', '.join(clip.available_models())})"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tries torch.jit.load first, which is deprecated
            cache = str(cache_home() / "clip")
            model, preprocess = clip.load(name, device="cpu", download_root=cache)
    except Exception as error:  # downloads and untrusted files fail in many ways
        raise ValueError(f"teacher {name!r}: {_first_line(error)}") from error
    return ClipTeacher(model, preprocess, functools.partial(clip.tokenize, truncate=True))


def _load_open_clip(name: str) -> ClipTeacher:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"teacher 'open_clip:{name}' needs the package open_clip_torch: "
            "pip install open_clip_torch"
        ) from error
    model_name, _, pretrained = name.partition("/")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            model_name, pretrained=pretrained or None, require_pretrained=True
        )
    except Exception as error:  # unknown names, downloads and files fail in many ways
        raise ValueError(f"teacher 'open_clip:{name}': {_first_line(error)}") from error
    return ClipTeacher(model, preprocess, open_clip.get_tokenizer(model_name))


def _load_classifier(name: str, weights: str | Path | None) -> ClassifierTeacher:
    model = _create_timm(name, pretrained=weights is None)
    head = model.get_classifier()
    classes = timm.data.ImageNetInfo().num_classes()
    if not isinstance(head, nn.Linear) or head.bias is None or head.out_features != classes:
        raise ValueError(
            f"teacher {name!r}: has no linear head of the {classes} classes of ImageNet-1k; a CLIP "
            "goes by its name in the clip package or as open_clip:MODEL/PRETRAINED"
        )
    if weights is not None:
        _load_weights(model, name, Path(weights))
    return ClassifierTeacher(model)


@functools.cache
def _imagenet_synonyms() -> list[list[str]]:
    info = timm.data.ImageNetInfo()
    return [info.index_to_description(i).lower().split(", ") for i in range(info.num_classes())]


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """A name for each class of ImageNet-1k, no two alike."""
    synonyms = _imagenet_synonyms()
    first = Counter(names[0] for names in synonyms)
    chosen = [
        names[0] if first[names[0]] == 1 else next((n for n in names if n not in first), names[0])
        for names in synonyms
    ]
    chosen[134], chosen[517] = "crane bird", "construction crane"  # "crane" both, and nothing else
    return tuple(chosen)


@functools.cache
def _imagenet_indices() -> dict[str, int]:
    info, indices = timm.data.ImageNetInfo(), dict[str, int]()
    for index, synonyms in reversed(list(enumerate(_imagenet_synonyms()))):
        indices |= dict.fromkeys(synonyms, index)  # of two classes with one synonym the first one's
    indices |= {name: index for index, name in enumerate(imagenet_names())}
    return indices | {info.index_to_label_name(i): i for i in range(info.num_classes())}


def imagenet_index(name: str) -> int:
    """The index of an ImageNet-1k class, by its name, one of its synonyms or its WordNet id.

    Raises:
        ValueError: if there is no such class.
    """
    indices = _imagenet_indices()
    key = name.lower().replace("_", " ")
    if key not in indices:
        near = difflib.get_close_matches(key, indices, n=3)
        raise ValueError(
            f"{name!r} is no class of ImageNet-1k" + f" (near: {', '.join(near)})" * bool(near)
        )
    return indices[key]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _as_image(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
