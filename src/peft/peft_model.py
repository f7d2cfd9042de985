"""Names that other libraries import from ``peft.peft_model``; the code lies in ``peft.model``."""

from .core.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .model import PeftModel
from .task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
    "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "TunerLayerStatus",
    "TunerModelStatus", "get_layer_status", "get_model_status",
]  # fmt: skip
