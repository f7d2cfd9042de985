"""Names that other libraries import from ``peft.utils.peft_types``."""

from ..config import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
