"""What test-time training is compared with: TPT and ZERO, which ask a CLIP about many views."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchvision.transforms import RandomResizedCrop

VIEWS = 64  # of one image, in both papers
CONFIDENT = 10  # one view in so many is confident enough
CONTEXT, CONTEXT_TOKENS = "a photo of a", 4  # where the learned tokens start
LEARNING_RATE = 5e-3  # of TPT's one step


def make_views(
    image: Image.Image, preprocess: Callable[[Image.Image], Tensor], seed: int
) -> Tensor:
    """The image and random crops of it, ``(VIEWS, 3, h, h)``, as a teacher's ``preprocess`` wants.

    A crop has 8 to 100 % of the area and sides of 3:4 to 4:3; half of them are mirrored. They are a
    function of the seed and the picture.
    """
    views = [preprocess(image)]
    side = views[0].shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(image.tobytes()))
        for _ in range(VIEWS - 1):
            top, left, height, width = RandomResizedCrop.get_params(
                image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]
            )
            box = (left, top, left + width, top + height)
            crop = image.resize((side, side), Image.Resampling.BICUBIC, box)
            mirrored = torch.rand(()) < 0.5
            views.append(preprocess(ImageOps.mirror(crop) if mirrored else crop))
    return torch.stack(views)


def by_confidence(logits: Tensor) -> Tensor:
    """``(V, C)`` -> the views' indices ``(V,)``, the lowest entropy of a prediction first."""
    log_p = logits.log_softmax(dim=1)
    return (-(log_p.exp() * log_p).sum(dim=1)).argsort(stable=True)


def confident_count(views: int) -> int:
    """How many of the views are confident."""
    return max(1, views // CONFIDENT)


def zero_vote(logits: Tensor) -> int:
    """ZERO (Farina et al., NeurIPS 2024): what most of the confident views of ``(V, C)`` say.

    At temperature zero a prediction is its arg max, and the mean of predictions is a vote. A tie is
    broken by the next confident view that says one of the best.
    """
    order = by_confidence(logits)
    said = logits.argmax(dim=1)[order].tolist()
    count = confident_count(len(said))
    votes = {answer: said[:count].count(answer) for answer in said[:count]}
    best = [answer for answer in votes if votes[answer] == max(votes.values())]
    return next((answer for answer in said[count:] if answer in best), best[0])


class TPT(nn.Module):
    """Test-time prompt tuning (Shu et al., NeurIPS 2022): a frozen CLIP and learned context tokens.

    Args:
        clip: OpenAI's or open_clip's; its parameters are frozen.
        prompts: token ids ``(C, 77)`` of a sentence a class, ``CONTEXT`` in front of each.
    """

    initial: Tensor
    prompts: Tensor

    def __init__(self, clip: Any, prompts: Tensor) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.register_buffer("prompts", prompts, persistent=False)
        initial = clip.token_embedding(prompts[0, 1 : 1 + CONTEXT_TOKENS]).detach()
        self.register_buffer("initial", initial, persistent=False)
        self.context = nn.Parameter(initial.clone())

    @torch.no_grad()
    def encode_views(self, views: Tensor) -> Tensor:
        """``(V, 3, h, h)`` -> ``(V, F)`` of unit length.

        Nothing in front of the image tower's output is learned: it has no backward pass.
        """
        return F.normalize(self.clip.encode_image(views).float(), dim=-1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Views ``(V, F)`` -> logits ``(V, C)``."""
        texts = F.normalize(self.encode_prompts().float(), dim=-1)
        return self.clip.logit_scale.exp() * embeddings @ texts.T

    def encode_prompts(self) -> Tensor:
        """The prompts with the learned context tokens, ``(C, F)``."""

        def learned(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:  # (C, 77, width)
            context = self.context.to(tokens.dtype).expand(len(tokens), -1, -1)
            return torch.cat([tokens[:, :1], context, tokens[:, 1 + len(self.context) :]], dim=1)

        handle = self.clip.token_embedding.register_forward_hook(learned)
        try:
            return self.clip.encode_text(self.prompts)
        finally:
            handle.remove()

    def loss(self, embeddings: Tensor) -> Tensor:
        """Entropy of the mean prediction of the most confident tenth of the views ``(V, F)``."""
        logits = self(embeddings)
        chosen = by_confidence(logits.detach())[: confident_count(len(logits))]
        log_mean = logits[chosen].log_softmax(dim=1).logsumexp(dim=0) - math.log(len(chosen))
        return -(log_mean.exp() * log_mean).sum()

    def optimizer(self) -> AdamW:
        """A fresh one."""
        return AdamW([self.context], lr=LEARNING_RATE)

    def step(self, optimizer: Optimizer, embeddings: Tensor) -> None:
        """One step of ``optimizer`` on the context tokens."""
        optimizer.zero_grad()
        self.loss(embeddings).backward()
        optimizer.step()

    def adapt(self, views: Tensor) -> Tensor:
        """Logits ``(C,)`` of the first of ``(V, 3, h, h)`` after one step from the start."""
        with torch.no_grad():
            self.context.copy_(self.initial)
        embeddings = self.encode_views(views)
        self.step(self.optimizer(), embeddings)
        with torch.no_grad():
            return self(embeddings[:1])[0]
