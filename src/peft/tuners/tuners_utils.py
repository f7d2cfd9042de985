"""Names that other libraries import from ``peft.tuners.tuners_utils``; the code lies in ``peft.core``."""

from ..core.holder import BaseTunerLayer
from ..core.injection import cast_adapter_dtype
from ..core.targets import match as _match
from ..core.tuner import BaseTuner


def check_target_module_exists(config: object, key: str) -> bool:
    """Whether a configuration's ``target_modules`` mean the module of this name."""
    targets = getattr(config, "target_modules", None)
    return targets is not None and _match(set(targets) if isinstance(targets, list) else targets, key) is not None


__all__ = ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "check_target_module_exists"]
