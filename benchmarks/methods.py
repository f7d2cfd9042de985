"""What is measured: the reference shapes and the table of methods. A new method is one row of `METHODS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import pretrained

FROZEN = "frozen model"
FULL = "full fine-tuning"
DROPOUT = ", dropout 0.1"


@dataclass(frozen=True)
class Shape:
    """A model without a head and the batch it is measured with.

    Attributes:
        name: How tables call it.
        architecture: `"bert"` or `"llama"`.
        sizes: Fields of the transformers config. The vocabulary is small, so that the layers set the ratios.
        batch: Rows of a batch.
        tokens: Tokens of a row.
        attention: The projections that the usual LoRA recipe adapts: query and value.
        package: Of a pretrained model: its name in `benchmarks.pretrained.PACKAGES`. Its own dropout is left as it is.
        new_tokens: How many a generation adds to each row; 0 for a single call.
    """

    name: str
    architecture: str
    sizes: dict[str, Any]
    batch: int
    tokens: int
    attention: tuple[str, ...]
    package: str = ""
    new_tokens: int = 0


BERT = Shape(
    "BERT-like 6×384, batch 8×128",
    "bert",
    {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    batch=8,
    tokens=128,
    attention=("query", "value"),
)
LLAMA = Shape(
    "Llama-like 8×576, batch 4×128",
    "llama",
    {
        "hidden_size": 576,
        "num_hidden_layers": 8,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    batch=4,
    tokens=128,
    attention=("q_proj", "v_proj"),
)
SHAPES = (BERT, LLAMA)

REAL = (
    Shape("MiniLM (pretrained), batch 8×128", "bert", {"hidden_size": 384}, 8, 128, ("query", "value"), "minilm"),
    Shape("SmolLM2-135M (pretrained), batch 2×128", "llama", {"hidden_size": 576}, 2, 128, LLAMA.attention, "smollm2"),
)

# Many small layers: what counts here is the work per module, not the arithmetic. 32 × 7 = 224 adapted modules.
DEEP = Shape(
    "Llama-like 32×256, 224 modules",
    "llama",
    {
        "hidden_size": 256,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
    },
    batch=1,
    tokens=16,
    attention=("q_proj", "v_proj"),
)
DEEP_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# How the cost grows: one long row of tokens, so that the length alone changes; and ranks at the usual length.
LENGTHS = (32, 128, 512, 1024)
RANKS = (4, 16, 64, 256)
LOADED = (4, 15, 30, 60)
LONG = tuple(replace(BERT, name=f"BERT-like 6×384, batch 1×{length}", batch=1, tokens=length) for length in LENGTHS)

# Mixed batches: 64 rows, each with an adapter of its own choice: a call with one token a row, one with 32 (prefill), and a generation.
MIXED = (
    *(
        replace(LLAMA, name=f"Llama-like 8×576, mixed batch {rows}×{tokens}", batch=rows, tokens=tokens)
        for rows, tokens in ((64, 1), (64, 32))
    ),
    replace(LLAMA, name="Llama-like 8×576, 16 tokens for 64 rows", batch=64, tokens=1, new_tokens=16),
)
MIXED_COUNTS = (4, 16, 64)


def build_model(shape: Shape) -> Any:
    """Builds a shape's model: with random weights and without dropout of its own, or the pretrained one.

    Args:
        shape: One of the shapes above.

    Returns:
        A transformers model, its weights set by torch's current seed.
    """
    import transformers

    if shape.package:
        folder = os.environ[pretrained.variable(shape.package)]
        return transformers.AutoModel.from_pretrained(folder, dtype="float32", use_cache=False)
    common: dict[str, Any] = {"vocab_size": 1024, "max_position_embeddings": 1024, "use_cache": False}
    if shape.architecture == "bert":
        dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**shape.sizes, **common, **dropout)
        return transformers.BertModel(config, add_pooling_layer=False)
    if shape.new_tokens:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape.sizes, **common | {"use_cache": True}))
    return transformers.LlamaModel(transformers.LlamaConfig(**shape.sizes, **common))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: How tables and `--only` call it.
        config: Makes its config. Called with the module `peft` (ours or the peer's: the API is one) and the shape.
        quick: Whether the quick form measures it too.
        ours_only: Whether the peer does not have it: it is compared with the bound alone then.
        variants: Whether it is measured in half precision and with gradient checkpointing too.
        inside: The name of a context in `peft.helpers` within which inference is measured.
    """

    name: str
    config: Callable[[Any, Shape], Any]
    quick: bool = False
    ours_only: bool = False
    variants: bool = False
    inside: str = ""


