"""Names that other libraries import from ``peft.utils.save_and_load``; the code lies in ``peft.core``."""

from ..core.checkpoints import get_peft_model_state_dict, set_peft_model_state_dict
from ..core.files import load_peft_weights

__all__ = ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
