"""What libraries that inject adapters themselves need (``peft.functional``)."""

from .core.activation import delete_adapter, set_adapter, set_requires_grad
from .core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from .core.injection import cast_adapter_dtype
from .mapping import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model", "set_adapter",
    "set_peft_model_state_dict", "set_requires_grad",
]  # fmt: skip
