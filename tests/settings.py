"""One row for each method: how its promises are tested. A new method adds a row here and gets every promise checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import tiny
from peft import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
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
        default_targets: Whether it adapts the modules that it chooses itself, rather than those of the tiny model.
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
    default_targets: bool = False

    def make(self, base: tiny.Tiny, **options: Any) -> Any:
        """A configuration for a tiny model."""
        targets = None if self.default_targets else list(base.targets)
        return self.config(target_modules=targets, task_type=base.task_type, **options)

    def model(self, base: tiny.Tiny, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """A fresh adapter on a tiny model."""
        return get_peft_model(base.build(dtype), self.make(base, **options)).eval()


def tokens(target_modules: list[str], **options: Any) -> TrainableTokensConfig:
    """Three tokens of the input embedding, whichever layers other methods adapt."""
    usual = [list(base.targets) for base in (tiny.GPT2, tiny.LLAMA, tiny.T5)]
    targets = None if target_modules in usual else target_modules
    return TrainableTokensConfig(**{"token_indices": [9, 4, 30], "target_modules": targets, **options})


SETTINGS = (
    Setting("lora", LoraConfig, second={"r": 4, "lora_alpha": 12}),
    Setting(
        "dora",
        lambda **kw: LoraConfig(use_dora=True, **kw),
        bases=(tiny.BERT_EMBEDDING, tiny.GPT2, tiny.CONV, tiny.LLAMA, tiny.T5),
        second={"r": 4, "lora_alpha": 12},
    ),
    Setting("lora-bias", lambda **kw: LoraConfig(lora_bias=True, **kw), bases=(tiny.GPT2, tiny.BERT), second={"r": 4}),
    Setting(
        "pissa",
        lambda **kw: LoraConfig(**{"init_lora_weights": "pissa", **kw}),
        bases=(tiny.LLAMA,),
        second={"r": 4, "lora_alpha": 12},
        exempt={
            "bit-exact start": "the part that the adapter starts from is added and subtracted",
            "meta": "the start is read off the base weights",
        },
    ),
    Setting(
        "tokens",
        tokens,
        bases=(tiny.GPT2, tiny.LLAMA, tiny.T5),
        second={"token_indices": [5, 9]},
    ),
    Setting(
        "lora-tokens",
        lambda **kw: LoraConfig(**{"trainable_token_indices": [9, 4, 30], **kw}),
        bases=(tiny.GPT2, tiny.LLAMA),
        second={"trainable_token_indices": [5, 9]},
    ),
    Setting("rslora", lambda **kw: LoraConfig(use_rslora=True, r=6, **kw), bases=(tiny.LLAMA,)),
    Setting(
        "bottleneck",
        partial(BottleneckConfig, ln_before=True),
        bases=(tiny.BERT, tiny.BERT_EMBEDDING, tiny.GPT2, tiny.LLAMA, tiny.T5),
        second={"reduction_factor": 4, "use_gating": True},
    ),
    Setting(
        "houlsby",
        partial(BottleneckConfig, placement="houlsby", non_linearity="swish"),
        second={"bottleneck_dim": 5},
        bases=(tiny.BERT, tiny.LLAMA, tiny.T5),
        default_targets=True,
    ),
    Setting(
        "pfeiffer",
        BottleneckConfig,
        second={"reduction_factor": 4, "ln_after": True},
        bases=(tiny.BERT, tiny.T5, tiny.GPT2, tiny.LLAMA),
        default_targets=True,
    ),
    Setting(
        "parallel",
        partial(BottleneckConfig, placement="parallel"),
        second={"bottleneck_dim": 5, "scaling": "learned"},
        bases=(tiny.BERT, tiny.T5, tiny.LLAMA, tiny.GPT2),
        default_targets=True,
    ),
    Setting(
        "compacter",
        partial(BottleneckConfig, placement="houlsby", phm_dim=2),
        bases=(tiny.LLAMA, tiny.BERT),
        default_targets=True,
        second={"bottleneck_dim": 6, "phm_rank": None, "phm_shared": False},
    ),
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
