"""One row for each method: how its promises are tested. A new method adds a row here and gets every promise checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import tiny
from peft import (
    BottleneckConfig,
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.core.checkpoints import training_tensors
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
        has_targets: Whether it adapts layers that its configuration names.
        wrong: Options that no model can honour.
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
    has_targets: bool = True
    wrong: tuple[dict[str, Any], ...] = ({"target_modules": ["nothing"]}, {"target_modules": ["model"]})

    def make(self, base: tiny.Tiny, **options: Any) -> Any:
        """A configuration for a tiny model."""
        targets = {"target_modules": None if self.default_targets else list(base.targets)} if self.has_targets else {}
        return self.config(**{**targets, "task_type": base.task_type, **options})

    def model(self, base: tiny.Tiny, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """A fresh adapter on a tiny model."""
        return get_peft_model(base.build(dtype), self.make(base, **options)).eval()


def tokens(target_modules: list[str], **options: Any) -> TrainableTokensConfig:
    """Three tokens of the input embedding, whichever layers other methods adapt."""
    usual = [list(base.targets) for base in (tiny.GPT2, tiny.LLAMA, tiny.T5)]
    targets = None if target_modules in usual else target_modules
    return TrainableTokensConfig(**{"token_indices": [9, 4, 30], "target_modules": targets, **options})


def _prompts(
    name: str, config: Callable[..., Any], bases: tuple[tiny.Tiny, ...] | None = None, **options: Any
) -> Setting:
    """A method with virtual tokens: it has no target layers and nothing to merge, and changes outputs from the start."""
    return Setting(
        name,
        lambda **kw: config(**{"num_virtual_tokens": 5, **options, **kw}),
        bases=bases or (tiny.BERT, tiny.GPT2, tiny.LLAMA, tiny.T5),
        second={"num_virtual_tokens": 3},
        exempt={"fresh": "virtual tokens change what the model attends to"},
        has_targets=False,
        wrong=({"num_virtual_tokens": 0}, {"num_virtual_tokens": "5"}),
    )


def context(**options: Any) -> CPTConfig:
    """CPT on a context of one example, behind a token of an instruction, with bounds that let it matter."""
    ids = options.pop("cpt_token_ids", [3, 14, 15, 9, 26])
    kinds = [0, 1, 2, 3, 4][: len(ids)]
    bounds = {"opt_projection_epsilon": 20.0, "opt_projection_format_epsilon": 9.0}
    options = {"num_virtual_tokens": len(ids), **options, "cpt_token_ids": ids, "cpt_tokens_type_mask": kinds}
    return CPTConfig(**{**bounds, **options})


def ia3(**options: Any) -> IA3Config:
    """IA³ with the ends of feed-forward networks rescaled at their input."""
    inputs = [name for name in options["target_modules"] if name in ("dense", "c_proj", "down_proj")]
    return IA3Config(**{"feedforward_modules": inputs, **options})


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
    Setting("ia3", ia3, second={"feedforward_modules": []}),
    # Rank 8 goes through ΔW on these small layers, rank 3 through its factors.
    Setting("loha", LoHaConfig, second={"r": 3, "alpha": 12}),
    Setting(
        "lokr",
        lambda **kw: LoKrConfig(**{"r": 2, **kw}),
        second={"r": 1, "alpha": 3, "decompose_factor": 4, "decompose_both": True},
    ),
    Setting("lokr-whole", LoKrConfig, bases=(tiny.LLAMA,), second={"init_weights": "lycoris", "alpha": 3}),
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
    _prompts("prefix", PrefixTuningConfig),
    _prompts("prefix-projection", PrefixTuningConfig, bases=(tiny.BERT, tiny.LLAMA, tiny.T5), prefix_projection=True),
    _prompts("prompt", PromptTuningConfig),
    _prompts("p-tuning", PromptEncoderConfig, bases=(tiny.BERT, tiny.LLAMA, tiny.T5), encoder_hidden_size=7),
    _prompts("p-tuning-v2", PTuningV2Config, num_virtual_tokens=[5, 2]),
    _prompts(
        "p-tuning-v2-mlp",
        PTuningV2Config,
        bases=(tiny.LLAMA, tiny.T5),
        num_virtual_tokens=[3, 5],
        reparameterization="mlp",
    ),
    _prompts("multitask-prompt", MultitaskPromptTuningConfig, bases=(tiny.BERT, tiny.LLAMA, tiny.T5), num_ranks=2),
    _prompts("cartridge", CartridgeConfig, bases=(tiny.LLAMA, tiny.T5), num_frozen_tokens=2),
    replace(
        _prompts("cpt", context, bases=(tiny.GPT2, tiny.LLAMA)),
        config=context,
        second={"cpt_token_ids": [7, 21, 4]},
        wrong=({"cpt_token_ids": [5, 10_000]}, {"cpt_token_ids": [7], "num_virtual_tokens": 3}),
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
        for tensor in own_tensors(model, adapter).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def own_tensors(model: torch.nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What an adapter trains: the tensors of its file, or those that its file's are made of."""
    made_of = {k: t for k, t in training_tensors(model, adapter).items() if isinstance(t, torch.nn.Parameter)}
    in_file = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {**{k: t for k, t in in_file.items() if not (made_of and k == "prompt_embeddings")}, **made_of}


def equal(setting: Setting, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit; up to rounding with virtual tokens, which a decoder reads with the input or, where it keeps a cache, before."""
    return torch.equal(a, b) if setting.has_targets else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def logits(model: torch.nn.Module, base: tiny.Tiny, **kwargs: Any) -> torch.Tensor:
    """Outputs for the fixed inputs, without gradients."""
    with torch.no_grad():
        return outputs(model, base.inputs(), **kwargs)


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """Logits, those of virtual tokens left out."""
    found = model(**inputs, **kwargs).logits
    return found[:, -inputs["input_ids"].shape[1] :] if found.dim() == 3 else found
