"""The shape of an APM, and how it is trained."""

import math
from dataclasses import dataclass, field
from typing import Any

from apm.choices import FEATURE_LOSSES, POOLINGS


@dataclass(frozen=True, kw_only=True)
class APMConfig:
    """Shape of an APM. Lengths are in pixels, widths in channels."""

    image_size: int = 448  # side of the square input image
    patch_size: int = 14  # side of the patch that one column entry folds
    trunk_widths: tuple[int, ...]  # of the shared MLP's layers
    feature_dim: int  # width of the answered feature, the teacher's
    rgb_widths: tuple[int, ...] = (256, 256)  # of the RGB head's hidden layers
    position_dim: int = 1024  # width of the positional encoding, divisible by 4
    pooling: str | None = None  # how ``pool`` summarises the locations, one of choices.POOLINGS
    pool_heads: int = 8  # of the attention pooling
    local_width: int = 0  # of the embedded local patch I_xy of Figure 1; 0: none, as released
    # How far a location sees around its patch: residual blocks at half a patch and at a patch, each
    # of which adds one such step on every side.
    local_blocks: tuple[int, int] = (2, 8)

    def __post_init__(self) -> None:
        for name in ("trunk_widths", "rgb_widths", "local_blocks"):  # lists, from a checkpoint
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = [self.image_size, self.patch_size, self.feature_dim, self.position_dim]
        sizes += [self.pool_heads, *self.trunk_widths, *self.rgb_widths]
        counts = [self.local_width, *self.local_blocks]
        whole = all(isinstance(number, int) for number in sizes + counts)
        if not whole or min(sizes) < 1 or min(counts) < 0:
            raise ValueError(f"expected whole numbers of at least 1, got {self!r:.400}")
        heads, local = self.pool_heads if self.pooling == "attention" else 1, self.local_width > 0
        for wrong, requirement in (
            (not self.trunk_widths or not self.rgb_widths, "widths must not be empty"),
            (len(self.local_blocks) != 2, "local_blocks must be two numbers"),
            (self.image_size % self.patch_size, "image_size must be a multiple of patch_size"),
            (self.position_dim % 4, "position_dim must be divisible by 4"),
            (self.pooling not in POOLINGS, f"pooling must be one of {POOLINGS}"),
            (self.feature_dim % heads, "feature_dim must be a multiple of pool_heads"),
            (local and self.patch_size % 2, "patch_size must be even for local patches"),
            (local and self.local_width % 4, "local_width must be divisible by 4"),
        ):
            if wrong:
                raise ValueError(f"{requirement}, got {self!r:.400}")

    @property
    def grid_size(self) -> int:
        """Locations along one side of the grid."""
        return self.image_size // self.patch_size

    @property
    def column_dim(self) -> int:
        """Width of the trigger column: one entry a patch."""
        return self.grid_size**2

    @property
    def local_size(self) -> int:
        """Side in pixels of the neighbourhood that a location sees as its local patch."""
        fine, coarse = self.local_blocks
        return self.patch_size * (1 + fine + 2 * coarse) if self.local_width else 0

    @classmethod
    def coco(cls) -> "APMConfig":
        """The paper's dense model: DINOv2 ViT-L/14 features on COCO, 54.3 M parameters."""
        return cls(trunk_widths=(4096, 4096, 4096, 2048, 1024), feature_dim=1024)

    @classmethod
    def tta(cls, feature_dim: int = 768, pooling: str = "attention") -> "APMConfig":
        """The paper's test-time training model: one CLIP CLS token, 22.8 M parameters."""
        return cls(trunk_widths=(4096, 2048, 1024), feature_dim=feature_dim, pooling=pooling)

    @classmethod
    def small(cls, feature_dim: int = 192) -> "APMConfig":
        """The bundled checkpoint's model, with the local patch: 5.6 M parameters at width 384."""
        return cls(
            trunk_widths=(768, 512, 512),
            feature_dim=feature_dim,
            rgb_widths=(1280, 128),
            position_dim=256,
            local_width=192,
        )


def _flag(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides the weights, besides model and data; the defaults are the paper's."""

    epochs: int = _flag(12, "passes over the images")
    batch_size: int = _flag(64, "images a step, over all processes")
    learning_rate: float = _flag(1e-4, "peak learning rate of AdamW")
    fold_rate: float = _flag(1.0, "share of it for the fold and the RGB head's first layer, 0 to 1")
    weight_decay: float = _flag(0.0, "decoupled weight decay")
    schedule: str = _flag("constant", "of the learning rate", choices=("constant", "cosine"))
    warmup: int = _flag(0, "steps in which the learning rate rises")
    locations: int = _flag(1024, "random places a step, of the grid's 1024; fewer are faster")
    null_share: float = _flag(0.3, "share of a batch that is answered from the column alone")
    feature_loss: str = _flag(
        "mse",
        "how answers are compared with the teacher's features. mse: squared error, the paper's. "
        "standardised: channels of equal weight, and the angle besides. relational: also how alike "
        "the places of an image are to each other, which islands are made of",
        choices=FEATURE_LOSSES,
    )
    rgb_weight: float = _flag(1.0, "weight of the RGB loss beside the feature loss")
    augment: bool = _flag(False, "random crops, flips and parts of a patch, features alike")
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for names, low, high in (
            (("epochs", "batch_size", "locations"), 1, math.inf),
            (("learning_rate", "weight_decay", "warmup", "rgb_weight"), 0, math.inf),
            (("fold_rate", "null_share"), 0, 1),
        ):
            for name in names:
                if not low <= getattr(self, name) <= high:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} {getattr(self, name)}: must be in {low}..{high}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... of ``steps``, as a share of its peak."""
        rate = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        return rate