def _lora(all_linear: bool = False, **fields: Any) -> Callable[[Any, Shape], Any]:
    def config(peft: Any, shape: Shape) -> Any:
        targets = "all-linear" if all_linear else list(shape.attention)
        return peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": targets} | fields)

    return config


def _all_linear(config: str, **fields: Any) -> Callable[[Any, Shape], Any]:
    return lambda peft, shape: getattr(peft, config)(target_modules="all-linear", **fields)


def _ia3(peft: Any, shape: Shape) -> Any:
    # Keys, values and what enters the feed-forward network's second layer, as the paper has it.
    targets, feedforward = {
        "bert": (["key", "value", "output.dense"], ["output.dense"]),
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    }[shape.architecture]
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def _prompts(config: str, **fields: Any) -> Callable[[Any, Shape], Any]:
    common = {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}
    return lambda peft, shape: getattr(peft, config)(**common, **fields)


def _projected_prefix(peft: Any, shape: Shape) -> Any:
    width = shape.sizes["hidden_size"]
    return _prompts("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=width)(peft, shape)


def _bottleneck(placement: str, **options: Any) -> Callable[[Any, Shape], Any]:
    return lambda peft, shape: peft.BottleneckConfig(placement=placement, **options)


METHODS = (
    Method("LoRA r8", _lora(), quick=True),
    Method("LoRA r8" + DROPOUT, _lora(lora_dropout=0.1), quick=True),
    Method("LoRA r8 all-linear", _lora(all_linear=True), variants=True),
    Method("LoRA r8 all-linear" + DROPOUT, _lora(all_linear=True, lora_dropout=0.1), variants=True),
    Method("DoRA r8 all-linear", _lora(all_linear=True, use_dora=True), variants=True),
    Method("LoHa r8 all-linear", _all_linear("LoHaConfig", r=8, alpha=8), variants=True),
    Method("LoKr r8 all-linear", _all_linear("LoKrConfig", r=8, alpha=8), variants=True),
    Method("IA³", _ia3, variants=True),
    Method("Pfeiffer adapters 1/16", _bottleneck("pfeiffer"), ours_only=True),
    Method("Houlsby adapters 1/16", _bottleneck("houlsby"), ours_only=True),
    Method("Parallel adapters 1/16", _bottleneck("parallel", scaling=4.0), ours_only=True),
    Method("Compacter 1/16", _bottleneck("houlsby", phm_dim=4), ours_only=True),
    Method("prefix 20", _prompts("PrefixTuningConfig")),
    Method("prefix 20, projection", _projected_prefix),
    Method("P-tuning v2 20", _prompts("PTuningV2Config"), ours_only=True),
    Method("prompt 20", _prompts("PromptTuningConfig")),
    Method("P-tuning 20", _prompts("PromptEncoderConfig", encoder_hidden_size=128)),
)
INFERENCE = (
    Method("DoRA r8 all-linear, cached", _lora(all_linear=True, use_dora=True), ours_only=True, inside="DoraCaching"),
)
"""Rows of the mixed batches alone, measured when the method that their names begin with is."""
RANKED = tuple(Method(f"LoRA r{rank} all-linear", _lora(all_linear=True, r=rank)) for rank in RANKS)


def find(table: tuple[Any, ...], name: str) -> Any:
    """Finds a row of a table by its name.

    Args:
        table: Shapes or methods.
        name: The exact name.

    Returns:
        The row.

    Raises:
        KeyError: No row has that name.
    """
    for row in table:
        if row.name == name:
            return row
    raise KeyError(f"{name!r} is none of {[row.name for row in table]}")
