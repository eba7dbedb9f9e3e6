"""The paper's Table 4 and the models it compares: real architectures, random weights.

Build them under ``with device:``; on ``torch.device("meta")`` they have shapes and no memory.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apm.peers import TPT


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


def tpt_model(prompts: int = 1) -> TPT:
    """Test-time prompt tuning of CLIP ViT-B/16."""
    return TPT(clip_model("ViT-B/16"), clip_inputs(prompts=prompts)[1])
