"""Names that other libraries import from ``peft.mapping_func``; the code lies in ``peft.mapping``."""

from .mapping import get_peft_model

__all__ = ["get_peft_model"]
