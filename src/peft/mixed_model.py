"""Names that other libraries import from ``peft.mixed_model``; the code lies in ``peft.model``."""

from .model import PeftMixedModel

__all__ = ["PeftMixedModel"]
