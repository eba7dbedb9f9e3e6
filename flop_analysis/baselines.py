"""The paper's Table 4 and the models it compares: real architectures, random weights.

Build them under ``with device:``; on ``torch.device("meta")`` they have shapes and no memory.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


class Paper(NamedTuple):
    """A line of the paper's Table 4: millions of parameters, GB, GFLOPs (multiply-adds)."""

    parameters: float
    memory_measured: float
    memory_ideal: float
    gmacs_measured: float
    gmacs_ideal: float


TABLE_4 = {
    "Swin": Paper(87, 1.5, 1.4, 353, 308),
    "TPT": Paper(151.3, 3.1, 2.7, 529, 476),
    "CLIP": Paper(149.2, 2.3, 1.8, 462, 410),
    "teacher": Paper(149.2, 1.8, 1.8, 20.5, 20.5),  # t = 1
    "student": Paper(174.2, 2.7, 1.8 + 0.6, 10, 10),  # t = 2, parameters and memory with teacher
    "APM": Paper(174.2, 2.7, 1.8 + 0.6, 241.7, 210.5),
}

IMAGE_SIZE = 224  # of Swin and CLIP, pixels
CONTEXT_LENGTH = 77  # of CLIP's prompts, tokens
CLIP_SIZES = {  # embedding; layers, width and patch of the image tower; width of the text tower
    "ViT-B/32": (512, 12, 768, 32, 512),
    "ViT-B/16": (512, 12, 768, 16, 512),
    "ViT-L/14": (768, 24, 1024, 14, 768),
}


def clip_model(name: str) -> nn.Module:
    """OpenAI's CLIP, one of ``CLIP_SIZES``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip imports the deprecated pkg_resources
        from clip.model import CLIP  # seconds that the rows without CLIP do not need
    embedding, layers, width, patch, text_width = CLIP_SIZES[name]
    vision = (IMAGE_SIZE, layers, width, patch)
    text = (CONTEXT_LENGTH, 49408, text_width, text_width // 64, 12)  # vocabulary; heads, layers
    return CLIP(embedding, *vision, *text).eval()


def clip_inputs(images: int = 1, prompts: int = 1) -> tuple[Tensor, Tensor]:
    """Images ``(images, 3, 224, 224)`` and the token ids of prompts ``(prompts, 77)``."""
    return (
        torch.rand(images, 3, IMAGE_SIZE, IMAGE_SIZE),
        torch.zeros(prompts, CONTEXT_LENGTH, dtype=torch.long),
    )


def swin_model() -> nn.Module:
    """Swin-B (Liu et al., ICCV 2021)."""
    from torchvision.models import swin_b  # seconds that the rows without Swin do not need

    return swin_b().eval()


class TPT(nn.Module):
    """Test-time prompt tuning (Shu et al., NeurIPS 2022): a frozen CLIP and learned context tokens.

    Args:
        clip: what ``clip_model`` returns; its parameters are frozen.
        context_tokens: learned tokens in front of the class name.
    """

    VIEWS = 64  # augmented views of the test image in one step

    def __init__(self, clip: Any, context_tokens: int = 4) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        width = clip.token_embedding.embedding_dim
        self.context = nn.Parameter(0.02 * torch.randn(context_tokens, width))

    def forward(self, views: Tensor, prompts: Tensor) -> Tensor:
        """``(V, 3, 224, 224)`` and token ids ``(C, 77)`` -> logits ``(V, C)``.

        Nothing in front of the image tower's output is learned, so that tower runs without a
        backward pass.
        """
        with torch.no_grad():
            images = F.normalize(self.clip.encode_image(views), dim=-1)
        texts = F.normalize(self.encode_text(prompts), dim=-1)
        return self.clip.logit_scale.exp() * images @ texts.T

    def encode_text(self, prompts: Tensor) -> Tensor:
        """Token ids ``(C, 77)`` -> ``(C, embed_dim)``, tokens 1, 2, ... being the learned ones."""
        clip, length = self.clip, len(self.context)
        tokens = clip.token_embedding(prompts)  # (C, 77, width)
        context = self.context.expand(len(prompts), -1, -1)
        tokens = torch.cat([tokens[:, :1], context, tokens[:, 1 + length :]], dim=1)
        tokens = (tokens + clip.positional_embedding).transpose(0, 1)  # (77, C, width)
        tokens = clip.ln_final(clip.transformer(tokens)).transpose(0, 1)
        rows = torch.arange(len(prompts), device=prompts.device)
        return tokens[rows, prompts.argmax(dim=-1)] @ clip.text_projection

    def loss(self, views: Tensor, prompts: Tensor) -> Tensor:
        """Entropy of the mean prediction of the most confident tenth of the views."""
        log_p = self(views, prompts).log_softmax(dim=1)  # (V, C)
        entropies = -(log_p.exp() * log_p).sum(dim=1)
        chosen = entropies.topk(max(1, len(views) // 10), largest=False).indices
        log_mean = log_p[chosen].logsumexp(dim=0) - math.log(len(chosen))
        return -(log_mean.exp() * log_mean).sum()

    def step(self, optimizer: Optimizer, views: Tensor, prompts: Tensor) -> None:
        """One step of ``optimizer`` on the context tokens."""
        optimizer.zero_grad()
        self.loss(views, prompts).backward()
        optimizer.step()
