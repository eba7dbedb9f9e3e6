"""Where the counts of multiply-adds differ from the paper's Table 4, in words."""

from typing import Any

from baselines import TABLE_4

PAPER_LOCATIONS = 512  # the paper's protocol asks for half of the grid


def explain(clip: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """A line per deviation from the paper."""
    measured = ", ".join(
        f"{name} {TABLE_4[name].gmacs_measured}" for name in ("Swin", "TPT", "CLIP", "APM")
    )
    return [
        f"fvcore alone counts {clip['fvcore alone']:.2f} GMACs for CLIP: it does not know "
        "aten::scaled_dot_product_attention, 2 n^2 d multiply-adds a layer; a handle adds them.",
        "fvcore also charges 5 operations per element of a layer norm and 1 of an average (norms); "
        "torch's counter, halved, has the products alone. Apart from the norms the two agree.",
        f"The paper's 10 GFLOPs for the student are trunk and feature head at {PAPER_LOCATIONS} "
        "locations, half of the grid, whatever the chunk size. Conv, pooling, RGB head and the "
        "backward pass are left out, in its total too.",
        f"At equal output, the feature grid, this project takes {dense['ours']:.2f} GMACs and the "
        f"released arithmetic {dense['released']:.2f}: {dense['saved (%)']:.0f} % less.",
        "The paper does not say what a TPT step is. One view and one prompt, forward and backward "
        "through the text tower, come nearest; TPT itself takes 64 views and a prompt per class.",
        f"The paper's measured column ({measured}) is 11 to 15 % above its ideal one, the one that "
        "is compared here. Counts are the same on every machine, only Figure 2's times are not.",
        "The paper adds CLIP ViT-B/16 to a student whose 768-wide features are those of ViT-L/14.",
    ]
