"""Frozen teachers of one embedding an image, for test-time training: CLIPs and classifiers."""

import logging
import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apm.data.class_names import imagenet_index
from apm.runtime.files import cache_home
from apm.teachers import identify, load_timm, refusing, sketch, timm_name

logger = logging.getLogger(__name__)
OPEN_CLIP = "open_clip:"


class ClipTeacher(nn.Module):
    """CLIP: one embedding an image, compared with embeddings of sentences (section 3.2).

    Attributes:
        preprocess: PIL image -> ``(3, h, h)``, as the teacher wants it.
        tokenize: sentences -> ``(n, length)``, cut where they are longer.
    """

    identity: dict[str, str | None]

    def __init__(self, clip: Any, preprocess: Any, tokenize: Any) -> None:
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
        sentences = [t.replace("{}", name) for name in class_names for t in templates]
        length = self.tokenize([""]).shape[1]
        # With one place more, only a sentence that is too long fills it.
        tokens = self.tokenize([*sentences, ""], context_length=length + 1)
        cut = [sentences[i] for i in (tokens[:-1, -1] != tokens[-1, -1]).nonzero()]
        tokens = self.tokenize(sentences) if cut else tokens[:-1, :-1]
        by_class = tokens.unflatten(0, (len(class_names), -1))
        keys = [rows.numpy().tobytes() for rows in by_class]
        _require_distinct(class_names, keys, f"have the same {length} tokens in every prompt")
        if cut:
            logger.warning("prompts cut at %d tokens: %d, as %.80r", length, len(cut), cut[0])
        classes = []
        rows_of_classes = by_class.to(next(self.clip.parameters()).device)
        for rows in tqdm(rows_of_classes, "prompts", unit="class", delay=3, leave=False):
            directions = F.normalize(self.clip.encode_text(rows).float(), dim=-1)
            classes.append(F.normalize(directions.mean(dim=0), dim=-1))
        return torch.stack(classes)

    def logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """``(..., F)`` and ``(C, F)`` -> ``(..., C)``: 100 times the cosine."""
        return 100 * F.normalize(embeddings, dim=-1) @ classes.T


class ClassifierTeacher(nn.Module):
    """A classifier of timm: its features are the embedding, its head's rows are the classes."""

    identity: dict[str, str | None]

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier: Any = classifier.float().eval().requires_grad_(False)
        config = timm.data.resolve_model_data_config(classifier)
        self.preprocess: Any = timm.data.create_transform(**config)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, h, h)`` preprocessed -> ``(B, F)`` float32: what the head is given."""
        features = self.classifier.forward_features(images)
        return self.classifier.forward_head(features, pre_logits=True).float()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
        """``(C, F + 1)``: the head's row and bias of each ImageNet-1k class; no sentences."""
        rows = [imagenet_index(name) for name in class_names]
        _require_distinct(class_names, rows, "are the same class of ImageNet-1k")
        head = self.classifier.get_classifier()
        return torch.cat([head.weight[rows], head.bias[rows, None]], dim=1)

    def logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """``(..., F)`` and ``(C, F + 1)`` -> ``(..., C)``: the head's own."""
        return embeddings @ classes[:, :-1].T + classes[:, -1]


TokenTeacher = ClipTeacher | ClassifierTeacher


def load_token_teacher(name: str, weights: Path | None = None) -> TokenTeacher:
    """A teacher by its name.

    Args:
        name: the clip package's (``ViT-L/14``), a file that ``clip.load`` reads, timm's of a
            classifier, or ``open_clip:MODEL/PRETRAINED`` (``open_clip:ViT-H-14-quickgelu/dfn5b``).
        weights: of a classifier of timm; default timm's own download.
    """
    teacher: TokenTeacher
    if timm.is_model(timm_name(name)):
        head = sketch(name).get_classifier()  # before a download
        if not isinstance(head, nn.Linear) or head.bias is None or head.out_features != 1000:
            raise ValueError(
                f"--teacher {name!r}: has no linear head of the 1000 classes of ImageNet-1k; a "
                "CLIP goes by its name in the clip package or as open_clip:MODEL/PRETRAINED"
            )
        teacher = ClassifierTeacher(load_timm(name, weights))
    elif weights:
        raise ValueError(
            f"--teacher-weights {weights}: only for a classifier of timm, not {name!r}"
        )
    else:
        teacher, weights = _load_clip(name)
        if not all(tensor.isfinite().all() for tensor in teacher.state_dict().values()):
            raise ValueError(f"--teacher {name!r}: holds numbers that are not finite")
        if weights:  # recorded by the file's name
            name = name.replace(str(weights), weights.name)
    teacher.identity = identify(name, weights)
    return teacher


def _load_clip(name: str) -> tuple[ClipTeacher, Path | None]:
    """A CLIP, and the local file that takes the place of a known name or tag."""
    model_name, _, source = name.removeprefix(OPEN_CLIP).partition("/")
    if is_open := name.startswith(OPEN_CLIP):
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(f"--teacher {name!r} needs: pip install -e '.[open_clip]'") from error
        known = open_clip.list_pretrained_tags_by_model(model_name) or open_clip.list_models()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources
            import clip  # two seconds, with its tokenizer
        source, known = name, clip.available_models()
    file = None if source in known else Path(source)
    if file and not file.is_file():
        others = ", ".join(known)
        raise ValueError(f"--teacher {name!r}: no file, no model of timm, none of {others}")
    reason = "this file is no such CLIP" if file else "could not be had; name a local file"
    with refusing(f"--teacher {name!r}: {reason}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_open:
            model, _, preprocess = open_clip.create_model_and_transforms(model_name, source)
            return ClipTeacher(model, preprocess, open_clip.get_tokenizer(model_name)), file
        model, preprocess = clip.load(name, device="cpu", download_root=str(cache_home() / "clip"))
        return ClipTeacher(model, preprocess, partial(clip.tokenize, truncate=True)), file


def _require_distinct(names: Sequence[str], keys: Sequence[Hashable], what: str) -> None:
    first: dict[Hashable, str] = {}
    for name, key in zip(names, keys, strict=True):
        if not name.strip():
            raise ValueError("a class name is empty")
        if key in first:
            raise ValueError(f"classes {first[key]!r:.80} and {name!r:.80} {what}; leave one out")
        first[key] = name
