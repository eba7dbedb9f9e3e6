"""The Asynchronous Perception Machine (Modi and Rawat, NeurIPS 2024)."""

from apm.checkpoint import load_model, save_model
from apm.model import APM, APMConfig

__all__ = ["APM", "APMConfig", "load_model", "save_model"]
