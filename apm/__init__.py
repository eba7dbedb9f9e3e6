"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apm.runtime.files import use_writable_caches

if TYPE_CHECKING:
    from apm.checkpoint import load_model, save_model
    from apm.config import APMConfig
    from apm.model import APM

__all__ = ["APM", "APMConfig", "load_model", "save_model"]

use_writable_caches()  # before libraries look for theirs


def __getattr__(name: str) -> Any:
    """One of ``__all__``, imported when it is asked for: --help does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"APM": "model", "APMConfig": "config"}.get(name, "checkpoint")
    return getattr(import_module(f"apm.{home}"), name)
