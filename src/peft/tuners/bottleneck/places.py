"""Where bottleneck adapters sit in each model type when the user names no modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Places:
    """Regular expressions for the full names of modules of one model type.

    Attributes:
        attention: What ends the attention of a layer, before the residual sum.
        feedforward: What ends its feed-forward network, before the residual sum.
        whole: What gives the layer's output: the norm that closes it in models that normalise after the residual sum, the whole
            layer in models that normalise before it, where no module but the layer gives the sum.
        beside: The feed-forward network, or what ends it.
        inputs: For those ``beside`` that do not read their own input: expression, and template of the module that does.
    """

    attention: str
    feedforward: str
    whole: str
    beside: str
    inputs: Mapping[str, str] = field(default_factory=dict)

    def targets(self, placement: str) -> str:
        """The expression for a placement."""
        return {
            "houlsby": f"({self.attention})|({self.feedforward})",
            "pfeiffer": self.whole,
            "parallel": self.beside,
        }[placement]


_LAYER = r"(.*\.)?layers\.\d+"
_BERT = Places(
    attention=r".*\.attention\.output\.dense",
    feedforward=r".*\.\d+\.output\.dense",
    whole=r".*\.\d+\.output\.LayerNorm",
    beside=r".*\.\d+\.output\.dense",
    inputs={r"(.*\.\d+)\.output\.dense": r"\1.intermediate"},
)
_LLAMA = Places(
    attention=r".*\.self_attn\.o_proj",
    feedforward=r".*\.mlp\.down_proj",
    whole=_LAYER,
    beside=rf"{_LAYER}\.mlp",
)
_T5_FF = r"(encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)"
_BART = Places(
    attention=rf"{_LAYER}\.self_attn\.out_proj",
    feedforward=rf"{_LAYER}\.fc2",
    whole=rf"{_LAYER}\.final_layer_norm",
    beside=rf"{_LAYER}\.fc2",
    inputs={r"(.*)\.fc2": r"\1.fc1"},
)

PLACES: Mapping[str, Places] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta-v2"), _BERT),
    "distilbert": Places(
        attention=r".*\.attention\.out_lin",
        feedforward=r".*\.ffn\.lin2",
        whole=r".*\.layer\.\d+\.output_layer_norm",
        beside=r".*\.layer\.\d+\.ffn",
    ),
    "modernbert": Places(attention=r".*\.attn\.Wo", feedforward=r".*\.mlp\.Wo", whole=_LAYER, beside=rf"{_LAYER}\.mlp"),
    "gpt2": Places(
        attention=r".*h\.\d+\.attn\.c_proj",
        feedforward=r".*h\.\d+\.mlp\.c_proj",
        whole=r"(.*\.)?h\.\d+",
        beside=r"(.*\.)?h\.\d+\.mlp",
    ),
    "opt": Places(
        attention=rf"{_LAYER}\.self_attn\.out_proj",
        feedforward=rf"{_LAYER}\.fc2",
        whole=_LAYER,
        beside=rf"{_LAYER}\.fc2",
        inputs={r"(.*)\.fc2": r"\1.fc1"},
    ),
    "bloom": Places(
        attention=r".*\.self_attention\.dense",
        feedforward=r".*\.mlp\.dense_4h_to_h",
        whole=r"(.*\.)?h\.\d+",
        beside=r"(.*\.)?h\.\d+\.mlp",
    ),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3"), _LLAMA
    ),
    "phi": Places(
        attention=r".*\.self_attn\.dense", feedforward=r".*\.mlp\.fc2", whole=_LAYER, beside=rf"{_LAYER}\.mlp"
    ),
    **dict.fromkeys(
        ("t5", "mt5", "umt5"),
        Places(
            attention=r".*\.SelfAttention\.o",
            feedforward=r".*\.DenseReluDense\.wo",
            whole=_T5_FF,
            beside=rf"{_T5_FF}\.DenseReluDense",
        ),
    ),
    **dict.fromkeys(("bart", "mbart"), _BART),
    "vit": Places(
        attention=r".*\.attention\.(o_proj|output\.dense)",
        feedforward=r".*\.\d+\.(mlp\.fc2|output\.dense)",
        whole=r"(.*\.)?layers?\.\d+",
        beside=r"(.*\.)?layers\.\d+\.mlp",
    ),
}
"""The table, by ``config.model_type``."""
