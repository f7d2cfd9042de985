"""A method defined outside the package: y = (1 + s) ⊙ W x. It is the proof that the engine does everything else."""

from dataclasses import dataclass

from peft.config import WeightConfig
from peft.core.layer import AdapterLayer
from peft.core.tuner import BaseTuner
from peft.registry import register_method


@dataclass
class DiagScaleConfig(WeightConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        self.peft_type = "DIAG_SCALE"
        super().__post_init__()


class DiagScaleLayer(AdapterLayer):
    parameter_slots = ("diag_scale",)
    delta_depends_on_weight = True
    adds_up = True  # ΔW = diag(s) W is linear in s

    def shapes(self, config, settings):
        return {"diag_scale": (self.out_features,)}

    def start(self, tensors, config, settings):
        tensors["diag_scale"].zero_()

    def delta(self, name, weight):
        return self.diag_scale[name][:, None] * weight


class DiagScaleModel(BaseTuner):
    layer_cls = DiagScaleLayer


register_method("DIAG_SCALE", config_cls=DiagScaleConfig, tuner_cls=DiagScaleModel)
