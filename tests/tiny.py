"""Tiny random models, one for each kind of layer that adapters sit on, with inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

VOCAB = 60


@dataclass(frozen=True)
class Tiny:
    """A base model for tests.

    Args:
        name: Its name in test ids.
        targets: Modules to adapt.
        task_type: Its task.
    """

    name: str
    targets: tuple[str, ...]
    task_type: str | None

    def build(self, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
        """The model with the same random weights each time, in evaluation mode, dropout zero."""
        torch.manual_seed(0)
        model = _BUILDERS[self.name](changes)
        return model.to(dtype).eval()

    def inputs(self, rows: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.name == "t5":
            inputs["decoder_input_ids"] = ids.flip(1)
        return inputs


def _bert(changes):
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _gpt2(changes):
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **changes,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(changes):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _t5(changes):
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=2, eos_token_id=1,
        decoder_start_token_id=0, **changes,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class ConvBlock(GradientCheckpointingLayer):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return torch.tanh(self.conv(x))


class ConvNet(PreTrainedModel):
    """Convolutions of one, two and three dimensions over embedded tokens: dilated, strided, padded in several ways.

    Args:
        config: transformers' configuration.
        grouped: With groups.
    """

    config_class = PreTrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config, grouped=False):
        super().__init__(config)
        four, two = (4, 2) if grouped else (1, 1)
        self.embed = nn.Embedding(VOCAB, 8)
        self.line = ConvBlock(nn.Conv1d(8, 12, 3, padding="same", dilation=2, groups=four, padding_mode="circular"))
        self.plane = ConvBlock(nn.Conv2d(12, 16, (2, 3), padding=1, groups=two, padding_mode="reflect"))
        self.space = ConvBlock(nn.Conv3d(16, 24, (3, 2, 1), stride=(2, 1, 1), padding=(1, 1, 0), dilation=(1, 2, 1)))
        self.head = nn.Linear(24, 5)
        self.post_init()

    def _init_weights(self, module):
        """Leave torch's own start values."""

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        x = self.line(self.embed(input_ids).transpose(1, 2))
        x = self.plane(x.unflatten(2, (2, -1)))
        x = self.space(x[..., None])
        return SimpleNamespace(logits=self.head(x.flatten(2).mean(2)))


def _conv(changes):
    return ConvNet(PreTrainedConfig(**changes))


def _grouped(changes):
    return ConvNet(PreTrainedConfig(**changes), grouped=True)


_BUILDERS = {
    "bert": _bert, "bert-embedding": _bert, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "conv": _conv, "conv-groups": _grouped,
}  # fmt: skip

BERT = Tiny("bert", ("query", "value", "dense"), "SEQ_CLS")
BERT_EMBEDDING = Tiny("bert-embedding", ("word_embeddings", "query"), "SEQ_CLS")
GPT2 = Tiny("gpt2", ("c_attn", "c_proj"), "CAUSAL_LM")
LLAMA = Tiny("llama", ("q_proj", "v_proj", "down_proj"), "CAUSAL_LM")
CONV = Tiny("conv", ("line.conv", "plane.conv", "space.conv"), None)
GROUPED = Tiny("conv-groups", ("line.conv", "plane.conv"), None)
T5 = Tiny("t5", ("q", "v"), "SEQ_2_SEQ_LM")
