"""What can be chosen by name. Nothing slow is imported here, so that --help needs none of it."""

from typing import Any

FITS = ("crop", "stretch")  # how a photograph becomes a square
ORDERS = ("raster", "spiral", "random")  # in which places are asked
METHODS = ("tsne", "pca", "kmeans")  # of colouring islands
POOLINGS = (None, "attention", "mean")  # of locations' features to one
FEATURE_LOSSES = ("mse", "standardised", "relational")  # of apm.losses
DTYPES = ("float32", "bfloat16")  # of matrix products
STORE_DTYPES = ("int8", "float16")  # of features on disk
DEFAULT_TEACHER = "vit_large_patch14_reg4_dinov2.lvd142m"

# Name -> folder of its files below the root, torchvision's loader, and the split that accuracies
# are reported on.
TORCHVISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cifar10": ("cifar-10-batches-py", "CIFAR10", {"train": False}),
    "cifar100": ("cifar-100-python", "CIFAR100", {"train": False}),
    "flowers102": ("flowers-102", "Flowers102", {"split": "test"}),
    "dtd": ("dtd", "DTD", {"split": "test"}),
    "oxford_pets": ("oxford-iiit-pet", "OxfordIIITPet", {"split": "test"}),
    "caltech101": ("caltech101", "Caltech101", {}),
    "food101": ("food-101", "Food101", {"split": "test"}),
    "sun397": ("SUN397", "SUN397", {}),
    "fgvc_aircraft": ("fgvc-aircraft-2013b", "FGVCAircraft", {"split": "test"}),
    "eurosat": ("eurosat", "EuroSAT", {}),
}
DATASETS = (*TORCHVISION, "imagefolder", "cifar10c")

# Of ImageNet-C and CIFAR-10-C, in the published order.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
ALL = "all"
