"""One row for each method: how its promises are tested. A new method adds a row here and gets every promise checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from toy import DiagScaleConfig


@dataclass(frozen=True)
class Setting:
    """A method with its options.

    Args:
        name: Its name in test ids.
        config: Makes its configuration from target modules and task type.
        bases: The tiny models that it is tested on.
        second: Options of a second adapter of another size, for tests with several.
        exempt: Promises that do not hold for this method, with the reason its docs give.
    """

    name: str
    config: Callable[..., Any]
    bases: tuple[tiny.Tiny, ...] = (
        tiny.BERT,
        tiny.BERT_EMBEDDING,
        tiny.GPT2,
        tiny.CONV,
        tiny.GROUPED,
        tiny.LLAMA,
        tiny.T5,
    )
    second: dict[str, Any] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)

    def make(self, base: tiny.Tiny, **options: Any) -> Any:
        """A configuration for a tiny model."""
        return self.config(target_modules=list(base.targets), task_type=base.task_type, **options)

    def model(self, base: tiny.Tiny, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """A fresh adapter on a tiny model."""
        return get_peft_model(base.build(dtype), self.make(base, **options)).eval()


SETTINGS = (
    Setting("lora", LoraConfig, second={"r": 4, "lora_alpha": 12}),
    Setting("rslora", lambda **kw: LoraConfig(use_rslora=True, r=6, **kw), bases=(tiny.LLAMA,)),
    Setting(
        "toy",
        lambda **kw: DiagScaleConfig(**{k: v for k, v in kw.items() if k != "task_type"}, task_type=kw["task_type"]),
    ),
)

CASES = [(setting, base) for setting in SETTINGS for base in setting.bases]
IDS = [f"{setting.name}-{base.name}" for setting, base in CASES]
ONE_EACH = [(setting, setting.bases[-2] if len(setting.bases) > 1 else setting.bases[0]) for setting in SETTINGS]
ONE_EACH_IDS = [f"{setting.name}-{base.name}" for setting, base in ONE_EACH]


def randomise(model: torch.nn.Module, adapter: str = "default", seed: int = 0, scale: float = 0.2) -> None:
    """Give an adapter random weights, so that it changes outputs."""
    generator = torch.Generator().manual_seed(seed + 17)
    with torch.no_grad():
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def logits(model: torch.nn.Module, base: tiny.Tiny, **kwargs: Any) -> torch.Tensor:
    """Outputs for the fixed inputs, without gradients."""
    with torch.no_grad():
        return model(**base.inputs(), **kwargs).logits
