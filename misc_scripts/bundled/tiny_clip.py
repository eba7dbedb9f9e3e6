"""A CLIP small enough to be bundled: image tower started from a ViT, text tower from nothing.

It learns the class names of one data set by CLIP's contrast of images and sentences. That makes a
teacher of the real file format, not an open-vocabulary model: of other words it knows nothing.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from apm.checkpoint import save_tensors
from apm.config import TrainConfig
from apm.data.training_set import epoch_batches
from apm.runtime.device import generator_at, precision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pkg_resources
    import clip
    from clip.model import CLIP

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BORDER = 2  # px, by which a training image is moved at most
VOCABULARY, SENTENCE = 49408, 77  # of CLIP's tokenizer
FRESH_RATE = 10
TEXT_WIDTH = 64  # more makes the embedding of the vocabulary too large to be bundled


def new_clip(
    *, image_size: int = 32, patch: int = 4, width: int = 192, layers: int = 6, text_layers: int = 2
) -> CLIP:
    """A small CLIP with random weights."""
    return CLIP(
        embed_dim=width,
        image_resolution=image_size,
        vision_layers=layers,
        vision_width=width,
        vision_patch_size=patch,
        context_length=SENTENCE,
        vocab_size=VOCABULARY,
        transformer_width=TEXT_WIDTH,
        transformer_heads=TEXT_WIDTH // 64,
        transformer_layers=text_layers,
    )


@torch.no_grad()
def start_from_vit(model: CLIP, vit: VisionTransformer) -> None:
    """Give CLIP's image tower the first blocks of a ViT of its width, grid and heads.

    The tower sees small patches, the ViT their enlargement: enlarging and normalisation become part
    of the first convolution and of the positional embedding. What stays different is CLIP's norm
    before the first block and its approximation of the GELU.

    Args:
        vit: with mean = std = 0.5 and as many patches as the tower.

    Raises:
        ValueError: if the ViT does not fit the tower.
    """
    visual = model.visual
    blocks, width = visual.transformer.layers, visual.transformer.width
    places = visual.positional_embedding.shape
    token, positions, config = vit.cls_token, vit.pos_embed, resolve_model_data_config(vit)
    if (
        token is None
        or positions is None
        or positions.shape[1:] != places
        or len(vit.blocks) < blocks
        or {*config["mean"], *config["std"]} != {0.5}
    ):
        raise ValueError(
            f"a ViT of width {vit.embed_dim} with {len(vit.blocks)} blocks cannot start an image "
            f"tower of width {width} with {blocks} blocks and {places[0]} positions, which "
            "needs the same width and positions, as many blocks, and mean = std = 0.5"
        )
    side, kernel = visual.conv1.kernel_size[0], vit.patch_embed.proj.weight
    pixels = torch.eye(side**2).view(-1, 1, side, side)
    enlarge = F.interpolate(pixels, kernel.shape[-2:], mode="bicubic").flatten(1)  # (p^2, P^2)
    small = (kernel.flatten(2) @ enlarge.T).view(-1, 3, side, side)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    visual.conv1.weight.copy_(small * std / 0.5)
    constant = (small * (mean - 0.5) / 0.5).sum(dim=(1, 2, 3)) + vit.patch_embed.proj.bias
    visual.class_embedding.copy_(token[0, 0])
    visual.positional_embedding.copy_(positions[0])
    visual.positional_embedding[1:] += constant
    source: Any
    for block, source in zip(visual.transformer.resblocks, vit.blocks, strict=False):
        block.attn.in_proj_weight.copy_(source.attn.qkv.weight)
        block.attn.in_proj_bias.copy_(source.attn.qkv.bias)
        for layer, other in (
            (block.attn.out_proj, source.attn.proj),
            (block.mlp.c_fc, source.mlp.fc1),
            (block.mlp.c_proj, source.mlp.fc2),
            (block.ln_1, source.norm1),
            (block.ln_2, source.norm2),
        ):
            layer.load_state_dict(other.state_dict())


def tokenize(class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """All sentences about all classes, cut where all of them are padding: ``(C, T, L)``."""
    sentences = [template.replace("{}", name) for name in class_names for template in templates]
    tokens = clip.tokenize(sentences, truncate=True)
    # Attention is causal: nothing after a sentence's end reaches its embedding.
    length = int((tokens != 0).sum(dim=1).max())
    return tokens[:, :length].view(len(class_names), len(templates), length)


def separate_classes(model: CLIP, tokens: Tensor, *, steps: int = 100, seed: int = 0) -> float:
    """Train the text tower alone to tell sentences about different classes apart.

    With random weights it embeds all sentences nearly alike, and the image tower cannot learn from
    that.

    Args:
        tokens: ``(C, T, L)``.

    Returns:
        The last loss.
    """
    generator = torch.Generator().manual_seed(seed)
    text = [p for name, p in model.named_parameters() if not name.startswith("visual.")]
    optimizer = torch.optim.AdamW(text, lr=1e-3, fused=True)
    labels = torch.arange(len(tokens), device=tokens.device)
    for _ in tqdm(range(steps), "text tower", unit="step"):
        drawn = torch.randint(tokens.shape[1], (2, len(tokens)), generator=generator)
        one, other = (
            F.normalize(model.encode_text(tokens[labels, templates]), dim=-1)
            for templates in drawn.to(tokens.device)
        )
        loss = F.cross_entropy(one @ other.T * model.logit_scale.detach().exp(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.item()


class ClipTrainer:
    """Trains a CLIP on labelled images: each against one sentence of every class.

    Every random choice is a function of seed and step, so a run that goes on from ``state_dict``
    is the run that was never stopped.

    Args:
        model: the CLIP, on its device.
        images: ``(N, 3, H, H)`` uint8 RGB, of the CLIP's size.
        labels: ``(N,)`` class indices.
        class_names: of the C classes.
        templates: sentences; a step draws one for each class.
        config: batch size, schedule, precision and seed; its learning rate is that of what comes
            from the ViT. What starts from nothing, the text tower and the projections, has
            ``FRESH_RATE`` times as much.
        steps: length of the run, for the cosine schedule.

    Attributes:
        steps_done: steps done.
    """

    def __init__(
        self,
        model: CLIP,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        templates: Sequence[str],
        config: TrainConfig,
        *,
        steps: int,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.config, self.steps, self.steps_done = config, steps, 0
        self.device = model.logit_scale.device
        self.tokens = tokenize(class_names, templates).to(self.device)
        groups: dict[int, list[Tensor]] = {1: [], FRESH_RATE: []}
        for name, parameter in model.named_parameters():
            from_vit = name.startswith("visual.") and name != "visual.proj"
            groups[1 if from_vit else FRESH_RATE].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "share": share} for share, parameters in groups.items()],
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self) -> tuple[float, float]:
        """One step of the optimiser on the next batch.

        Returns:
            Loss and share of right answers before the step.
        """
        config = self.config
        generator = generator_at(config.seed, self.steps_done)
        chosen = self.batch()
        labels = self.labels[chosen].to(self.device)
        images = augment(self.images[chosen], generator).to(self.device)
        drawn = torch.randint(self.tokens.shape[1], (len(self.tokens),), generator=generator)
        with precision(self.device, config.dtype):
            embeddings = self.model.encode_image(normalise(images))
            classes = self.model.encode_text(self.tokens[torch.arange(len(drawn)), drawn])
        cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(classes.float(), dim=-1).T
        loss = F.cross_entropy(cosines * self.model.logit_scale.exp(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            rate = config.rate(self.steps_done, self.steps) * config.learning_rate
            group["lr"] = group["share"] * rate
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))  # as in CLIP
        self.steps_done += 1
        return loss.item(), (cosines.argmax(dim=1) == labels).float().mean().item()

    def batch(self) -> list[int]:
        """Indices of the next step's images; an epoch leaves out the last, incomplete batch."""
        count, size = len(self.images), self.config.batch_size
        epoch, place = divmod(self.steps_done, count // size)
        return epoch_batches(count, size, self.config.seed, epoch)[place]

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        return parts | {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]


@torch.no_grad()
def save_clip(path: Path, model: CLIP, images: Tensor) -> None:
    """Write a state dict in half precision, which ``clip.load`` reads.

    Embeddings of images are brought to about unit length, so that mean squared errors to them
    compare with the paper's. Cosines, and with them a CLIP's answers, stay as they are.

    Args:
        path: of the file.
        model: as trained.
        images: ``(N, 3, H, H)`` uint8 RGB, a sample to measure the length on.
    """
    state = model.state_dict()
    device = model.logit_scale.device
    length = model.encode_image(normalise(images.to(device))).norm(dim=-1).mean()
    state["visual.proj"] = state["visual.proj"] / length
    save_tensors(path, {name: value.half().cpu() for name, value in state.items()})


def normalise(images: Tensor) -> Tensor:
    """uint8 ``(B, 3, H, W)`` -> float32, as CLIP wants them."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)
    )
    return (images / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(B, 3, H, H)`` uint8, each shifted by up to ``BORDER`` px, half of them flipped."""
    count, _, size, _ = images.shape
    padded = F.pad(images.float(), (BORDER,) * 4, mode="reflect").to(images.dtype)
    rows, columns = torch.randint(2 * BORDER + 1, (2, count, 1), generator=generator)
    span = torch.arange(size)
    columns = columns + span
    flipped = torch.rand(count, generator=generator) < 0.5
    columns[flipped] = columns[flipped].flip(1)
    batch = torch.arange(count)[:, None, None]
    return padded[batch, :, (rows + span)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
