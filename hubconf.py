"""Models for ``torch.hub``.

``torch.hub.load("OWNER/REPO", "apm_small")``, or of a clone: ``torch.hub.load("PATH", "apm_small",
source="local")``.
"""

import pathlib

import apm

# By the names under which they are imported.
dependencies = ["filelock", "numpy", "PIL", "safetensors", "torch"]


def apm_small() -> apm.APM:
    """The bundled checkpoint's model, in eval mode; ``model.preprocessing`` goes before it."""
    folder = pathlib.Path(__file__).parent
    return apm.load_model(folder / "checkpoints" / "apm_small.safetensors")


def apm_released(checkpoint: str | pathlib.Path) -> apm.APM:
    """One of the paper's released checkpoints, or one of this project's, from a file."""
    return apm.load_model(checkpoint)
