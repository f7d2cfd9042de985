"""The table of cases: which base model, which adapters, and what is asked of them. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FP32_TOLERANCE = 1e-5
# bfloat16 keeps 8 bits of mantissa: one rounding is 2**-9 = 0.2 %. Two layers of a dozen rounded products in another
# order stay within 3 % of the largest logit.
BF16_TOLERANCE = 3e-2
FP16_TOLERANCE = 4e-3  # three more bits


@dataclass(frozen=True)
class Base:
    """A tiny base model.

    Args:
        model: Class name in transformers, or, with ``config`` left out, in ``oracle_models.py``.
        config: Name of the config class in transformers.
        values: Arguments of the config, or of the plain class.
        inputs: Which inputs and labels the oracle makes: ``tokens``, ``classes``, ``tags``, ``spans``, ``next``,
            ``seq2seq`` or ``vectors``.
    """

    model: str
    config: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    inputs: str = "tokens"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a case. Another method needs rows only: ``Adapter({…}, method="IA3Config", centre=1.0)``.

    Args:
        values: Arguments of the config class, without the task type.
        name: Its name in the model.
        method: Config class, as named in ``peft``.
        noise: Standard deviation of the weights that the oracle puts in.
        centre: Their mean: 1 for methods that multiply.
    """

    values: dict[str, Any] = field(default_factory=dict)
    name: str = "default"
    method: str = "LoraConfig"
    noise: float = 0.2
    centre: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: Name in the test's id.
        base: Key of :data:`BASES`.
        adapters: The adapters; the first is made by ``get_peft_model``, the others by ``add_adapter``.
        task: ``task_type`` of every adapter.
        inject: Use ``inject_adapter_in_model`` on the raw model, and ``get``/``set_peft_model_state_dict``.
        dtype: Of the base model.
        wrap: Further arguments of ``get_peft_model``, ``from_pretrained`` and ``load_adapter``.
        new_tokens: Rows added to the vocabulary before wrapping.
        save: Further arguments of ``save_pretrained``.
        subfolder: Folder inside the adapter's folder to save into and to load from.
        together: Several adapters can be active at once.
        mixed: One adapter a row can be asked for.
        merge: Merging is compared.
        generate: Greedy generation is compared.
        steps: Number of steps of training that are compared.
        tolerance: For outputs and gradients, relative to the largest value, at least 1.
        more_here: Names of sections where this library does more than the peer on purpose; they are left out of the
            comparison.
    """

    name: str
    base: str
    adapters: tuple[Adapter, ...]
    task: str | None = None
    inject: bool = False
    dtype: str = "float32"
    wrap: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    save: dict[str, Any] = field(default_factory=dict)
    subfolder: str | None = None
    together: bool = False
    mixed: bool = False
    merge: bool = True
    generate: bool = False
    steps: int = 0
    tolerance: float = FP32_TOLERANCE
    more_here: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


_BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

BASES: dict[str, Base] = {
    "bert-classifier": Base("BertForSequenceClassification", "BertConfig", _BERT, "classes"),
    "bert-tagger": Base("BertForTokenClassification", "BertConfig", _BERT, "tags"),
    "bert-reader": Base("BertForQuestionAnswering", "BertConfig", {**_BERT, "num_labels": 2}, "spans"),
    "bert-encoder": Base("BertModel", "BertConfig", _BERT),
    "gpt2": Base("GPT2LMHeadModel", "GPT2Config", _GPT2, "next"),
    "gpt2-classifier": Base("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "num_labels": 3}, "classes"),
    "llama": Base("LlamaForCausalLM", "LlamaConfig", _LLAMA, "next"),
    "llama-tied": Base("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, "next"),
    "llama-classifier": Base("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 3}, "classes"),
    "t5": Base("T5ForConditionalGeneration", "T5Config", _T5, "seq2seq"),
    "mlp": Base("Perceptron", inputs="vectors"),
    "convs": Base("Convolutions", inputs="vectors"),
    "convs-groups": Base("GroupedConvolutions", inputs="vectors"),
}


def lora(name: str = "default", **values: Any) -> Adapter:
    """A LoRA adapter with these config values."""
    return Adapter(values, name)


def tokens(name: str = "default", **values: Any) -> Adapter:
    """An adapter that trains rows of the embedding."""
    return Adapter({"token_indices": [38, 17, 4, 50, 11, 19], **values}, name, method="TrainableTokensConfig")


def loha(name: str = "default", **values: Any) -> Adapter:
    """A LoHa adapter with these config values."""
    return Adapter(values, name, "LoHaConfig", noise=0.4)


def lokr(name: str = "default", **values: Any) -> Adapter:
    """A LoKr adapter with these config values."""
    return Adapter(values, name, "LoKrConfig", noise=0.4)


def ia3(name: str = "default", **values: Any) -> Adapter:
    """An IA³ adapter with these config values."""
    return Adapter(values, name, "IA3Config", noise=0.5, centre=1.0)


# The peer has a module, `token_adapter`, between an embedding and its trained rows.
NAMED_OTHERWISE = ("state", "loaded state", "layer status", "loaded layer status", "layer attributes")

# Virtual tokens stand inside the base model here and beside it in the peer, which tells no status of them, can neither go on training
# them nor take them out, and in whose state dict they have other names.
VIRTUAL = (
    "layer status", "model status", "layer attributes", "state", "initial values", "model unloaded", "unloaded", "loading to train",
    "loaded layer status", "loaded state",
)  # fmt: skip


# A change of a shared weight is one pair of factors here. In the peer it is two pairs of parameters that share memory: each gets a
# part of the gradient, and merging adds both. It also writes the modules that follow into the configuration.
TIED = (
    "wrapping", "counts", "printed", "initial values", "layer status", "model status", "layer attributes", "state",
    "flags after activating", "model unloaded", "unloaded", "config values", "loading to train", "loaded layer status", "loaded state",
    "gradients",
)  # fmt: skip


def virtual(name: str, method: str, base: str, task: str, more_here: tuple[str, ...] = (), **values: Any) -> Case:
    """A case with virtual tokens."""
    steps = values.pop("steps", 0)
    adapter = Adapter({"num_virtual_tokens": 5, **values}, method=method, noise=0.5)
    if not task.endswith("LM"):  # there the peer cannot switch virtual tokens off
        more_here += ("outputs without adapters",)
    if (
        method == "PromptEncoderConfig"
        or "prefix_projection" in values
        or (task == "TOKEN_CLS" and "Prefix" not in method)
    ):
        more_here += ("loaded gradients",)  # which the peer does not train once loaded, or not with labels
    return Case(name, base, (adapter,), task, merge=False, steps=steps, more_here=(*VIRTUAL, *more_here))


# The peer's frozen parameters are buffers here, and it cannot train a loaded adapter of these kinds.
FROZEN = ("counts", "printed", "flags after activating", "loaded gradients")

# An instruction and two examples for CPT.
CONTEXT = {
    "cpt_token_ids": [7, 12, 31, 40, 8, 55, 31, 23, 40],
    "cpt_tokens_type_mask": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "cpt_mask": [1] * 9,
    "opt_projection_epsilon": 9.0,
    "opt_projection_format_epsilon": 5.0,
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
}

CASES: tuple[Case, ...] = (
    # BERT: every task that has a model class of its own, and a base without a task.
    Case("bert-classifier", "bert-classifier", (lora(),), "SEQ_CLS"),
    Case("bert-classifier-own-head", "bert-classifier", (lora(modules_to_save=["classifier"]),), "SEQ_CLS"),
    Case("bert-tagger", "bert-tagger", (lora(r=4, lora_alpha=16),), "TOKEN_CLS"),
    Case("bert-reader", "bert-reader", (lora(target_modules=["query", "key", "value"]),), "QUESTION_ANS"),
    Case("bert-encoder", "bert-encoder", (lora(target_modules=["query", "value"]),), "FEATURE_EXTRACTION"),
    Case("bert-no-task", "bert-classifier", (lora(target_modules=["query"], modules_to_save=["classifier"]),)),
    # Where the adapters go.
    Case(
        "bert-layers-and-pattern",
        "bert-encoder",
        (lora(target_modules=["query", "value"], layers_to_transform=[1], layers_pattern="layer"),),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "bert-one-layer",
        "bert-encoder",
        (lora(target_modules=["query", "output.dense"], layers_to_transform=0),),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "bert-exclude",
        "bert-encoder",
        (lora(target_modules=["query", "dense"], exclude_modules=["pooler.dense", "intermediate.dense"]),),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "bert-exclude-regex",
        "bert-encoder",
        (lora(target_modules=["query", "dense"], exclude_modules=r".*layer\.0\..*"),),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "bert-regex",
        "bert-encoder",
        (lora(target_modules=r".*layer\.[01]\.attention\.self\.(query|key)"),),
        "FEATURE_EXTRACTION",
    ),
    Case("bert-all-linear", "bert-classifier", (lora(target_modules="all-linear"),), "SEQ_CLS"),
    Case(
        "bert-embedding",
        "bert-classifier",
        (lora(target_modules=["word_embeddings", "query"]),),
        "SEQ_CLS",
    ),
    Case("bert-embeddings-only", "bert-encoder", (lora(target_modules=["position_embeddings"]),), "FEATURE_EXTRACTION"),
    # What they are.
    Case(
        "bert-patterns",
        "bert-classifier",
        (
            lora(
                target_modules=["query", "value", "dense"],
                rank_pattern={"query": 4, r".*layer\.1\.output\.dense": 2},
                alpha_pattern={"layer.0.attention.self.value": 32, "query": 3},
            ),
        ),
        "SEQ_CLS",
    ),
    Case(
        "bert-rslora",
        "bert-encoder",
        (lora(r=4, lora_alpha=16, use_rslora=True, target_modules=["query"], rank_pattern={"layer.1": 2}),),
        "FEATURE_EXTRACTION",
    ),
    Case("bert-rank-one", "bert-encoder", (lora(r=1, lora_alpha=3, target_modules=["dense"]),), "FEATURE_EXTRACTION"),
    # The peer's file holds the head's bias three times over, as the adapter's, as the wrapper's and as the base model's.
    Case(
        "bert-bias-all",
        "bert-classifier",
        (lora(bias="all"),),
        "SEQ_CLS",
        more_here=("adapter states", "file keys"),
    ),
    Case("bert-bias-lora-only", "bert-classifier", (lora(bias="lora_only"),), "SEQ_CLS"),
    Case(
        "bert-gaussian",
        "bert-classifier",
        (lora(init_lora_weights="gaussian", target_modules=["query", "dense", "word_embeddings"]),),
        "SEQ_CLS",
    ),
    Case("bert-random-start", "bert-classifier", (lora(init_lora_weights=False),), "SEQ_CLS"),
    Case("bert-dropout", "bert-classifier", (lora(lora_dropout=0.3),), "SEQ_CLS"),
    Case("bert-inference-mode", "bert-classifier", (lora(inference_mode=True),), "SEQ_CLS"),
    # DoRA. Active together, each of ours acts on the weight that the earlier ones made, as merging does; the peer's norms are
    # those of the base weight.
    Case("bert-dora", "bert-classifier", (lora(use_dora=True, target_modules=["query", "dense"]),), "SEQ_CLS"),
    Case(
        "bert-embedding-dora",
        "bert-encoder",
        (lora(use_dora=True, target_modules=["word_embeddings", "query"]),),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "bert-dora-and-plain",
        "bert-encoder",
        (
            lora(use_dora=True, target_modules=["query", "value"]),
            lora("plain", r=4, target_modules=["value", "dense"]),
        ),
        "FEATURE_EXTRACTION",
    ),
    Case(
        "gpt2-dora",
        "gpt2",
        (lora(use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),),
        "CAUSAL_LM",
        generate=True,
    ),
    Case(
        "llama-dora",
        "llama",
        (lora(use_dora=True, target_modules="all-linear", use_rslora=True, rank_pattern={"v_proj": 3}),),
        "CAUSAL_LM",
        generate=True,
    ),
    Case(
        "llama-dora-bfloat16",
        "llama",
        (lora(use_dora=True),),
        "CAUSAL_LM",
        dtype="bfloat16",
        tolerance=BF16_TOLERANCE,
    ),
    Case("llama-dora-meta", "llama", (lora(use_dora=True),), "CAUSAL_LM", wrap={"low_cpu_mem_usage": True}),
    Case("t5-dora", "t5", (lora(use_dora=True, target_modules=["q", "v", "wo"]),), "SEQ_2_SEQ_LM"),
    Case("mlp-dora-random-start", "mlp", (lora(use_dora=True, init_lora_weights=False, target_modules=["first"]),)),
    Case("inject-dora", "mlp", (lora(use_dora=True, target_modules=["first", "second"]),), inject=True),
    # A bias of B's.
    Case("bert-lora-bias", "bert-classifier", (lora(lora_bias=True, r=4, lora_alpha=12),), "SEQ_CLS"),
    Case("gpt2-lora-bias", "gpt2", (lora(lora_bias=True, fan_in_fan_out=True),), "CAUSAL_LM"),
    # T5 does not scale its attention: its logits are large, and rounding with them.
    Case("t5-lora-bias", "t5", (lora(lora_bias=True),), "SEQ_2_SEQ_LM", merge=False, tolerance=3e-5),
    # Several adapters, names, folders.
    Case("bert-other-name", "bert-classifier", (lora("my-adapter_2"),), "SEQ_CLS"),
    Case("bert-subfolder", "bert-classifier", (lora(),), "SEQ_CLS", subfolder="inner/folder"),
    Case(
        "bert-two-heads",
        "bert-classifier",
        (lora(), lora("second", r=4, target_modules=["key"])),
        "SEQ_CLS",
        mixed=True,
    ),
    Case(
        "bert-three-adapters",
        "bert-encoder",
        (
            lora("a", target_modules=["query", "value"]),
            lora("b", r=2, lora_alpha=7, target_modules=["value", "dense"]),
            lora("c", use_rslora=True, target_modules=["word_embeddings", "query"]),
        ),
        "FEATURE_EXTRACTION",
        together=True,
        mixed=True,
    ),
    Case(
        "bert-selected",
        "bert-encoder",
        (lora(target_modules=["query"]), lora("kept", target_modules=["key"])),
        "FEATURE_EXTRACTION",
        save={"selected_adapters": ["kept"]},
        together=True,
    ),
    # GPT-2: Conv1D keeps its weight transposed.
    Case("gpt2", "gpt2", (lora(fan_in_fan_out=True),), "CAUSAL_LM", generate=True),
    Case("gpt2-fan-not-said", "gpt2", (lora(),), "CAUSAL_LM"),
    Case(
        "gpt2-all",
        "gpt2",
        (
            lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, rank_pattern={"mlp.c_proj": 3}),
            lora("second", target_modules=["c_attn"], fan_in_fan_out=True),
        ),
        "CAUSAL_LM",
        together=True,
        mixed=True,
        generate=True,
    ),
    Case("gpt2-classifier", "gpt2-classifier", (lora(fan_in_fan_out=True, bias="all"),), "SEQ_CLS"),
    Case("gpt2-all-linear", "gpt2", (lora(target_modules="all-linear", fan_in_fan_out=True),), "CAUSAL_LM"),
    # Llama: grouped queries, no biases, an untied head.
    Case("llama", "llama", (lora(),), "CAUSAL_LM", generate=True),
    Case("llama-all-linear", "llama", (lora(target_modules="all-linear"),), "CAUSAL_LM", generate=True),
    Case(
        "llama-extra-modules",
        "llama",
        (lora(target_modules="all-linear", modules_to_save=["lm_head", "embed_tokens"]),),
        "CAUSAL_LM",
        generate=True,
    ),
    Case(
        "llama-norms-trained",
        "llama",
        (lora(modules_to_save=["input_layernorm"]), lora("second", target_modules=["o_proj"])),
        "CAUSAL_LM",
    ),
    # A bare "norm" reaches every module whose name ends so, "input_layernorm" included.
    Case("llama-every-norm-trained", "llama", (lora(modules_to_save=["norm"]),), "CAUSAL_LM"),
    Case(
        "llama-head-and-embedding",
        "llama",
        (lora(target_modules=["lm_head", "embed_tokens", "down_proj"]),),
        "CAUSAL_LM",
        save={"save_embedding_layers": False},
    ),
    Case("llama-embedding-auto", "llama", (lora(target_modules=["embed_tokens", "q_proj"]),), "CAUSAL_LM"),
    Case(
        "llama-patterns",
        "llama",
        (
            lora(
                target_modules=["q_proj", "k_proj", "up_proj"],
                rank_pattern={"layers.0.self_attn.q_proj": 3, "^model.layers.1.mlp.up_proj": 5},
                alpha_pattern={"k_proj": 2},
            ),
        ),
        "CAUSAL_LM",
    ),
    Case(
        "llama-two-adapters",
        "llama",
        (lora(), lora("second", r=4)),
        "CAUSAL_LM",
        together=True,
        mixed=True,
        generate=True,
    ),
    Case("llama-classifier", "llama-classifier", (lora(),), "SEQ_CLS"),
    Case("llama-tied", "llama-tied", (lora(),), "CAUSAL_LM"),
    Case("llama-tied-embedding-saved", "llama-tied", (lora(modules_to_save=["embed_tokens"]),), "CAUSAL_LM"),
    Case(
        "llama-tied-embedding-adapted",
        "llama-tied",
        (lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),),
        "CAUSAL_LM",
        generate=True,
        merge=False,
        more_here=TIED,
    ),
    Case(
        "llama-tied-both-saved",
        "llama-tied",
        (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),),
        "CAUSAL_LM",
        more_here=("config values",),
    ),
    Case(
        "llama-bfloat16",
        "llama",
        (lora(target_modules="all-linear"),),
        "CAUSAL_LM",
        dtype="bfloat16",
        tolerance=BF16_TOLERANCE,
    ),
    Case(
        "llama-bfloat16-adapter-too",
        "llama",
        (lora(modules_to_save=["lm_head"]),),
        "CAUSAL_LM",
        dtype="bfloat16",
        wrap={"autocast_adapter_dtype": False},
        tolerance=BF16_TOLERANCE,
    ),
    Case(
        "llama-float16",
        "llama",
        (lora(target_modules="all-linear"),),
        "CAUSAL_LM",
        dtype="float16",
        tolerance=FP16_TOLERANCE,
    ),
    Case("bert-bfloat16", "bert-classifier", (lora(),), "SEQ_CLS", dtype="bfloat16", tolerance=BF16_TOLERANCE),
    Case(
        "llama-meta",
        "llama",
        (lora(), lora("second", r=4)),
        "CAUSAL_LM",
        wrap={"low_cpu_mem_usage": True},
        together=True,
    ),
    Case("llama-more-tokens", "llama", (lora(),), "CAUSAL_LM", new_tokens=5),
    Case(
        "llama-more-tokens-told",
        "llama",
        (lora(),),
        "CAUSAL_LM",
        new_tokens=5,
        save={"save_embedding_layers": True},
    ),
    Case("llama-embeddings-told", "llama", (lora(),), "CAUSAL_LM", save={"save_embedding_layers": True}),
    # T5: encoder and decoder.
    Case("t5", "t5", (lora(),), "SEQ_2_SEQ_LM", generate=True),
    Case("t5-all-linear", "t5", (lora(target_modules="all-linear"),), "SEQ_2_SEQ_LM"),
    Case(
        "t5-head-saved",
        "t5",
        (lora(target_modules=["q", "v", "wi", "wo"], modules_to_save=["lm_head"]),),
        "SEQ_2_SEQ_LM",
    ),
    Case(
        "t5-two-adapters",
        "t5",
        (lora(target_modules=["q"]), lora("second", target_modules=["k", "wo"])),
        "SEQ_2_SEQ_LM",
        together=True,
        mixed=True,
        generate=True,
    ),
    # Modules that transformers does not know.
    Case("mlp", "mlp", (lora(target_modules=["first", "second"]),)),
    Case(
        "mlp-two-adapters",
        "mlp",
        (
            lora("one", target_modules=["first"], modules_to_save=["head"]),
            lora("two", target_modules=["second", "first"], r=3, modules_to_save=["head"]),
        ),
        mixed=True,
    ),
    Case("mlp-all-linear", "mlp", (lora(target_modules="all-linear"),)),
    Case("mlp-regex", "mlp", (lora(target_modules="first|second", bias="lora_only"),)),
    Case("convs", "convs", (lora(target_modules=["line", "plane", "space"]),)),
    Case(
        "convs-two-adapters",
        "convs",
        (lora(target_modules=["line", "space"], r=4), lora("two", target_modules=["space", "plane"], use_rslora=True)),
        together=True,
        mixed=True,
    ),
    Case(
        "convs-gaussian",
        "convs",
        (lora(target_modules=["line", "head"], init_lora_weights="gaussian", rank_pattern={"head": 3}),),
    ),
    Case("convs-dora", "convs", (lora(target_modules=["line", "plane", "space"], use_dora=True),)),
    Case("convs-loha", "convs", (loha(target_modules=["line", "plane", "head"], r=3),)),
    Case(
        "convs-loha-effective",
        "convs",
        (loha(target_modules=["line", "plane"], r=3, use_effective_conv2d=True),),
        more_here=("gradients",),  # the peer's of w1_a and w2_a are not those of its own outputs
    ),
    Case("convs-lokr", "convs", (lokr(target_modules=["line", "plane", "head"], r=2),)),
    Case(
        "convs-lokr-effective",
        "convs",
        (lokr(target_modules=["line", "plane"], r=2, use_effective_conv2d=True),),
    ),
    Case(
        "convs-ia3", "convs", (ia3(target_modules=["plane", "space", "head"], feedforward_modules=["plane", "head"]),)
    ),
    Case("convs-groups", "convs-groups", (lora(target_modules=["line", "plane", "space"]),), merge=False),
    Case("inject-convs", "convs", (lora(target_modules=["line", "plane"]),), inject=True),
    # Copies of a layer share its weight: merging into it is refused here, and the peer's is off. unload() gives the model its
    # own depth back here.
    Case(
        "llama-replicated",
        "llama",
        (lora(layer_replication=[[0, 2], [0, 1]]),),
        "CAUSAL_LM",
        merge=False,
        more_here=("model unloaded", "unloaded"),
    ),
    # Trained rows.
    *(
        Case(
            f"{base}-tokens",
            base,
            (lora(trainable_token_indices=[38, 17, 4, 50, 11, 19]),),
            "CAUSAL_LM",
            generate=True,
            more_here=NAMED_OTHERWISE,
        )
        for base in ("llama", "llama-tied", "gpt2")
    ),
    Case("llama-only-tokens", "llama", (tokens(),), "CAUSAL_LM", more_here=NAMED_OTHERWISE),
    # Prefixes and virtual tokens.
    *(
        virtual(f"{method}-{base}", config, base, task, **values)
        for method, config, values in (
            ("prefix", "PrefixTuningConfig", {}),
            ("prompt", "PromptTuningConfig", {}),
            ("p-tuning", "PromptEncoderConfig", {"encoder_hidden_size": 7}),
        )
        for base, task in (
            ("bert-classifier", "SEQ_CLS"),
            ("bert-tagger", "TOKEN_CLS"),
            ("gpt2", "CAUSAL_LM"),
            ("llama", "CAUSAL_LM"),
            ("t5", "SEQ_2_SEQ_LM"),
        )
    ),
    # On an encoder-decoder the peer trains further tokens in the decoder, which its `generate` leaves out.
    *(
        virtual(f"multitask-{base}", "MultitaskPromptTuningConfig", base, task, num_tasks=3, num_ranks=2, steps=4)
        for base, task in (("bert-classifier", "SEQ_CLS"), ("llama", "CAUSAL_LM"))
    ),
    *(
        virtual(f"cartridge-{base}", "CartridgeConfig", base, task, FROZEN, num_frozen_tokens=2, steps=4)
        for base, task in (("bert-classifier", "SEQ_CLS"), ("llama", "CAUSAL_LM"))
    ),
    *(
        virtual(f"cpt-{base}", "CPTConfig", base, "CAUSAL_LM", FROZEN, num_virtual_tokens=9, steps=12, **CONTEXT)
        for base in ("gpt2", "llama")
    ),
    virtual("prefix-zero", "PrefixTuningConfig", "bert-classifier", "SEQ_CLS", init_weights="zero"),
    virtual(
        "prefix-projection", "PrefixTuningConfig", "gpt2", "CAUSAL_LM", prefix_projection=True, encoder_hidden_size=7
    ),
    virtual(
        "p-tuning-lstm",
        "PromptEncoderConfig",
        "bert-tagger",
        "TOKEN_CLS",
        encoder_hidden_size=7,
        encoder_reparameterization_type="LSTM",
    ),
    # LoHa.
    Case("loha-bert", "bert-classifier", (loha(),), "SEQ_CLS"),
    Case(
        "loha-llama-two",
        "llama",
        (
            loha(target_modules="all-linear", r=3, alpha=7, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4}),
            loha("second", r=4, target_modules=["v_proj"]),
        ),
        "CAUSAL_LM",
        generate=True,
    ),
    Case(
        "loha-together",
        "mlp",
        (loha(target_modules=["first"]), loha("b", r=2, target_modules=["first"])),
        together=True,
    ),
    Case("loha-random-start", "mlp", (loha(target_modules=["first", "second"], r=2, init_weights=False),)),
    Case("loha-t5", "t5", (loha(rank_dropout=0.2, module_dropout=0.1),), "SEQ_2_SEQ_LM", tolerance=3e-5),
    Case(
        "loha-bfloat16",
        "llama",
        (loha(r=2),),
        "CAUSAL_LM",
        dtype="bfloat16",
        tolerance=BF16_TOLERANCE,
    ),
    Case("inject-loha", "mlp", (loha(target_modules=["first", "second"]),), inject=True),
    # LoKr.
    Case("lokr-bert", "bert-classifier", (lokr(),), "SEQ_CLS"),
    Case(
        "lokr-llama-two",
        "llama",
        (
            lokr(target_modules="all-linear", r=2, alpha=7, decompose_factor=4, rank_pattern={"q_proj": 1}),
            lokr("second", r=1, decompose_both=True, target_modules=["v_proj"]),
        ),
        "CAUSAL_LM",
        together=True,
        generate=True,
    ),
    Case("lokr-lycoris-start", "bert-encoder", (lokr(r=2, init_weights="lycoris"),), "FEATURE_EXTRACTION"),
    Case("lokr-random-start", "mlp", (lokr(target_modules=["first", "second"], r=2, init_weights=False),)),
    Case("lokr-whole", "t5", (lokr(r=32, rank_dropout=0.2, rank_dropout_scale=True),), "SEQ_2_SEQ_LM"),
    Case(
        "lokr-bfloat16",
        "llama",
        (lokr(r=2),),
        "CAUSAL_LM",
        dtype="bfloat16",
        tolerance=BF16_TOLERANCE,
    ),
    Case("inject-lokr", "mlp", (lokr(target_modules=["first", "second"], r=2),), inject=True),
    # IA³.
    Case("ia3-bert", "bert-classifier", (ia3(),), "SEQ_CLS"),
    Case("ia3-gpt2", "gpt2", (ia3(fan_in_fan_out=True),), "CAUSAL_LM", generate=True),
    Case(
        "ia3-llama-two",
        "llama",
        (ia3(), ia3("second", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
        "CAUSAL_LM",
        together=True,
        generate=True,
    ),
    Case("ia3-t5", "t5", (ia3(modules_to_save=["lm_head"]),), "SEQ_2_SEQ_LM"),
    Case("ia3-outputs-only", "mlp", (ia3(target_modules=["first", "second"], feedforward_modules=[]),)),
    Case("ia3-random-start", "mlp", (ia3(target_modules=["first"], feedforward_modules=[], init_ia3_weights=False),)),
    Case("ia3-bfloat16", "llama", (ia3(),), "CAUSAL_LM", dtype="bfloat16", tolerance=BF16_TOLERANCE),
    Case(
        "inject-ia3",
        "mlp",
        (ia3(target_modules=["first", "second"], feedforward_modules=["second"]),),
        inject=True,
    ),
    # Injection into a raw model, as other libraries do it.
    Case("inject-mlp", "mlp", (lora(target_modules=["first", "second"]),), inject=True),
    Case("inject-bert", "bert-encoder", (lora(target_modules=["query", "word_embeddings"]),), inject=True),
    Case(
        "inject-llama",
        "llama",
        (lora(target_modules="all-linear"), lora("second", target_modules=["q_proj"])),
        inject=True,
        together=True,
    ),
    Case(
        "inject-bert-head",
        "bert-classifier",
        (lora(modules_to_save=["classifier"], target_modules=["query"]),),
        inject=True,
    ),
)


# Adapters whose start is read off the weights, saved as they are and as plain ones. Left out, because the peer cannot: patterns
# together with rsLoRA, a trained head (its converted file lacks it), OLoRA on Conv1D (its factors have the wrong shapes).
CONVERSIONS: tuple[Case, ...] = tuple(
    Case(f"{base}-{start}{label}", base, (lora(init_lora_weights=start, r=4, lora_alpha=6, **values),), task)
    for start in ("pissa", "olora")
    for label, base, task, values in (
        ("", "bert-encoder", "FEATURE_EXTRACTION", {"target_modules": ["query", "dense"]}),
        ("-rslora", "llama", "CAUSAL_LM", {"use_rslora": True}),
        ("-patterns", "llama", "CAUSAL_LM", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        ("", "gpt2", "CAUSAL_LM", {"fan_in_fan_out": True}),
    )
    if (start, base) != ("olora", "gpt2")
)


def pick(**wanted: bool) -> Iterator[Case]:
    """The cases that have (or have not) these truthy fields, and ``several`` for more than one adapter."""
    for case in CASES:
        have = {name: len(case.adapters) > 1 if name == "several" else bool(getattr(case, name)) for name in wanted}
        if have == wanted:
            yield case
